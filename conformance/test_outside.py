"""What comes from outside and means harm, or no sense: external data, pickles, bombs, numbers that are none."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import onnx
import pytest
import yaml
from command_line import align, one_line, python, variant_file
from engines import convolution, engine
from fuzz_pictures import png
from fuzz_sound import Sound, place
from hypothesis import given
from hypothesis import strategies as st
from report_scenes import FAILS, write_everything
from test_record import made

from alignment.data.coco import CocoDataset
from alignment.data.dota import open_dota
from alignment.divergence import _around
from alignment.engine.int8 import ranges_in_cache
from alignment.errors import AlignError
from alignment.export.onnx_export import check_onnx, file_digest
from alignment.gate.runs import read_runs
from alignment.inspection.draw import draw
from alignment.inspection.saved import load_inspection
from alignment.models.mmyolo_source import build_detector
from alignment.quantize.trained import Trained, identity_of
from alignment.report.plot import Mark, Series, dots, scatter
from alignment.report.run_folder import read_run, to_json
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.record import Record
from alignment.variant import golden_dir, load_variant


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


def graph(sound: Sound) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(sound.graph)
    return copy


def written(folder: Path, model: onnx.ModelProto) -> Path:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


OUTSIDE = ["../outside.bin", "{folder}/outside.bin", "link.bin", "sub/../../outside.bin", "/dev/zero"]


@pytest.mark.parametrize("place", OUTSIDE)
def test_external_data_outside_of_the_folder_is_not_read(sound, tmp_path, place):
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    model = graph(sound)
    weight = model.graph.initializer[0]
    (tmp_path / "outside.bin").write_bytes(weight.raw_data)
    (inside / "link.bin").symlink_to(tmp_path / "outside.bin")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=place.format(folder=tmp_path))
    with pytest.raises(AlignError, match=r"model\.onnx: not a valid ONNX model"):
        check_onnx(written(inside, model))


def test_external_data_beside_the_graph_is_read(sound, tmp_path):
    onnx.save(graph(sound), tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").is_file()
    read = check_onnx(tmp_path / "model.onnx").graph.initializer[0]
    assert read.raw_data == sound.graph.graph.initializer[0].raw_data


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda g: g.initializer[0].__setattr__("raw_data", b"123"), "w0"),
        (lambda g: g.initializer[0].dims.append(7), "w0"),
        (lambda g: g.initializer[0].__setattr__("data_type", 99), "model.onnx: not a valid ONNX model"),
        (lambda g: g.output.pop(), "has no outputs"),
        (
            lambda g: g.node.insert(0, onnx.helper.make_node("RandomNormal", [], ["z"], shape=[10**6, 10**4])),
            "tensor z",
        ),
    ],
)
def test_a_graph_that_cannot_be_run_is_refused_before_it_is(sound, tmp_path, edit, words):
    model = graph(sound)
    edit(model.graph)
    with pytest.raises(AlignError, match=words):
        check_onnx(written(tmp_path, model))


def test_a_picture_of_more_pixels_than_memory_is_not_decoded(tmp_path):
    (tmp_path / "large.png").write_bytes(png(30_000, 30_000))
    # In a process of its own: OpenCV reads its limit when it is first imported.
    done = python("-c", f"from alignment.data.coco import *; read_image(Path({str(tmp_path / 'large.png')!r}))")
    assert "large.png: not an image, or a damaged one (OpenCV: " in done.stderr
    assert "PIXELS" in done.stderr


NO_BOXES = [[10**400, 0, 5, 5], [0, 0, 1e300, 5], [0, 0, float("nan"), 5], [0, 0, "five", 5], [[0], [0, 1], 5, 5]]


@pytest.mark.parametrize("box", NO_BOXES, ids=["endless", "far", "NaN", "text", "lists"])
@pytest.mark.parametrize("kind", ["bbox", "rbox", "poly"])
def test_a_box_of_no_numbers_is_named(sound, tmp_path, kind, box):
    root = shutil.copytree(sound.tiles if kind == "poly" else sound.data, tmp_path / "data")
    path = root / ("dota8.json" if kind == "poly" else "annotations/instances_val2017.json")
    truth = json.loads(path.read_text())
    entry = truth["annotations"][1]
    entry[kind] = box * 2 if kind == "poly" else [*box, 0][: 4 if kind == "bbox" else 5]
    if kind == "rbox":
        truth["annotations"] = [entry]
    path.write_text(json.dumps(truth))
    with pytest.raises(AlignError, match=f"annotation {entry['id']}"):
        open_dota(root) if kind == "poly" else CocoDataset.open(root).require_rotated("a")


@pytest.mark.parametrize("size", [(8, 5000), (5000, 1)])
def test_a_thin_picture_gets_into_the_report(sound, tmp_path, monkeypatch, size):
    pytest.importorskip("torch")
    place(sound, tmp_path)
    data = shutil.copytree(sound.data, tmp_path / "data")
    for path in (data / "val2017").iterdir():
        cv2.imwrite(str(path), np.full((*size, 3), 9, np.uint8))
    monkeypatch.chdir(tmp_path)
    result = align("run", "tiny.yaml", "--backend", "onnxruntime", "--data", "data", "--out", "out")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("digits", ["7fc00000", "7f800000", "ff800000", "bf800000", "7f7fffff", "", "3c01", "zz"])
def test_a_scale_that_is_none_is_named_with_its_file(digits):
    with pytest.raises(AlignError, match=r"a\.cache: no scale in the line 'x: "):
        ranges_in_cache(f"TRT-8601-EntropyCalibration2\nx: {digits}\n", "a.cache")


@pytest.mark.parametrize(("lines", "words"), [("", "of no tensor"), ("x: 00000001\n", "x: scale 1.4")])
def test_a_cache_that_int8_has_no_use_of_is_named(lines, words):
    with pytest.raises(AlignError, match=rf"a\.cache: .*{words}"):
        ranges_in_cache(f"TRT-8601-EntropyCalibration2\n{lines}", "a.cache")


NO_CASES = ["", "a-b", "net-tensorrt-fp4", "net-tpu-fp32", "net-tensorrt-int8-nowhere", "a-b-c-d-e-f"]


@pytest.mark.parametrize("case", NO_CASES)
def test_a_record_of_no_case_is_refused(tmp_path, case):
    path = made().save(tmp_path)
    path.write_text(path.read_text().replace('"case": "net-tensorrt-fp32"', f'"case": "{case}"', 1))
    with pytest.raises(AlignError, match="not a whole record"):
        Record.load(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("detections_labels", lambda a: a + 10_000),
        ("candidates_rows", lambda a: a + 2**30),
        ("candidates_rows", lambda a: a.astype(np.float32)),
        ("candidates_labels", lambda a: -1 - a),
        ("detections_boxes", lambda a: a[:-1]),
        ("detections_boxes", lambda a: a[:, :3]),
        ("candidates_count", lambda a: a + 1),
        ("candidates_count", lambda a: a[None]),
    ],
)
def test_a_record_whose_columns_do_not_fit_is_refused(tmp_path, name, change):
    path = made().save(tmp_path)
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = dict(stored)
    np.savez(path.with_suffix(".npz"), **{**arrays, name: change(arrays[name])})
    with pytest.raises(AlignError, match="not a whole record"):
        Record.load(path)


def test_a_record_whose_detections_are_of_no_candidate_is_explained_all_the_same(tmp_path):
    names = [f"yolov8_embedded-tensorrt-{precision}" for precision in ("fp32", "fp16")]
    for name in names:
        for ending in (".json", ".npz"):
            shutil.copy(golden_dir() / "records" / f"{name}{ending}", tmp_path)
    path = tmp_path / f"{names[0]}.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    last = arrays[next(name for name in arrays if name.startswith("full_") and name.endswith("_scores"))].shape[0] - 1
    arrays["detections_rows"][0] = last
    np.savez(path, **arrays)
    result = align("explain", *(tmp_path / f"{name}.json" for name in names))
    assert result.exit_code == 1, result.output
    assert f"row {last}" in result.stdout
    arrays["detections_labels"][0] = 5
    arrays["candidates_labels"] += 6 - arrays["candidates_labels"].max()
    np.savez(path, **arrays)
    refused = align("explain", *(tmp_path / f"{name}.json" for name in names))
    assert refused.exit_code == 2, refused.output
    assert one_line(refused.stderr)


def test_a_run_whose_dataset_is_no_mapping_is_gated_all_the_same(tmp_path):
    run = write_everything(tmp_path / "run")
    strange = run.model_copy(update={"dataset": {case.case.variant: "x" for case in run.cases}})
    (tmp_path / "run" / "alignment.json").write_text(to_json(strange))
    assert read_runs([tmp_path / "run"]).dataset_of("yolov8_n") == {}
    for words in (["gate", tmp_path / "run", "--baseline", tmp_path / "run"], ["report", tmp_path / "run"]):
        assert align(*words).exit_code in (0, 1)
    assert [case.case.id for case in read_run(tmp_path / "run").cases if case.status == "fail"] == [FAILS]


@pytest.mark.parametrize("size", [math.inf, math.nan, "x", [], {}, None])
def test_an_engine_whose_tensors_have_no_shape_is_refused(tmp_path, size):
    tensor = {"Name": "x", "Dimensions": [1, size], "Format/Datatype": "Half"}
    layer = {"Name": "a", "LayerType": "Convolution", "Inputs": [tensor], "Outputs": []}
    (tmp_path / "one.json").write_text(json.dumps({"Layers": [layer]}))
    with pytest.raises(AlignError, match=r"one\.json: no inspected engine"):
        load_inspection(tmp_path / "one.json")


def test_names_of_control_characters_are_no_broken_drawing(tmp_path):
    layers = [convolution("a\x1b[31m\x00\ufffe", "x:Half", "a\x07:Half", weights="Half")]
    root = ElementTree.fromstring(draw([engine(*layers, times={})]))
    said = "".join(root.itertext())
    assert "[31m" in said
    assert not {"\x1b", "\x00", "\x07", "\ufffe"} & set(said)


def test_a_chart_takes_any_number():
    values = (math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0, 5e-324, 0.1, 0.1 + 2e-17)
    series = [Series("a", "ways", "dot", [Mark(x, y, "") for x in values for y in values], line=True)]
    for some in (series, [Series("b", "ways", "dot", [Mark(x, x, "")]) for x in values], []):
        for text in (scatter("t", "x", "y", some), dots("t", ["row"], some)):
            assert "nan" not in text
            assert "inf" not in text


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("weights/w0", np.zeros((8, 3, 8, 7), np.float32), "weights w0 are"),
        ("weights/more", np.zeros(3, np.float32), "weights more are"),
        ("weights/w0", np.full((8, 3, 8, 8), np.nan, np.float32), "not of finite float32"),
        ("weight_scales/w0", np.ones(7, np.float32), "scales of w0 are"),
        ("weight_scales/w0", np.zeros(8, np.float32), "a scale that int8 cannot have"),
        ("scales/image", np.float32(-1), "a scale that int8 cannot have"),
        ("scales/image", np.ones(2, np.float32), "not a file of align qat"),
        ("biases/first", np.zeros(5, np.float32), "biases first are"),
        ("biases/first", np.array(["2024-01-01"], "M8[s]"), "not a file of align qat"),
    ],
)
def test_trained_weights_that_do_not_fit_are_refused(sound, tmp_path, monkeypatch, part, value, words):
    place(sound, tmp_path)
    monkeypatch.chdir(tmp_path)
    variant = load_variant("tiny.yaml")
    weights = {"w0": np.zeros((8, 3, 8, 8), np.float32), "w1": np.zeros((10, 8, 1, 1), np.float32)}
    scales = {"image": np.float32(0.1), "b": np.float32(0.1)}
    weight_scales = {"w0": np.full(8, 0.1, np.float32), "w1": np.full(10, 0.1, np.float32)}
    Trained(weights, {}, scales, weight_scales, identity_of(variant)).save(Path("tiny.qat.npz"))
    with np.load("tiny.qat.npz") as stored:
        arrays = dict(stored)
    np.savez("tiny.qat.npz", **{**arrays, part: value})
    fields = {**sound.variant, "quantization": {**sound.variant["quantization"], "trained": "tiny.qat.npz"}}
    Path("tiny.yaml").write_text(yaml.safe_dump(fields))
    result = align("quantize", "tiny.yaml", "--data", sound.data, "--out", "out")
    assert result.exit_code == 2, result.output
    assert words in one_line(result.stderr)
    assert "tiny.qat.npz" in result.stderr


def test_the_folder_of_a_keep_float_file_will_do(sound, tmp_path, monkeypatch):
    place(sound, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["quantize", "tiny.yaml", "--data", sound.data, "--out", "out", "--keep-float"]
    assert "no node is named 'out'" in one_line(align(*words, "out").stderr)  # no folder, so the name of a node
    missing = align(*words, ".")
    assert missing.exit_code == 2
    assert "keep_float.yaml: No such file" in one_line(missing.stderr)
    kept = {
        "graph_sha256": file_digest(Path("model.onnx")),
        "variant": "tiny",
        "nodes": [{"node": "first", "reason": "why"}],
    }
    Path("keep_float.yaml").write_text(yaml.safe_dump(kept))
    found = align(*words, ".")
    assert found.exit_code == 0, found.output
    assert "1 nodes in int8" in found.stdout


def test_a_model_of_many_times_the_weights_of_its_checkpoint_is_not_built(tmp_path):
    pytest.importorskip("mmyolo")

    def wide(fields: dict) -> None:
        fields["source"]["options"]["model.backbone.widen_factor"] = 40.0

    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AlignError, match=r"cannot be built: ValueError: .* many times the weights of its checkpoint"):
        build_detector(load_variant(variant_file(tmp_path, wide)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started < 2**20  # kB


@pytest.mark.parametrize("axis", [0, 2])
def test_an_input_of_no_images_or_pixels_is_refused(tmp_path, axis):
    shape = [1, 3, 32, 32]
    shape[axis] = 0
    image = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["images"], ["out"], "relu")], "g", [image], [out])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "none.onnx")
    with pytest.raises(AlignError, match=r"none.onnx: inputs images tensor\(float\) \[.*0.*\]: give a model"):
        OnnxRuntimeRunner(tmp_path / "none.onnx")


@given(st.lists(st.floats(width=32), min_size=4, max_size=4), st.tuples(st.integers(1, 900), st.integers(1, 900)))
def test_a_crop_of_any_box_is_within_the_picture_and_not_empty(box, shape):
    height, width = shape
    left, top, right, bottom = _around(np.array(box, np.float32), (height, width, 3))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize("field", ["file", "checkpoint"])
def test_a_path_that_no_file_can_have_is_named_with_its_yaml(sound, tmp_path, field):
    source = {"kind": "onnx", "file": "x" * 300, "head": {"layout": "yolov8"}}
    if field == "checkpoint":
        source = {"kind": "mmyolo", "config": "a.py", "checkpoint": f"a/{'x' * 300}/b"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**sound.variant, "source": source}))
    result = align("run", tmp_path / "a.yaml")
    assert result.exit_code == 2
    assert "a.yaml: source: " in one_line(result.stderr)
    assert "longer than a file name can be" in result.stderr


def test_a_training_that_means_harm_is_not_resumed(tmp_path):
    pytest.importorskip("mmyolo")
    torch = pytest.importorskip("torch")
    pytest.importorskip("pytorch_quantization")
    from command_line import Malicious

    from alignment.quantize.qat import _require_begun_alike

    torch.save({"qat": {"identity": "a"}, "message_hub": Malicious(tmp_path / "a.pth")}, tmp_path / "a.pth")
    with pytest.raises(AlignError, match=r"a\.pth: no checkpoint of align qat"):
        _require_begun_alike(tmp_path / "a.pth", "a")
    assert not (tmp_path / "executed").exists()
