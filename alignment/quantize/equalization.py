"""Cross-layer equalization: the channels between two convolutions are scaled so that both have weights of one size.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), equation 11.  The network
computes the same, as s * relu(x) = relu(s * x) for s > 0; SiLU does not let a factor through, so that networks with it
have nothing to equalize.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from alignment.quantize.graph import OnnxGraph, attribute

#: Activations of positive homogeneity: a positive factor passes through.
HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu")
#: Rounds over all pairs; a layer in the middle of three is in two of them.
ROUNDS = 10


def pairs_of(graph: OnnxGraph) -> list[tuple[NodeProto, NodeProto]]:
    """Convolutions, and the one convolution that reads each, through nothing or an activation of `HOMOGENEOUS`."""
    found = []
    outputs = graph.outputs
    for node in graph.nodes:
        tensor = node.output[0] if node.op_type == "Conv" and graph.weight(node) is not None else None
        while tensor is not None:
            readers = graph.readers.get(tensor, [])
            if tensor in outputs or len(readers) != 1:
                break
            reader, index = readers[0]
            if reader.op_type in HOMOGENEOUS and index == 0:
                tensor = reader.output[0]
                continue
            if (
                reader.op_type == "Conv"
                and index == 0
                and graph.weight(reader) is not None
                and _scalable(reader, graph)
            ):
                found.append((node, reader))
            break
    return found


def equalize(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A graph that computes the same, and the factor of each channel by the name of the first convolution.

    Pairs whose weights or bias other nodes read too are left alone, as are those whose bias is computed.
    """
    equalized = onnx.ModelProto()
    equalized.CopyFrom(model)
    graph = OnnxGraph(equalized)
    pairs = [pair for pair in pairs_of(graph) if _owned(pair, graph)]
    values = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in equalized.graph.initializer}
    factors: dict[str, np.ndarray] = {}
    for _ in range(ROUNDS):
        for first, second in pairs:
            one, other = values[first.input[1]], values[second.input[1]]
            depthwise = attribute(second, "group", 1) != 1
            ours = np.abs(one).reshape(len(one), -1).max(1)
            axes = (1, 2, 3) if depthwise else (0, 2, 3)
            theirs = np.abs(other).max(axes)
            fits = (ours > 0) & (theirs > 0)
            factor = np.sqrt(np.divide(ours, theirs, where=fits, out=np.ones_like(ours)))
            values[first.input[1]] = one / factor[:, None, None, None]
            if first.input[2:]:
                values[first.input[2]] = values[first.input[2]] / factor
            shape = (-1, 1, 1, 1) if depthwise else (1, -1, 1, 1)
            values[second.input[1]] = other * factor.reshape(shape)
            factors[first.name] = factors.get(first.name, 1.0) * factor
    touched = {name for first, second in pairs for name in (first.input[1], *first.input[2:3], second.input[1])}
    for initializer in equalized.graph.initializer:
        if initializer.name in touched:
            value = values[initializer.name].astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
    return equalized, factors


def _owned(pair: tuple[NodeProto, NodeProto], graph: OnnxGraph) -> bool:
    first, second = pair
    names = [first.input[1], second.input[1], *first.input[2:3]]
    return all(name in graph.initializers and len(graph.readers[name]) == 1 for name in names)


def _scalable(node: NodeProto, graph: OnnxGraph) -> bool:
    """Whether each input channel meets weights of its own: no groups, or depthwise."""
    weight = graph.weight(node)
    assert weight is not None
    group = attribute(node, "group", 1)
    return group == 1 or (group == weight.dims[0] and weight.dims[1] == 1)
