"""QDQ graphs: quantizers and their scales into an ONNX graph, and back out of it.

Weights stay in the file as float32, with QuantizeLinear and DequantizeLinear behind them: TensorRT's parser and ONNX
Runtime both fold these, and the file can be quantized anew.  Everything is symmetric, with a zero point of 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from alignment.errors import AlignError
from alignment.quantize.graph import DEQUANTIZE, QUANTIZE, QUANTIZING
from alignment.quantize.placement import Placement, WeightQuantizer

#: The first with a scale for each channel.
MIN_OPSET = 13
#: Of int8, without −128: TensorRT takes weights from −127 to 127.
LEVELS = 127


def write_qdq(
    model: ModelProto,
    placement: Placement,
    scales: Mapping[str, np.float32],
    weight_scales: Mapping[str, np.ndarray],
) -> ModelProto:
    """Writes the quantizers of a placement into a copy of a graph.

    Tensors keep their names; only the readers that the placement lists read the quantized form.  Weights beyond
    127 × scale are clipped in the copy, so that none becomes −128.

    Args:
        model: the float32 graph that was placed, opset 13 or later.
        placement: of this graph.
        scales: float32 by activation tensor.
        weight_scales: ``[C] float32`` by initializer, C being its size along the quantizer's axis.

    Returns:
        The graph with nodes ``<tensor>_QuantizeLinear`` and ``<tensor>_DequantizeLinear``.

    Raises:
        AlignError: for an older opset, a placement of another graph, names that are taken, and scales that are missing
            or no positive, normal float32.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise AlignError(f"opset {opset} has no scales per channel", f"export with opset {MIN_OPSET} or later")
    writer = _Writer(model)
    before: dict[str, list[NodeProto]] = {}
    after: dict[str, list[NodeProto]] = {}
    for initializer, quantizers in _by_initializer(placement.weights).items():
        scale = _checked(weight_scales.get(initializer), initializer, "weights of")
        readers, axis = [(quantizer.node, 1) for quantizer in quantizers], quantizers[0].axis
        writer.clip(initializer, scale, axis, readers)
        before.setdefault(quantizers[0].node, []).extend(writer.pair(initializer, readers, scale, axis))
    for place in placement.activations:
        scale = _checked(scales.get(place.tensor), place.tensor, "tensor")
        after[place.tensor] = writer.pair(place.tensor, place.readers, scale)
    return writer.finished(before, after)


def group_amax(placement: Placement, amax: Mapping[str, float]) -> dict[str, float]:
    """The largest magnitude in the group of each quantizer's tensor, by tensor: members of a group share a scale.

    Raises:
        AlignError: for a tensor without one.
    """
    largest: dict[str, float] = {}
    for place in placement.activations:
        if place.tensor not in amax:
            raise AlignError(f"tensor {place.tensor}: no range", "calibrate the graph that quantizers are placed in")
        largest[place.group] = max(amax[place.tensor], largest.get(place.group, 0.0))
    return {place.tensor: largest[place.group] for place in placement.activations}


def fake_quantizers(model: ModelProto) -> tuple[dict[str, np.float32], dict[str, np.ndarray]]:
    """The scales in a QDQ graph: by activation tensor, and ``[C] float32`` by quantized initializer.

    Raises:
        AlignError: for scales that are computed, and for a tensor that is quantized with two of them.
    """
    constants = {value.name: value for value in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    activations: dict[str, np.float32] = {}
    weights: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        if node.op_type != QUANTIZE:
            continue
        tensor, scale_name = node.input[:2]
        if scale_name not in constants:
            raise AlignError(f"node {node.name}: scale {scale_name} is computed", "store it in the file")
        scale = numpy_helper.to_array(constants[scale_name]).astype(np.float32)
        found = weights.get(tensor) if tensor in constants else activations.get(tensor)
        if found is not None and not np.array_equal(found, scale.reshape(np.shape(found))):
            raise AlignError(f"tensor {tensor}: quantized twice, with different scales", "give its readers one scale")
        if tensor in constants:
            weights[tensor] = scale.reshape(-1)
        else:
            activations[tensor] = np.float32(scale.reshape(()))
    return activations, weights


def _by_initializer(quantizers: Iterable[WeightQuantizer]) -> dict[str, list[WeightQuantizer]]:
    found: dict[str, list[WeightQuantizer]] = {}
    for quantizer in quantizers:
        found.setdefault(quantizer.initializer, []).append(quantizer)
    return found


def _checked(scale: np.ndarray | np.float32 | None, tensor: str, kind: str) -> np.ndarray:
    """A scale as float32, all of it positive and normal: TensorRT refuses 0, and flushes what is denormal to it."""
    keep = "calibrate anew, or keep its readers in float (keep_float)"
    if scale is None:
        raise AlignError(f"{kind} {tensor}: no scale", keep)
    with np.errstate(over="ignore", under="ignore"):
        values = np.asarray(scale).astype(np.float32)
    bad = np.argwhere(~(np.isfinite(values) & (values >= np.finfo(np.float32).tiny)))
    if len(bad):
        channel = f", channel {bad[0][0]}" if values.ndim else ""
        raise AlignError(f"{kind} {tensor}{channel}: scale {values[tuple(bad[0])]:g} is none that int8 can have", keep)
    return values


class _Writer:
    """A copy of a graph that quantizers are written into."""

    def __init__(self, model: ModelProto) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        self.nodes = {node.name: node for node in graph.node}
        self.initializers = {value.name: value for value in graph.initializer}
        tensors = (name for node in graph.node for name in (*node.input, *node.output))
        self.taken = {*self.nodes, *self.initializers, *tensors, *(value.name for value in graph.input)}

    def pair(
        self, tensor: str, readers: Iterable[tuple[str, int]], scale: np.ndarray, axis: int | None = None
    ) -> list[NodeProto]:
        """The Q/DQ pair of a tensor, whose scale goes into the graph and which its readers are made to read."""
        if axis is None and scale.shape != ():
            raise AlignError(f"tensor {tensor}: {scale.size} scales", "an activation has one")
        quantize, dequantize, scale_name, zero, quantized, dequantized = (
            self._name(f"{tensor}_{rest}") for rest in (*QUANTIZING, "scale", "zero_point", "quantized", "dequantized")
        )
        self._store(scale_name, scale)
        self._store(zero, np.zeros(scale.shape, np.int8))
        self._reconnect(tensor, readers, dequantized)
        nodes = [
            helper.make_node(QUANTIZE, [tensor, scale_name, zero], [quantized], quantize),
            helper.make_node(DEQUANTIZE, [quantized, scale_name, zero], [dequantized], dequantize),
        ]
        for node in nodes if axis is not None else ():
            node.attribute.append(helper.make_attribute("axis", axis))
        return nodes

    def clip(self, name: str, scale: np.ndarray, axis: int, readers: Sequence[tuple[str, int]]) -> None:
        """Clips weights to what their scale represents; others that read them get a copy of what they were."""
        found = self.initializers.get(name)
        if found is None or found.data_type != TensorProto.FLOAT:
            raise AlignError(
                f"weights of {name}: no float32 initializer of that name", "place quantizers in this graph"
            )
        weights = numpy_helper.to_array(found)
        if scale.shape != (weights.shape[axis],):
            raise AlignError(
                f"weights of {name}: scales of shape {scale.shape}", f"one for each of {weights.shape[axis]} channels"
            )
        limit = np.expand_dims(scale * np.float32(LEVELS), [i for i in range(weights.ndim) if i != axis])
        # A scale of amax / 127 may be a rounding error short: that is no clipping, and the file keeps its weights.
        beyond = np.abs(weights) > limit * np.float32(1.001)
        if not beyond.any():
            return
        clipped = np.where(beyond, np.clip(weights, -limit, limit), weights)
        reading = (
            (node.name, index) for node in self.model.graph.node for index, t in enumerate(node.input) if t == name
        )
        others = [place for place in reading if place not in readers]
        if others:
            copy = self._name(f"{name}_float")
            self._store(copy, weights)
            self._reconnect(name, others, copy)
        found.CopyFrom(numpy_helper.from_array(clipped, name))

    def finished(self, before: Mapping[str, list[NodeProto]], after: Mapping[str, list[NodeProto]]) -> ModelProto:
        """The graph with pairs of weights before the nodes named, and of activations after the tensors named."""
        graph = self.model.graph
        ordered = [pair for value in graph.input for pair in after.get(value.name, ())]
        for node in graph.node:
            pairs = (pair for output in node.output for pair in after.get(output, ()))
            ordered += [*before.get(node.name, ()), node, *pairs]
        written = ModelProto()
        written.CopyFrom(self.model)
        del written.graph.node[:]
        written.graph.node.extend(ordered)
        return written

    def _name(self, name: str) -> str:
        if name in self.taken:
            raise AlignError(f"the name {name} is taken", "rename it, or quantize the float32 export")
        self.taken.add(name)
        return name

    def _store(self, name: str, values: np.ndarray) -> None:
        self.model.graph.initializer.append(numpy_helper.from_array(values, name))

    def _reconnect(self, tensor: str, readers: Iterable[tuple[str, int]], instead: str) -> None:
        for name, index in readers:
            node = self.nodes.get(name)
            if node is None or index >= len(node.input) or node.input[index] != tensor:
                raise AlignError(f"node {name} does not read {tensor}", "place quantizers in this graph")
            node.input[index] = instead


__all__ = ["fake_quantizers", "group_amax", "write_qdq"]
