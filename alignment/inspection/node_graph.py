"""The ONNX graph behind an engine, without weights: small enough to be kept beside what the inspector tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from onnx import ModelProto

from alignment.quantize.graph import QUANTIZING

#: Operators that give a constant, or shape arithmetic, and of which no engine has a layer.
SHAPE_OPS = ("Constant", "ConstantOfShape", "Shape", "Size", "Range")


@dataclass(frozen=True)
class Node:
    """One ONNX node."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class NodeGraph:
    """Nodes in the order of the graph, and the names of the graph's inputs and outputs."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: ModelProto) -> NodeGraph:
        """The top level of a graph; scales and zero points of quantizers are left out."""
        stored = {value.name for value in model.graph.initializer}
        nodes = (
            Node(
                node.name,
                node.op_type,
                tuple(node.input[: 1 if node.op_type in QUANTIZING else None]),
                tuple(node.output),
            )
            for node in model.graph.node
        )
        return cls(
            tuple(nodes),
            tuple(value.name for value in model.graph.input if value.name not in stored),
            tuple(value.name for value in model.graph.output),
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> NodeGraph:
        """What `to_json` made."""
        tensors = [str(name) for name in fields["tensors"]]

        def named(places: Iterable[int]) -> tuple[str, ...]:
            return tuple(tensors[place] for place in places)

        nodes = tuple(Node(str(name), str(op), named(ins), named(outs)) for name, op, ins, outs in fields["nodes"])
        later = {tensor for node in nodes for tensor in node.outputs if tensor}
        for node in nodes:
            if not later.isdisjoint(node.inputs):
                raise ValueError(f"node {node.name} reads what itself or a later one makes")
            later.difference_update(node.outputs)
        return cls(nodes, named(fields["inputs"]), named(fields["outputs"]))

    def to_json(self) -> dict[str, Any]:
        """Lists, texts and numbers only; tensors by their place in a list of their names."""
        places: dict[str, int] = {}

        def at(names: Iterable[str]) -> list[int]:
            return [places.setdefault(name, len(places)) for name in names]

        nodes = [[node.name, node.op, at(node.inputs), at(node.outputs)] for node in self.nodes]
        ends = {"inputs": at(self.inputs), "outputs": at(self.outputs)}
        return {"tensors": list(places), "nodes": nodes, **ends}

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Nodes by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def position(self) -> dict[str, int]:
        """The place of each node, by name."""
        return {node.name: place for place, node in enumerate(self.nodes)}

    @cached_property
    def makers(self) -> dict[str, Node]:
        """Tensor → the node that makes it."""
        return {tensor: node for node in self.nodes for tensor in node.outputs if tensor}

    @cached_property
    def readers(self) -> dict[str, list[Node]]:
        """Tensor → the nodes that read it, in the order of the graph."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for tensor in dict.fromkeys(node.inputs):
                found.setdefault(tensor, []).append(node)
        return found

    @cached_property
    def varying(self) -> set[str]:
        """Tensors that depend on an input of the graph by more than its shape."""
        found = set(self.inputs)
        for node in self.nodes:
            if node.op not in SHAPE_OPS and not found.isdisjoint(node.inputs):
                found.update(node.outputs)
        return found

    @cached_property
    def wanted_int8(self) -> tuple[str, ...]:
        """The nodes that read what a DequantizeLinear gives: those that a QDQ graph asks to run in int8."""
        dequantized = {tensor for node in self.nodes if node.op == "DequantizeLinear" for tensor in node.outputs}
        return tuple(n.name for n in self.nodes if n.op not in QUANTIZING and not dequantized.isdisjoint(n.inputs))

    def data_readers(self, node: Node) -> list[Node]:
        """The nodes that read a node's outputs, Q/DQ pairs between them passed over."""
        found: list[Node] = []
        for tensor in node.outputs:
            for reader in self.readers.get(tensor, ()):
                found += self.data_readers(reader) if reader.op in QUANTIZING else [reader]
        return list(dict.fromkeys(found))

    def data_makers(self, node: Node) -> list[Node]:
        """The nodes that make what a node reads of the image, Q/DQ pairs between them passed over."""
        found: list[Node] = []
        for tensor in node.inputs:
            maker = self.makers.get(tensor)
            if maker is not None and tensor in self.varying:
                found += self.data_makers(maker) if maker.op in QUANTIZING else [maker]
        return list(dict.fromkeys(found))

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are nodes, once each, in the order of the graph."""
        return sorted(set(names) & self.position.keys(), key=self.position.__getitem__)
