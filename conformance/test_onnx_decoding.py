"""Decoding of each head layout against plain loops, and one line for every file that does not fit its YAML."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from alignment.compare.measure import Measured, TensorErrors
from alignment.compare.verdict import judge
from alignment.errors import AlignError
from alignment.golden import GoldenCase
from alignment.models.onnx_heads import require_plausible, sigmoid
from alignment.models.outputs import to_outputs
from alignment.variant import Variant

SIDE, STRIDES, CLASSES = 64, [16, 32], 3
CELLS = sum((SIDE // s) ** 2 for s in STRIDES)
ANCHORS = [[(10.0, 13.0), (30.0, 7.0)], [(40.0, 61.0)]]
EFFICIENT = {"layout": "end2end"}


def variant_of(head: dict[str, Any], classes: int = CLASSES, **fields: Any) -> Variant:
    source = {"kind": "onnx", "file": "their.onnx", "head": head}
    size = {"height": SIDE, "width": SIDE}
    return Variant.model_validate({"name": "their", "source": source, "input": size, "classes": classes, **fields})


def numbers(*shape: int, low: float = -8, high: float = 8) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, shape, elements=st.floats(low, high), fill=st.floats(low, high))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def around(cx: float, cy: float, w: float, h: float) -> list[float]:
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def check(
    head: dict[str, Any], named: dict[str, np.ndarray], boxes: list, scores: list, kind: str = "horizontal"
) -> None:
    """`boxes` and `scores` are what the loops found for the first image of the batch."""
    found = to_outputs(named, variant_of(head, boxes=kind))
    np.testing.assert_allclose(found.boxes[0], boxes, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(found.scores[0], scores, rtol=1e-12, atol=1e-12)


@given(numbers(2, 7, 5 + CLASSES), st.booleans(), st.booleans())
def test_yolov5(rows, transposed, logits):
    boxes, scores = [], []
    for cx, cy, w, h, objectness, *classes in rows[0]:
        boxes.append(around(cx, cy, w, h))
        f = logistic if logits else float
        scores.append([f(objectness) * f(score) for score in classes])
    head = {"layout": "yolov5", "scores_activation": "sigmoid" if logits else "none"}
    check(head, {"out": rows.transpose(0, 2, 1) if transposed else rows}, boxes, scores)


@given(numbers(1, 4 + CLASSES, 9), st.sampled_from(["xyxy", "cxcywh"]))
def test_yolov8(columns, box_format):
    boxes, scores = [], []
    for i in range(9):
        box = [columns[0, k, i] for k in range(4)]
        boxes.append(box if box_format == "xyxy" else around(*box))
        scores.append([columns[0, 4 + c, i] for c in range(CLASSES)])
    check({"layout": "yolov8", "box_format": box_format}, {"out": columns}, boxes, scores)


@given(numbers(1, 4 + CLASSES + 1, 9))
def test_yolov8_with_rotated_boxes_has_the_angle_last(columns):
    boxes = [[columns[0, k, i] for k in (0, 1, 2, 3, 4 + CLASSES)] for i in range(9)]
    scores = [[columns[0, 4 + c, i] for c in range(CLASSES)] for i in range(9)]
    check({"layout": "yolov8"}, {"out": columns}, boxes, scores, "rotated")


@given(numbers(1, CELLS, 5 + CLASSES))
def test_yolox(rows):
    boxes, scores = [], []
    index = 0
    for stride in STRIDES:
        for y in range(SIDE // stride):
            for x in range(SIDE // stride):
                dx, dy, log_w, log_h, objectness, *classes = rows[0, index]
                boxes.append(
                    around((x + dx) * stride, (y + dy) * stride, math.exp(log_w) * stride, math.exp(log_h) * stride)
                )
                scores.append([objectness * score for score in classes])
                index += 1
    check({"layout": "yolox", "strides": STRIDES}, {"out": rows}, boxes, scores)


@given(st.data(), st.booleans(), st.booleans())
def test_yolov5_raw(data, flat, reversed_order):
    named, boxes, scores = {}, [], []
    for stride, anchors in zip(STRIDES, ANCHORS, strict=True):
        side = SIDE // stride
        level = data.draw(numbers(1, len(anchors), side, side, 5 + CLASSES))
        for index, (width, height) in enumerate(anchors):
            for y in range(side):
                for x in range(side):
                    tx, ty, tw, th, objectness, *classes = (logistic(value) for value in level[0, index, y, x])
                    centre = (2 * tx - 0.5 + x) * stride, (2 * ty - 0.5 + y) * stride
                    boxes.append(around(*centre, (2 * tw) ** 2 * width, (2 * th) ** 2 * height))
                    scores.append([objectness * score for score in classes])
        if flat:
            level = level.transpose(0, 1, 4, 2, 3).reshape(1, -1, side, side)
        named[f"stride_{stride}"] = level
    if reversed_order:
        named = dict(reversed(named.items()))
    check({"layout": "yolov5_raw", "strides": STRIDES, "anchors": ANCHORS}, named, boxes, scores)


def test_anchors_may_be_the_flat_lists_of_ultralytics_yaml():
    flat = [[size for pair in level for size in pair] for level in ANCHORS]
    head = {"layout": "yolov5_raw", "strides": STRIDES}
    assert variant_of({**head, "anchors": flat}) == variant_of({**head, "anchors": ANCHORS})


@given(arrays(np.float32, 9, elements=st.floats(-500, 500, width=32)))
def test_sigmoid_keeps_its_dtype_and_never_overflows(x):
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-x.astype(np.float64))), rtol=1e-4, atol=1e-37)


def table(count: int, kept: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """An image of `count` detections, junk beyond."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 30, (1, kept, 2))
    return {
        "num_dets": np.array([[count]], np.int32),
        "boxes": np.concatenate([corner, corner + rng.uniform(1, 30, (1, kept, 2))], 2).astype(np.float32),
        "scores": rng.uniform(0.1, 1, (1, kept)).astype(np.float32),
        "labels": np.where(np.arange(kept) < count, rng.integers(0, CLASSES, (1, kept)), -1).astype(np.int32),
    }


@pytest.mark.parametrize("name", ["scores", "boxes"])
def test_detections_that_are_not_finite_are_no_padding_and_are_counted(name):
    four = table(5)
    four[name][0, 2] = np.nan
    outputs = to_outputs(four, variant_of(EFFICIENT))
    assert len(outputs.kept[0]) == 5
    errors = TensorErrors()
    errors.add(outputs, outputs, None)
    assert errors.nonfinite == four[name][0, 2].size
    checks = judge(Measured(matched=5, total=5, nonfinite=errors.nonfinite), GoldenCase(), 1, None)[3].checks
    assert [(c.name, c.ok, c.limit) for c in checks] == [("NaN or infinite", False, "= 0 values of detections")]


@given(st.integers(0, 8), st.integers(0, 99))
def test_all_ends_of_nms_say_the_same(count, seed):
    four = table(count, seed=seed)
    boxes, scores, labels = (four[name][0] for name in ("boxes", "scores", "labels"))
    real = np.arange(8) < count
    column = np.where(real, scores, 0)[:, None]
    rows = np.concatenate([boxes, column, labels[:, None]], 1)
    seven = np.concatenate([np.zeros((count, 1)), boxes[real], labels[real, None], scores[real, None]], 1)
    other_image = np.concatenate([np.ones((count, 1)), seven[:, 1:]], 1)
    five = {"dets": np.concatenate([boxes, column], 1)[None], "labels": labels[None].astype(np.int64)}
    forms: list[tuple[dict[str, np.ndarray], dict[str, Any]]] = [
        (four, {}),
        ({"out": rows[None]}, {}),
        ({"other": rows, "out": rows[None]}, {"output": "out"}),
        ({"out": seven}, {}),
        ({"out": np.concatenate([other_image, seven])}, {}),
        (five, {"boxes": "dets", "count": None}),
    ]
    order = sorted(range(count), key=lambda i: -scores[i])
    for named, fields in forms:
        outputs = to_outputs(named, variant_of({**EFFICIENT, **fields}))
        assert (outputs.boxes.shape, outputs.scores.shape, outputs.raw) == ((1, 0, 4), (1, 0, CLASSES), {})
        (found,) = outputs.kept
        np.testing.assert_array_equal(found.boxes, boxes[order])
        np.testing.assert_array_equal(found.scores, scores[order])
        np.testing.assert_array_equal(found.labels, labels[order])
        assert {found.boxes.dtype, found.scores.dtype} == {np.dtype(np.float32)}
        assert {found.labels.dtype, found.rows.dtype} == {np.dtype(np.int32)}


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


RAW = {"layout": "yolov5_raw", "strides": STRIDES, "anchors": ANCHORS}
MAPS = {"a": zeros(1, 16, 4, 4), "b": zeros(1, 8, 2, 2)}
ROWS7 = np.array([[0, 1, 1, 9, 9, 3, 0.5]], np.float32)
# Head, outputs of the file, and what the one line must say.
MISFITS: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], list[str]]] = {
    "boxes are missing": (
        {"layout": "decoded"},
        {"scores": zeros(1, 9, 3)},
        ["no output 'boxes' but scores", "head.boxes"],
    ),
    "scores are missing": ({"layout": "decoded"}, {"boxes": zeros(1, 9, 4)}, ["'scores'", "source.head.scores"]),
    "boxes of five columns": (
        {"layout": "decoded"},
        {"boxes": zeros(1, 9, 5), "scores": zeros(1, 9, 3)},
        ["boxes [1, 9, 5]", "[B, N, 4]", "source.head"],
    ),
    "scores of other rows": (
        {"layout": "decoded"},
        {"boxes": zeros(1, 9, 4), "scores": zeros(1, 8, 3)},
        ["9 boxes but 8 rows of scores", "source.head"],
    ),
    "scores of more classes": (
        {"layout": "decoded"},
        {"boxes": zeros(1, 9, 4), "scores": zeros(1, 9, 7)},
        ["scores [1, 9, 7]", "3 classes", "[B, 3, N] or [B, N, 3]", "classes", "7 classes?"],
    ),
    "scores said to be transposed": (
        {"layout": "decoded", "transposed": True},
        {"boxes": zeros(1, 9, 4), "scores": zeros(1, 9, 3)},
        ["scores [1, 9, 3]", "[B, 3, N]", "source.head"],
    ),
    "as many boxes as classes": (
        {"layout": "decoded"},
        {"boxes": zeros(1, 3, 4), "scores": zeros(1, 3, 3)},
        ["[1, 3, 3]", "source.head.transposed"],
    ),
    "yolov8 of more classes": ({"layout": "yolov8"}, {"o": zeros(1, 84, 99)}, ["o [1, 84, 99]", "80 classes?"]),
    "yolov5 declared yolov8": (
        {"layout": "yolov8"},
        {"o": zeros(1, 99, 8)},
        ["o [1, 99, 8]", "[B, N, 7]", "4 classes?"],
    ),
    "yolov8 declared yolov5": ({"layout": "yolov5"}, {"o": zeros(1, 7, 99)}, ["[B, 8, N]", "source.head"]),
    "yolov5 said to be transposed": (
        {"layout": "yolov5", "transposed": True},
        {"o": zeros(1, 99, 8)},
        ["o [1, 99, 8]", "is [B, 8, N]", "source.head"],
    ),
    "as many rows as columns": ({"layout": "yolov5"}, {"o": zeros(1, 8, 8)}, ["o [1, 8, 8]", "source.head.transposed"]),
    "a map for yolov5": ({"layout": "yolov5"}, {"o": zeros(1, 3, 4, 4, 8)}, ["o [1, 3, 4, 4, 8]", "[B, N, 8]"]),
    "no such output": ({"layout": "yolov5", "output": "x"}, {"o": zeros(1, 9, 8)}, ["'x' but o", "source.head.output"]),
    "two that fit": (
        {"layout": "yolov5"},
        {"o": zeros(1, 9, 8), "p": zeros(1, 6, 8)},
        ["2 outputs have", "o [1, 9, 8], p [1, 6, 8]", "source.head.output"],
    ),
    "two of which none fits": (
        {"layout": "yolov5"},
        {"o": zeros(1, 9, 7), "p": zeros(1, 9, 4)},
        ["no output has", "layout yolov5", "source.head.output"],
    ),
    "cells of other strides": (
        {"layout": "yolox", "strides": [8]},
        {"o": zeros(1, CELLS, 8)},
        ["[1, 20, 8]", "[B, 64, 8]", "strides [8]", "source.head"],
    ),
    "an anchor too few": (
        {**RAW, "anchors": [ANCHORS[0][:1], ANCHORS[1]]},
        MAPS,
        ["stride 16", "1 anchors", "[B, 1, 4, 4, 8] or [B, 8, 4, 4]", "a [1, 16, 4, 4]", "source.head.anchors"],
    ),
    "a level too few": (RAW, {"a": MAPS["a"]}, ["stride 32", "outputs are a [1, 16, 4, 4]"]),
    "rows of five": (EFFICIENT, {"o": zeros(1, 9, 5)}, ["o [1, 9, 5]", "[B, K, 6]", "[n, 7]", "source.head"]),
    "no labels": (EFFICIENT, {k: v for k, v in table(3).items() if k != "labels"}, ["'labels'", "source.head.labels"]),
    "no count": (
        EFFICIENT,
        {k: v for k, v in table(3).items() if k != "num_dets"},
        ["'num_dets'", "source.head.count"],
    ),
    "labels of another length": (EFFICIENT, {**table(3), "labels": zeros(1, 5)}, ["labels [1, 5]", "[B, K]"]),
    "a label too high": (EFFICIENT, {"o": ROWS7}, ["label 3", "3 classes", "count from 0"]),
    "a label between classes": (EFFICIENT, {"o": ROWS7 - [[0, 0, 0, 0, 0, 0.5, 0]]}, ["label 2.5"]),
    "columns in another order": (EFFICIENT, {"o": np.roll(ROWS7, 1)}, ["[n, 7] (batch index"]),
}


@pytest.mark.parametrize(("head", "named", "words"), MISFITS.values(), ids=MISFITS)
def test_a_file_that_does_not_fit_its_yaml_is_named_with_what_was_found(head, named, words):
    with pytest.raises(AlignError) as caught:
        to_outputs(named, variant_of(head))
    line = str(caught.value)
    assert "their.onnx: " in line
    assert "\n" not in line
    assert caught.value.mend
    assert [word for word in words if word not in line] == []


def test_a_square_output_is_read_as_the_yaml_says():
    rows = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    plain, turned = (variant_of({"layout": "yolov5", "transposed": value}) for value in (False, True))
    one, other = (to_outputs({"o": rows}, variant) for variant in (plain, turned))
    np.testing.assert_array_equal(to_outputs({"o": rows.transpose(0, 2, 1)}, plain).scores, other.scores)
    assert not np.array_equal(one.scores, other.scores)


GOOD_BOXES = np.array([[[0, 0, 50, 60], [10, 20, 30, 40], [4, 4, 8, 8]]], np.float32)
GOOD_SCORES = np.array([[[0.1, 0, 0.9], [0, 0, 0.5], [1, 0.2, 0]]], np.float32)
IMPLAUSIBLE = {
    "logits": (GOOD_BOXES, GOOD_SCORES * 8 - 6, ["from -6 to 2", "scores_activation: sigmoid"]),
    "percent": (GOOD_BOXES, GOOD_SCORES * 100, ["from 0 to 100"]),
    "two sigmoids": (GOOD_BOXES, sigmoid(GOOD_SCORES), ["below 0.5", "scores_activation: none"]),
    "centre and size": (GOOD_BOXES[..., [2, 3, 0, 1]], GOOD_SCORES, ["right edge", "box_format: cxcywh"]),
    "fractions of the input": (GOOD_BOXES / 64, GOOD_SCORES, ["beyond 0.938 pixels"]),
}


@pytest.mark.parametrize(("boxes", "scores", "words"), IMPLAUSIBLE.values(), ids=IMPLAUSIBLE)
def test_values_that_cannot_be_meant_are_named(boxes, scores, words):
    variant = variant_of({"layout": "decoded"})
    require_plausible(GOOD_BOXES, GOOD_SCORES, variant)
    with pytest.raises(AlignError) as caught:
        require_plausible(boxes, scores, variant)
    assert [word for word in ["their.onnx", *words] if word not in str(caught.value)] == []
