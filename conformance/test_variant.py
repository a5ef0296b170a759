"""Variants: the zoo loads, a wrong YAML gets one line that names file, field and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import AlignError
from alignment.variant import Variant, load_variant, zoo

GOOD: dict[str, Any] = {
    "name": "tiny",
    "source": {"kind": "onnx", "file": "tiny.onnx", "head": {"layout": "decoded"}},
    "input": {"height": 64, "width": 96},
    "classes": 2,
}
YOLOX: dict[str, Any] = {"layout": "yolox"}
RAW: dict[str, Any] = {"layout": "yolov5_raw", "strides": [8]}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with the field at a dotted path set, taken out where the value is None; several fields at the path "."."""
    fields = yaml.safe_load(yaml.safe_dump(GOOD))
    if path == ".":
        return {**fields, **value}
    *parents, last = path.split(".")
    place = fields
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    if value is None:
        del place[last]
    return fields


def write(folder: Path, content: str | dict[str, Any]) -> Path:
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def complaint(name: str | Path) -> str:
    with pytest.raises(AlignError) as caught:
        load_variant(name)
    assert "\n" not in str(caught.value)
    assert caught.value.mend
    return str(caught.value)


def make(path: str, value: Any) -> Variant:
    return Variant.model_validate(changed(path, value))


@pytest.mark.parametrize("path", zoo(), ids=lambda path: path.stem)
def test_the_zoo_loads(path):
    variant = load_variant(path)
    assert variant.name == path.stem
    assert load_variant(path.stem) == variant
    assert variant.weights.is_absolute()
    assert variant.embedded == (variant.dataset in ("synthetic", "synthetic_rotated"))
    assert not variant.embedded or variant.weights.is_file()


def test_the_zoo_is_not_empty_and_its_names_are_unique():
    names = [load_variant(path).name for path in zoo()]
    assert {"yolov5_n", "yolov8_n", "yolox_nano", "yolox_nano_onnx", "yolov8_embedded"} <= set(names)
    assert len(names) == len(set(names))


def test_defaults_and_paths_relative_to_the_yaml(tmp_path):
    variant = load_variant(write(tmp_path, GOOD))
    assert variant.weights == tmp_path / "tiny.onnx"
    assert (variant.nms.iou_threshold, variant.preprocess.pad_value, variant.dataset) == (0.65, 114, "coco")
    assert not variant.has_torch


WRONG = {
    "unknown field": ("preprocess.colour", "rgb", ["preprocess.colour", "not permitted", "channels, mean, std"]),
    "unknown top field": ("clases", 3, ["clases", "not permitted", "classes, boxes, nms"]),
    "unknown source field": ("source.config", "x.py", ["source.config", "not permitted", "kind, file, head"]),
    "unknown head field": ("source.head.box", "x", ["source.head.box", "not permitted", "boxes, scores, box_format"]),
    "wrong enum": ("preprocess.resize", "squash", ["preprocess.resize", "'squash'", "'letterbox'", "'stretch'"]),
    "wrong dataset": ("dataset", "voc", ["dataset", "'voc'", "'coco'", "'synthetic'"]),
    "wrong layout": ("source.head.layout", "ssd", ["source.head.layout", "'decoded'", "'yolox'"]),
    "wrong kind": ("source.kind", "caffe", ["source", "'mmyolo'", "'onnx'"]),
    "missing source": ("source", None, ["source", "required"]),
    "source without a kind": ("source.kind", None, ["source", "kind"]),
    "source that is text": ("source", "model.onnx", ["source"]),
    "missing file": ("source.file", None, ["source.file", "required"]),
    "missing classes": ("classes", None, ["classes", "required"]),
    "no classes": ("classes", 0, ["classes", "greater than 0", "given: 0"]),
    "odd size": ("input.height", 100, ["input.height", "multiple of 32", "given: 100"]),
    "text for a number": ("input.width", "wide", ["input.width", "integer", "'wide'"]),
    "pad out of a byte": ("preprocess.pad_value", 256, ["preprocess.pad_value", "255"]),
    "std 0": ("preprocess.std", [1, 0, 1], ["preprocess.std", "0"]),
    "two means": ("preprocess.mean", [1, 2], ["preprocess.mean"]),
    "iou above 1": ("nms.iou_threshold", 1.5, ["nms.iou_threshold", "1", "given: 1.5"]),
    "field of another layout": ("source.head.strides", [8], ["source.head.strides", "layout, boxes, scores"]),
    "head without a layout": ("source.head", {}, ["source.head.layout", "'layout'"]),
    "stride 0": ("source.head", YOLOX | {"strides": [8, 0]}, ["source.head.strides.1", "greater than 0"]),
    "no anchors": ("source.head", {"layout": "yolov5_raw"}, ["source.head.anchors", "required"]),
    "half an anchor": ("source.head", RAW | {"anchors": [[10, 13, 16]]}, ["source.head.anchors.0.1", "required"]),
    "anchor of no size": ("source.head", RAW | {"anchors": [[10, 0]]}, ["source.head.anchors.0.0.1", "than 0"]),
    "anchors that are text": ("source.head", RAW | {"anchors": "all"}, ["source.head.anchors", "list"]),
    "anchors of a level too few": (
        "source.head",
        RAW | {"strides": [8, 16], "anchors": [[10, 13]]},
        ["source.head.anchors", "1 levels", "[8, 16]"],
    ),
    "NMS for a graph that ends in it": (
        ".",
        {"source": {**GOOD["source"], "head": {"layout": "end2end"}}, "nms": {"iou_threshold": 0.5}},
        ["nms", "remove nms"],
    ),
    "rotated boxes of a layout that has none": (
        ".",
        {"source": {**GOOD["source"], "head": YOLOX}, "boxes": "rotated"},
        ["boxes", "'yolox'", "'decoded', 'yolov8' and 'end2end'"],
    ),
    "name with a slash": ("name", "a/b", ["name", "'a/b'"]),
    "variable that is not set": (
        "source.file",
        "${NOT_SET_ANYWHERE}/x.onnx",
        ["source", "NOT_SET_ANYWHERE", "not set"],
    ),
}


@pytest.mark.parametrize(("field", "value", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_named_with_what_is_allowed(tmp_path, field, value, words):
    path = write(tmp_path, changed(field, value))
    line = complaint(path)
    assert line.startswith(f"{path}: ")
    assert [word for word in words if word not in line] == []


def test_further_errors_are_counted(tmp_path):
    assert "and 1 more" in complaint(write(tmp_path, {**changed("classes", 0), "dataset": "voc"}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [unclosed", "not YAML"),
        ("\tname: x", "not YAML"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("", "holds no fields"),
        ("- a\n- b", "holds no fields"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path, text, words):
    path = write(tmp_path, text)
    line = complaint(path)
    assert str(path) in line
    assert words in line


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert "not YAML" in complaint(path)


def test_a_file_that_is_missing_or_a_folder(tmp_path):
    missing, folder = tmp_path / "nowhere.yaml", tmp_path / "folder.yaml"
    folder.mkdir()
    assert str(missing) in complaint(missing)
    assert str(folder) in complaint(folder)


def test_an_unknown_name_lists_the_known_ones():
    line = complaint("yolov9_x")
    assert "'yolov9_x'" in line
    assert [path.stem for path in zoo() if path.stem not in line] == []


def test_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_MODELS", str(tmp_path / "models"))
    path = write(tmp_path, changed("source.file", "${MY_MODELS}/tiny.onnx"))
    assert load_variant(path).weights == tmp_path / "models" / "tiny.onnx"
    monkeypatch.delenv("MY_MODELS")
    assert "MY_MODELS is not set" in complaint(path)
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path / "data"))
    assert load_variant("yolov8_n").weights.is_relative_to(tmp_path / "data")


MATTERS = {
    "input.height": 96,
    "classes": 3,
    "preprocess.resize": "stretch",
    "preprocess.channels": "bgr",
    "preprocess.pad_value": 0,
    "preprocess.mean": [0, 0, 1],
    "preprocess.std": [1, 1, 1],
    "preprocess.interpolation": "area",
    "nms.iou_threshold": 0.5,
    "nms.multi_label": False,
    "source.head.layout": "yolox",
    "source.head": {"layout": "yolox", "strides": [8, 16]},
    "source.head.box_format": "cxcywh",
    "source.head.scores_activation": "sigmoid",
    "source.head.transposed": True,
}


@pytest.mark.parametrize(("field", "value"), MATTERS.items(), ids=MATTERS)
def test_the_fingerprint_follows_what_matters(field, value):
    assert make(field, value).fingerprint() != Variant.model_validate(GOOD).fingerprint()


def test_each_change_has_its_own_fingerprint():
    prints = [make(field, value).fingerprint() for field, value in MATTERS.items()]
    assert len(set(prints)) == len(prints)
    assert all(len(print_) == 16 for print_ in prints)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "other"), ("notes", "hm"), ("source.file", "/elsewhere/x.onnx"), ("dataset", "synthetic")],
)
def test_the_fingerprint_ignores_names_notes_and_places(field, value):
    assert make(field, value).fingerprint() == Variant.model_validate(GOOD).fingerprint()


def test_mmyolo_options_are_part_of_the_fingerprint():
    variant = load_variant("yolov8_embedded")
    source = variant.source.model_copy(update={"options": {}})
    assert variant.model_copy(update={"source": source}).fingerprint() != variant.fingerprint()


@given(st.integers(-64, 256))
def test_sizes_are_positive_multiples_of_32(side):
    fields = changed("input.height", side)
    if side >= 32 and side % 32 == 0:
        assert Variant.model_validate(fields).input.height == side
    else:
        with pytest.raises(ValueError, match="height"):
            Variant.model_validate(fields)


def test_a_variant_survives_its_own_dump():
    for path in zoo():
        variant = load_variant(path)
        assert Variant.model_validate(variant.model_dump(mode="json")) == variant
