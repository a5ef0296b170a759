"""What will go wrong in int8, seen before any engine is built: from the scales and the statistics alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from alignment.quantize.graph import OnnxGraph
from alignment.quantize.observers import sqnr_db

if TYPE_CHECKING:
    from alignment.quantize.recipe import Quantized

#: A channel whose values reach less than so many steps is starved, and a tensor with this part of starved channels too.
LEVELS, STARVED = 4.0, 0.2
#: Decibels; int8 reaches about 30 on activations.
SQNR = 20.0
#: Part of a weight's elements that lie beyond its range.
CLIPPED = 0.001
#: Largest channel of a weight against its smallest: one scale for all, as some runtimes use, would lose the small ones.
RATIO = 1000.0


@dataclass(frozen=True)
class Trouble:
    """One thing that is likely to cost accuracy.

    Attributes:
        kind: of `DETECTORS`.
        tensor: activation or initializer.
        node: that reads it quantized; of a tensor without quantizer, that makes it.
        module: of torch; empty where it is not known.
        value: what was found.
        bound: what it is held to.
        remedy: what helps.
    """

    kind: str
    tensor: str
    node: str
    module: str
    value: float
    bound: float
    remedy: str

    def __str__(self) -> str:
        module = f" ({self.module})" if self.module else ""
        found = f"{self.value:.3g}, bound {self.bound:g}"
        return f"{self.kind}: {self.tensor}, node {self.node}{module}: {found}: {self.remedy}"


@dataclass(frozen=True)
class _Scene:
    quantized: Quantized
    graph: OnnxGraph
    modules: Mapping[str, str]

    def trouble(self, kind: str, tensor: str, node: str, value: float, bound: float, remedy: str) -> Trouble:
        return Trouble(kind, tensor, node, self.modules.get(node, ""), float(value), bound, remedy)

    def weight(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.graph.initializers[name])


def starved_channels(scene: _Scene) -> Iterator[Trouble]:
    """Some channels are so much larger than others that these get next to no levels of the one scale."""
    for quantizer in scene.quantized.placement.activations:
        channels = scene.quantized.calibration.tensors[quantizer.tensor].channels
        if channels is None or len(channels) < 2:
            continue
        starved = float((channels / scene.quantized.scales[quantizer.tensor] < LEVELS).mean())
        if starved >= STARVED:
            node = quantizer.readers[0][0]
            remedy = f"--equalization where a Relu lies between convolutions, else --keep-float {node}"
            yield scene.trouble("starved channels", quantizer.tensor, node, starved, STARVED, remedy)


def low_sqnr(scene: _Scene) -> Iterator[Trouble]:
    """The noise of its rounding is too near to the signal."""
    for quantizer in scene.quantized.placement.activations:
        found = sqnr_db(scene.quantized.calibration.tensors[quantizer.tensor], scene.quantized.amax[quantizer.tensor])
        if found < SQNR:
            node = quantizer.readers[0][0]
            yield scene.trouble("low SQNR", quantizer.tensor, node, found, SQNR, f"--keep-float {node}")


def vanishing_scale(scene: _Scene) -> Iterator[Trouble]:
    """A tensor is 0 on all images, or all but: it has no range, and a route without QDQ leaves its layer in float."""
    least = float(np.finfo(np.float32).tiny) * 127
    for tensor, amax in scene.quantized.amax.items():
        if amax < least:
            maker = scene.graph.makers.get(tensor)
            node = maker.name if maker is not None else tensor
            yield scene.trouble("vanishing scale", tensor, node, amax, least, "calibrate on images that it reacts to")


def clipped_weights(scene: _Scene) -> Iterator[Trouble]:
    """More than a few elements of a weight lie beyond its range."""
    for quantizer in scene.quantized.placement.weights:
        weight = np.moveaxis(scene.weight(quantizer.initializer), quantizer.axis, 0)
        largest = scene.quantized.weight_scales[quantizer.initializer] * np.float32(127.5)
        part = float((np.abs(weight.reshape(len(weight), -1)) > largest[:, None]).mean())
        if part > CLIPPED:
            yield scene.trouble(
                "clipped weights", quantizer.initializer, quantizer.node, part, CLIPPED, "--weights minmax"
            )


def uneven_channels(scene: _Scene) -> Iterator[Trouble]:
    """A weight's channels are of very different sizes: harmless with a scale for each, as here."""
    for quantizer in scene.quantized.placement.weights:
        scales = scene.quantized.weight_scales[quantizer.initializer]
        ratio = float(scales.max() / scales.min())
        if ratio > RATIO:
            remedy = "--equalization where a Relu lies between convolutions"
            yield scene.trouble("uneven channels", quantizer.initializer, quantizer.node, ratio, RATIO, remedy)


DETECTORS: tuple[Callable[[_Scene], Iterator[Trouble]], ...] = (
    starved_channels,
    low_sqnr,
    vanishing_scale,
    clipped_weights,
    uneven_channels,
)


def troubles(quantized: Quantized, modules: Mapping[str, str] | None = None) -> list[Trouble]:
    """All that the detectors find.

    Args:
        quantized: see `alignment.quantize.recipe`.
        modules: node → torch module, as far as it is known.
    """
    scene = _Scene(quantized, OnnxGraph(onnx.load(quantized.source)), modules or {})
    return [trouble for detector in DETECTORS for trouble in detector(scene)]
