"""Records what INMSLayer, TensorRT's NonMaxSuppression, says about every scene, on this machine's GPU.

python conformance/record_nms_layer.py golden/nms_layer [PART PARTS]

With PART (from 0) only every PARTS-th scene, into files of its own: what is in one folder belongs together.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from nms_scenes import Scene, digest, image_of, layer_scenes, to_layer_onnx

from alignment.engine.build import BuildOptions
from alignment.engine.capabilities import Capabilities, gpu
from alignment.errors import AlignError
from alignment.runners.tensorrt import TensorRTRunner
from alignment.storage import writing

RUNS = 3


def selected(scene: Scene, folder: Path, runs: int = 1) -> list[np.ndarray]:
    """Rows ``[K, 3] int32`` of image, class and box of each run, in the layer's own order.

    Raises:
        AlignError: TensorRT cannot build or run it.
    """
    path = folder / "nms.onnx"
    onnx.save(to_layer_onnx(scene), path)
    precision = "fp16" if scene.boxes.dtype == np.float16 else "fp32"
    batch = len(scene.boxes)
    with TensorRTRunner(
        path, BuildOptions(precision=precision, min_batch=batch, opt_batch=batch, max_batch=batch)
    ) as runner:
        return [runner.run(image_of(scene))["selected"].astype(np.int32) for _ in range(runs)]


def main(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Writes ``<TensorRT version>.npz`` and ``.json`` anew after each scene: a crash in TensorRT costs no other."""
    version = Capabilities.current().version
    stem = folder / (version if parts == 1 else f"{version}-{part}of{parts}")
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, dict] = {}
    for name, scene in list(layer_scenes().items())[part::parts]:
        about[name] = {"digest": digest(scene)}
        try:
            with tempfile.TemporaryDirectory() as work:
                first, *others = selected(scene, Path(work), RUNS)
        except AlignError as error:
            about[name]["error"] = str(error)
        else:
            arrays[name] = first
            about[name] |= {"stable": all(np.array_equal(first, other) for other in others), "count": len(first)}
        print(name, {key: value for key, value in about[name].items() if key != "digest"}, flush=True)
        with writing(stem.with_name(f"{stem.name}.npz")) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        with writing(stem.with_name(f"{stem.name}.json")) as temporary:
            told = {"tensorrt": version, "gpu": gpu().name, "scenes": about}
            temporary.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
