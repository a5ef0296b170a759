"""The part of a graph that a change can reach, cut out so that the rest need not be computed again."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper


@dataclass(frozen=True)
class Suffix:
    """The end of a changed graph.

    Attributes:
        model: its nodes; ONNX Runtime, without graph optimization, computes the same to the bit as in the whole.
        inputs: tensors of the unchanged graph that it reads.
        outputs: of those that were wanted, the ones that the change reaches; the others are as without it.
    """

    model: ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def suffix_of(base: ModelProto, changed: ModelProto, wanted: Collection[str]) -> Suffix:
    """Cuts out what differs from `base` and all that descends from it, as far as a wanted tensor needs it.

    Args:
        base: the graph that tensors at the border come from.
        changed: the same with other nodes or initializers; tensors that both have are of one name.
        wanted: names of tensors.
    """
    nodes = list(changed.graph.node)
    reached = _reached(base, changed)
    touched = {name for node in reached for name in node.output}
    outputs = tuple(name for name in wanted if name in touched)
    varying = _varying(changed)
    needed, inputs, kept = set(outputs), {}, []
    for node in reversed(nodes):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        for name in _reads(node):
            if name in touched or name not in varying:
                needed.add(name)
            else:
                inputs[name] = True
    return Suffix(_extracted(changed, kept[::-1], list(inputs), outputs, needed), tuple(inputs), outputs)


def _reached(base: ModelProto, changed: ModelProto) -> list[NodeProto]:
    """The nodes of `changed` that `base` does not have, or has on other inputs, in the order of the graph."""
    same_nodes = {node.name: node for node in base.graph.node}
    values = {value.name: value for value in base.graph.initializer}
    other = {value.name for value in changed.graph.initializer if values.get(value.name) != value}
    found = []
    for node in changed.graph.node:
        if same_nodes.get(node.name) != node or not other.isdisjoint(_reads(node)):
            other.update(node.output)
            found.append(node)
    return found


def _varying(model: ModelProto) -> set[str]:
    """Tensors that depend on an input of the graph."""
    found = {value.name for value in model.graph.input} - {value.name for value in model.graph.initializer}
    for node in model.graph.node:
        if not found.isdisjoint(_reads(node)):
            found.update(node.output)
    return found


def _reads(node: NodeProto) -> Iterator[str]:
    """The tensors that a node reads, inside its branches and loops too."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)


def _extracted(
    model: ModelProto, nodes: list[NodeProto], inputs: list[str], outputs: Collection[str], needed: Collection[str]
) -> ModelProto:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = {value.name: value for value in (*inferred.value_info, *inferred.input, *inferred.output)}

    def described(name: str) -> onnx.ValueInfoProto:
        return known.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    graph = helper.make_graph(
        nodes,
        model.graph.name,
        [described(name) for name in inputs],
        [described(name) for name in outputs],
        [value for value in model.graph.initializer if value.name in needed],
    )
    return helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )


__all__ = ["Suffix", "suffix_of"]
