"""Images from files to detections, beside bare inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases.images import scoring_samples
from benchmarks.harness import Case, Contestant, Setting, Work


def _runner(setting: Setting, backend: Any) -> Any:
    from alignment.case import Case as Alignable
    from alignment.runners.open import open_runner
    from alignment.variant import load_variant

    variant = load_variant(setting.variant)
    return open_runner(variant, Alignable(variant.name, backend, "fp32"))


def ours(backend: str) -> Callable[[Setting], Work]:
    """Read, preprocess, run, decode, NMS."""

    def prepare(setting: Setting) -> Work:
        from alignment.models.outputs import detect

        runner, samples = _runner(setting, backend), scoring_samples(setting)
        return lambda: detect(samples, runner.run)

    return prepare


def bare(backend: str) -> Callable[[Setting], Work]:
    """The runner alone on preprocessed images."""

    def prepare(setting: Setting) -> Work:
        runner, images = _runner(setting, backend), [sample.tensor[None] for sample in scoring_samples(setting)]

        def work() -> None:
            for image in images:
                runner.run(image)

        return work

    return prepare


def contestants(backend: str) -> tuple[Contestant, ...]:
    """Ours and the floor."""
    return (
        Contestant("ours", "ours", ours(backend), (backend,)),
        Contestant("bare inference", "floor", bare(backend), (backend,)),
    )


CASE = Case(
    name="detection",
    title="Images from files to detections in FP32 on ONNX Runtime, beside inference alone on preprocessed images",
    axis="images",
    sizes=(16, 32, 64),
    variant="yolov8_embedded",
    contestants=contestants("onnxruntime"),
)
