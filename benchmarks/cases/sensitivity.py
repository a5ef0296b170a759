"""A sweep over the layers beside whole runs, one a layer, and beside bare inference as often."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.cases.images import in_memory, model_of, scoring_samples
from benchmarks.harness import Case, Contestant, Setting, Work

if TYPE_CHECKING:
    from alignment.data.samples import Samples
    from alignment.quantize.recipe import Quantized

#: What the other axis has.
IMAGES, LAYERS = 4, 8
_number = itertools.count()
Given = Callable[[Setting], tuple["Quantized", "Samples"]]


def given(axis: str) -> Given:
    """The quantized variant with so many of its convolutions as layers, evenly from the graph, and so many images."""

    def of(setting: Setting) -> tuple[Quantized, Samples]:
        from alignment.quantize.recipe import quantize
        from alignment.variant import PLAIN, load_variant, with_quantization

        layers, images = (setting.size, IMAGES) if axis == "layers" else (LAYERS, setting.size)
        variant = with_quantization(load_variant(setting.variant), PLAIN | {"policy": "conv-only"})
        whole = quantize(variant, every=False)
        nodes = [quantizer.node for quantizer in whole.placement.weights]
        chosen = {nodes[round((place + 0.5) * len(nodes) / layers - 0.5)] for place in range(min(layers, len(nodes)))}
        quantized = replace(whole, placement=whole.placement.restricted(chosen))
        samples = in_memory(scoring_samples(setting, images))
        samples.variant = variant
        return quantized, samples

    return of


def swept(axis: str, share: bool) -> Callable[[Setting], Work]:
    """All metrics of every layer; without `share` every layer runs the whole network."""

    def prepare(setting: Setting) -> Work:
        from alignment.quantize.sweep import sweep

        quantized, samples = given(axis)(setting)

        def work() -> Any:
            path = setting.folder / f"{next(_number)}.sensitivity.json"
            return sweep(samples.variant, quantized, samples, path=path, share=share)[0]

        return work

    return prepare


def whole_runs(axis: str) -> Callable[[Setting], Work]:
    """The float network once a layer and image, node by node in one thread, and nothing else."""

    def prepare(setting: Setting) -> Work:
        from alignment.runners.onnxruntime import OnnxRuntimeRunner

        quantized, samples = given(axis)(setting)
        runner = OnnxRuntimeRunner(model_of(setting), optimize=False, threads=1)
        layers, images = len(quantized.placement.weights), [sample.tensor[None] for sample in samples]

        def work() -> None:
            for _ in range(layers):
                for image in images:
                    runner.run(image)

        return work

    return prepare


def judge(setting: Setting, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many layers, and whether numbers are those of whole runs, to the bit."""
    plain = results.get("whole runs and all metrics")
    return {
        name: {"layers": len(found.layers), "equal": float(plain is None or found.layers == plain.layers)}
        for name, found in results.items()
        if found is not None
    }


def _case(axis: str, sizes: tuple[int, ...], title: str) -> Case:
    return Case(
        name=f"sensitivity-{axis}",
        title=title,
        axis=axis,
        sizes=sizes,
        variant="yolov8_embedded",
        repeat=3,
        contestants=(
            Contestant("ours", "ours", swept(axis, share=True)),
            Contestant("whole runs and all metrics", "peer", swept(axis, share=False)),
            Contestant("whole runs alone", "floor", whole_runs(axis), ("onnxruntime",)),
        ),
        judge=judge,
    )


_TITLE = "A sweep over layers, each alone in int8, with all metrics and what they need: FP32 and the kept tensors"
BY_LAYERS = _case("layers", (8, 16, 32), f"{_TITLE}; {IMAGES} images")
BY_IMAGES = _case("images", (4, 8, 16), f"{_TITLE}; {LAYERS} layers")
