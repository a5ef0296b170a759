"""The float16 form of a graph: what it keeps, what is float16 in it, and that a CPU really rounds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from alignment.case import Case, cases_of
from alignment.engine import build
from alignment.engine.build import BuildOptions
from alignment.engine.capabilities import Capabilities
from alignment.errors import AlignError
from alignment.export.float16 import float16_model, float32_nodes, split
from alignment.export.onnx_export import ExportedModel, exported
from alignment.golden import DEFAULTS
from alignment.layers import mark_outputs
from alignment.runners import tensorrt
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.open import open_model
from alignment.variant import load_variant

IMAGE = np.random.default_rng(0).random((1, 3, 320, 320), np.float32)


@pytest.fixture(scope="module")
def model() -> ExportedModel:
    """The embedded variant's ONNX file and node map."""
    pytest.importorskip("mmyolo")
    return exported(load_variant("yolov8_embedded"))


@pytest.fixture(params=[True, False], ids=["native", "rounded"])
def native(request) -> bool:
    return request.param


def types_of(graph: onnx.GraphProto) -> dict[str, int]:
    """Element type of each tensor by name."""
    values = (*graph.input, *graph.output, *graph.value_info)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {w.name: w.data_type for w in graph.initializer}


def test_names_of_nodes_weights_inputs_and_outputs_stay(model, native):
    single, half = onnx.load(model.onnx), onnx.load(float16_model(model.onnx, native))
    assert types_of(onnx.GraphProto(input=half.graph.input, output=half.graph.output)) == types_of(
        onnx.GraphProto(input=single.graph.input, output=single.graph.output)
    )
    assert half.metadata_props == single.metadata_props
    operators = {node.name: node.op_type for node in half.graph.node}
    assert {node.name: node.op_type for node in single.graph.node}.items() <= operators.items()
    entries = json.loads(model.node_map.read_text())
    weights = {w.name: numpy_helper.to_array(w) for w in half.graph.initializer}
    originals = {w.name: numpy_helper.to_array(w) for w in single.graph.initializer}
    mapped = [entry["weight"] for entry in entries.values() if "weight" in entry]
    assert len(mapped) > 60
    for name in mapped:
        assert weights[name].dtype == np.float16
        # The smallest number of float16 stands for those that would become 0.
        np.testing.assert_allclose(weights[name].astype(np.float32), originals[name], rtol=2.0**-11, atol=6e-8)


def test_the_native_graph_is_float16_up_to_the_last_convolutions_and_float32_behind(model):
    half = onnx.shape_inference.infer_shapes(onnx.load(float16_model(model.onnx)), check_type=True, strict_mode=True)
    types = types_of(half.graph)
    before, decoding = split(onnx.load(model.onnx).graph)
    last = {"/detector/bbox_head/head_module/reg_preds.2/reg_preds.2.2/Conv", "/detector/neck/upsample_layers.0/Resize"}
    assert last <= {node.name for node in before}
    assert {"Softmax", "Concat", "Sub"} <= {node.op_type for node in decoding}
    converted = {node.name: node for node in half.graph.node}
    for nodes, expected in ((before, TensorProto.FLOAT16), (decoding, TensorProto.FLOAT)):
        found = {types[name] for node in nodes for name in converted[node.name].output}
        assert found == {expected}


def test_on_a_cpu_every_tensor_before_decoding_is_rounded(model, tmp_path):
    graph = onnx.load(model.onnx)
    before, decoding = split(graph.graph)
    made = [name for node in (*before, *decoding) for name in node.output]
    marked = tmp_path / "marked.onnx"
    onnx.save(mark_outputs(graph, made), marked)
    values = OnnxRuntimeRunner(float16_model(marked, native=False)).run(IMAGE)
    for node in before:
        for name in node.output:
            assert np.array_equal(values[name], values[name].astype(np.float16).astype(np.float32)), name
    assert not np.array_equal(values["boxes"], values["boxes"].astype(np.float16))


def test_it_is_converted_once_and_again_after_a_change(model, monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    first = float16_model(model.onnx)
    stamp = first.stat().st_mtime_ns
    assert float16_model(model.onnx) == first
    assert first.stat().st_mtime_ns == stamp
    graph = onnx.load(model.onnx)
    stem = next(node for node in graph.graph.node if node.op_type == "Conv")
    weights = next(w for w in graph.graph.initializer if w.name == stem.input[1])
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) + 1, weights.name))
    changed = tmp_path / model.onnx.name
    onnx.save(graph, changed)
    assert len({first, float16_model(model.onnx, native=False), float16_model(changed)}) == 3


def test_kept_nodes_are_float32_and_so_is_what_goes_between_them(model, native):
    graph = onnx.load(model.onnx).graph
    keep = [*float32_nodes(model.onnx, ["*/stage2/stage2.0/*", "*/stage2/stage2.1/main_conv/conv/Conv"])]
    half = onnx.load(float16_model(model.onnx, native, keep)).graph
    makers = {name: node for node in half.node for name in node.output}
    weights = {w.name: w for w in half.initializer}
    original = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    kept = [node for node in half.node if node.name in keep and "stage2" in node.name]
    assert len(kept) == 4
    for node in kept:
        for name in node.input:
            if name in weights:
                assert np.array_equal(numpy_helper.to_array(weights[name]), original[name.removesuffix("_exact")])
            else:
                maker = makers[name]
                assert maker.name in keep or node is kept[0], f"{node.name} reads {maker.name}"
    fast, slow = (OnnxRuntimeRunner(float16_model(model.onnx, native, k)).run(IMAGE)["boxes"] for k in (keep, []))
    assert not np.array_equal(fast, slow)


def test_with_every_node_kept_it_is_the_float32_graph(model, native):
    keep = float32_nodes(model.onnx, ["*"])
    found = OnnxRuntimeRunner(float16_model(model.onnx, native, keep), optimize=False).run(IMAGE)
    expected = OnnxRuntimeRunner(model.onnx, optimize=False).run(IMAGE)
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= 1e-4 * np.abs(values).max()


def tiny(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], output: list) -> Path:
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "tiny", [image], [answer], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_constant_that_both_parts_read_stays_exact_where_decoding_reads_it(tmp_path, native):
    third = np.array(1 / 3, np.float32)
    nodes = [
        helper.make_node("Mul", ["images", "third"], ["a"], "scale"),
        helper.make_node("Conv", ["a", "w"], ["b"], "conv"),
        helper.make_node("Mul", ["b", "zero"], ["c"], "nothing"),
        helper.make_node("Add", ["c", "third"], ["y"], "decode"),
    ]
    weights = {"third": third, "w": np.ones((1, 3, 1, 1), np.float32), "zero": np.array(0, np.float32)}
    path = tiny(tmp_path / "shared.onnx", nodes, weights, ["batch", 1, 8, 8])
    found = OnnxRuntimeRunner(float16_model(path, native)).run(np.ones((1, 3, 8, 8), np.float32))
    assert np.all(found["y"] == third)
    assert third != np.float16(third)


def test_a_graph_without_convolutions_is_all_float16(tmp_path):
    path = tiny(tmp_path / "plain.onnx", [helper.make_node("Exp", ["images"], ["y"], "exp")], {}, ["batch", 3, 8, 8])
    found = OnnxRuntimeRunner(float16_model(path, native=False)).run(np.full((1, 3, 8, 8), 0.3, np.float32))
    assert np.all(found["y"] == np.exp(np.float16(0.3).astype(np.float32)).astype(np.float16))


def damaged(path: Path) -> None:
    path.write_bytes(b"\xff\xff no protobuf")


def refuse(*_: object, **__: object) -> None:
    raise ValueError("no such type")


@pytest.mark.parametrize("change", [damaged, Path.unlink], ids=["damaged", "missing"])
def test_a_bad_file_is_an_error_that_names_it(model, tmp_path, change: Callable[[Path], None]):
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.onnx.read_bytes())
    change(path)
    with pytest.raises(AlignError, match=r"bad\.onnx"):
        float16_model(path)


def test_what_cannot_be_converted_leaves_nothing(model, monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_, full_check=False: refuse() if full_check else None)
    with pytest.raises(AlignError, match="cannot be converted to float16: ValueError: no such type"):
        float16_model(model.onnx)
    assert not list(tmp_path.glob("entries/float16/*"))


@pytest.mark.parametrize(("version", "typed"), [("8.6.1", False), ("10.16.1", False), ("11.4.0", True)])
def test_tensorrt_gets_a_float16_graph_where_it_has_no_flag_for_it(model, monkeypatch, version, typed):
    monkeypatch.setattr(Capabilities, "current", classmethod(lambda cls: cls(version)))
    monkeypatch.setattr(tensorrt, "TensorRTRunner", lambda path, options: (path, options))
    decoding = float32_nodes(model.onnx, [])
    path, options = open_model(model.onnx, Case("yolov8_embedded", "tensorrt", "fp16"), 4, decoding)
    assert path == (float16_model(model.onnx, keep=decoding) if typed else model.onnx)
    assert options == BuildOptions(
        precision="fp16", strongly_typed=typed, float32_nodes=() if typed else decoding, opt_batch=4, max_batch=4
    )
    path, options = open_model(model.onnx, Case("yolov8_embedded", "tensorrt", "fp32"))
    assert (path, options) == (model.onnx, BuildOptions())


@pytest.mark.parametrize(("version", "flags"), [("8.6.1", None), ("10.16.1", 0b11), ("11.4.0", 0)])
def test_a_strongly_typed_network_is_asked_for_where_that_is_a_choice(monkeypatch, version, flags):
    names = SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(NetworkDefinitionCreationFlag=names))
    ability = Capabilities.of(version)
    options = BuildOptions(precision="fp16", strongly_typed=True)
    if flags is None:
        with pytest.raises(AlignError, match=r"8\.6\.1 has no strongly typed networks"):
            build._network_flags(options, ability)
    else:
        assert build._network_flags(options, ability) == flags
    assert build._network_flags(BuildOptions(), ability) == int(not version.startswith("11"))


def test_a_float32_graph_is_no_strongly_typed_float16(model):
    build._require_float16(float16_model(model.onnx))
    with pytest.raises(AlignError, match="nothing in it is float16"):
        build._require_float16(model.onnx)


def test_float16_cases_are_those_of_the_deployed_backends():
    variant = load_variant("yolov8_embedded")
    cases = cases_of(variant, ("torch", "onnxruntime", "tensorrt"), ("fp32", "fp16"))
    assert [case.id.removeprefix("yolov8_embedded-") for case in cases] == [
        "torch-fp32",
        "onnxruntime-fp32",
        "onnxruntime-fp16",
        "tensorrt-fp32",
        "tensorrt-fp16",
    ]


def test_limits_of_float16_are_wider_than_those_of_float32_and_not_without_end():
    single, half = DEFAULTS["fp32"], DEFAULTS["fp16"]
    for name in ("raw", "boxes", "angles", "scores", "delta_ap"):
        assert single[name] < half[name] <= 2**13 * single[name]
    assert half["scores"] <= 0.1
    assert 0.95 < half["agreement"] < single["agreement"]
