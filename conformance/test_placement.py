"""QDQ placement: one tiny graph a rule, then what holds in every graph, random and real."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from alignment.errors import AlignError
from alignment.quantize.graph import ACTIVATIONS, OnnxGraph
from alignment.quantize.placement import FLOAT_RULES, INT8_RULES, MOVING, POLICIES, Placement, place, quantizable
from alignment.variant import load_variant, zoo

EMBEDDED = [path.stem for path in zoo() if load_variant(path.stem).embedded]
WIDTH = 32


def tiny(text: str, width: int = WIDTH, **weights: object) -> onnx.ModelProto:
    """A graph of nodes in ONNX's own notation, one a line or ``;``, each named as its first output.

    Its input is ``x``, its output the last line's.  Names with ``w`` are random weights of the shapes given, or
    ``width`` by ``width``, 1 × 1; other keywords are constants.
    """
    nodes = [onnx.parser.parse_node(line.strip()) for line in text.replace("\n", ";").split(";") if line.strip()]
    for node in nodes:
        node.name = node.output[0]
    read = {name for node in nodes for name in node.input}
    values = {name: (width, width, 1, 1) for name in sorted(read) if name.startswith("w")} | weights
    random = np.random.default_rng(0)
    arrays = {
        name: random.normal(0, 0.3, value).astype(np.float32) if isinstance(value, tuple) else np.asarray(value)
        for name, value in values.items()
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width, 8, 8])],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(model).graph.output[0])
    onnx.checker.check_model(model)
    return model


def reads(placement: Placement) -> dict[str, list[str]]:
    """Quantized tensor → who reads it in int8."""
    return {q.tensor: [name for name, _ in q.readers] for q in placement.activations}


class Stays(NamedTuple):
    """A graph and the node of it that a rule leaves float, with the policy switch that puts it into int8, if any."""

    node: str
    text: str
    switch: Mapping[str, object] = MappingProxyType({})
    weights: Mapping[str, object] = MappingProxyType({})


BINS = np.arange(32, dtype=np.float32).reshape(1, 32, 1, 1)
GROUPED = "c = ConvTranspose <group = 2> (x, w); h = Conv (c, w1)"
TWO_AXES = "p = GlobalAveragePool (x); f = Flatten (p); a = Gemm (f, w); b = Gemm <transB = 1> (a, w)"
ATTENTION = "p = GlobalAveragePool (x); c = Conv (p, w); m = Mul (x, c); h = Conv (m, w1)"
DEPTHWISE = "c = Conv <group = 32> (x, w); h = Conv (c, w1)"
NARROW = {"w": (15, 32, 1, 1), "w1": (32, 15, 1, 1)}
FLOAT = {
    "projection": Stays(
        "p", "s = Softmax (x); p = Conv (s, w); h = Conv (p, w1)", {}, {"w": BINS, "w1": (32, 1, 1, 1)}
    ),
    "softmax": Stays("s", "s = Softmax (x); h = Conv (s, w)"),
    "decoding": Stays("e", "h = Conv (x, w); e = Exp (h)"),
    "unsuited": Stays("c", "a = Relu (w); c = Conv (x, a); h = Conv (c, w1)"),
    "grouped-transpose": Stays("c", GROUPED, {}, {"w": (32, 16, 1, 1)}),
    "other-axis": Stays("b", TWO_AXES, {}, {"w": (32, 32)}),
    "head": Stays("h", "c = Conv (x, w); h = Conv (c, w1); e = Exp (h)", {"heads": True}),
    "one-pixel": Stays("c", ATTENTION, {"one_pixel": True}),
    "depthwise": Stays("c", DEPTHWISE, {"depthwise": True}, {"w": (32, 1, 1, 1)}),
    "few-channels": Stays("c", "c = Conv (x, w); h = Conv (c, w1)", {"min_channels": 15}, NARROW),
}


@pytest.mark.parametrize("rule", [rule.name for rule in FLOAT_RULES])
def test_stays_float(rule):
    node, text, switch, weights = FLOAT[rule]
    model = tiny(text, **weights)
    strict = replace(POLICIES["tensorrt"], depthwise=False)
    placement = place(model, strict)
    assert placement.float_nodes[node].startswith(f"{rule}: ")
    assert node not in {name for names in reads(placement).values() for name in names}
    assert node not in {weight.node for weight in placement.weights}
    if switch:
        assert node not in place(model, replace(strict, **switch)).float_nodes


class Int8(NamedTuple):
    """A graph, and who reads what in int8; tensors of one tuple share a scale."""

    text: str
    reads: dict[str, list[str]]
    groups: set[tuple[str, ...]]
    policy: str = "tensorrt"
    weights: Mapping[str, object] = MappingProxyType({})


WIDE, HALF, TWICE = {"w1": (32, 64, 1, 1)}, {"w": (32, 16, 1, 1)}, {"scales": np.float32([1, 1, 2, 2])}
#: The rule, or the rule and what is special.  Each graph ends in a head, which the policy ``tensorrt`` leaves float.
INT8 = {
    "weighted": Int8("y = Conv (x, w); h = Conv (y, w9)", {"x": ["y"]}, {("x",)}),
    # The activation reads c in float, the other convolution in int8.
    "weighted: own scale": Int8(
        "c = Conv (x, w); r = Relu (c); y = Add (r, x); h = Conv (y, w9); i = Conv (c, w2)",
        {"x": ["c"], "c": ["i"], "y": ["h"]},
        {("x",), ("c",), ("y",)},
        "conv-only",
    ),
    "weighted: one quantizer": Int8(
        "a = Conv (x, w); b = Conv (x, w1); y = Mul (a, b); h = Conv (y, w9)", {"x": ["a", "b"]}, {("x",)}
    ),
    "residual": Int8(
        "c = Conv (x, w); y = Add (c, x); h = Conv (y, w9)",
        {"x": ["c", "y"]},
        {("x",)},
    ),
    # SiLU is computed with the convolution, the Add is not: it reads int8 on both sides.
    "residual: behind an activation": Int8(
        "c = Conv (x, w); s = Sigmoid (c); m = Mul (s, c); y = Add (m, x); h = Conv (y, w9)",
        {"x": ["c", "y"], "m": ["y"]},
        {("x",), ("m",)},
    ),
    "residual: one behind an activation": Int8(
        "a = Conv (x, w); r = Relu (a); b = Conv (x, w1); y = Add (b, r); h = Conv (y, w9)",
        {"x": ["a", "b"], "r": ["y"]},
        {("x",), ("r",)},
    ),
    "residual: no convolution": Int8(
        "e = Exp (x); y = Add (e, x); c = Conv (y, w); h = Conv (c, w9)", {"y": ["c"]}, {("y",)}
    ),
    "residual: two convolutions": Int8(
        "a = Conv (x, w); b = Conv (x, w1); y = Add (b, a); h = Conv (y, w9)",
        {"x": ["a", "b"], "a": ["y"]},
        {("x",), ("a",)},
    ),
    "residual: both": Int8(
        "c = Conv (x, w); y = Add (c, x); h = Conv (y, w9)",
        {"x": ["c", "y"], "c": ["y"], "y": ["h"]},
        {("x",), ("c",), ("y",)},
        "full",
    ),
    "concat": Int8(
        "a = Conv (x, w); r = Relu (a); k = Concat <axis = 1> (r, x); y = Conv (k, w1); h = Conv (y, w9)",
        {"x": ["a", "k"], "r": ["k"], "k": ["y"]},
        {("x", "r", "k")},
        weights=WIDE,
    ),
    "concat: read in float": Int8(
        "a = Conv (x, w); k = Concat <axis = 1> (a, x); e = Exp (k); y = Conv (e, w1); h = Conv (y, w9)",
        {"x": ["a"], "e": ["y"]},
        {("x",), ("e",)},
        weights=WIDE,
    ),
    "concat: with a constant": Int8(
        "k = Concat <axis = 1> (x, one); y = Conv (k, w1); h = Conv (y, w9)",
        {"k": ["y"]},
        {("k",)},
        weights={"one": np.ones((1, 32, 8, 8), np.float32), **WIDE},
    ),
    "moving": Int8(
        "r = Relu (x); m = MaxPool <kernel_shape = [2, 2]> (r); y = Conv (m, w); h = Conv (y, w9)",
        {"r": ["m"], "m": ["y"]},
        {("r", "m")},
    ),
    "moving: one after the other": Int8(
        "t = Transpose <perm = [0, 1, 3, 2]> (x); a, b = Split <axis = 1> (t); y = Conv (b, w); h = Conv (y, w9)",
        {"x": ["t"], "t": ["a"], "b": ["y"]},
        {("x", "t", "b")},
        weights=HALF,
    ),
    "moving: nearest": Int8(
        'u = Resize <mode = "nearest"> (x, , scales); y = Conv (u, w); h = Conv (y, w9)',
        {"x": ["u"], "u": ["y"]},
        {("x", "u")},
        weights=TWICE,
    ),
    "moving: not linear": Int8(
        'u = Resize <mode = "linear"> (x, , scales); y = Conv (u, w); h = Conv (y, w9)',
        {"u": ["y"]},
        {("u",)},
        weights=TWICE,
    ),
    "averaging": Int8("p = GlobalAveragePool (x); h = Conv (p, w)", {"x": ["p"], "p": ["h"]}, {("x",), ("p",)}, "full"),
}


@pytest.mark.parametrize("case", INT8)
def test_reads_int8(case):
    text, expected, groups, policy, weights = INT8[case]
    placement = place(tiny(text, **weights), policy)
    assert reads(placement) == expected
    found: dict[str, tuple[str, ...]] = {}
    for quantizer in placement.activations:
        found[quantizer.group] = (*found.get(quantizer.group, ()), quantizer.tensor)
    assert set(found.values()) == groups
    assert set(found) <= set(expected)


def test_every_rule_has_a_graph():
    assert set(FLOAT) == {rule.name for rule in FLOAT_RULES}
    assert {rule.name for rule in INT8_RULES} <= set(INT8)


@pytest.mark.parametrize(
    ("node", "axis", "shape"),
    [
        ("Conv (x, w)", 0, (48, 32, 1, 1)),
        ("ConvTranspose (x, w)", 1, (32, 48, 2, 2)),
        ("Gemm (f, w)", 1, (2048, 48)),
        ("Gemm <transB = 1> (f, w)", 0, (48, 2048)),
        ("MatMul (x, w)", 1, (8, 48)),
    ],
)
def test_weight_axis(node, axis, shape):
    placement = place(tiny(f"f = Flatten (x); y = {node}", w=shape), "full")
    assert [(q.initializer, q.node, q.axis) for q in placement.weights] == [("w", "y", axis)]


@pytest.mark.parametrize(
    "activation",
    [
        *(f"y = {name} (c)" for name in ACTIVATIONS if name not in ("PRelu", "Mish", "Gelu", "HardSwish")),
        "y = PRelu (c, w2)",
        "s = Sigmoid (c); y = Mul (c, s)",
        "s = HardSigmoid (c); y = Mul (s, c)",
        "s = Softplus (c); t = Tanh (s); y = Mul (c, t)",
        "a = Add (c, three); b = Clip (a, zero, six); d = Div (b, six); y = Mul (c, d)",
    ],
)
@pytest.mark.parametrize("policy", ["tensorrt", "conv-only"])
def test_fused_activation(activation, policy):
    constants = {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6), "w2": (32, 1, 1)}
    model = tiny(f"c = Conv (x, w); {activation}; z = Add (y, x); h = Conv (z, w9); i = Conv (h, w8)", **constants)
    expected = {
        "tensorrt": {"x": ["c", "z"], "y": ["z"], "z": ["h"]},
        "conv-only": {"x": ["c"], "z": ["h"], "h": ["i"]},
    }
    assert reads(place(model, policy)) == expected[policy]


@pytest.mark.parametrize(
    "gate",
    [
        "p = GlobalAveragePool (x); c = Conv (p, w); s = Sigmoid (c); y = Mul (x, s)",
        "r = Relu (x); t = Tanh (x); a = Add (r, t); s = Sigmoid (a); y = Mul (x, s)",
    ],
    ids=["attention", "two branches"],
)
def test_gate_is_no_activation(gate):
    assert OnnxGraph(tiny(gate)).before_activation("y") == "y"


def test_quantizer_is_named_after_its_first_rule():
    model = tiny("m = MaxPool <kernel_shape = [2, 2]> (x); a = Conv (m, w); b = Conv (x, w1); h = Conv (b, w9)")
    rules = {q.tensor: q.rule for q in place(model, "full").activations}
    assert rules == {"x": "weighted", "m": "weighted", "b": "weighted"}


@pytest.mark.parametrize("pattern", ["k[0]", "k*", "?[[]0]"])
def test_keep_float(pattern):
    model = tiny("a = Conv (x, w); k = Concat <axis = 1> (a, x); y = Conv (k, w1); h = Conv (y, w9)", w1=(32, 64, 1, 1))
    model.graph.node[1].name = "k[0]"
    placement = place(model, keep_float=[pattern])
    assert placement.float_nodes["k[0]"] == f"keep-float: named by {pattern}"
    assert reads(placement) == {"x": ["a"], "k": ["y"]}
    assert len({q.group for q in placement.activations}) == 2


def test_the_name_of_a_node_means_that_node_alone():
    model = tiny("k0 = Conv (x, w); b = Conv (k0, w1); h = Conv (b, w9)")
    model.graph.node[1].name = "k[0]"
    assert OnnxGraph(model).matching(["k[0]"]) == {"k[0]": "k[0]"}
    assert OnnxGraph(model).matching(["k[[]0]", "k[0-9]"]) == {"k[0]": "k[[]0]", "k0": "k[0-9]"}


def test_what_calibration_does_not_see_is_no_activation():
    """A constant that is computed has no range: neither rule may ask for one."""
    model = tiny(
        "e = Exp (one); k = Add (x, e); y = Conv (k, w); h = Conv (y, w9)", one=np.ones((1, 32, 8, 8), np.float32)
    )
    assert reads(place(model, "full")) == {"k": ["y"], "y": ["h"]}


def test_wrong_usage():
    model = tiny("y = Conv (x, w)")
    with pytest.raises(AlignError, match=r"no placement policy is named 'int8'.*tensorrt, conv-only, full"):
        place(model, "int8")
    with pytest.raises(AlignError, match=r"no node is named 'yy'.*named alike: y"):
        place(model, keep_float=["yy"])
    with pytest.raises(AlignError, match="q: the graph is quantized already"):
        place(tiny("q = QuantizeLinear (x, s, z); y = DequantizeLinear (q, s, z)", s=np.float32(1), z=np.int8(0)))


#: What random graphs are made of: lines in which {0} and {1} are tensors there are, and {n} a number.
PIECES = (
    "t{n} = Conv ({0}, w{n})",
    "t{n} = Relu ({0})",
    "s{n} = Sigmoid ({0}); t{n} = Mul ({0}, s{n})",
    "t{n} = Add ({0}, {1})",
    "t{n} = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({0})",
    "k{n} = Concat <axis = 1> ({0}, {1}); a{n}, t{n} = Split <axis = 1> (k{n})",
    "c{n} = Conv ({0}, w{n}); s{n} = Sigmoid (c{n}); m{n} = Mul (c{n}, s{n}); t{n} = Add (m{n}, {1})",
)


@st.composite
def graphs(draw, width: int = 16) -> onnx.ModelProto:
    """Graphs of up to seven pieces, each reading any two tensors before it; two convolutions read the last ones."""
    tensors, lines = ["x"], []
    for number in range(draw(st.integers(1, 7))):
        first, second = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
        lines.append(draw(st.sampled_from(PIECES)).format(first, second, n=number))
        tensors.append(f"t{number}")
    return tiny("; ".join([*lines, f"y = Conv ({tensors[-1]}, wy)", "h = Conv (y, wh)"]), width)


@settings(deadline=None, max_examples=200)
@given(graphs(), st.sampled_from(list(POLICIES)))
def test_any_graph(model, policy):
    assert_sound(OnnxGraph(model), place(model, policy))


def assert_sound(graph: OnnxGraph, placement: Placement) -> None:
    """What holds of every placement: each tensor once, fused chains unbroken, one scale where values only move."""
    int8 = {slot for q in placement.activations for slot in q.readers}
    group = {q.tensor: q.group for q in placement.activations}
    assert len(group) == len(placement.activations)
    assert len(int8) == sum(len(q.readers) for q in placement.activations)
    assert {weight.node for weight in placement.weights} == {
        node.name for node in graph.nodes if graph.learnt(node) and node.name not in placement.float_nodes
    }
    for node in graph.nodes:
        slots = [index for index in range(len(node.input)) if (node.name, index) in int8]
        assert not (slots and node.name in placement.float_nodes)
        assert not (slots and node.op_type in (*ACTIVATIONS, "Mul")), node.name
        if graph.learnt(node):
            assert slots == ([] if node.name in placement.float_nodes else [0])
        elif node.op_type == "Add" and placement.policy == "tensorrt" and node.name not in placement.float_nodes:
            makers = [graph.makers.get(tensor) for tensor in node.input]
            fused = any(m is not None and m.name in {w.node for w in placement.weights} for m in makers)
            assert len(slots) == 1 if fused else len(slots) in (0, 2)
        elif node.op_type == "Concat" and slots:
            joined = {group[name] for name in (*node.input, *node.output) if name in group}
            assert len(slots) == len(node.input)
            assert len(joined) == 1, node.name
        elif slots and node.op_type in MOVING:
            assert len({group[name] for name in (node.input[0], *node.output) if name in group}) == 1, node.name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded(name, policy):
    pytest.importorskip("mmyolo")
    from alignment.export.onnx_export import exported

    graph = OnnxGraph(onnx.load(exported(load_variant(name)).onnx))
    placement = place(graph, policy)
    assert_sound(graph, placement)
    why = {node.name: placement.float_nodes.get(node.name, "").split(":")[0] for node in graph.nodes}
    last = {node.name for node in graph.nodes if graph.learnt(node) and node.name not in graph.precedes_learnt}
    assert len(last) >= 3
    assert {node for node in why if why[node] == "head"} == (last if policy == "tensorrt" else set())
    assert all(why[node.name] in ("softmax", "decoding") for node in graph.nodes if node.op_type in ("Softmax", "Exp"))


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_any_policy_may_quantize(name):
    """Whatever is kept in float: the residual rule may then take the other branch."""
    pytest.importorskip("mmyolo")
    from alignment.export.onnx_export import exported

    model = onnx.load(exported(load_variant(name)).onnx)
    graph, known, rng = OnnxGraph(model), set(quantizable(model)), np.random.default_rng(0)
    for policy in POLICIES:
        for part in (0.0, 0.05, 0.5):
            kept = [node.name for node in graph.nodes if rng.random() < part]
            placed = {quantizer.tensor for quantizer in place(graph, policy, kept).activations}
            assert placed <= known
            assert placed or part


@given(model=graphs(), policy=st.sampled_from(sorted(POLICIES)), data=st.data())
def test_what_any_policy_may_quantize_of_any_graph(model, policy, data):
    kept = data.draw(st.lists(st.sampled_from([node.name for node in model.graph.node]), max_size=5))
    assert {quantizer.tensor for quantizer in place(model, policy, kept).activations} <= set(quantizable(model))


@pytest.mark.parametrize("name", EMBEDDED)
def test_calibration_sees_what_is_quantized(name):
    pytest.importorskip("mmyolo")
    from alignment.export.onnx_export import exported
    from alignment.quantize.calibrate import activations

    model = onnx.load(exported(load_variant(name)).onnx)
    assert {quantizer.tensor for quantizer in place(model, "full").activations} <= set(activations(model))
