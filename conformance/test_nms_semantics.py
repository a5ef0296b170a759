"""Each post-processing that we describe, against the real one; and what fates must always say."""

from __future__ import annotations

import dataclasses
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from alignment.data.preprocess import Transform
from alignment.nms.implementations import mmyolo, onnx_nms
from alignment.nms.semantics import Fate, Semantics, run
from alignment.variant import Nms

pytestmark = pytest.mark.nms
SAME = Transform((1.0, 1.0), (0.0, 0.0), (320, 320))
MOVED = Transform((0.5, 0.5), (16.0, 0.0), (640, 576))
#: Multiples of 1/8, so that ties and scores at a threshold are common; and what is no score.
VALUES = st.one_of(st.integers(0, 8).map(lambda i: i / 8), st.sampled_from([np.nan, np.inf, -np.inf]))
CORNER = st.integers(-2, 10)
BOX = st.tuples(CORNER, CORNER, CORNER, CORNER)
ORDERED = st.tuples(CORNER, CORNER, st.integers(0, 6), st.integers(0, 6)).map(
    lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3])
)
THRESHOLDS = st.sampled_from([0.25, 1 / 3, 0.5, 0.75, 1.0])


@st.composite
def images(draw: Any, box: Any = ORDERED, values: Any = VALUES) -> tuple[np.ndarray, np.ndarray]:
    """Boxes ``[N, 4]`` and scores ``[N, C]`` of one image, on a grid on which IoUs meet thresholds exactly."""
    count, classes = draw(st.integers(0, 20)), draw(st.integers(1, 3))
    boxes = draw(st.lists(box, min_size=count, max_size=count))
    scores = draw(st.lists(values, min_size=count * classes, max_size=count * classes))
    return np.array(boxes, np.float32).reshape(-1, 4) * 4, np.array(scores, np.float32).reshape(-1, classes)


def nms_session(score_threshold: float, iou_threshold: float, limit: int) -> Any:
    """ONNX Runtime on one NonMaxSuppression."""
    import onnxruntime

    graph = helper.make_graph(
        [helper.make_node("NonMaxSuppression", ["boxes", "scores", "limit", "iou", "score"], ["kept"])],
        "nms",
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, "n", 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, "c", "n"]),
        ],
        [helper.make_tensor_value_info("kept", TensorProto.INT64, ["k", 3])],
        [
            helper.make_tensor("limit", TensorProto.INT64, [1], [limit]),
            helper.make_tensor("iou", TensorProto.FLOAT, [1], [iou_threshold]),
            helper.make_tensor("score", TensorProto.FLOAT, [1], [score_threshold]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@settings(max_examples=300, deadline=None)
@given(images(box=BOX), THRESHOLDS, st.sampled_from([0.0, 0.25, 0.5]), st.integers(1, 8))
def test_onnx_nms_is_onnx_runtimes(image, iou_threshold, score_threshold, limit):
    boxes, scores = image
    session = nms_session(score_threshold, iou_threshold, limit)
    (kept,) = session.run(None, {"boxes": boxes[None], "scores": scores.T[None]})
    fates = run(onnx_nms(score_threshold, iou_threshold, limit), boxes, scores)
    ours = fates.kept
    # ONNX Runtime goes class by class; within one, both go by falling score.
    ours = ours[np.argsort(fates.labels[ours], kind="stable")]
    np.testing.assert_array_equal(np.stack([fates.labels[ours], fates.rows[ours]], 1), kept[:, 1:])


def mmyolos(
    boxes: np.ndarray, scores: np.ndarray, nms: Nms, transform: Transform, yolox_style: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that mmdet's filter lets through and mmcv's ``batched_nms`` keeps, in mmyolo's order of steps."""
    import torch
    from mmcv.ops import batched_nms
    from mmdet.models.utils import filter_scores_and_topk

    values, rows = torch.from_numpy(scores), torch.arange(len(scores))
    if nms.multi_label:
        values, labels, rows, _ = filter_scores_and_topk(values, nms.score_threshold, nms.nms_pre)
    else:
        best, labels = values.max(1, keepdim=True)
        values, _, rows, found = filter_scores_and_topk(
            best, nms.score_threshold, nms.nms_pre, {"labels": labels[:, 0]}
        )
        labels = found["labels"]
    placed = torch.from_numpy(transform.to_original(boxes[rows.numpy()].reshape(-1, boxes.shape[1])))
    pairs = (rows * scores.shape[1] + labels).numpy()
    if not len(pairs):
        return pairs, pairs
    _, kept = batched_nms(placed, values, labels, {"type": "nms", "iou_threshold": nms.iou_threshold})
    kept = kept[: len(pairs) if yolox_style else nms.max_per_image]
    return pairs, pairs[kept.numpy()]


def assert_mmyolos(
    boxes: np.ndarray, scores: np.ndarray, nms: Nms, transform: Transform, yolox_style: bool = False
) -> None:
    passed, kept = mmyolos(boxes, scores, nms, transform, yolox_style)
    if yolox_style:
        nms = nms.model_copy(update={"max_per_image": nms.nms_pre})
    # torch sorts equal scores in no order: what it took, and what it kept of that, goes first.
    first = np.concatenate([kept, np.setdiff1d(passed, kept)])
    fates = run(mmyolo(nms), boxes, scores, transform, first)
    np.testing.assert_array_equal((fates.rows * scores.shape[1] + fates.labels)[fates.kept], kept)


@settings(max_examples=200, deadline=None)
@given(images(), THRESHOLDS, st.data())
def test_mmyolo_is_mmdets_filter_and_mmcvs_nms(image, iou_threshold, data):
    """Scores that are no number, or infinite, are among them."""
    pytest.importorskip("mmyolo")
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    nms = Nms(
        score_threshold=data.draw(st.sampled_from([0.0, 0.25, 0.5])),
        iou_threshold=iou_threshold,
        nms_pre=data.draw(st.integers(1, 40)),
        max_per_image=data.draw(st.integers(1, 30)),
        multi_label=data.draw(st.booleans()),
    )
    assert_mmyolos(*image, nms, data.draw(st.sampled_from([SAME, MOVED])), data.draw(st.booleans()))


def predicted(boxes: np.ndarray, logits: np.ndarray, cfg: dict[str, Any]) -> Any:
    """What mmyolo's own head makes of decoded boxes and logits, by its ``predict_by_feat``; objectness is 1."""
    import torch
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmengine.config import ConfigDict
    from mmyolo.models.dense_heads import YOLOv5Head

    count, classes = logits.shape
    priors = SimpleNamespace(grid_priors=lambda *_, **__: [torch.zeros(count, 2)])
    coder = SimpleNamespace(decode=lambda priors, boxes, stride: boxes.clone())
    head = SimpleNamespace(
        num_classes=classes,
        featmap_sizes=None,
        featmap_strides=[1],
        num_base_priors=1,
        prior_generator=priors,
        bbox_coder=coder,
    )
    head._bbox_post_process = MethodType(BaseDenseHead._bbox_post_process, head)
    maps = (torch.from_numpy(np.ascontiguousarray(x.T))[None, ..., None] for x in (logits, boxes))
    sure = torch.full((1, 1, count, 1), np.inf)
    meta = {"ori_shape": (10000, 10000), "scale_factor": (1.0, 1.0)}
    (found,) = YOLOv5Head.predict_by_feat(head, *([one] for one in (*maps, sure)), [meta], ConfigDict(cfg))
    return found


@pytest.mark.parametrize("yolox_style", [True, False])
@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("nms_pre", [30000, 25])
def test_mmyolo_is_mmyolos_own_head_which_in_yolox_style_lifts_max_per_img(yolox_style, multi_label, nms_pre):
    pytest.importorskip("mmyolo")
    import torch

    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    rng = np.random.default_rng(nms_pre)
    corner = rng.uniform(0, 100, (60, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 40, (60, 2))], 1).astype(np.float32)
    logits = rng.normal(-1, 2, (60, 3)).astype(np.float32)
    logits[:3, 0] = np.nan, np.inf, -np.inf
    nms = Nms(score_threshold=0.25, iou_threshold=0.5, nms_pre=nms_pre, max_per_image=5, multi_label=multi_label)
    cfg = {"score_thr": 0.25, "nms_pre": nms_pre, "max_per_img": 5, "multi_label": multi_label}
    found = predicted(boxes, logits, {**cfg, "nms": {"type": "nms", "iou_threshold": 0.5}, "yolox_style": yolox_style})
    lifted = nms.model_copy(update={"max_per_image": nms_pre}) if yolox_style else nms
    scores = torch.from_numpy(logits).sigmoid().numpy()
    fates = run(mmyolo(lifted), boxes, scores, SAME)
    assert (len(fates.kept) > 5) == yolox_style
    np.testing.assert_array_equal(found.scores.numpy(), fates.scores[fates.kept])
    np.testing.assert_array_equal(found.labels.numpy(), fates.labels[fates.kept])
    np.testing.assert_array_equal(found.bboxes.numpy(), boxes[fates.rows[fates.kept]])


@pytest.mark.parametrize("count", [9999, 10000])
def test_mmcv_takes_classes_one_by_one_from_10000_boxes_on(count):
    """Negative coordinates make boxes of neighbouring classes meet below that, and not above."""
    pytest.importorskip("mmyolo")
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    rng = np.random.default_rng(count)
    centre = rng.uniform(-300, 10, (count, 2))
    boxes = np.concatenate([centre - 20, centre + 20], 1).astype(np.float32)
    scores = np.zeros((count, 2), np.float32)
    scores[np.arange(count), rng.integers(0, 2, count)] = rng.permutation(count) / count * 0.9 + 0.05
    nms = Nms(score_threshold=0.01, iou_threshold=0.5, max_per_image=300)
    assert_mmyolos(boxes, scores, nms, SAME)
    apart = dataclasses.replace(mmyolo(nms), classes="apart")
    same = np.array_equal(run(apart, boxes, scores, SAME).fates, run(mmyolo(nms), boxes, scores, SAME).fates)
    assert same == (count >= 10000)


SEMANTICS = st.builds(
    Semantics,
    score_threshold=st.sampled_from([0.0, 0.25, 0.5]),
    iou_threshold=THRESHOLDS,
    threshold_float32=st.booleans(),
    score_inclusive=st.booleans(),
    nan_passes=st.booleans(),
    multi_label=st.booleans(),
    background=st.sampled_from([None, 0]),
    floor=st.sampled_from([None, -32768.0]),
    topk=st.one_of(st.none(), st.integers(1, 20)),
    topk_unit=st.sampled_from(["pairs", "anchors"]),
    candidate_cap=st.one_of(st.none(), st.integers(1, 20)),
    ties=st.sampled_from(["rising", "falling"]),
    frame=st.sampled_from(["input", "original"]),
    classes=st.sampled_from(["apart", "offset", "offset_or_apart", "together"]),
    split=st.sampled_from([None, 5]),
    iou_inclusive=st.booleans(),
    reorder=st.booleans(),
    max_per_class=st.one_of(st.none(), st.integers(1, 5)),
    max_output=st.one_of(st.none(), st.integers(1, 8)),
)


@settings(max_examples=400, deadline=None)
@given(images(), SEMANTICS)
def test_every_pair_has_a_fate_that_its_evidence_bears_out(image, semantics):
    boxes, scores = image
    fates = run(semantics, boxes, scores, MOVED)
    flat = fates.rows * scores.shape[1] + fates.labels
    assert len(np.unique(flat)) == len(flat)
    with np.errstate(invalid="ignore"):
        passing = (
            scores >= semantics.score_threshold if semantics.score_inclusive else scores > semantics.score_threshold
        ) | (np.isnan(scores) & semantics.nan_passes)
    if semantics.floor is None:
        assert set(flat) == set(np.flatnonzero(passing.ravel()))
    order = fates.scores[~np.isnan(fates.scores)]
    assert (order[:-1] >= order[1:]).all()
    suppressed = fates.fates == Fate.SUPPRESSED
    assert ((fates.by >= 0) == suppressed).all()
    by = fates.by[suppressed]
    assert (by < np.flatnonzero(suppressed)).all()
    reached = fates.iou[suppressed] >= np.float32(semantics.iou_threshold)
    assert reached.all()
    if semantics.classes == "apart":
        assert (fates.labels[by] == fates.labels[suppressed]).all()
    if semantics.max_output is not None:
        assert len(fates.kept) <= semantics.max_output
        assert (fates.fates != Fate.CUT_BY_MAX_OUTPUT).all() or semantics.max_per_class or len(fates.kept)
    if semantics.candidate_cap is not None:
        assert (
            np.isin(fates.fates, [Fate.KEPT, Fate.SUPPRESSED, Fate.CUT_BY_MAX_OUTPUT]).sum() <= semantics.candidate_cap
        )
    if not semantics.multi_label and semantics.floor is None:
        assert len(np.unique(fates.rows[fates.kept])) == len(fates.kept)


@pytest.mark.topk
@settings(max_examples=200, deadline=None)
@given(images(values=st.integers(0, 8).map(lambda i: i / 8)), SEMANTICS, st.integers(1, 12))
def test_topk_over_rows_hands_them_on_by_their_best_score(image, semantics, count):
    """A graph that ends in TopK, Gather and NMS: NMS knows the rows by their rank only."""
    boxes, scores = image
    rank = np.argsort(-scores.max(1), kind="stable")[:count]
    after = dataclasses.replace(semantics, topk=None, ties="rising")
    given_rows = run(after, boxes[rank], scores[rank], MOVED)
    whole = run(dataclasses.replace(after, topk=count, topk_unit="anchors"), boxes, scores, MOVED)
    np.testing.assert_array_equal(whole.rows[whole.kept], rank[given_rows.rows[given_rows.kept]])
    np.testing.assert_array_equal(whole.labels[whole.kept], given_rows.labels[given_rows.kept])


@pytest.mark.topk
def test_the_anchors_of_topk_are_onnx_runtimes():
    import onnxruntime

    graph = helper.make_graph(
        [helper.make_node("TopK", ["best", "k"], ["values", "rows"])],
        "topk",
        [helper.make_tensor_value_info("best", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("rows", TensorProto.INT64, ["k"])],
        [helper.make_tensor("k", TensorProto.INT64, [1], [40])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    scores = (rng.integers(1, 9, (100, 3)) / 8).astype(np.float32)
    (rows,) = session.run(None, {"best": scores.max(1)})
    boxes = np.zeros((100, 4), np.float32)
    fates = run(Semantics(0.0, 0.5, topk=40, topk_unit="anchors"), boxes, scores)
    assert set(fates.rows[fates.fates != Fate.CUT_BY_TOPK]) == set(rows.tolist())


@pytest.mark.topk
@pytest.mark.parametrize("unit", ["pairs", "anchors"])
def test_topk_takes_equal_scores_as_they_were_seen_to_be_taken(unit):
    """Four rows of one score, and K of 2: TopK is bound to no order of them."""
    corner = np.arange(4, dtype=np.float32)[:, None] * 20
    boxes = np.concatenate([corner, corner * 0, corner + 10, corner * 0 + 10], 1)
    scores = np.full((4, 2), 0.5, np.float32)
    scores[:, 1] = 0
    semantics = Semantics(0.25, 0.5, topk=2, topk_unit=unit)
    for first in ([6, 2], [4, 6]):
        fates = run(semantics, boxes, scores, first=np.array(first))
        assert (fates.rows * 2 + fates.labels)[fates.kept].tolist() == first
    if unit == "anchors":
        fates = run(semantics, boxes, scores, first_rows=np.array([3, 1]))
        assert fates.rows[fates.kept].tolist() == [3, 1]
