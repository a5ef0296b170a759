"""The part of a graph that a change can reach, cut out so that the rest need not be computed again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from alignment.quantize.graph import reads


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


class Unchanged:
    """A graph that others differ from in a part.

    Args:
        model: the graph that the tensors at the border come from.
    """

    def __init__(self, model: ModelProto) -> None:
        self._nodes = {node.name: node for node in model.graph.node}
        self._values = {value.name: value for value in model.graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self._known = {value.name: value for value in (*inferred.value_info, *inferred.input, *inferred.output)}

    def suffix(self, changed: ModelProto, wanted: Collection[str]) -> Suffix:
        """Cuts out what differs and all that descends from it, as far as a wanted tensor needs it.

        Args:
            changed: the graph with other nodes or initializers; tensors that both have are of one name.
            wanted: names of tensors that both have.
        """
        touched = self._touched(changed)
        outputs = tuple(name for name in wanted if name in touched)
        varying = _varying(changed)
        needed, inputs, kept = set(outputs), dict[str, None](), []
        for node in reversed(changed.graph.node):
            if needed.isdisjoint(node.output):
                continue
            kept.append(node)
            for name in reads(node):
                if name in touched or name not in varying:
                    needed.add(name)
                else:
                    inputs[name] = None
        graph = helper.make_graph(
            kept[::-1],
            changed.graph.name,
            [self._described(name) for name in inputs],
            [self._described(name) for name in outputs],
            [value for value in changed.graph.initializer if value.name in needed],
        )
        options = {"opset_imports": changed.opset_import, "ir_version": changed.ir_version}
        return Suffix(helper.make_model(graph, functions=changed.functions, **options), tuple(inputs), outputs)

    def _touched(self, changed: ModelProto) -> set[str]:
        """The tensors of nodes that this graph does not have, or has on other values."""
        other = {value.name for value in changed.graph.initializer if self._values.get(value.name) != value}
        found: set[str] = set()
        for node in changed.graph.node:
            read = set(reads(node))
            if self._nodes.get(node.name) != node or not other.isdisjoint(read) or not found.isdisjoint(read):
                found.update(node.output)
        return found

    def _described(self, name: str) -> ValueInfoProto:
        return self._known.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _varying(model: ModelProto) -> set[str]:
    """Tensors that depend on an input of the graph."""
    found = {value.name for value in model.graph.input} - {value.name for value in model.graph.initializer}
    for node in model.graph.node:
        if not found.isdisjoint(reads(node)):
            found.update(node.output)
    return found


__all__ = ["Suffix", "Unchanged"]
