"""Which tensors of a graph get a quantizer, and for which readers: the QDQ placement rules, without scales.

A Q/DQ pair tells TensorRT what may run in int8, and keeps it from fusing the nodes on its two sides.  So a pair goes
where a convolution reads its input, on the branches of a residual Add that no convolution computes it with, and around
nodes that only move values; never between a convolution and the activation or Add that it fuses with.  Nodes that move
values have one scale before and after them, or TensorRT would have to requantize there.

`FLOAT_RULES` say which nodes stay float, `INT8_RULES` which inputs the others read in int8.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from onnx import ModelProto, NodeProto

from alignment.errors import AlignError
from alignment.quantize.graph import QUANTIZE, OnnxGraph, attribute

PolicyName = Literal["tensorrt", "conv-only", "full"]
#: Operators that only move values or drop some; a Resize does where it takes the nearest.
MOVING = (
    *("MaxPool", "Resize", "Slice", "Split", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"),
    *("DepthToSpace", "SpaceToDepth"),
)
AVERAGING = ("AveragePool", "GlobalAveragePool")


@dataclass(frozen=True)
class Policy:
    """The switches of a placement.

    Attributes:
        name: as in `POLICIES`.
        min_channels: convolutions with fewer input or output channels stay float; depthwise ones have `depthwise`.
        depthwise: whether depthwise convolutions are quantized.
        heads: whether convolutions are that no other follows, so that decoding reads what they give.
        one_pixel: whether convolutions are that read one pixel, behind a global average.
        residual: the inputs of an Add that are quantized beside a quantized convolution: none; those that the Add is
            not fused with, see `_residual`; or both, whatever they come from.
        moving: whether Concat and nodes that move values run in int8, at one scale: never; where something reads their
            output in int8; or always.
        averaging: whether average pooling runs in int8.
    """

    name: str
    min_channels: int = 0
    depthwise: bool = True
    heads: bool = True
    one_pixel: bool = True
    residual: Literal["none", "unfused", "both"] = "none"
    moving: Literal["never", "wanted", "always"] = "never"
    averaging: bool = False


#: ``tensorrt``: for fused int8 with few reformats.  ``conv-only``: every convolution for itself, as is often done.
#: ``full``: all that TensorRT could run in int8.
POLICIES: dict[str, Policy] = {
    "tensorrt": Policy("tensorrt", min_channels=16, heads=False, one_pixel=False, residual="unfused", moving="wanted"),
    "conv-only": Policy("conv-only"),
    "full": Policy("full", residual="both", moving="always", averaging=True),
}


@dataclass(frozen=True)
class Quantizer:
    """A Q/DQ pair of an activation.

    Attributes:
        tensor: its ONNX name.
        readers: (node name, input index) of those that read the quantized form; others read the float tensor.
        group: quantizers of one group have one scale; it is named after one of its tensors.
        rule: the name of the rule that put it there, the first of `INT8_RULES` if there are several.
    """

    tensor: str
    readers: tuple[tuple[str, int], ...]
    group: str
    rule: str


@dataclass(frozen=True)
class WeightQuantizer:
    """The Q/DQ pair of a node's weights, with one scale for each index along `axis`, the output channels."""

    initializer: str
    node: str
    axis: int


@dataclass(frozen=True)
class Placement:
    """Where quantizers go.

    Attributes:
        policy: its name.
        activations: in the order of the graph, one a tensor.
        weights: one a node, in the order of the graph.
        float_nodes: node → ``rule: why`` it stays float, for nodes that decode, and for those that a rule is there for.
            What is in neither, activations above all, runs in whatever its neighbours do.
    """

    policy: str
    activations: tuple[Quantizer, ...]
    weights: tuple[WeightQuantizer, ...]
    float_nodes: dict[str, str]

    @property
    def int8_nodes(self) -> tuple[str, ...]:
        """The nodes that read int8, activations or weights; each can be taken out by itself, see `restricted`."""
        readers = (name for quantizer in self.activations for name, _ in quantizer.readers)
        return tuple(dict.fromkeys([*readers, *(quantizer.node for quantizer in self.weights)]))

    def restricted(self, nodes: Collection[str], activations: bool = True, weights: bool = True) -> Placement:
        """What of this placement `nodes` read; groups, and with them scales, stay those of the whole.

        Args:
            nodes: names among `int8_nodes`; the others read float.
            activations: whether these nodes read their activations in int8.
            weights: whether they read their weights in int8.
        """
        kept = []
        for quantizer in self.activations if activations else ():
            readers = tuple(reader for reader in quantizer.readers if reader[0] in nodes)
            if readers:
                kept.append(replace(quantizer, readers=readers))
        own = tuple(quantizer for quantizer in self.weights if weights and quantizer.node in nodes)
        return replace(self, activations=tuple(kept), weights=own)


@dataclass(frozen=True)
class FloatRule:
    """Nodes that stay float: whether it applies to one, and why."""

    name: str
    applies: Callable[[OnnxGraph, NodeProto, Policy], bool]
    why: str


@dataclass(frozen=True)
class Scene:
    """What the int8 rules look at beside their node: what stays float, and who reads int8 further down."""

    graph: OnnxGraph
    policy: Policy
    float_nodes: Collection[str]
    int8: dict[tuple[str, int], str]

    def wanted(self, node: NodeProto) -> bool:
        """Whether something reads an output of a node in int8."""
        readers = self.graph.readers
        return any((reader.name, index) in self.int8 for name in node.output for reader, index in readers.get(name, ()))

    def convolved(self, tensor: str) -> bool:
        """Whether a tensor is what a quantized convolution gives, before any activation."""
        maker = self.graph.makers.get(tensor)
        return maker is not None and self.graph.learnt(maker) and maker.name not in self.float_nodes


@dataclass(frozen=True)
class Int8Rule:
    """Nodes that read int8: the indices of the inputs that they read so, and why.

    `one_scale` is for those that only move values: their inputs and outputs are of one group.
    """

    name: str
    inputs: Callable[[Scene, NodeProto], Iterable[int]]
    why: str
    one_scale: bool = False


def _unsuited(graph: OnnxGraph, node: NodeProto, policy: Policy) -> bool:
    return graph.learnt(node) and (graph.weight(node) is None or not graph.is_activation(node.input[0]))


def _grouped_transpose(graph: OnnxGraph, node: NodeProto, policy: Policy) -> bool:
    return node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1


def _other_axis(graph: OnnxGraph, node: NodeProto, policy: Policy) -> bool:
    if not graph.learnt(node):
        return False
    others = (reader for reader, index in graph.readers[node.input[1]] if index == 1 and graph.learnt(reader))
    return graph.weight_axis(node) != graph.weight_axis(next(others))


def _decodes(graph: OnnxGraph, node: NodeProto, policy: Policy) -> bool:
    return not graph.learnt(node) and node.name not in graph.precedes_learnt


def _head(graph: OnnxGraph, node: NodeProto, policy: Policy) -> bool:
    return not policy.heads and graph.learnt(node) and node.name not in graph.precedes_learnt


def _one_pixel(graph: OnnxGraph, node: NodeProto, policy: Policy) -> bool:
    return not policy.one_pixel and graph.learnt(node) and set(graph.spatial(node.input[0])) == {1}


def _is_depthwise(graph: OnnxGraph, node: NodeProto) -> bool:
    return node.op_type == "Conv" and 1 < graph.channels(node)[0] == attribute(node, "group", 1)


def _depthwise(graph: OnnxGraph, node: NodeProto, policy: Policy) -> bool:
    return not policy.depthwise and _is_depthwise(graph, node)


def _few_channels(graph: OnnxGraph, node: NodeProto, policy: Policy) -> bool:
    return graph.learnt(node) and not _is_depthwise(graph, node) and min(graph.channels(node)) < policy.min_channels


#: The first that applies gives the reason; those after ``unsuited`` count on weights.
FLOAT_RULES = (
    FloatRule("projection", lambda g, n, p: g.is_projection(n), "the fixed sum of DFL gives boxes in pixels"),
    FloatRule("softmax", lambda g, n, p: n.op_type == "Softmax", "TensorRT has no int8 Softmax"),
    FloatRule("decoding", _decodes, "no convolution follows; boxes and scores need more than 8 bits"),
    FloatRule("unsuited", _unsuited, "its weights are no float32 initializer, or its input no float32 activation"),
    FloatRule("grouped-transpose", _grouped_transpose, "its output channels lie along two axes of its weights"),
    FloatRule("other-axis", _other_axis, "shares its weights with a node whose channels lie along another axis"),
    FloatRule("head", _head, "no convolution follows; decoding reads what it gives"),
    FloatRule("one-pixel", _one_pixel, "reads one pixel: nothing to win, and attention scales whole channels"),
    FloatRule("depthwise", _depthwise, "depthwise: int8 kernels are slow or do not fuse"),
    FloatRule("few-channels", _few_channels, "too few channels to fill an int8 kernel"),
)


def _weighted(scene: Scene, node: NodeProto) -> Iterable[int]:
    return (0,) if scene.graph.learnt(node) else ()


def _residual(scene: Scene, node: NodeProto) -> Iterable[int]:
    """TensorRT computes an Add with the convolution that gives one of its inputs, and reads the other, the skip branch.

    Where an activation stands between, it computes that with the convolution instead, and the Add by itself: with one
    input left in float, that convolution would write float, and its activation be a kernel of its own.
    """
    if node.op_type != "Add" or not all(map(scene.graph.is_activation, node.input)):
        return ()
    if scene.policy.residual == "both":
        return (0, 1)
    if scene.policy.residual == "none":
        return ()
    direct = [index for index, tensor in enumerate(node.input) if scene.convolved(tensor)]
    if direct:
        # The last convolution before it: the other branch has been written by then.
        last = max(direct, key=lambda index: scene.graph.order(node.input[index]))
        return (1 - last,)
    activated = any(scene.convolved(scene.graph.before_activation(tensor)) for tensor in node.input)
    return (0, 1) if activated else ()


def _concat(scene: Scene, node: NodeProto) -> Iterable[int]:
    if node.op_type != "Concat" or not _runs_along(scene, node):
        return ()
    return range(len(node.input)) if all(map(scene.graph.is_activation, node.input)) else ()


def _moving(scene: Scene, node: NodeProto) -> Iterable[int]:
    if node.op_type == "Resize" and attribute(node, "mode", "nearest") != "nearest":
        return ()
    moves = node.op_type in MOVING and scene.graph.is_activation(node.input[0])
    return (0,) if moves and _runs_along(scene, node) else ()


def _runs_along(scene: Scene, node: NodeProto) -> bool:
    moving = scene.policy.moving
    return moving == "always" or (moving == "wanted" and scene.wanted(node))


def _averaging(scene: Scene, node: NodeProto) -> Iterable[int]:
    return (0,) if scene.policy.averaging and node.op_type in AVERAGING else ()


INT8_RULES = (
    Int8Rule("weighted", _weighted, "convolutions and matrix products are what int8 makes fast"),
    Int8Rule("residual", _residual, "read in int8, but for what stays in the registers of a convolution that adds it"),
    Int8Rule("concat", _concat, "at one scale, its inputs are written where they belong", one_scale=True),
    Int8Rule("moving", _moving, "int8 is a quarter to move, at one scale it stays as it is", one_scale=True),
    Int8Rule("averaging", _averaging, "TensorRT has int8 kernels for it"),
)


def place(
    model: ModelProto | OnnxGraph,
    policy: PolicyName | Policy = "tensorrt",
    keep_float: Collection[str] = (),
) -> Placement:
    """Where quantizers go in a float32 graph.

    Args:
        model: with names for all its nodes, batch normalization folded.
        policy: one of `POLICIES`, or its name.
        keep_float: names of nodes that read no int8, with wildcards.

    Raises:
        AlignError: for a policy or node that does not exist, or a graph that has QDQ nodes already.
    """
    graph = model if isinstance(model, OnnxGraph) else OnnxGraph(model)
    rules = policy if isinstance(policy, Policy) else POLICIES.get(policy)
    if rules is None:
        raise AlignError(f"no placement policy is named {policy!r}", f"one of {', '.join(POLICIES)}")
    there = next((node.name for node in graph.nodes if node.op_type == QUANTIZE), None)
    if there is not None:
        raise AlignError(f"node {there}: the graph is quantized already", "place quantizers in the float32 export")
    float_nodes = _float_nodes(graph, rules, graph.matching(keep_float))
    int8 = _int8_inputs(Scene(graph, rules, float_nodes, {}))
    weights = tuple(
        WeightQuantizer(node.input[1], node.name, graph.weight_axis(node))
        for node in graph.nodes
        if graph.learnt(node) and node.name not in float_nodes
    )
    return Placement(rules.name, _quantizers(graph, int8), weights, float_nodes)


def quantizable(model: ModelProto) -> tuple[str, ...]:
    """The activations that any policy may put a quantizer on, whatever nodes stay float, in the order of the graph."""
    return tuple(quantizer.tensor for quantizer in place(model, "full").activations)


def _float_nodes(graph: OnnxGraph, policy: Policy, named: dict[str, str]) -> dict[str, str]:
    reasons = {}
    for node in graph.nodes:
        if node.name in named:
            reasons[node.name] = f"keep-float: named by {named[node.name]}"
        elif rule := next((rule for rule in FLOAT_RULES if rule.applies(graph, node, policy)), None):
            reasons[node.name] = f"{rule.name}: {rule.why}"
    return reasons


def _int8_inputs(scene: Scene) -> dict[tuple[str, int], str]:
    """(node name, input index) → rule.  Last node first, as whether a node moves int8 depends on those behind it."""
    for node in reversed(scene.graph.nodes):
        if node.name not in scene.float_nodes:
            for rule in INT8_RULES:
                scene.int8.update({(node.name, index): rule.name for index in rule.inputs(scene, node)})
    return scene.int8


def _quantizers(graph: OnnxGraph, int8: dict[tuple[str, int], str]) -> tuple[Quantizer, ...]:
    rules = {rule.name: place for place, rule in enumerate(INT8_RULES)}
    readers: dict[str, list[tuple[str, int]]] = {}
    for name, index in sorted(int8, key=lambda slot: (graph.position[slot[0]], slot[1])):
        readers.setdefault(graph.nodes[graph.position[name]].input[index], []).append((name, index))
    outputs = [name for node in graph.nodes for name in node.output]
    places = {name: place for place, name in enumerate(outputs)}
    tensors = sorted(readers, key=lambda tensor: places.get(tensor, -1))
    group = _groups(graph, int8)
    first: dict[str, str] = {}
    for tensor in tensors:
        first.setdefault(group(tensor), tensor)
    return tuple(
        Quantizer(
            tensor,
            tuple(readers[tensor]),
            first[group(tensor)],
            min((int8[slot] for slot in readers[tensor]), key=rules.__getitem__),
        )
        for tensor in tensors
    )


def _groups(graph: OnnxGraph, int8: dict[tuple[str, int], str]) -> Callable[[str], str]:
    """Joins the inputs and outputs of nodes that move int8; returns what gives the same answer for tensors joined."""
    parents: dict[str, str] = {}

    def root(tensor: str) -> str:
        while tensor in parents:
            tensor = parents[tensor]
        return tensor

    one_scale = {rule.name for rule in INT8_RULES if rule.one_scale}
    for (name, index), rule in int8.items():
        if rule in one_scale:
            node = graph.nodes[graph.position[name]]
            for tensor in filter(graph.is_activation, node.output):
                ours, theirs = root(node.input[index]), root(tensor)
                if ours != theirs:
                    parents[theirs] = ours
    return root
