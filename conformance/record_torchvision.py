"""Records what torchvision's NMS, on the CPU, says about every scene.

python conformance/record_torchvision.py golden/torchvision_nms

Any Python with torchvision and NumPy will do, such as Debian's own with python3-torchvision: torchvision's wheels want
a torch with CUDA.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from nms_scenes import Scene, digest, torchvision_scenes


def kept(scene: Scene) -> np.ndarray:
    """Rows ``[K, 2] int32`` of class and box that torchvision keeps of the first image, in its own order."""
    import torch
    from torchvision.ops import batched_nms

    passed = torch.from_numpy(scene.scores[0]) > scene.settings["score_threshold"]
    rows, labels = passed.nonzero(as_tuple=True)
    boxes, scores = torch.from_numpy(scene.boxes[0])[rows], torch.from_numpy(scene.scores[0])[passed]
    found = batched_nms(boxes, scores, labels, scene.settings["iou_threshold"])[: scene.settings["max_output_boxes"]]
    return torch.stack([labels[found], rows[found]], 1).numpy().astype(np.int32)


def main(folder: Path) -> None:
    """Writes ``<torchvision version>.npz`` and ``.json``."""
    import torch
    import torchvision

    scenes = torchvision_scenes()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / torchvision.__version__
    np.savez_compressed(f"{stem}.npz", **{name: kept(scene) for name, scene in scenes.items()})
    told = {
        "torchvision": torchvision.__version__,
        "torch": torch.__version__,
        "scenes": {name: digest(scene) for name, scene in scenes.items()},
    }
    Path(f"{stem}.json").write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
