"""One contestant of `benchmarks.calibration`, in a process of its own: ``python -m benchmarks.contestants JSON``.

Of what is imported, what a contestant does not need is not, as its peak memory is to be its own; and the interpreter
that has modelopt need not have this package's requirements.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class Images:
    """Preprocessed images that lie in files, read one at a time; a CalibrationDataReader too."""

    def __init__(self, folder: str, count: int, name: str) -> None:
        self.paths = [Path(folder) / f"{index}.npy" for index in range(count)]
        self.name = name
        self.rewind()

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.load(path)[None] for path in self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._rest, None)
        return None if image is None else {self.name: image}

    def get_first(self) -> dict[str, np.ndarray]:
        return {self.name: next(iter(self))}

    def rewind(self) -> None:
        self._rest = iter(self)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._rest = (np.load(path)[None] for path in self.paths[start_index:end_index])


def bare(job: dict[str, Any]) -> Callable[[], None]:
    """All images through the graph as it is, in a session with calibration's options, or ONNX Runtime's own."""
    from onnxruntime import InferenceSession

    from alignment.runners.onnxruntime import open_session

    images = Images(job["images"], job["count"], job["input"])

    def work() -> None:
        if job["option"]:
            session = InferenceSession(job["model"], providers=["CPUExecutionProvider"])
        else:
            session = open_session(Path(job["model"]), job["model"], spin=False)
        for image in images:
            session.run(None, {job["input"]: image})

    return work


def ours(job: dict[str, Any]) -> Callable[[], None]:
    """`calibrate`, and the range of every tensor; the QDQ graph is written where there is a place for it."""
    from alignment.data.samples import CALIBRATION_SPLIT, Sample, Samples, open_samples
    from alignment.quantize.calibrate import calibrate
    from alignment.quantize.recipe import apply
    from alignment.variant import load_variant

    model, variant = Path(job["model"]), load_variant(job["variant"])
    samples = open_samples(variant, limit=job["count"], split=CALIBRATION_SPLIT)
    paths = Images(job["images"], job["count"], job["input"]).paths
    files = {entry.id: path for entry, path in zip(samples.dataset.images, paths, strict=True)}

    class Ready(Samples):
        def load(self, entry: Any) -> Sample:
            return Sample(entry, np.load(files[entry.id]), None, "")  # type: ignore[arg-type]

    chosen = samples if job["option"].endswith("files") else Ready(variant, samples.dataset)
    method = job["option"].split()[0]

    def work() -> None:
        found = calibrate(model, chosen, Path(job["folder"]) / "calibration.npz")
        found.amax(method)
        if job["out"]:
            import onnx

            recipe = variant.quantization.model_copy(update={"method": method})
            onnx.save(apply(model, recipe, found).model, job["out"])

    return work


def onnxruntime(job: dict[str, Any]) -> Callable[[], None]:
    """quantize_static: symmetric, QDQ, weights per channel."""
    from onnxruntime import quantization as q

    images = Images(job["images"], job["count"], job["input"])

    def work() -> None:
        q.quantize_static(
            job["model"],
            job["out"] or str(Path(job["folder"]) / "static.onnx"),
            images,
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=q.CalibrationMethod[job["option"]],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )

    return work


def modelopt(job: dict[str, Any]) -> Callable[[], None]:
    """nvidia-modelopt's ONNX PTQ on the CPU."""
    from modelopt.onnx.quantization import quantize

    images = Images(job["images"], job["count"], job["input"])

    def work() -> None:
        quantize(
            job["model"],
            "int8",
            calibration_data_reader=images,
            calibration_method=job["option"],
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=job["out"] or str(Path(job["folder"]) / "modelopt.onnx"),
        )

    return work


def main() -> None:
    """Prints seconds, processor seconds, and the peak memory in MB, of the process and of its imports."""
    job = json.loads(sys.argv[1])
    work = {"bare": bare, "ours": ours, "onnxruntime": onnxruntime, "modelopt": modelopt}[job["kind"]](job)
    before, start, processor = _peak(), time.perf_counter(), time.process_time()
    work()
    found = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
    print("\n" + json.dumps({**found, "peak": _peak(), "imports": before}))


def _peak() -> float:
    """Linux's own figure: that of getrusage begins at what the parent of the process had."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
