"""From a float ONNX file and preprocessed images to a QDQ graph: ours and other tools."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases.images import images_of, model_of, scoring_samples, training_samples
from benchmarks.harness import Case, Contestant, Setting, Work

#: Images that the graphs are scored on.
SCORED = 64
_number = itertools.count()


def _file(setting: Setting, suffix: str) -> Path:
    """A file that no turn before has written."""
    return setting.folder / f"{next(_number)}.{suffix}"


def bare(spin: bool) -> Callable[[Setting], Work]:
    """All images through the graph as it is: in a session with calibration's options, or with ONNX Runtime's own, whose
    idle threads spin, which costs time where something else runs."""

    def prepare(setting: Setting) -> Work:
        from onnxruntime import InferenceSession

        from alignment.runners.onnxruntime import open_session

        model, images = model_of(setting), images_of(setting)

        def work() -> None:
            if spin:
                session = InferenceSession(str(model), providers=["CPUExecutionProvider"])
            else:
                session = open_session(model, model)
            for image in images:
                session.run(None, {images.name: image})

        return work

    return prepare


def ours(method: str, graph: bool = True, read: bool = False, every: bool = False) -> Callable[[Setting], Work]:
    """Statistics of the tensors that a policy may quantize, or of every one, and, with `graph`, the range of each and
    the QDQ graph; `read`: images from files as they are."""

    def prepare(setting: Setting) -> Work:
        import onnx

        from alignment.data.samples import Sample, Samples
        from alignment.quantize.calibrate import calibrate
        from alignment.quantize.placement import quantizable
        from alignment.quantize.recipe import apply

        model, samples = model_of(setting), training_samples(setting)
        variant, paths = samples.variant, images_of(setting).paths
        files = {entry.id: path for entry, path in zip(samples.dataset.images, paths, strict=True)}

        class Ready(Samples):
            def load(self, entry: Any) -> Sample:
                return Sample(entry, np.load(files[entry.id]), None)  # type: ignore[arg-type]

        chosen = samples if read else Ready(variant, samples.dataset)
        recipe = variant.quantization.model_copy(update={"method": method})

        def work() -> Path | None:
            wanted = None if every else quantizable(onnx.load(model))
            found = calibrate(model, chosen, _file(setting, "npz"), tensors=wanted)
            if not graph:
                return None
            path = _file(setting, "onnx")
            onnx.save(apply(model, recipe, found).model, path)
            return path

        return work

    return prepare


def quantize_static(method: str) -> Callable[[Setting], Work]:
    """ONNX Runtime's: symmetric, QDQ, weights per channel."""

    def prepare(setting: Setting) -> Work:
        from onnxruntime import quantization as q

        model, images = model_of(setting), images_of(setting)

        def work() -> Path:
            images.rewind()
            path = _file(setting, "onnx")
            q.quantize_static(
                str(model),
                str(path),
                images,
                quant_format=q.QuantFormat.QDQ,
                per_channel=True,
                activation_type=q.QuantType.QInt8,
                weight_type=q.QuantType.QInt8,
                calibrate_method=q.CalibrationMethod[method],
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
            )
            return path

        return work

    return prepare


def modelopt(method: str) -> Callable[[Setting], Work]:
    """nvidia-modelopt's ONNX PTQ on the CPU."""

    def prepare(setting: Setting) -> Work:
        with _as_it_was("onnxruntime.quantization"):
            from modelopt.onnx.quantization import quantize

        model, images = model_of(setting), images_of(setting)

        def work() -> Path:
            images.rewind()
            path = _file(setting, "onnx")
            with _as_it_was("onnxruntime.quantization"):
                quantize(
                    str(model),
                    "int8",
                    calibration_data_reader=images,
                    calibration_method=method,
                    calibration_eps=["cpu"],
                    high_precision_dtype="fp32",
                    output_path=str(path),
                )
            return path

        return work

    return prepare


@contextmanager
def _as_it_was(package: str) -> Iterator[None]:
    """Takes back what is patched in a package's modules and classes: modelopt changes ONNX Runtime's for good."""
    import onnxruntime.quantization  # noqa: F401

    modules = [module for name, module in sorted(sys.modules.items()) if f"{name}.".startswith(f"{package}.")]
    owners: set[Any] = {
        one for m in modules for one in vars(m).values() if isinstance(one, type) and one.__module__.startswith(package)
    }
    before = [(owner, dict(vars(owner))) for owner in (*modules, *owners)]
    try:
        yield
    finally:
        for owner, members in before:
            for name, value in members.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


def nncf(setting: Setting) -> Work:
    """NNCF's ONNX PTQ with its defaults, bias correction among them."""
    import onnx
    from nncf import Dataset, quantize

    model, images = model_of(setting), images_of(setting)

    def work() -> Path:
        path = _file(setting, "onnx")
        data = Dataset(list(images.paths), lambda file: {images.name: np.load(file)[None]})
        onnx.save(quantize(onnx.load(model), data, subset_size=len(images)), path)
        return path

    return work


def judge(setting: Setting, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """AP, and agreement with FP32, of every QDQ graph in ONNX Runtime, node by node."""
    from alignment.compare.coco_map import agreement_ap, coco_ap
    from alignment.models.outputs import detect
    from alignment.runners.onnxruntime import OnnxRuntimeRunner
    from benchmarks.cases.images import in_memory

    samples = in_memory(scoring_samples(setting, SCORED))
    with OnnxRuntimeRunner(model_of(setting)) as runner:
        reference = detect(samples, runner.run)
    scores = {"bare inference": {"AP": coco_ap(samples.dataset, reference)[0], "agreement": 1.0}}
    for name, path in results.items():
        if path is not None:
            with OnnxRuntimeRunner(path, optimize=False) as runner:
                found = detect(samples, runner.run)
            agreement = agreement_ap(samples.dataset, reference, found)
            scores[name] = {"AP": coco_ap(samples.dataset, found)[0], "agreement": agreement}
    return {name: found for name, found in scores.items() if name in results}


_ORT = ("onnxruntime",)
CASE = Case(
    name="calibration",
    title="A QDQ graph of a float one, calibrated on preprocessed images; AP and agreement with FP32 of what came out "
    f"are those of ONNX Runtime, node by node, on {SCORED} other images",
    axis="images",
    sizes=(8, 16, 32),
    variant="yolov8_embedded",
    repeat=3,
    contestants=(
        Contestant("ours, mse", "ours", ours("mse")),
        Contestant("ours, histogram", "ours", ours("histogram")),
        Contestant("ours, entropy", "ours", ours("entropy")),
        Contestant("ours, mse, every tensor", "ours", ours("mse", every=True)),
        Contestant("ours, statistics of all methods alone", "ours", ours("", graph=False)),
        Contestant("ours, statistics of every tensor alone", "ours", ours("", graph=False, every=True)),
        Contestant("ours, mse, reading and preprocessing too", "ours", ours("mse", read=True)),
        Contestant("quantize_static, MinMax", "peer", quantize_static("MinMax"), _ORT),
        Contestant("quantize_static, Entropy", "peer", quantize_static("Entropy"), _ORT),
        Contestant("quantize_static, Percentile", "peer", quantize_static("Percentile"), _ORT),
        Contestant("modelopt, max", "peer", modelopt("max"), ("nvidia-modelopt",)),
        Contestant("modelopt, entropy", "peer", modelopt("entropy"), ("nvidia-modelopt",)),
        Contestant("NNCF", "peer", nncf, ("nncf",)),
        Contestant("bare inference", "floor", bare(spin=False), _ORT),
        Contestant("bare inference, threads that spin", "floor", bare(spin=True), _ORT),
    ),
    judge=judge,
)
