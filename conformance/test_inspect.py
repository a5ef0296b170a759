"""Engines taken apart: the inspector's JSON, the ONNX nodes of each layer, how layers are joined, and files of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import align, one_line, python
from engines import SILU, clean, convolution, engine, layer, quantized, reformat, simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import graphs, tiny

from alignment.case import Case
from alignment.engine.capabilities import missing
from alignment.engine.inspect import parse
from alignment.errors import AlignError
from alignment.inspection.engine_graph import EngineGraph
from alignment.inspection.findings import find
from alignment.inspection.node_graph import NodeGraph
from alignment.inspection.record import inspect
from alignment.inspection.saved import Inspection, load_inspection
from alignment.variant import golden_dir, load_variant, with_quantization

pytestmark = pytest.mark.culprit
#: What `align inspect` saved on GPUs.
RECORDED = sorted((golden_dir() / "engines").glob("*.engine.json"))


def told(**fields: object) -> str:
    return json.dumps({"Layers": [{"Name": "c", "LayerType": "CaskConvolution", **fields}]}).replace("\\u001e", "\x1e")


#: One layer, as versions of TensorRT tell it.
VERSIONS = {
    "8.6": told(
        Inputs=[{"Name": "x", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major linear FP32"}],
        Outputs=[
            {
                "Name": "y",
                "Dimensions": [1, 32, 8, 8],
                "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format",
            }
        ],
        Weights={"Type": "Float", "Count": 864},
        Bias={"Type": "Float", "Count": 0},
        TacticName="sm80_xmma",
        TacticValue="0x5",
        Metadata="[ONNX Layer: /c/Conv]\x1e[ONNX Layer: /c/act[0]/Relu]",
    ),
    "10": told(
        Inputs=[{"Name": "x", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Float"}],
        Outputs=[{"Name": "y", "Dimensions": [1, 32, 8, 8], "Format/Datatype": "Int8"}],
        Weights={"Type": "Float", "Count": 864},
        TacticName="sm80_xmma",
        Metadata="[ONNX Layer: /c/Conv]\x1f[ONNX Layer: /c/act[0]/Relu]",
    ),
    "format apart": told(
        Inputs=[{"Name": "x", "Dimensions": [1, 3, 8, 8], "Format": "Row major linear", "Datatype": "FP32"}],
        Outputs=[{"Name": "y", "Dimensions": [1, 32, 8, 8], "Format": "NC/32HW32", "Datatype": "Int8"}],
        Weights={"Type": "Float", "Count": 864},
        TacticName="sm80_xmma",
        Metadata="[ONNX Layer: /c/Conv][ONNX Layer: /c/act[0]/Relu]",
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_tell_the_same(version):
    (one,) = parse(VERSIONS[version])
    assert [(t.name, t.shape, t.datatype) for t in one.inputs] == [("x", (1, 3, 8, 8), "Float")]
    assert [(t.name, t.shape, t.datatype) for t in one.outputs] == [("y", (1, 32, 8, 8), "Int8")]
    assert (one.weights, one.bias, one.kernel) == ("Float", "", "sm80_xmma")
    assert one.nodes == ("/c/Conv", "/c/act[0]/Relu")


def test_layouts():
    (one,) = parse(VERSIONS["8.6"])
    assert one.inputs[0].layout == "Row major linear"
    assert one.outputs[0].layout == "Thirty-two wide channel vectorized row major"


@pytest.mark.parametrize(
    ("text", "datatype"),
    [
        *(("Row major Int8 format", "Int8"), ("UInt8", "UInt8"), ("BFloat16", "BFloat16"), ("Half", "Half")),
        *(("Row major linear BF16", "BFloat16"), ("FP8", "FP8"), ("Int64", "Int64"), ("N/A due to dynamic shapes", "")),
    ],
)
def test_datatypes(text, datatype):
    (one,) = parse(told(Outputs=[{"Name": "y", "Dimensions": [1], "Format/Datatype": text}]))
    assert one.types == (datatype,)


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("/a/Conv", ("/a/Conv",)),
        ("/a/Conv + PWN(PWN(/a/act/Sigmoid), /a/act/Mul)", ("/a/Conv", "/a/act/Sigmoid", "/a/act/Mul")),
        ("a.weight + a.weight_QuantizeLinear + /a/Conv", ("a.weight", "a.weight_QuantizeLinear", "/a/Conv")),
        ("/a/Conv || /b/Conv", ("/a/Conv", "/b/Conv")),
        ("x_DequantizeLinear_clone_1", ("x_DequantizeLinear",)),
        ("Reformatting CopyNode for Input Tensor 0 to /a/Conv", ()),
        ("{ForeignNode[/a/Softmax.../b/Concat]}", ()),
        ("(Unnamed Layer* 3) [Shuffle] + /a/Reshape", ("(Unnamed Layer* 3) [Shuffle]", "/a/Reshape")),
    ],
)
def test_nodes_in_a_name(name, nodes):
    (one,) = parse(told(Name=name))
    assert one.nodes == nodes


NODES = st.text("abc/._0", min_size=1, max_size=6)


@st.composite
def names(draw, depth: int = 2):
    """A layer's name, and the nodes in it."""
    if depth == 0:
        node = draw(NODES)
        return node, [node]
    parts = draw(st.lists(names(depth=depth - 1), min_size=1, max_size=3))
    nodes = [node for _, inside in parts for node in inside]
    if draw(st.booleans()):
        return " + ".join(name for name, _ in parts), nodes
    return f"PWN({', '.join(name for name, _ in parts)})", nodes


@given(names())
def test_any_name(made):
    name, nodes = made
    (one,) = parse(told(Name=name))
    assert one.nodes == tuple(dict.fromkeys(nodes))


@pytest.mark.parametrize(
    ("fields", "runs_in"),
    [
        (convolution("c", "x:Int8", "y:Half"), "Int8"),
        (convolution("c", "x:Int8", "y:Int8", weights=""), "Int8"),
        (convolution("c", "x:Half", "y:Half", weights="Half"), "Half"),
        (convolution("c", "x:Float", "y:Half", weights="Half"), "Half"),
        (convolution("w + w_QuantizeLinear + c", "", "y:Half", weights=""), "Int8"),
        (layer("d", "CaskDeconvolutionV2", "x:Int8", "y:Float"), "Int8"),
        (layer("p", "PointWiseV2", "x:Half", "y:Int8"), "Half"),
        (layer("p", "CaskPooling", "x:Int8", "y:Int8"), "Int8"),
        (layer("a", "ElementWise", "x:Half z:Float", "y:Half"), "Float"),
    ],
    ids=[
        "int8 to half",
        "no weights told",
        "half",
        "half from float",
        "outputs only",
        "transposed",
        "pointwise",
        "pooling",
        "wide",
    ],
)
def test_precision_of_a_layer(fields, runs_in):
    (one,) = parse(json.dumps({"Layers": [fields]}))
    assert one.runs_in == runs_in


def test_nodes_are_mapped_folded_or_unknown():
    text = "c = Conv(x, w0); r = Relu(c); k = Concat<axis = 1>(r, r); f = Reshape(k, size); g = Neg(f)"
    text += "; t = Add(one, one); s = Shape(g); h = Exp(g); l = Clip(h, t)"
    model = tiny(text, one=np.float32(1), size=np.int64([1, 64, 64]))
    found = engine(
        convolution("c + r", "x:Half", "r:Half", ("c", "r"), "Half"),
        layer("g", "PointWiseV2", "k:Half", "g:Half"),
        graph=model,
    ).engine_graph.precisions
    assert {name: (real.layer.name, real.runs_in) for name, real in found.mapped.items()} == {
        **dict.fromkeys(("c", "r"), ("c + r", "Half")),
        "g": ("g", "Half"),
    }
    assert found.folded == {"k": "view", "f": "view", "t": "constant", "s": "constant"}
    assert found.unknown == ("h", "l")
    assert found.counts() == {"Half": 3, "view": 2, "constant": 2, "unknown": 2}


@settings(deadline=None, max_examples=60)
@given(graphs(), st.sampled_from(["tensorrt", "conv-only", "full"]))
def test_any_graph_is_mapped_throughout(model, policy):
    """Every node in exactly one part, each to its own layer; layers joined as the graph joins them."""
    made = simulated(quantized(model, policy))
    graph, found = made.graph, made.engine_graph.precisions
    parts = [*found.mapped, *found.folded, *found.unknown]
    assert sorted(parts) == sorted(node.name for node in graph.nodes)
    assert not found.unknown
    assert all(real.layer.name == name for name, real in found.mapped.items())
    place = {one.name: index for index, one in enumerate(made.engine_graph.layers)}
    for name, index in place.items():
        makers = {graph.makers[t].name for t in graph.by_name[name].inputs if t in graph.makers and t in graph.varying}
        assert {made.engine_graph.layers[before].name for before in made.engine_graph.before[index]} == makers


def test_a_region_of_myelin():
    """8.6 names the first and last node of what Myelin compiled; those between that no other layer has belong to it."""
    model = tiny("c = Conv(x, w0); e = Exp(c); a = Add(e, e); n = Neg(a); o = Add(n, c); d = Conv(o, w1)")
    found = engine(
        convolution("c", "x:Float", "c:Float", weights="Float"),
        layer("{ForeignNode[e...o]}", "Myelin", "c:Float", "o:Float", ()),
        convolution("d", "o:Float", "d:Float", weights="Float"),
        graph=model,
    ).engine_graph
    assert found.nodes == [("c",), ("e", "a", "n", "o"), ("d",)]
    assert not found.precisions.unknown


def test_layers_are_joined_past_what_vanished():
    """A Split that is a view, and a Concat of which one input is written in place."""
    model = quantized(
        tiny("c = Conv(x, w0); p, q = Split<axis = 1>(c); k = Concat<axis = 1>(p, q); d = Conv(k, w1)"), "full"
    )
    found = engine(
        convolution("c", "x:Int8", "c_quantized:Int8"),
        reformat("k_p_dequantized_clone_0 copy", "p_dequantized_clone_0:Int8", "k_dequantized:Int8"),
        convolution("d", "k_quantized:Int8", "d:Float"),
        graph=model,
    ).engine_graph
    assert found.nodes[1] == ("k",)
    assert found.before == [[], [0], [1]]


def test_layers_are_joined_past_a_copy_that_only_one_input_needs():
    """The other input of the Concat is written in place, and read by a layer of its own beside that."""
    text = "p = Conv(x, w0); q = MaxPool<kernel_shape = [1, 1]>(p); k = Concat<axis = 1>(p, q); d = Conv(k, w1)"
    found = engine(
        convolution("p", "x:Int8", "p_quantized:Int8"),
        layer("q", "CaskPooling", "p_quantized:Int8", "q_quantized:Int8"),
        reformat("k_q_dequantized copy", "q_quantized:Int8", "k_quantized:Int8"),
        convolution("d", "k_quantized:Int8", "d:Float"),
        graph=quantized(tiny(text, w1=(32, 64, 1, 1))),
    ).engine_graph
    assert found.before == [[], [0], [1], [0, 2]]


def test_a_file_comes_back(tmp_path):
    made = clean()
    kept = Inspection("a", made.text, {"d": 0.25}, made.graph, ("c",), {"d": "head"}, {"tensorrt": "8.6.1"})
    kept.save(tmp_path / "a.json")
    assert load_inspection(tmp_path / "a.json") == kept
    assert kept.milliseconds(2) == 0.25


def test_the_inspectors_own_file(tmp_path):
    """What trtexec --exportLayerInfo writes; the graph beside it tells the rest."""
    made = clean()
    (tmp_path / "raw.json").write_text(made.text)
    alone = load_inspection(tmp_path / "raw.json")
    assert (alone.name, len(alone.engine_graph.layers)) == ("raw", 3)
    assert {finding.kind for finding in find(alone)} == {"reformat"}
    assert load_inspection(tmp_path / "raw.json", made.graph).wanted == ("c", "d")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"Layers": 3}', '{"Layers": []}', '{"format": 9}', '{"format": 1, "name": "a"}', '"Layers"'],
)
def test_what_is_no_engine_is_refused(tmp_path, text):
    path = tmp_path / "engine.json"
    path.write_text(text)
    with pytest.raises(AlignError, match=r"engine\.json"):
        load_inspection(path)
    result = align("inspect", path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "engine.json" in one_line(result.stderr)


def test_the_command_on_files(tmp_path):
    clean().save(tmp_path / "a.engine.json")
    result = align("inspect", tmp_path / "a.engine.json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "reformat: Float → Int8: the image writes float, c reads int8; mend: none" in result.output
    findings = json.loads((tmp_path / "a.findings.json").read_text())
    assert [finding["kind"] for finding in findings] == ["reformat"]
    assert (tmp_path / "a.svg").read_text().startswith("<svg")


def test_files_of_one_case_are_told_apart_by_their_names(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "a.engine.json", tmp_path / "b.engine.json", tmp_path / "other" / "a.engine.json"]
    for path in paths:
        clean().save(path)
    assert align("inspect", *paths[:2], "--out", tmp_path / "both").exit_code == 0
    names = ["a-against-b.html", "a-against-b.svg", "a.findings.json", "b.findings.json"]
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == names
    result = align("inspect", paths[0], paths[2], "--out", tmp_path / "twice")
    assert result.exit_code == 2
    assert "two engines are both named a" in one_line(result.stderr)
    assert not (tmp_path / "twice").exists() or not list((tmp_path / "twice").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        *(("a.json", "b.json", "c.json"), ("a.json", "yolov8_embedded"), ("yolov8_n", "yolov8_s"), ("none.json",)),
        *(("a.json", "--against", "fp16"), ("yolov8_embedded", "--precision", "fp4")),
        *(("yolov8_embedded", "--route", "x"), ("yolov8_embedded", "--against", "int8/x")),
    ],
    ids=str,
)
def test_wrong_usage(tmp_path, arguments):
    result = align("inspect", *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert one_line(result.stderr).startswith("align: ")
    assert list(tmp_path.iterdir()) == []


def test_a_variant_needs_a_gpu(tmp_path):
    if missing() is None:
        pytest.skip("there is one")
    pytest.importorskip("mmyolo")
    result = align("inspect", "yolov8_embedded", "--precision", "fp16", "--out", tmp_path)
    assert result.exit_code == 2
    assert "tensorrt" in one_line(result.stderr)


def test_the_profiler_adds_up_by_run(monkeypatch):
    class Base:
        def __init__(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "tensorrt", type("trt", (), {"IProfiler": Base}))
    from alignment.runners.tensorrt import _profiler

    runs: list[dict[str, float]] = [{}]
    profiler = _profiler(runs)
    profiler.report_layer_time("a", 1.0)
    profiler.report_layer_time("a", 0.5)
    runs.append({})
    profiler.report_layer_time("a", 2.0)
    assert runs == [{"a": 1.5}, {"a": 2.0}]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.removesuffix(".engine.json"))
def test_recorded_engines(path: Path):
    """What holds of every engine: no node is lost, no layer stands apart, every Reformat is told of."""
    made = load_inspection(path)
    graph = made.engine_graph
    found = graph.precisions
    assert sorted([*found.mapped, *found.folded, *found.unknown]) == sorted(node.name for node in made.graph.nodes)
    assert not found.unknown
    told_of = {finding.place for finding in find(made) if finding.kind == "reformat"}
    assert told_of == {place for place, one in enumerate(graph.layers) if one.kind == "Reformat"}
    assert {one.name for one in graph.layers} >= set(made.times)
    for one, before in zip(graph.layers, graph.before, strict=True):
        if one.inputs and not before:
            assert {tensor.name for tensor in one.inputs} & set(made.graph.inputs), one.name


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["int8", "fp16"])
def test_an_engine_of_this_gpu(tmp_path, case):
    if reason := missing():
        pytest.skip(reason)
    pytest.importorskip("mmyolo")
    variant = with_quantization(load_variant("yolov8_embedded"), {"images": 4})
    made = inspect(variant, Case(variant.name, "tensorrt", case, "qdq" if case == "int8" else None), 0)
    made.save(tmp_path / "a.json")
    graph = load_inspection(tmp_path / "a.json").engine_graph
    assert not graph.precisions.unknown
    assert set(made.times) <= {one.name for one in graph.layers}
    assert sum(made.times.values()) > 0
    assert made.provenance["latency_ms"] > 0
    wanted = [graph.precisions.mapped[name].runs_in for name in made.wanted if name in graph.precisions.mapped]
    assert wanted.count("Int8") >= 0.8 * len(wanted) if case == "int8" else not wanted


def test_help_needs_no_backend():
    done = python("-c", "import sys, alignment.commands.inspect; print({'torch', 'tensorrt'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_a_graph_that_bites_its_tail_is_refused():
    looped = {"tensors": ["x", "y"], "nodes": [["q", "QuantizeLinear", [0, 1], [1]]], "inputs": [0], "outputs": [1]}
    with pytest.raises(ValueError, match="node q reads what itself or a later one makes"):
        NodeGraph.from_json(looped)


def test_graph_as_json():
    graph = NodeGraph.of(quantized(tiny(SILU)))
    assert NodeGraph.from_json(json.loads(json.dumps(graph.to_json()))) == graph
    assert EngineGraph([], graph).precisions.counts()["unknown"] == 4
    assert all(len(node.inputs) == 1 for node in graph.nodes if node.op == "QuantizeLinear")
