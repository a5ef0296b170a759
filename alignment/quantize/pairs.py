"""The Q/DQ pairs in an ONNX file: which nodes read int8, and the same graph with some of them reading float.

Works on the file alone, whoever wrote it: weights as float32 behind a pair, as `write_qdq` has them, or as int8 behind
a DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from alignment.errors import AlignError
from alignment.quantize.graph import DEQUANTIZE, QUANTIZE, attribute, reads


@dataclass(frozen=True)
class Pair:
    """A Q/DQ pair as one input of a node reads it.

    Attributes:
        node: that reads it.
        index: of its input.
        tensor: what is quantized: an activation, or an initializer.
        scale: name of the initializer that holds the scale.
        axis: along which there are several scales; None for one scale.
        stored: whether what is quantized is an initializer, float or int8.
    """

    node: str
    index: int
    tensor: str
    scale: str
    axis: int | None
    stored: bool


class QdqGraph:
    """The top level of a QDQ graph.

    Attributes:
        model: as given; nothing here changes it.
        pairs: one for each input that reads int8, in the order of the graph.
        constants: initializers, and what Constant nodes hold, by name.

    Raises:
        AlignError: for nodes without a name of their own.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.constants = {value.name: value for value in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self._makers = {name: node for node in model.graph.node for name in node.output if name}
        self.pairs = tuple(
            self._pair(node, index)
            for node in model.graph.node
            if node.op_type not in (QUANTIZE, DEQUANTIZE)
            for index, tensor in enumerate(node.input)
            if self._dequantizes(tensor)
        )
        names = [node.name for node in model.graph.node]
        for name in self.int8_nodes:
            if not name or names.count(name) > 1:
                raise AlignError(f"node {name or '(unnamed)'} reads int8", "give every node a name of its own")

    @property
    def int8_nodes(self) -> tuple[str, ...]:
        """The nodes that read int8, in the order of the graph."""
        return tuple(dict.fromkeys(pair.node for pair in self.pairs))

    def values(self, name: str) -> np.ndarray:
        """A constant as an array.  Raises AlignError for a tensor that is computed."""
        if name not in self.constants:
            raise AlignError(f"{name} is computed", "store scales and weights in the file")
        return numpy_helper.to_array(self.constants[name])

    def _dequantizes(self, tensor: str) -> bool:
        return tensor in self._makers and self._makers[tensor].op_type == DEQUANTIZE

    def _pair(self, node: NodeProto, index: int) -> Pair:
        dequantize = self._makers[node.input[index]]
        quantize = self._makers.get(dequantize.input[0])
        tensor = quantize.input[0] if quantize is not None and quantize.op_type == QUANTIZE else dequantize.input[0]
        scale = dequantize.input[1]
        several = scale in self.constants and self.values(scale).ndim > 0 and self.values(scale).size > 1
        axis = int(attribute(dequantize, "axis", 1)) if several else None
        return Pair(node.name, index, tensor, scale, axis, tensor in self.constants)

    def without(self, nodes: Collection[str]) -> ModelProto:
        """The graph in which these nodes read float, and Q/DQ nodes and constants that nothing reads are gone.

        Weights that were clipped for their scale stay as the file has them.

        Raises:
            AlignError: for a node that reads no int8.
        """
        if strange := set(nodes) - set(self.int8_nodes):
            raise AlignError(f"node {min(strange)} reads no int8", "name one that reads a DequantizeLinear")
        changed = ModelProto()
        changed.CopyFrom(self.model)
        added: dict[str, TensorProto] = {}
        for node in changed.graph.node:
            for index, tensor in enumerate(node.input if node.name in nodes else ()):
                if self._dequantizes(tensor):
                    node.input[index] = self._float(tensor, added)
        changed.graph.initializer.extend(added.values())
        _drop_dead(changed)
        return changed

    def with_scales(self, node: str, change: Callable[[np.ndarray], np.ndarray], weights: bool = False) -> ModelProto:
        """The graph in which a node reads through pairs of its own, at other scales; other readers keep theirs.

        Args:
            node: one of `int8_nodes`.
            change: from a pair's float32 scale, or scales along its axis, to the one to have, or those.
            weights: whether it is the pairs of weights; else those of activations.

        Raises:
            AlignError: for a node that has no such pair, or only weights that are int8 in the file.
        """
        chosen = [pair for pair in self.pairs if pair.node == node and pair.stored == weights]
        floats = [p for p in chosen if p.tensor not in self.constants or self.values(p.tensor).dtype == np.float32]
        if not floats:
            kind = "weights" if weights else "activations"
            raise AlignError(f"node {node} reads no {kind} through a Q/DQ pair", "name one that does")
        changed = ModelProto()
        changed.CopyFrom(self.model)
        place = [other.name for other in changed.graph.node].index(node)
        for pair in floats:
            scale = change(self.values(pair.scale)).astype(np.float32)
            names = [f"{node}.{pair.index}_{rest}" for rest in ("scale", "zero_point", "quantized", "dequantized")]
            for array, name in ((scale, names[0]), (np.zeros(scale.shape, np.int8), names[1])):
                changed.graph.initializer.append(numpy_helper.from_array(array, name))
            steps = ((QUANTIZE, pair.tensor, names[2]), (DEQUANTIZE, names[2], names[3]))
            for kind, read, given in steps:
                made = helper.make_node(kind, [read, *names[:2]], [given], f"{node}.{pair.index}_{kind}")
                if scale.ndim:
                    made.attribute.append(helper.make_attribute("axis", pair.axis))
                changed.graph.node.insert(place, made)
                place += 1
            changed.graph.node[place].input[pair.index] = names[3]
        _drop_dead(changed)
        return changed

    def only(self, nodes: Collection[str]) -> ModelProto:
        """The graph in which of the nodes that read int8 only these do; see `without`."""
        if strange := set(nodes) - set(self.int8_nodes):
            raise AlignError(f"node {min(strange)} reads no int8", "name one that reads a DequantizeLinear")
        return self.without(set(self.int8_nodes) - set(nodes))

    def _float(self, tensor: str, added: dict[str, TensorProto]) -> str:
        """The float tensor behind a pair; int8 weights become float32 ones, which `added` collects."""
        while self._dequantizes(tensor):
            dequantize = self._makers[tensor]
            quantize = self._makers.get(dequantize.input[0])
            if quantize is None or quantize.op_type != QUANTIZE:
                name = f"{tensor}_float"
                added[name] = numpy_helper.from_array(self._dequantized(dequantize), name)
                return name
            tensor = quantize.input[0]
        return tensor

    def _dequantized(self, node: NodeProto) -> np.ndarray:
        values = self.values(node.input[0]).astype(np.float32)
        scale = self.values(node.input[1]).astype(np.float32)
        zero = self.values(node.input[2]).astype(np.float32) if len(node.input) > 2 and node.input[2] else np.float32(0)
        if scale.size > 1:
            shape = [1] * values.ndim
            shape[int(attribute(node, "axis", 1))] = -1
            scale, zero = scale.reshape(shape), np.reshape(zero, shape if np.size(zero) > 1 else ())
        return ((values - zero) * scale).astype(np.float32)


def _drop_dead(model: ModelProto) -> None:
    """Takes out Q/DQ nodes whose output nothing reads, and initializers that nothing reads."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    left = [(node, reads(node)) for node in graph.node]
    dead: list[NodeProto] = []
    while True:
        read = outputs.union(*(names for _, names in left))
        gone = [n for n, _ in left if n.op_type in (QUANTIZE, DEQUANTIZE) and read.isdisjoint(n.output)]
        if not gone:
            break
        dead += gone
        ids = {id(node) for node in gone}
        left = [(node, names) for node, names in left if id(node) not in ids]
    for node in dead:
        graph.node.remove(node)
    kept = [value for value in graph.initializer if value.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
