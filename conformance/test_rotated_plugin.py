"""EfficientNMSRotated_TRT: its oracle against the definition, and the real one, in TensorRT, against the oracle."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from alignment.engine.build import BuildOptions
from alignment.engine.capabilities import missing
from alignment.nms.implementations import ROTATED_IOU_ROUNDING, efficient_nms_rotated
from alignment.nms.plugins import ROTATED, plugin_outputs
from alignment.nms.rotated import rotated_iou
from alignment.nms.semantics import Fate, run

pytestmark = [pytest.mark.nms, pytest.mark.rotated, pytest.mark.plugin]
DEFAULTS: dict[str, Any] = {
    "score_threshold": 0.25,
    "iou_threshold": 0.5,
    "max_output_boxes": 100,
    "background_class": -1,
    "score_activation": 0,
    "class_agnostic": 0,
    "pre_nms_topk": 0,
    "plugin_version": "1",
}
Image = tuple[np.ndarray, np.ndarray]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    return float(rotated_iou(a[None].astype(float), b[None].astype(float))[0])


def defined(boxes: np.ndarray, scores: np.ndarray, asked: dict[str, Any]) -> list[tuple[int, int]]:
    """The definition, pair by pair: (row, class) of what is kept, in order."""
    candidates = []
    for row, of_row in enumerate(scores.astype(np.float32)):
        for label, score in enumerate(of_row):
            if asked["score_activation"]:
                score = np.float32(1 / (1 + np.exp(-np.float64(score))))
            if label != asked["background_class"] and score > np.float32(asked["score_threshold"]):
                candidates.append((-score, row, label))
    candidates.sort()
    kept: list[tuple[int, int]] = []
    for _, row, label in candidates[: asked["pre_nms_topk"] or None]:
        if len(kept) == asked["max_output_boxes"]:
            break
        rivals = [r for r, other in kept if other == label or asked["class_agnostic"]]
        threshold = np.float32(asked["iou_threshold"])
        if all(np.float32(iou(boxes[r], boxes[row])) <= threshold for r in rivals):
            kept.append((row, label))
    return kept


# Few coordinates: ties, equal boxes, boxes without area and IoUs at the threshold are frequent.
SIDES = st.one_of(st.integers(0, 4), st.just(np.inf))
PLACES = st.one_of(st.integers(0, 4), st.just(np.nan))
BOXES = st.tuples(PLACES, PLACES, SIDES, SIDES, st.sampled_from([0, np.pi / 8, np.pi / 4, np.pi / 2, np.inf]))
VALUES = st.one_of(st.integers(-2, 8).map(lambda i: i / 8), st.sampled_from([np.nan, np.inf, -np.inf]))
ATTRIBUTES = st.fixed_dictionaries(
    {
        "score_threshold": st.sampled_from([-1.0, 0.0, 0.25, 0.5]),
        "iou_threshold": st.sampled_from([0.1, 1 / 3, 0.5, 1.0]),
        "max_output_boxes": st.integers(1, 20),
        "background_class": st.integers(-1, 2),
        "score_activation": st.integers(0, 1),
        "class_agnostic": st.integers(0, 1),
        "pre_nms_topk": st.sampled_from([0, 1, 5, 1000]),
    }
)


@st.composite
def images(draw: Any) -> Image:
    rows, classes = draw(st.integers(0, 12)), draw(st.integers(1, 3))
    boxes = draw(st.lists(BOXES, min_size=rows, max_size=rows))
    scores = draw(st.lists(VALUES, min_size=rows * classes, max_size=rows * classes))
    return np.array(boxes, np.float32).reshape(-1, 5), np.array(scores, np.float32).reshape(-1, classes)


@settings(max_examples=400, deadline=None)
@given(images(), ATTRIBUTES, st.sampled_from([np.float32, np.float16]))
def test_the_oracle_is_the_definition(image, attributes, kind):
    boxes, scores = (part.astype(kind) for part in image)
    expected = defined(boxes, scores, attributes)
    with np.errstate(all="ignore"):
        count, found, values, labels = (
            part[0] for part in plugin_outputs(ROTATED, boxes[None], scores[None], attributes)
        )
    places = attributes["max_output_boxes"]
    assert count.tolist() == [len(expected)]
    assert (found.shape, values.shape, labels.shape) == ((places, 5), (places,), (places,))
    assert found.dtype == values.dtype == kind
    assert labels.dtype == np.int32
    assert labels.tolist() == [label for _, label in expected] + [-1] * (places - len(expected))
    np.testing.assert_array_equal(found[: len(expected)], boxes[[row for row, _ in expected]])
    assert not found[len(expected) :].any()
    assert not values[len(expected) :].any()
    own = scores[[row for row, _ in expected], [label for _, label in expected]]
    with np.errstate(over="ignore"):
        own = (1 / (1 + np.exp(-own.astype(np.float64)))).astype(np.float32).astype(kind) if values.size else own
    if attributes["score_activation"]:
        np.testing.assert_array_equal(values[: len(expected)], own)


def test_without_activation_scores_are_copies():
    boxes, scores = scattered(1, 40, 3)
    _, _, values, labels = plugin_outputs(ROTATED, boxes, scores, DEFAULTS)
    count = int((labels >= 0).sum())
    assert count > 10
    assert np.isin(values[0, :count], scores).all()
    assert (np.diff(values[0, :count]) <= 0).all()


def test_images_of_a_batch_are_each_on_their_own():
    boxes, scores = scattered(3, 50, 2)
    together = plugin_outputs(ROTATED, boxes, scores, DEFAULTS)
    for image in range(3):
        alone = plugin_outputs(ROTATED, boxes[image : image + 1], scores[image : image + 1], DEFAULTS)
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_array_equal(one[image], other[0])


def test_iou_at_the_threshold_goes_as_it_was_seen():
    """IoU of both pairs is 1/3 to the last bit or two; beyond a step of float32 nothing is excused."""
    boxes = np.array([[0, 0, 4, 2, 0.3], [2 * np.cos(0.3), 2 * np.sin(0.3), 4, 2, 0.3]], np.float32)
    scores = np.array([[0.9], [0.8]], np.float32)
    for threshold, open_to_both in ((1 / 3, True), (1 / 3 + 1e-6, False), (1 / 3 - 1e-6, False)):
        semantics = efficient_nms_rotated({**DEFAULTS, "iou_threshold": threshold})
        fates = {tuple(run(semantics, boxes, scores, seen=np.array(seen)).fates) for seen in ([0], [0, 1])}
        kept = {(Fate.KEPT, Fate.SUPPRESSED), (Fate.KEPT, Fate.KEPT)}
        assert fates == kept if open_to_both else len(fates) == 1
    assert ROTATED_IOU_ROUNDING < 1e-6


def scattered(batch: int, rows: int, classes: int, span: float = 200.0, seed: int = 0) -> Image:
    """Boxes in clusters, some scores tied."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.uniform(0, span, (batch, -(-rows // 4), 2)), 4, 1)[:, :rows]
    boxes = np.concatenate(
        [
            centres + rng.normal(0, 3, centres.shape),
            rng.uniform(5, 40, (batch, rows, 2)),
            rng.uniform(-np.pi / 2, np.pi / 2, (batch, rows, 1)),
        ],
        -1,
    )
    return boxes.astype(np.float32), (rng.integers(0, 64, (batch, rows, classes)) / 64).astype(np.float32)


def poisoned(batch: int) -> Image:
    boxes, scores = scattered(batch, 200, 3)
    rng = np.random.default_rng(1)
    for values in (boxes, scores):
        flat = values.reshape(-1)
        flat[rng.choice(flat.size, 60, replace=False)] = np.repeat([np.nan, np.inf, -np.inf], 20)
    return boxes, scores


def at_thresholds() -> Image:
    """Halves of one box, whose IoU is 1/3, turned all ways; scores at the threshold, above and below by a step."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 60)
    along = np.stack([np.cos(angles), np.sin(angles)], 1)
    first = np.concatenate([np.stack([np.arange(60) * 20.0, np.zeros(60)], 1), np.tile([4.0, 2.0], (60, 1))], 1)
    second = first + np.concatenate([2 * along, np.zeros((60, 2))], 1)
    boxes = np.concatenate([np.concatenate([part, angles[:, None]], 1) for part in (first, second)])
    step = np.spacing(np.float32(0.25))
    scores = np.concatenate([np.full(60, 0.9), np.full(60, 0.5)]).astype(np.float32)
    scores[50:60], scores[110:] = np.float32(0.25), np.tile([0.25 - step, 0.25 + step], 5)
    return boxes[None].astype(np.float32), scores[None, :, None]


SCENES: dict[str, tuple[Image, dict[str, Any]]] = {
    "scattered": (scattered(2, 300, 4), {}),
    "agnostic": (scattered(2, 300, 4), {"class_agnostic": 1}),
    "background": (scattered(1, 100, 4), {"background_class": 2}),
    "logits": ((scattered(1, 300, 2)[0], (scattered(1, 300, 2)[1] - 0.5) * 8), {"score_activation": 1}),
    "best pairs": (scattered(2, 300, 4), {"pre_nms_topk": 150}),
    "all tied": ((scattered(1, 500, 1)[0], np.full((1, 500, 1), 0.5, np.float32)), {"max_output_boxes": 500}),
    "at thresholds": (at_thresholds(), {"iou_threshold": 1 / 3}),
    "nothing": (scattered(2, 50, 2), {"score_threshold": 1.0}),
    "not finite": (poisoned(2), {}),
    "few places": (scattered(1, 300, 4), {"max_output_boxes": 7}),
    "6000 candidates": (scattered(1, 6000, 1, 900.0), {"score_threshold": -1.0, "max_output_boxes": 6000}),
    "20000 candidates": (scattered(1, 10000, 2, 3000.0), {"score_threshold": -1.0, "max_output_boxes": 300}),
}


def to_onnx(boxes: np.ndarray, scores: np.ndarray, attributes: dict[str, Any]) -> onnx.ModelProto:
    """A graph of the node alone, shapes fixed."""
    kind = TensorProto.FLOAT16 if boxes.dtype == np.float16 else TensorProto.FLOAT
    batch, places = len(boxes), attributes["max_output_boxes"]
    value = helper.make_tensor_value_info
    inputs = [value("boxes", kind, boxes.shape), value("scores", kind, scores.shape)]
    outputs = [
        value("num_dets", TensorProto.INT32, [batch, 1]),
        value("det_boxes", kind, [batch, places, 5]),
        value("det_scores", kind, [batch, places]),
        value("det_labels", TensorProto.INT32, [batch, places]),
    ]
    node = helper.make_node(ROTATED, ["boxes", "scores"], [o.name for o in outputs], "nms", **attributes)
    graph = helper.make_graph([node], "nms", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", SCENES)
def test_scenes_put_the_oracle_to_work(name, kind):
    """What the GPU is asked below tells one answer from another."""
    (boxes, scores), changes = SCENES[name]
    with np.errstate(all="ignore"):
        count, *_ = plugin_outputs(ROTATED, boxes.astype(kind), scores.astype(kind), {**DEFAULTS, **changes})
    assert (count > 5).all() == (name != "nothing")


def test_the_library_is_loaded_only_for_a_file_that_needs_it(tmp_path: Path, monkeypatch):
    """Before TensorRT parses or loads; the engine belongs to the library's bytes."""
    from alignment.engine.registry import plugin_identity, register_plugins

    library, said = tmp_path / "library.so", []
    library.write_bytes(b"first")
    trt = SimpleNamespace(init_libnvinfer_plugins=lambda logger, namespace: said.append("TensorRT's"))
    own = SimpleNamespace(load_plugin=lambda: said.append("ours"), build_plugin=lambda: library)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "alignment.engine.plugins", own)
    (boxes, scores), _ = SCENES["nothing"]
    needs, does_not = tmp_path / "needs.onnx", tmp_path / "does_not.onnx"
    model = to_onnx(boxes, scores, DEFAULTS)
    onnx.save(model, needs)
    model.graph.node[0].op_type = "EfficientNMS_TRT"
    onnx.save(model, does_not)
    register_plugins(None, does_not)
    assert said == ["TensorRT's"]
    assert plugin_identity(does_not) == {}
    register_plugins(None, needs)
    assert said == ["TensorRT's", "TensorRT's", "ours"]
    before = plugin_identity(needs)
    library.write_bytes(b"second")
    assert before.keys() == plugin_identity(needs).keys() == {"plugin_sha256"}
    assert before != plugin_identity(needs)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", SCENES)
def test_a_gpu_gives_what_the_oracle_gives(name, kind, tmp_path: Path):
    """In order, and twice: ties are no matter of chance.  Only an IoU at the threshold itself may go either way."""
    if reason := missing():
        pytest.skip(reason)
    from alignment.engine.execute import execute

    (boxes, scores), changes = SCENES[name]
    boxes, scores, attributes = boxes.astype(kind), scores.astype(kind), {**DEFAULTS, **changes}
    onnx.save(to_onnx(boxes, scores, attributes), tmp_path / "nms.onnx")
    options = BuildOptions(precision="fp16" if kind == np.float16 else "fp32")
    first, second = execute(tmp_path / "nms.onnx", options, {"boxes": boxes, "scores": scores}, runs=2)
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value)
    if name == "at thresholds":
        count = int(first["num_dets"][0, 0])
        rows = (boxes[0] == first["det_boxes"][0, :count, None]).all(2).argmax(1)
        fates = run(
            efficient_nms_rotated(attributes), *(part[0].astype(np.float32) for part in (boxes, scores)), seen=rows
        )
        np.testing.assert_array_equal(fates.rows[fates.kept], rows)
        return
    expected = plugin_outputs(ROTATED, boxes, scores, attributes)
    names = "num_dets", "det_boxes", "det_scores", "det_labels"
    # Sigmoids are rounded from float64's, which may be a bit off on either side.
    bound = np.finfo(kind).eps if name == "logits" else 0
    for key, value in zip(names, expected, strict=True):
        np.testing.assert_allclose(first[key], value, rtol=bound if key == "det_scores" else 0, err_msg=key)
