"""Bare ONNX files: what is wrong with one is said in one line, when it is read or when it is run."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from alignment.errors import AlignError
from alignment.export.onnx_export import ExportedModel, check_onnx, exported
from alignment.models.outputs import to_outputs
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.variant import Variant


def tiny(op: str = "Relu", opset: int = 17, inputs: int = 1, domain: str = "") -> bytes:
    """One node on an image of 32 x 32."""
    values = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["batch", 3, 32, 32]) for i in range(inputs)]
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 32, 32])
    nodes = [helper.make_node(op, [value.name for value in values], ["y"], domain=domain)] if op else []
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(helper.make_graph(nodes, "tiny", values, [answer]), opset_imports=opsets)
    model.ir_version = 8
    return model.SerializeToString()


BAD_FOR_BOTH = {
    "missing": None,
    "empty": b"",
    "cut off": tiny()[:-20],
    "text": b"this is no model, it is a line of text",
    "unknown op": tiny("Frobnicate"),
}


def complaint(function, *args) -> str:
    with pytest.raises(AlignError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    assert caught.value.mend
    return str(caught.value)


@pytest.mark.parametrize("reader", [check_onnx, OnnxRuntimeRunner])
@pytest.mark.parametrize("content", BAD_FOR_BOTH.values(), ids=BAD_FOR_BOTH)
def test_a_bad_onnx_file_is_named(tmp_path, reader, content):
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in complaint(reader, path)


def test_an_old_opset_and_an_empty_graph_are_refused(tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(tiny(opset=9))
    assert f"{path}: opset 9, but 11 is the oldest" in complaint(check_onnx, path)
    path.write_bytes(tiny(op=""))
    assert str(path) in complaint(check_onnx, path)


def split(opset: int) -> bytes:
    """A Split whose sizes are its second input, as opset 13 has it, in a file that says another one."""
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 32, 32])
    halves = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, 32, 32]) for name in "yz"]
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [2], [2, 2])
    node = helper.make_node("Split", ["x", "sizes"], ["y", "z"], axis=1)
    graph = helper.make_graph([node], "split", [image], halves, [sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("opset", "words"),
    [
        (9, "opset 9, but 11 is the oldest"),
        (10, "opset 10, but 11 is the oldest"),
        (12, "not a valid ONNX model of opset 12: Node"),
        (99, "opset 99, but"),
    ],
)
def test_a_wrong_opset_is_named_before_the_nodes_that_it_spoils(tmp_path, opset, words):
    path = tmp_path / "split.onnx"
    path.write_bytes(split(17))
    assert check_onnx(path).opset_import[0].version == 17
    path.write_bytes(split(opset))
    assert f"{path}: {words}" in complaint(check_onnx, path)


def reshaped(shape: list[int]) -> bytes:
    """Dynamic in batch, height and width, but a Reshape in it has one `shape`."""
    sides = ["batch", 3, "height", "width"]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, sides)
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constant = helper.make_tensor("shape", TensorProto.INT64, [len(shape)], shape)
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "r", [image], [answer], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


@pytest.mark.parametrize("given", [(2, 3, 32, 32), (1, 3, 48, 48)], ids=["batch", "size"])
def test_shapes_baked_into_a_dynamic_graph_are_named_when_they_do_not_fit(tmp_path, capfd, given):
    path = tmp_path / "baked.onnx"
    path.write_bytes(reshaped([1, 3, 1024]))
    with OnnxRuntimeRunner(path) as runner:
        assert runner.run(np.zeros((1, 3, 32, 32), np.float32))["y"].shape == (1, 3, 1024)
        line = complaint(runner.run, np.zeros(given, np.float32))
    assert f"{path}: ONNX Runtime cannot run it on {list(given)}: " in line
    assert "Reshape" in line
    assert "requested shape:{1,3,1024}" in line
    assert "export it for this batch and size" in line
    assert capfd.readouterr().err == "", "it says so once"


def test_a_graph_that_answers_for_another_number_of_images_is_named(tmp_path):
    fields = {"name": "bare", "input": {"height": 32, "width": 32}, "classes": 1}
    source = {"kind": "onnx", "file": str(tmp_path / "bare.onnx"), "head": {"layout": "yolov8"}}
    variant = Variant.model_validate({**fields, "source": source})
    assert len(to_outputs({"y": np.zeros((2, 5, 40), np.float32)}, variant, 2).boxes) == 2
    line = complaint(to_outputs, {"y": np.zeros((1, 5, 80), np.float32)}, variant, 2)
    assert "bare.onnx: 2 images went in, but outputs are y [1, 5, 80]" in line


def test_what_only_the_backend_can_refuse(tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(tiny("Frobnicate", domain="my.ops"))
    check_onnx(path)
    assert "Frobnicate" in complaint(OnnxRuntimeRunner, path)
    path.write_bytes(tiny("Add", inputs=2))
    assert "x0 tensor(float)" in complaint(OnnxRuntimeRunner, path)


def test_images_of_the_wrong_size_are_refused(tmp_path):
    path = tmp_path / "tiny.onnx"
    path.write_bytes(tiny())
    with OnnxRuntimeRunner(path) as runner:
        assert runner.run(np.full((2, 3, 32, 32), -1, np.float32))["y"].max() == 0
        line = complaint(runner.run, np.zeros((1, 3, 64, 64), np.float32))
    assert "['batch', 3, 32, 32], but the variant's images are [1, 3, 64, 64]" in line


def test_a_bare_onnx_variant_is_checked_and_used_as_it_is(tmp_path):
    path = tmp_path / "bare.onnx"
    path.write_bytes(tiny())
    fields = {"name": "bare", "input": {"height": 32, "width": 32}, "classes": 1}
    source = {"kind": "onnx", "file": str(path), "head": {"layout": "decoded"}}
    variant = Variant.model_validate({**fields, "source": source})
    assert exported(variant) == ExportedModel(path, None)
    path.write_bytes(b"")
    assert str(path) in complaint(exported, variant)
