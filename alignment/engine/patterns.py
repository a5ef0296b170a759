"""Known causes of bad engines, seen in the QDQ graph alone: no backend runs.

A pattern is no proof: most engines bear a quantized ConvTranspose.  Beside a culprit that `align culprit` found it says
why, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, numpy_helper

from alignment.errors import AlignError
from alignment.quantize.graph import ACTIVATIONS, OnnxGraph, attribute
from alignment.quantize.pairs import Pair, QdqGraph
from alignment.quantize.trouble import RATIO

#: An activation whose largest value is so many times what its scale reaches is clipped.
CLIPPING = 2.0


@dataclass(frozen=True)
class Suspicion:
    """One pattern at one node.

    Attributes:
        pattern: of `PATTERNS`.
        node: that reads the pair in question.
        module: of torch; empty where it is not known.
        evidence: what was seen, with its numbers.
        remedy: what helps.
    """

    pattern: str
    node: str
    module: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        module = f" ({self.module})" if self.module else ""
        return f"{self.pattern}: {self.node}{module}: {self.evidence}: {self.remedy}"


@dataclass(frozen=True)
class _Scene:
    """A QDQ graph, and the same in float, in which a node's weights and neighbours are looked up."""

    qdq: QdqGraph
    graph: OnnxGraph
    ranges: Mapping[str, float]

    def node(self, name: str) -> NodeProto:
        return self.graph.nodes[self.graph.position[name]]

    def scale(self, pair: Pair) -> np.ndarray:
        return self.qdq.values(pair.scale)

    def largest(self, pair: Pair) -> float:
        """Its scale; of several along an axis the largest."""
        return float(np.amax(self.scale(pair)))

    def convolved(self, tensor: str) -> bool:
        """Whether a tensor is what a convolution that reads int8 gives, before any activation."""
        maker = self.graph.makers.get(tensor)
        return maker is not None and self.graph.learnt(maker) and maker.name in self.qdq.int8_nodes


#: Node, evidence, remedy.
_Seen = Iterator[tuple[str, str, str]]


def bad_scale(scene: _Scene) -> _Seen:
    """A scale of 0, as a tensor that is 0 on all calibration images gets it; TensorRT flushes denormal ones to 0."""
    for pair in scene.qdq.pairs:
        values = scene.scale(pair).astype(np.float32).ravel()
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= np.finfo(np.float32).tiny)))
        if len(wrong):
            where = f", channel {wrong[0]}" if values.size > 1 else ""
            yield (
                pair.node,
                f"the scale of {pair.tensor}{where} is {values[wrong[0]]:g}",
                f"leave it in float: --keep-float {pair.node}",
            )


def inside_fusion(scene: _Scene) -> _Seen:
    """A pair between a convolution and the activation or Add that TensorRT would compute with it."""
    for pair in scene.qdq.pairs:
        if pair.stored or not scene.convolved(pair.tensor):
            continue
        node = scene.node(pair.node)
        gating = node.op_type == "Mul" and scene.graph.before_activation(node.output[0]) == pair.tensor
        if node.op_type in ACTIVATIONS or gating or (node.op_type == "Add" and _fused(scene, node) == pair.tensor):
            maker = scene.graph.makers[pair.tensor]
            evidence = f"a pair lies between it and {maker.name}, which it is fused with otherwise"
            yield pair.node, evidence, "take that pair out, and quantize what the fused nodes give"


def _fused(scene: _Scene, node: NodeProto) -> str | None:
    """The input of an Add that TensorRT computes with the convolution behind it: the last that is computed."""
    direct = [tensor for tensor in node.input if scene.convolved(tensor)]
    return max(direct, key=scene.graph.order, default=None)


def unlike_scales(scene: _Scene) -> _Seen:
    """Inputs of one Concat with different scales: each but one is requantized on its way."""
    read: dict[str, list[float]] = {}
    for pair in scene.qdq.pairs:
        if not pair.stored and scene.node(pair.node).op_type == "Concat":
            read.setdefault(pair.node, []).append(scene.largest(pair))
    for node, scales in read.items():
        if len(set(scales)) > 1:
            evidence = f"its inputs have scales from {min(scales):.3g} to {max(scales):.3g}"
            yield node, evidence, "give all its inputs one scale, that of its output: --policy tensorrt"


def two_scales(scene: _Scene) -> _Seen:
    """A tensor that its readers quantize with different scales: TensorRT 8.6 builds no engine of it where a pointwise
    layer gives that tensor (``outScales.size() == 1``), and requantizes it elsewhere."""
    first: dict[str, Pair] = {}
    for pair in scene.qdq.pairs:
        if pair.stored or pair.node == (other := first.setdefault(pair.tensor, pair)).node:
            continue
        ours, theirs = scene.largest(pair), scene.largest(other)
        if ours != theirs:
            evidence = f"reads {pair.tensor} with scale {ours:.3g}, {other.node} with {theirs:.3g}"
            yield pair.node, evidence, f"give {pair.tensor} one scale for all that read it"


def transposed(scene: _Scene) -> _Seen:
    """A ConvTranspose in int8, for which TensorRT has few kernels; versions differ in what they make of its axis."""
    yield from _quantized(scene, lambda node: node.op_type == "ConvTranspose", "a ConvTranspose reads int8")


def depthwise(scene: _Scene) -> _Seen:
    """A depthwise convolution in int8: slow or unfused, and with few weights a channel easily inaccurate."""

    def applies(node: NodeProto) -> bool:
        return node.op_type == "Conv" and 1 < attribute(node, "group", 1) == scene.graph.channels(node)[0]

    yield from _quantized(scene, applies, "a depthwise convolution reads int8")


def _quantized(scene: _Scene, applies: Callable[[NodeProto], bool], evidence: str) -> _Seen:
    for pair in scene.qdq.pairs:
        node = scene.node(pair.node)
        if pair.stored and pair.index == 1 and scene.graph.weight(node) is not None and applies(node):
            yield node.name, evidence, f"leave it in float: --keep-float {node.name}"


def wrong_axis(scene: _Scene) -> _Seen:
    """Weights with a scale for each index along another axis than that of the output channels."""
    for pair, node, axis, _ in _weights(scene):
        if pair.axis is not None and pair.axis != axis:
            evidence = f"scales of its weights lie along axis {pair.axis}, its output channels along {axis}"
            yield node.name, evidence, "quantize its weights anew, along their output channels"


def uneven_channels(scene: _Scene) -> _Seen:
    """Weights with one scale, and channels so unlike that the small ones are rounded to 0."""
    for pair, node, axis, values in _weights(scene):
        channels = np.amax(np.abs(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)), 1)
        live = channels[channels > 0]
        least, most = (float(np.amin(live)), float(np.amax(live))) if len(live) else (1.0, 1.0)
        if pair.axis is None and most / least > RATIO:
            evidence = f"one scale for channels of {least:.3g} to {most:.3g}"
            yield node.name, evidence, "give its weights a scale for each channel"


def _weights(scene: _Scene) -> Iterator[tuple[Pair, NodeProto, int, np.ndarray]]:
    for pair in scene.qdq.pairs:
        node = scene.node(pair.node)
        if pair.stored and pair.index == 1 and scene.graph.weight(node) is not None:
            values = scene.graph.initializers[node.input[1]]
            yield pair, node, scene.graph.weight_axis(node), numpy_helper.to_array(values)


def clipping(scene: _Scene) -> _Seen:
    """An activation that goes far beyond what its scale reaches; only where ranges are known."""
    for pair in scene.qdq.pairs:
        if pair.stored or pair.tensor not in scene.ranges:
            continue
        reach, seen = 127 * scene.largest(pair), scene.ranges[pair.tensor]
        if seen > CLIPPING * reach:
            evidence = f"{pair.tensor} reaches {seen:.3g}, its scale {reach:.3g}"
            yield pair.node, evidence, "calibrate anew, with --method minmax for one"


PATTERNS: dict[str, Callable[[_Scene], _Seen]] = {
    "bad scale": bad_scale,
    "pair inside a fusion": inside_fusion,
    "Concat of unlike scales": unlike_scales,
    "one tensor, two scales": two_scales,
    "ConvTranspose in int8": transposed,
    "depthwise in int8": depthwise,
    "wrong axis": wrong_axis,
    "one scale for unlike channels": uneven_channels,
    "clipped range": clipping,
}


def find_patterns(
    qdq: QdqGraph, modules: Mapping[str, str] | None = None, ranges: Mapping[str, float] | None = None
) -> list[Suspicion]:
    """All that is seen in a graph, each once.

    Args:
        qdq: a QDQ graph.
        modules: node → torch module, as far as it is known.
        ranges: largest magnitude by activation tensor, where it is known.

    Raises:
        AlignError: for a graph in which no node reads int8.
    """
    if not qdq.pairs:
        raise AlignError("the graph has no Q/DQ pairs", "give a QDQ graph, as `align quantize` writes it")
    scene, known = _Scene(qdq, OnnxGraph(qdq.only(())), ranges or {}), modules or {}
    found = [
        Suspicion(name, node, known.get(node, ""), evidence, remedy)
        for name, look in PATTERNS.items()
        for node, evidence, remedy in look(scene)
    ]
    return list(dict.fromkeys(found))
