"""``align new`` as a new user types it: from a file to a YAML, golden values and a report, without a line of Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx_layouts as layouts
import picky
import pytest
import yaml
from command_line import align, one_line
from onnx import helper

from alignment.data.coco import CocoDataset
from alignment.data.pictures import unlabelled_root
from alignment.errors import AlignError
from alignment.guess.config import read_config
from alignment.guess.findings import Asked, Finding, as_fields
from alignment.guess.write import write_variant
from alignment.report.run_folder import read_run
from alignment.storage import data_dir
from alignment.variant import ZOO, MMYoloSource, Variant, golden_dir, load_variant, zoo

YOLOX = data_dir() / "onnx" / "yolox_nano_416.onnx"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return picky.pictures(tmp_path_factory.mktemp("new") / "data", 8)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory) -> Path:
    """The embedded detector as another exporter would have written it."""
    pytest.importorskip("mmyolo")
    from alignment.export.onnx_export import ExportOptions, exported

    graph = layouts.Graph(exported(load_variant("yolov8_embedded"), ExportOptions(17, 1, "decoded")).onnx)
    picky.feed(graph, "imagenet", "bgr")
    return graph.save(tmp_path_factory.mktemp("unseen") / "unseen.onnx", layouts.yolov5_transposed(graph))


def new(*arguments: object) -> tuple[int, str, str]:
    result = align("new", *arguments)
    return result.exit_code, result.stdout, result.stderr


def test_an_unseen_file_becomes_a_variant_with_golden_values_and_a_report(unseen, data, tmp_path):
    command = ["shapes", "--onnx", unseen, "--data", data, "--out", tmp_path]
    code, said, error = new(*command)
    assert (code, error) == (0, ""), said
    text = (tmp_path / "shapes.yaml").read_text()
    variant = load_variant(tmp_path / "shapes.yaml")
    assert (variant.source.head.layout, variant.classes, variant.preprocess.channels) == ("yolov5", 6, "bgr")
    assert variant.preprocess.std == (57.375, 57.12, 58.395)
    for line in ("# certain: score that labels confirm", "# certain: output output [1, 11, 2100]; 6: the data have"):
        assert line in text
    run = read_run(tmp_path / "runs" / "shapes")
    assert {case.command.partition(" --golden ")[2] for case in run.cases} == {str(tmp_path / "golden")}
    verdicts = {case.case.id: case.status for case in run.cases}
    assert verdicts["shapes-onnxruntime-fp32"] == "pass"
    assert (tmp_path / "runs" / "shapes" / "report.html").is_file()
    golden = yaml.safe_load((tmp_path / "golden" / "shapes.yaml").read_text())["cases"]["shapes-onnxruntime-fp32"]
    assert 0 < golden["tolerances"]["boxes"]["value"] < 0.02
    assert golden["ap"]["value"] > 0.3
    for words in ("how sure", "wrote", "proposed in", "aligned on", "report: "):
        assert words in said
    again = next(line for line in said.splitlines() if line.startswith("again: align "))
    held = align(*again.removeprefix("again: align ").split())
    assert held.exit_code == 0, held.output

    code, _, error = new(*command)
    assert (code, "shapes.yaml: is there already" in one_line(error)) == (2, True)
    code, _, _ = new(*command, "--force", "--images", 2)
    assert code == 0


def test_pictures_without_labels_will_do(unseen, data, tmp_path):
    code, said, error = new("shapes", "--onnx", unseen, "--data", data / "val2017", "--out", tmp_path, "--images", 3)
    assert (code, error) == (0, ""), said
    assert "no truth, so no AP" in said
    assert "the mirrored picture confirms" in (tmp_path / "shapes.yaml").read_text()
    golden = yaml.safe_load((tmp_path / "golden" / "shapes.yaml").read_text())["cases"]["shapes-onnxruntime-fp32"]
    assert "ap" not in golden


def test_what_is_open_exits_2_in_one_line_and_leaves_nothing(unseen, data, tmp_path):
    (tmp_path / "white").mkdir()
    cv2.imwrite(str(tmp_path / "white" / "a.png"), np.full((64, 64, 3), 255, np.uint8))
    code, said, error = new("shapes", "--onnx", unseen, "--data", tmp_path / "white", "--out", tmp_path / "out")
    assert (code, said) == (2, "")
    for words in ("cannot tell preprocess.channels: ", "it finds nothing here; cannot tell preprocess.mean and std: "):
        assert words in one_line(error)
    assert "give --channels rgb or --channels bgr, and --range 0..1 or --range 0..255 or" in one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["yolov5_embedded", "rtmdet_embedded"])
def test_a_config_with_its_checkpoint_says_all_by_itself(data, tmp_path, name):
    pytest.importorskip("mmyolo")
    fields = yaml.safe_load((ZOO / f"{name}.yaml").read_text())
    options = [word for key, value in fields["source"]["options"].items() for word in ("--option", f"{key}={value}")]
    checkpoint = golden_dir() / "checkpoints" / f"{name}.pth"
    source = ["--config", fields["source"]["config"], "--checkpoint", checkpoint, *options, "--size", 320]
    code, said, error = new("mine", *source, "--data", data, "--out", tmp_path, "--images", 2)
    assert (code, error) == (0, ""), said
    ours, truth = load_variant(tmp_path / "mine.yaml"), load_variant(name)
    changes = {"name": truth.name, "dataset": truth.dataset, "notes": truth.notes}
    assert ours.model_copy(update=changes).fingerprint() == truth.fingerprint()
    cases = read_run(tmp_path / "runs" / "mine").cases
    assert {c.case.backend: c.status for c in cases} | {"tensorrt": ""} == {
        "torch": "pass",
        "onnxruntime": "pass",
        "tensorrt": "",
    }


#: What a YAML of the zoo has otherwise on purpose: its notes say why.
OTHERWISE = {
    "rtmdet_r_embedded": {"nms.nms_pre"},
    "rtmdet_r_s": {"nms.nms_pre"},
    "rtmdet_r_tiny": {"nms.nms_pre"},
    "yolox_nano": {"nms.multi_label"},
}


@pytest.mark.parametrize("path", zoo(), ids=lambda path: path.stem)
def test_every_config_of_the_zoo_is_read_as_its_yaml_has_it(path):
    pytest.importorskip("mmyolo")
    from alignment.models.mmyolo_source import load_config

    truth = load_variant(path)
    if not isinstance(truth.source, MMYoloSource):
        pytest.skip("a bare ONNX file")
    if truth.rotated:
        pytest.importorskip("mmrotate")
    size = (truth.input.height, truth.input.width) if truth.embedded else None
    fields = as_fields(read_config(load_config(truth), truth.source.config, Asked(size=size)))
    plain = truth.model_dump(exclude={"source", "quantization", "dataset", "notes"})
    ours = Variant.model_validate({"name": truth.name, "source": truth.source.model_dump(), **fields}).model_dump()
    differing = {
        f"{group}.{key}"
        for group in ("input", "preprocess", "nms")
        for key, value in plain[group].items()
        if ours[group][key] != value
    }
    assert differing == OTHERWISE.get(path.stem, set())
    assert (ours["classes"], ours["boxes"]) == (truth.classes, truth.boxes)
    assert ("rectangular" in fields.get("notes", "")) >= ("rectangular" in truth.notes)


def no_model(folder: Path) -> list[object]:
    (folder / "text.onnx").write_text("this is no model")
    return ["--onnx", folder / "text.onnx"]


def classifier(folder: Path) -> list[object]:
    onnx.save(picky.constant(1000), folder / "classifier.onnx")
    return ["--onnx", folder / "classifier.onnx"]


def with_input(shape: list[int], kind: int = onnx.TensorProto.FLOAT, twice: bool = False) -> Callable:
    def make(folder: Path) -> list[object]:
        inputs = [helper.make_tensor_value_info(name, kind, shape) for name in ("xz" if twice else "x")]
        answer = helper.make_tensor_value_info("y", kind, shape)
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "bad", inputs, [answer])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, folder / "bad.onnx")
        return ["--onnx", folder / "bad.onnx"]

    return make


def checkpoint(text: str) -> Callable:
    def make(folder: Path) -> list[object]:
        (folder / "weights.pth").write_text("no weights")
        return ["--config", text, "--checkpoint", folder / "weights.pth"]

    return make


def written(text: str) -> Callable:
    def make(folder: Path) -> list[object]:
        (folder / "config.py").write_text(text)
        return checkpoint(str(folder / "config.py"))(folder)

    return make


YOLOV8 = "yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py"
BAD: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "nothing": (lambda _: [], "give --onnx FILE, or --config FILE with --checkpoint FILE"),
    "both": (lambda _: ["--onnx", "a.onnx", "--config", YOLOV8], "one model is needed"),
    "a config without a checkpoint": (lambda _: ["--config", YOLOV8], "no weights: give --checkpoint FILE"),
    "a checkpoint without a config": (lambda _: ["--onnx", "a.onnx", "--checkpoint", "b.pth"], "b.pth: of which model"),
    "no such file": (lambda _: ["--onnx", "none.onnx"], "none.onnx: no such file"),
    "no such checkpoint": (lambda _: ["--config", YOLOV8, "--checkpoint", "none.pth"], "none.pth: no such file"),
    "no such config": (checkpoint("none.py"), "none.py is neither in mmyolo's configs nor a file"),
    "no checkpoint": (checkpoint(YOLOV8), "weights.pth: is a text file"),
    "no ONNX": (no_model, "text.onnx: not a valid ONNX model"),
    "a classifier": (classifier, "no detector, or one whose head layout is unknown; its outputs are y [1, 1000]"),
    "channels last": (with_input([1, 64, 64, 3]), "its channels last: export it with one float32 image input"),
    "two inputs": (with_input([1, 3, 64, 64], twice=True), "inputs x FLOAT [1, 3, 64, 64], z FLOAT"),
    "an input of bytes": (with_input([1, 3, 64, 64], onnx.TensorProto.UINT8), "inputs x UINT8 [1, 3, 64, 64]"),
    "an odd size": (with_input([1, 3, 60, 60]), "60 x 60, which are no multiples of 32"),
    "an unknown layout": (lambda _: ["--onnx", "a.onnx", "--layout", "yolo99"], "choose from decoded, yolov5"),
    "no size": (lambda _: ["--onnx", "a.onnx", "--size", "big"], "--size big: not a size in pixels"),
    "no anchors": (lambda _: ["--onnx", "a.onnx", "--anchors", "1,two"], "--anchors 1,two: no anchors"),
    "an empty list of anchors": (lambda _: ["--onnx", "a.onnx", "--anchors", ""], "--anchors : no anchors"),
    "half an anchor": (lambda _: ["--onnx", "a.onnx", "--anchors", "1,2 3"], "--anchors 1,2 3: no anchors"),
    "unlike levels": (lambda _: ["--onnx", "a.onnx", "--anchors", "1,2 3,4,5,6"], "3,4,5,6: no anchors"),
    "endless anchors": (lambda _: ["--onnx", "a.onnx", "--anchors", "1,inf"], "--anchors 1,inf: no anchors"),
    "no precision": (lambda _: ["--onnx", "a.onnx", "--precision", "fp99"], "--precision fp99: no such precision"),
    "another output": (
        lambda folder: [*classifier(folder), "--output", "z"],
        "no output is named z; its outputs are y",
    ),
    "options of a config for a file": (lambda _: ["--onnx", "a.onnx", "--option", "a=1"], "--option is not taken with"),
    "what a config says": (lambda f: [*checkpoint(YOLOV8)(f), "--range", "0..1"], "--range is not taken with --config"),
    "an option that is no YAML": (lambda f: [*checkpoint(YOLOV8)(f), "--option", "a=["], "--option a=[: a value that"),
    "a config without a model": (written("x = 1"), "no attribute 'model': mend the config"),
    "a model without settings": (
        lambda f: [*checkpoint(YOLOV8)(f), "--option", "model.test_cfg=null"],
        "no detector's config: TypeError",
    ),
    "a head of another kind": (
        lambda f: [*checkpoint(YOLOV8)(f), "--option", "model.bbox_head.head_module=3"],
        "no detector's config: AttributeError",
    ),
    "two channels": (
        lambda f: [*checkpoint(YOLOV8)(f), "--option", "model.data_preprocessor.mean=[1,2]"],
        f"{YOLOV8}: preprocess.mean.2: Field required",
    ),
    "no data": (
        lambda folder: [*classifier(folder), "--data", folder / "none"],
        "none: neither pictures nor a dataset",
    ),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_what_it_cannot_take_is_one_line_and_status_2(tmp_path, arguments, said):
    if "--config" in (given := arguments(tmp_path)) and "--checkpoint" in given:
        pytest.importorskip("mmyolo")
    code, printed, error = new("mine", *given, "--out", tmp_path / "out")
    assert (code, printed) == (2, "")
    assert said in one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "said"), [("My-Model", "no name of a variant"), ("yolov8_n", "of the zoo has that name")]
)
def test_a_name_that_is_none_or_taken_is_refused(tmp_path, name, said):
    code, _, error = new(name, "--onnx", tmp_path / "a.onnx", "--out", tmp_path)
    assert (code, said in one_line(error)) == (2, True)


def test_the_yaml_says_each_piece_of_evidence_once_above_its_fields(tmp_path):
    source = {"kind": "onnx", "file": str(tmp_path / "a b.onnx"), "head": {"layout": "yolov8"}}
    fields = {"name": "x", "input": {"height": 64, "width": 96}, "classes": 2}
    variant = Variant.model_validate({**fields, "source": source})
    findings = [
        Finding("source.head.layout", "yolov8", "certain", "its shape: [1, 6, 126]"),
        Finding("input.height", 64, "certain", "the graph"),
        Finding("input.width", 96, "certain", "the graph"),
        Finding("classes", 2, "likely", "guessed " * 30),
    ]
    write_variant(tmp_path / "x.yaml", variant, findings, "align new x")
    lines = (tmp_path / "x.yaml").read_text().splitlines()
    assert lines[:7] == [
        "# Written by `align new x`.  Above each field its evidence, and how sure it is.",
        "name: x",
        "source:",
        "  kind: onnx",
        "  file: a b.onnx",
        "  head:",
        "    # certain: its shape: [1, 6, 126]",
    ]
    assert sum("the graph" in line for line in lines) == 1
    assert max(map(len, lines)) <= 120
    assert load_variant(tmp_path / "x.yaml").model_dump() == variant.model_dump()


@pytest.mark.skipif(not YOLOX.is_file() or not (data_dir() / "coco").is_dir(), reason="set ALIGN_DATA")
def test_a_published_yolox_is_told_by_its_file_alone(tmp_path):
    folder = os.path.relpath(YOLOX)
    code, said, error = new("fresh", "--onnx", folder, "--out", tmp_path, "--images", 8)
    assert (code, error) == (0, ""), said
    ours, truth = load_variant(tmp_path / "fresh.yaml"), load_variant("yolox_nano_onnx")
    assert ours.source.head == truth.source.head
    assert (ours.input, ours.preprocess, ours.classes) == (truth.input, truth.preprocess, truth.classes)


def test_a_picture_that_is_replaced_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for sides in ((32, 64), (96, 32)):
        cv2.imwrite(str(folder / "a.png"), np.zeros((*sides, 3), np.uint8))
        (image,) = CocoDataset.open(unlabelled_root(folder, 2)).truth["images"]
        assert (image["height"], image["width"]) == sides


def test_an_error_lists_all_that_is_open(tmp_path):
    from alignment.guess.findings import require_settled

    findings = [
        Finding("a", None, "open", "so", "--a 1"),
        Finding("b", 2, "likely", "well"),
        Finding("c", None, "open", "", "--c 3"),
    ]
    with pytest.raises(AlignError) as caught:
        require_settled(tmp_path, findings)
    assert str(caught.value) == f"{tmp_path}: cannot tell a: so; cannot tell c: : give --a 1, and --c 3"
