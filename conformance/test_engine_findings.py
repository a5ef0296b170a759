"""Findings in engines: each planted where it must be found, and where it must not; and those of a recorded engine."""

from __future__ import annotations

import onnx
import pytest
from engines import SILU, clean, convolution, engine, layer, quantized, reformat, simulated
from hypothesis import given, settings
from test_placement import graphs, tiny

from alignment.inspection.findings import KINDS, find
from alignment.inspection.saved import Inspection, load_inspection
from alignment.variant import golden_dir

pytestmark = pytest.mark.culprit


def test_a_clean_engine():
    """Only the image is quantized, which cannot be otherwise."""
    (only,) = find(clean())
    assert (only.kind, only.cause, only.why) == (
        "reformat",
        "x_QuantizeLinear",
        "Float → Int8: the image writes float, c reads int8",
    )
    assert only.mend.startswith("none")
    assert clean().engine_graph.precisions.counts() == {"Float": 1, "Int8": 4, "quantizer": 7}


def one(inspection: Inspection, kind: str):
    found = [finding for finding in find(inspection) if finding.kind == kind]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("kinds", "cause", "why", "mend"),
    [
        (("Float", "Int8"), "d", "Float → Int8: c writes float, d reads int8", "let c write int8"),
        (("Int8", "Half"), "d", "Int8 → Half: c writes int8, d reads float", "let d read int8"),
        (("Half", "Float"), "d", "Half → Float: c writes Half, d reads Float", "float32_nodes"),
        (("Int8", "Int8:NHWC"), "", "want different layouts", "higher level"),
    ],
    ids=["type to int8", "type from int8", "float types", "layout only"],
)
def test_a_reformat(kinds, cause, why, mend):
    source, target = (kind.partition(":")[0] for kind in kinds)
    found = one(
        engine(
            convolution("c", "x:Int8", f"c:{kinds[0]}", weights=source),
            reformat("Reformatting CopyNode for Input Tensor 0 to d", f"c:{kinds[0]}", f"r:{kinds[1]}"),
            convolution("d", f"r:{kinds[1]}", f"d:{target}", weights=target),
            graph=tiny("c = Conv(x, w0); d = Conv(c, w1)"),
        ),
        "reformat",
    )
    assert found.cause == cause
    assert why in found.why
    assert mend in found.mend
    assert found.nodes == ("c", "d")


def test_quantizers_as_reformats():
    model = quantized(tiny("c = Conv(x, w0); e = Exp(c); d = Conv(e, w1)"), "conv-only")
    found = one(
        engine(
            convolution("c", "x_quantized:Int8", "c:Float"),
            layer("e", "PointWiseV2", "c:Float", "e:Float"),
            reformat("e_QuantizeLinear", "e:Float", "e_quantized:Int8", "QDQ"),
            convolution("d", "e_quantized:Int8", "d:Float"),
            graph=model,
        ),
        "reformat",
    )
    assert (found.cause, found.nodes) == ("e_QuantizeLinear", ("e", "d"))


@pytest.mark.parametrize(
    ("text", "tensor", "why"),
    [
        ("c = Conv(x, w0); p, q = Split<axis = 1>(c); k = Concat<axis = 1>(p, q)", "p", "a part of what p gives"),
        ("p = Conv(x, w0); q = MaxPool<kernel_shape = [1, 1]>(p); k = Concat<axis = 1>(p, q)", "p", "read by q too"),
        ("p = Conv(x, w0); q = Conv(x, w1); k = Concat<axis = 1>(p, q)", "q", "q is copied to its place in k"),
    ],
    ids=["Split", "another reader", "alone"],
)
def test_copies_of_a_concat(text, tensor, why):
    copy = reformat(f"k_{tensor}_dequantized_clone_1 copy", f"{tensor}_dequantized_clone_1:Int8", "k:Int8")
    found = one(engine(copy, graph=quantized(tiny(f"{text}; h = Conv(k, wh)", wh=(32, 64, 1, 1)))), "reformat")
    assert found.cause == "k"
    assert why in found.why


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("ends", ["int8", "float before", "float behind", "the engine's end", "an output too"])
def test_float_islands(length, ends):
    """Float layers between int8 ones, past a Reformat; none where a side is float too, or the engine ends there."""
    middle = ["e", "f"][:length]
    layers = [
        convolution("c", "x:Int8", "c:Int8") if ends != "float before" else layer("c", "SoftMax", "x:Half", "c:Half"),
        reformat("in", "c:Int8", "c1:Half"),
        layer("e", "PointWiseV2", "c1:Half", "e:Half"),
        layer("f", "PointWiseV2", "e:Half", "f:Half"),
        reformat("out", f"{middle[-1]}:Half", "q:Int8"),
        convolution("d", "q:Int8", "d:Int8") if ends != "float behind" else layer("d", "SoftMax", "q:Half", "d:Half"),
    ]
    if length == 1:
        del layers[3]
    if ends == "the engine's end":
        layers = layers[:-2]
    model = quantized(tiny("c = Conv(x, w0); e = Exp(c); f = Neg(e); d = Conv(f, w1)"), "conv-only")
    if ends == "an output too":
        model.graph.output.append(onnx.helper.make_tensor_value_info(middle[-1], onnx.TensorProto.FLOAT, None))
    found = [finding for finding in find(engine(*layers, graph=model)) if finding.kind == "float-island"]
    if ends != "int8":
        assert found == []
        return
    (island,) = found
    assert island.nodes == tuple(middle)
    assert island.cause == "e"
    assert "e reads no int8" in island.why


def test_an_island_that_placement_keeps():
    model = quantized(tiny("c = Conv(x, w0); e = Conv(c, w1); d = Conv(e, w2)"), "conv-only", ["e"])
    plain = engine(
        convolution("c", "x:Int8", "c:Int8"),
        convolution("e", "c:Half", "e:Half", weights="Half"),
        convolution("d", "e:Int8", "d:Int8"),
        graph=model,
    )
    made = Inspection("kept", plain.text, {"e": 0.5}, plain.graph, plain.wanted, {"e": "keep-float: named by e"})
    found = one(made, "float-island")
    assert (found.cause, found.milliseconds) == ("e", 0.5)
    assert "keep-float: named by e" in found.why


def with_pair(model: onnx.ModelProto, tensor: str, reader: str) -> onnx.ModelProto:
    """A QDQ graph with a further pair, where no placement puts one: before a reader that is no convolution."""
    nodes = list(model.graph.node)
    place = next(index for index, node in enumerate(nodes) if node.name == reader)
    scale, zero = next(node.input[1:3] for node in nodes if node.op_type == "QuantizeLinear")
    nodes[place].input[0] = f"{tensor}_dequantized"
    make, names = onnx.helper.make_node, (f"{tensor}_quantized", f"{tensor}_dequantized")
    pair = [
        make("QuantizeLinear", [tensor, scale, zero], names[:1], f"{tensor}_QuantizeLinear"),
        make("DequantizeLinear", [names[0], scale, zero], names[1:], f"{tensor}_DequantizeLinear"),
    ]
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    changed.graph.node.extend([*nodes[:place], *pair, *nodes[place:]])
    return changed


UNFUSED = {
    "a quantizer between": (
        "c = Conv(x, w0); r = Relu(c); d = Conv(r, w1)",
        "c_QuantizeLinear",
        "quantize behind the activation",
    ),
    "a second reader": (
        "c = Conv(x, w0); r = Relu(c); e = Exp(c); a = Mul(r, e); d = Conv(a, w1)",
        "e",
        "let e read behind the activation",
    ),
    "an Add with it": (
        "z = Conv(x, w2); c = Conv(x, w0); r = Relu(c); a = Add(r, z); d = Conv(a, w1)",
        "a",
        "quantize both inputs of a",
    ),
    "a float reader": ("c = Conv(x, w0); r = Relu(c); e = Exp(r); d = Conv(e, w1)", "e", "let e read int8"),
    "nothing": ("c = Conv(x, w0); r = Relu(c); d = Conv(r, w1)", "", "build at a higher level"),
}


@pytest.mark.parametrize("why", UNFUSED)
def test_unfused_activations(why):
    text, cause, mend = UNFUSED[why]
    model = quantized(tiny(text), "conv-only")
    if why == "a quantizer between":
        model = with_pair(model, "c", "r")
    fused = ("r", "a") if why == "an Add with it" else ("r",)
    found = one(
        engine(
            convolution("c", "x_quantized:Int8", "c:Half"),
            layer("PWN(r)", "PointWiseV2", "c:Half", f"{fused[-1]}:Half", fused),
            layer("e", "PointWiseV2", "c:Half r:Half", "e:Half"),
            graph=model,
        ),
        "unfused-activation",
    )
    assert found.cause == cause
    assert mend in found.mend
    assert found.nodes == fused


def test_an_activation_behind_a_float_convolution_is_none():
    model = quantized(tiny("c = Conv(x, w0); r = Relu(c); d = Conv(r, w1)"), "conv-only", ["c"])
    layers = convolution("c", "x:Half", "c:Half", weights="Half"), layer("r", "PointWiseV2", "c:Half", "r:Half")
    assert not [finding for finding in find(engine(*layers, graph=model)) if finding.kind == "unfused-activation"]


def test_an_unfused_activation_is_no_island_as_well():
    layers = (
        convolution("c", "x:Int8", "c:Half"),
        layer("r", "PointWiseV2", "c:Half", "r:Half"),
        convolution("d", "r:Int8", "d:Int8"),
    )
    found = find(engine(*layers, graph=quantized(tiny("c = Conv(x, w0); r = Relu(c); d = Conv(r, w1)"))))
    assert [finding.kind for finding in found] == ["unfused-activation"]


def test_an_unfused_activation_without_a_graph():
    layers = convolution("c", "x:Int8", "c:Half"), layer("PWN(r)", "PointWiseV2", "c:Half", "r:Int8", ())
    assert "--onnx" in one(engine(*layers), "unfused-activation").mend


@pytest.mark.parametrize("weights", ["Int8", "Half"])
def test_wanted_in_int8(weights):
    kind = "Int8" if weights == "Int8" else "Half"
    made = engine(
        convolution("c + PWN(s, m)", f"x:{kind}", "m:Int8", ("c", "s", "m"), weights),
        convolution("d", "m:Int8", "d:Float"),
        graph=quantized(tiny(SILU)),
    )
    found = [finding for finding in find(made) if finding.kind == "not-int8"]
    assert [(finding.cause, finding.why) for finding in found] == (
        [] if weights == "Int8" else [("c", "wanted in int8, runs in Half")]
    )


@settings(deadline=None, max_examples=40)
@given(graphs())
def test_findings_of_any_engine(model):
    """Every Reformat is told of once; places, nodes and causes are those of the engine and its graph."""
    made = simulated(quantized(model, "full"))
    found = find(made)
    layers = made.engine_graph.layers
    told_of = [finding.place for finding in found if finding.kind == "reformat"]
    assert told_of == [place for place, one in enumerate(layers) if one.kind == "Reformat"]
    for finding in found:
        assert finding.kind in KINDS
        assert layers[finding.place].name == finding.layer
        assert {*finding.nodes, finding.cause} - {""} <= made.graph.by_name.keys()
        assert finding.why
        assert finding.mend
        assert finding.milliseconds == made.times[finding.layer]


def test_a_recorded_engine_node_by_node():
    """TensorRT 8.6 on an H100, yolov8_n at level 0: what is not fused is what feeds the head's float convolutions."""
    made = load_inspection(golden_dir() / "engines" / "yolov8_n-tensorrt-int8-qdq-level0.engine.json")
    counts = made.engine_graph.precisions.counts()
    assert counts == {"Float": 73, "Int8": 163, "Half": 15, "quantizer": 265, "view": 9}
    found = find(made)
    last = "/detector/bbox_head/head_module/{0}_preds.{1}/{0}_preds.{1}.2/Conv"
    heads = {last.format(branch, level) for branch in ("cls", "reg") for level in range(3)}
    assert {finding.cause for finding in found if finding.kind == "unfused-activation"} == heads
    copies = [finding for finding in found if finding.kind == "reformat" and finding.layer.endswith(" copy")]
    assert copies
    assert all(made.graph.by_name[finding.cause].op == "Concat" for finding in copies)


def test_a_part_of_a_concat_is_read_before_the_rest_is_written():
    """TensorRT names every part of a Concat that is written in place after the whole."""
    reads = ["x", "whole", "b", "whole"]
    writes = ["whole", "b", "whole", "d"]
    layers = [
        convolution(name, f"{source}:Int8", f"{target}:Int8")
        for name, source, target in zip("abcd", reads, writes, strict=True)
    ]
    assert engine(*layers).engine_graph.before == [[], [0], [1], [0, 2]]
