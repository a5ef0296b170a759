"""Records what EfficientNMS_TRT says about every scene, on this machine's GPU.

python conformance/record_efficient_nms.py golden/efficient_nms
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from nms_scenes import digest, scenes, to_onnx

from alignment.engine.build import BuildOptions
from alignment.engine.capabilities import Capabilities, gpu
from alignment.engine.execute import execute
from alignment.errors import AlignError
from alignment.storage import writing

RUNS = 3


def main(folder: Path) -> None:
    """Writes ``<TensorRT version>.npz``: real detections only, those of each image one after another."""
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as work:
        for index, (name, scene) in enumerate(scenes().items()):
            path = Path(work) / f"{index}.onnx"
            onnx.save(to_onnx(scene), path)
            precision = "fp16" if scene.boxes.dtype == np.float16 else "fp32"
            try:
                runs = execute(
                    path, BuildOptions(precision=precision), {"boxes": scene.boxes, "scores": scene.scores}, RUNS
                )
            except AlignError as error:
                about[name] = {"digest": digest(scene), "error": str(error)}
                print(name, error, flush=True)
                continue
            first, *others = runs
            same = all(all(np.array_equal(first[k], o[k], equal_nan=True) for k in first) for o in others)
            counts = first["num_dets"][:, 0]
            about[name] = {"digest": digest(scene), "stable": same, "counts": counts.tolist()}
            for key in ("det_boxes", "det_scores", "det_labels"):
                arrays[f"{name}/{key}"] = np.concatenate([a[:c] for a, c in zip(first[key], counts, strict=True)])
                padding = [a[c:] for a, c in zip(first[key], counts, strict=True)]
                about[name][f"{key}_padding"] = sorted({float(v) for p in padding for v in np.unique(p)})[:4]
            print(name, counts.tolist(), "stable" if same else "NOT STABLE", flush=True)
    version = Capabilities.current().version
    about_all = {"tensorrt": version, "gpu": gpu().name, "scenes": about}
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / f"{version}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    with writing(folder / f"{version}.json") as temporary:
        temporary.write_text(json.dumps(about_all, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
