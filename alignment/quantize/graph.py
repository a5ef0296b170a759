"""Looking things up in an ONNX graph: who makes a tensor, who reads it, which weights a node has."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from alignment.errors import AlignError

#: Operators with weights of their own, at input 1; a MatMul has them where that is a constant matrix.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QUANTIZE, DEQUANTIZE = QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
#: Activations of one input that TensorRT computes together with the convolution before them.
ACTIVATIONS = (
    *("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish"),
    *("Tanh", "Elu", "Selu", "Softplus", "Mish", "Gelu"),
)
#: What a gate is made of beside activations: ``Clip(x + 3) / 6`` is a HardSigmoid that was written out.
_GATE = (*ACTIVATIONS, "Add", "Mul", "Div")
_GATE_NODES = 4


class OnnxGraph:
    """The top level of an ONNX graph, indexed; what is inside branches and loops is not looked at.

    Attributes:
        nodes: in the order of the graph, which is topological.
        makers: tensor → the node that makes it.
        readers: tensor → (node, input index) in the order of the graph.
        initializers: by name.
        outputs: of the graph.
        position: node name → its place in `nodes`.
        precedes_learnt: names of the nodes that a node with learnt weights follows, however far behind.

    Raises:
        AlignError: for nodes without a name of their own.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.nodes: list[NodeProto] = list(graph.node)
        self.position: dict[str, int] = {}
        for place, node in enumerate(self.nodes):
            if not node.name or node.name in self.position:
                which = (
                    f"two nodes are named {node.name}" if node.name else f"node {place} ({node.op_type}) has no name"
                )
                raise AlignError(which, "give every node a name of its own, as `align export` does")
            self.position[node.name] = place
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, index))
        self.initializers = {weight.name: weight for weight in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self._types = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
        # Tensors that depend on an input of the graph: the others are constants, computed or not.
        self._varying = {value.name for value in graph.input if value.name not in self.initializers}
        for node in self.nodes:
            if not self._varying.isdisjoint(node.input):
                self._varying.update(node.output)
        self.precedes_learnt = self._preceding()

    def _preceding(self) -> set[str]:
        found: set[str] = set()
        for node in reversed(self.nodes):
            readers = (reader for name in node.output if name for reader, _ in self.readers.get(name, ()))
            if any(reader.name in found or self.learnt(reader) for reader in readers):
                found.add(node.name)
        return found

    def is_activation(self, tensor: str) -> bool:
        """Whether a tensor is float32 and depends on the image: those are the tensors that calibration sees."""
        known = self._types.get(tensor)
        return tensor in self._varying and known is not None and known.elem_type == TensorProto.FLOAT

    def spatial(self, tensor: str) -> tuple[int, ...]:
        """What is known of a tensor's dimensions behind batch and channels; 0 where a dimension is not known."""
        known = self._types.get(tensor)
        return tuple(dim.dim_value for dim in known.shape.dim[2:]) if known is not None else ()

    def order(self, tensor: str) -> int:
        """The place of a tensor's maker; −1 for inputs and initializers."""
        maker = self.makers.get(tensor)
        return -1 if maker is None else self.position[maker.name]

    def before_activation(self, tensor: str) -> str:
        """The tensor that an activation turned into this one, SiLU and its like included; else the tensor itself."""
        maker = self.makers.get(tensor)
        if maker is not None and maker.op_type in ACTIVATIONS:
            return maker.input[0]
        if maker is not None and maker.op_type == "Mul":
            for value, gate in (maker.input, reversed(maker.input)):
                if self._gates(gate, value):
                    return value
        return tensor

    def _gates(self, gate: str, value: str) -> bool:
        """Whether a tensor was computed from another one pointwise, as in ``x * Sigmoid(x)``."""
        for _ in range(_GATE_NODES):
            maker = self.makers.get(gate)
            if maker is None or maker.op_type not in _GATE:
                return False
            varying = [name for name in maker.input if name in self._varying]
            if len(varying) != 1:
                return False
            gate = varying[0]
            if gate == value:
                return True
        return False

    def weight(self, node: NodeProto) -> TensorProto | None:
        """The float32 initializer that a node of `WEIGHTED` multiplies with; None for other nodes."""
        found = self.initializers.get(node.input[1]) if node.op_type in WEIGHTED and len(node.input) > 1 else None
        return found if found is not None and found.data_type == TensorProto.FLOAT and len(found.dims) > 1 else None

    def weight_axis(self, node: NodeProto) -> int:
        """The axis of a node's weights along which its output channels lie; of nodes that `weight` has one for."""
        if node.op_type == "MatMul":
            return len(self.initializers[node.input[1]].dims) - 1
        if node.op_type == "Gemm":
            return 0 if attribute(node, "transB", 0) else 1
        return 1 if node.op_type == "ConvTranspose" else 0

    def channels(self, node: NodeProto) -> tuple[int, int]:
        """Input and output channels of all groups together, of a node that `weight` has one for."""
        dims = self.initializers[node.input[1]].dims
        groups = int(attribute(node, "group", 1))
        if node.op_type == "ConvTranspose":
            return dims[0], dims[1] * groups
        if node.op_type == "Conv":
            return dims[1] * groups, dims[0]
        axis = self.weight_axis(node)
        return dims[-1] if axis == 0 else dims[-2], dims[axis]

    def macs(self, node: NodeProto) -> int:
        """Multiplications with learnt weights for one image, 0 for other nodes.

        Each weight is used once for every pixel of the output, in a ConvTranspose of the input.

        Raises:
            AlignError: where height and width are not known.
        """
        weight = self.weight(node)
        if weight is None or not self.learnt(node):
            return 0
        if node.op_type in ("Gemm", "MatMul"):
            return int(np.prod(weight.dims))
        pixels = self.spatial(node.input[0] if node.op_type == "ConvTranspose" else node.output[0])
        if not pixels or 0 in pixels:
            raise AlignError(f"node {node.name}: its output has no fixed size", "export with a fixed height and width")
        return int(np.prod(weight.dims) * np.prod(pixels))

    def is_projection(self, node: NodeProto) -> bool:
        """Whether a node is the fixed sum of DFL, which weighs bins by 0, 1, 2, ...: no weights that were learnt."""
        weight = self.weight(node)
        if weight is None or np.prod(weight.dims) != max(weight.dims) or max(weight.dims) < 2:
            return False
        values = numpy_helper.to_array(weight).ravel()
        return bool(np.array_equal(values, np.arange(len(values))))

    def learnt(self, node: NodeProto) -> bool:
        """Whether a node is a convolution or matrix product with weights that were learnt."""
        if node.op_type == "MatMul" and self.weight(node) is None:
            return False
        return node.op_type in WEIGHTED and not self.is_projection(node)

    def matching(self, patterns: Collection[str]) -> dict[str, str]:
        """The names of the nodes that patterns name, in which ``*`` and ``?`` stand for others, with the pattern.

        What is the name of a node means that node alone, whatever characters it is made of.

        Raises:
            AlignError: for a pattern that no node answers to.
        """
        found: dict[str, str] = {}
        for pattern in patterns:
            alike = (name for name in self.position if fnmatchcase(name, pattern))
            names = [pattern] if pattern in self.position else list(alike)
            if not names:
                near = ", ".join(difflib.get_close_matches(pattern, self.position, 3)) or "`align layers` lists them"
                raise AlignError(f"no node is named {pattern!r} (keep_float)", f"nodes named alike: {near}")
            found.update((name, found.get(name, pattern)) for name in names)
        return found


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """An attribute of a node, strings decoded."""
    found = next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
    return found.decode() if isinstance(found, bytes) else found


def reads(node: NodeProto) -> list[str]:
    """The tensors that a node reads, those inside its branches and loops included."""
    inner = [n for a in node.attribute for g in (a.g, *a.graphs) for n in g.node]
    return [*filter(None, node.input), *(name for n in inner for name in reads(n))]
