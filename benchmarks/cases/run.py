"""``align run`` beside the backends that it runs."""

from __future__ import annotations

from typing import Any

from benchmarks.cases.images import scoring_samples
from benchmarks.harness import Case, Contestant, Setting, Work


def _cases(variant: Any) -> list[Any]:
    from alignment.case import Case as Alignable

    return [Alignable(variant.name, backend, "fp32") for backend in ("torch", "onnxruntime")]


def ours(setting: Setting) -> Work:
    """All stages and the verdict, float64 on three images among it; models are loaded anew."""
    from alignment.pipeline import align_live

    samples = scoring_samples(setting)
    return lambda: align_live(samples.variant, _cases(samples.variant), samples)


def without_referee(setting: Setting) -> Work:
    """The same without float64."""
    from alignment.pipeline import RunOptions, align_live

    samples, options = scoring_samples(setting), RunOptions(referee_images=0)
    return lambda: align_live(samples.variant, _cases(samples.variant), samples, options)


def backends(setting: Setting) -> Work:
    """The same models, loaded and run on images that are preprocessed."""
    from alignment.runners.open import open_runner

    samples = scoring_samples(setting)
    images = [sample.tensor[None] for sample in samples]

    def work() -> None:
        for case in _cases(samples.variant):
            with open_runner(samples.variant, case) as runner:
                for image in images:
                    runner.run(image)

    return work


CASE = Case(
    name="run",
    title="A whole alignment of torch and ONNX Runtime in FP32, beside loading and running both",
    axis="images",
    sizes=(8, 16, 32),
    variant="yolov8_embedded",
    repeat=3,
    contestants=(
        Contestant("ours", "ours", ours),
        Contestant("ours, without float64", "ours", without_referee),
        Contestant("both backends alone", "floor", backends, ("torch", "onnxruntime")),
    ),
)
