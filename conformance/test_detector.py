"""Decoding and post-processing against mmyolo's own, and greedy NMS against its definition."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.coco import read_image
from alignment.data.preprocess import Transform, preprocess
from alignment.data.synthetic import draw
from alignment.nms.multiclass import candidates, iou_matrix, nms_by_class, postprocess
from alignment.storage import data_dir
from alignment.variant import Nms, Variant, load_variant

EMBEDDED = "yolov8_embedded"
REAL = ["yolov5_n", "yolov8_n", "yolox_nano"]


def built(name: str) -> tuple[Variant, Any]:
    """The variant and its detector; skips where its weights or mmyolo are absent."""
    pytest.importorskip("mmyolo")
    from alignment.models.mmyolo_source import build_detector

    variant = load_variant(name)
    if not variant.weights.is_file():
        pytest.skip(f"{variant.weights} is not there: set ALIGN_DATA")
    return variant, build_detector(variant)


@pytest.fixture(
    scope="module", params=[EMBEDDED, *(pytest.param(name, marks=pytest.mark.real_data) for name in REAL)]
)
def model(request) -> tuple[Variant, Any]:
    return built(request.param)


@pytest.fixture(scope="module")
def embedded() -> tuple[Variant, Any]:
    return built(EMBEDDED)


def sample(variant: Variant, index: int) -> tuple[np.ndarray, Transform]:
    """A synthetic image, preprocessed: ``[1, 3, H, W]``, and its geometry."""
    tensor, transform = preprocess(draw("val2017", index)[0], variant.input, variant.preprocess)
    return tensor[None], transform


def run(detector: Any, batch: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    with torch.inference_mode():
        values = detector(torch.from_numpy(batch))
    return {name: value.numpy() for name, value in zip(detector.output_names, values, strict=True)}


def before_nms(detector: Any, batch: np.ndarray, patch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """What the head's own predict_by_feat has decoded when it comes to threshold and TopK: boxes and scores."""
    import torch
    from mmyolo.models.dense_heads import yolov5_head

    head = detector.model.bbox_head
    boxes, scores = [], []
    decode, choose = head.bbox_coder.decode, yolov5_head.filter_scores_and_topk
    patch.setattr(head.bbox_coder, "decode", lambda *args: boxes.append(decode(*args)) or boxes[-1].clone())
    patch.setattr(
        yolov5_head, "filter_scores_and_topk", lambda s, *args, **kw: scores.append(s.clone()) or choose(s, *args, **kw)
    )
    config = copy.deepcopy(head.test_cfg)
    config.update(multi_label=True, score_thr=-1)  # no row is filtered before
    meta = {"ori_shape": batch.shape[2:], "scale_factor": (1.0, 1.0)}
    with torch.inference_mode():
        raw = head(detector.model.extract_feat(torch.from_numpy(batch)))
        head.predict_by_feat(*raw, batch_img_metas=[meta] * len(batch), cfg=config, rescale=False, with_nms=False)
    return boxes[0].numpy(), torch.stack(scores).numpy()


def test_decoding_is_the_heads_own_to_the_bit(model, monkeypatch):
    variant, detector = model
    batch = np.concatenate([sample(variant, index)[0] for index in range(2)])
    ours = run(detector, batch)
    boxes, scores = before_nms(detector, batch, monkeypatch)
    np.testing.assert_array_equal(ours["boxes"], boxes)
    np.testing.assert_array_equal(ours["scores"], scores)
    assert 0 < scores.min() < 0.01 < scores.max() < 1, "the scores are alive"
    assert ours["boxes"].dtype == ours["scores"].dtype == np.float32


def test_raw_outputs_are_the_heads(model):
    import torch

    variant, detector = model
    batch = sample(variant, 0)[0]
    ours = run(detector, batch)
    with torch.inference_mode():
        raw = detector.model.bbox_head(detector.model.extract_feat(torch.from_numpy(batch)))
    flat = [level.numpy() for kind in raw if kind[0] is not None for level in kind]
    names = [name for name in ours if name not in ("boxes", "scores")]
    assert len(names) == len(flat) == 3 * len(detector.kinds)
    for name, expected in zip(names, flat, strict=True):
        stride = int(name.rpartition("_s")[2])
        assert expected.shape[2:] == (variant.input.height // stride, variant.input.width // stride)
        np.testing.assert_array_equal(ours[name], expected)


def test_fusion_keeps_the_answers_and_the_original(model):
    from alignment.models.detector import fused

    variant, detector = model
    batch = sample(variant, 0)[0]
    weights = {name: value.clone() for name, value in detector.state_dict().items()}
    double = batch.astype(np.float64)
    after = run(fused(detector).double(), double)
    before = run(copy.deepcopy(detector).double(), double)
    # each weight is rounded once more to float32; in float64 nothing else differs
    assert np.abs(before["boxes"] - after["boxes"]).max() < 0.02
    assert np.abs(before["scores"] - after["scores"]).max() < 1e-4
    assert all(value.equal(weights[name]) for name, value in detector.state_dict().items())


def mmyolos_detections(detector: Any, batch: np.ndarray, transform: Transform, nms: Nms) -> Any:
    """mmyolo's full predict on one image, its test_cfg set as `nms` says."""
    import torch
    from mmdet.structures import DetDataSample

    left, top = transform.offset
    meta = {
        "ori_shape": transform.original,
        "img_shape": batch.shape[2:],
        "scale_factor": transform.scale,
        "pad_param": np.array([top, 0, left, 0], np.float32),
    }
    head = detector.model.bbox_head
    kept = copy.deepcopy(head.test_cfg)
    head.test_cfg.update(
        multi_label=nms.multi_label,
        score_thr=nms.score_threshold,
        nms_pre=nms.nms_pre,
        max_per_img=nms.max_per_image,
        yolox_style=False,
    )
    head.test_cfg.nms.iou_threshold = nms.iou_threshold
    try:
        with torch.inference_mode():
            data = [DetDataSample(metainfo=meta)]
            return detector.model.predict(torch.from_numpy(batch), data, rescale=True)[0].pred_instances
    finally:
        head.test_cfg = kept


SETTINGS = {
    "as configured": {},
    "much is suppressed": {"iou_threshold": 0.2},
    "almost nothing is suppressed": {"iou_threshold": 0.95},
    "one label a box": {"multi_label": False},
    "few": {"max_per_image": 7},
    "few candidates": {"nms_pre": 50},
    "high threshold": {"score_threshold": 0.5},
    "nothing is left": {"score_threshold": 0.999},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_detections_are_mmyolos(embedded, changes):
    """To the bit, on these images.

    mmcv's batched_nms keeps classes apart by adding class × (largest coordinate + 1) to the boxes: up to about 2500
    here, where float32 steps are 2.4e-4 px.  That moves an IoU by some 1e-5, so a pair of boxes as near as that to
    the threshold might be judged otherwise there; ours compares the boxes themselves.
    """
    variant, detector = embedded
    nms = variant.nms.model_copy(update=changes)
    found = 0
    for index in range(6):
        batch, transform = sample(variant, index)
        theirs = mmyolos_detections(detector, batch, transform, nms)
        raw = run(detector, batch)
        ours = postprocess(raw["boxes"][0], raw["scores"][0], transform, nms)
        np.testing.assert_array_equal(ours.labels, theirs.labels.numpy())
        np.testing.assert_allclose(ours.scores, theirs.scores.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours.boxes, theirs.bboxes.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_array_equal(ours.scores, raw["scores"][0][ours.rows, ours.labels])
        found += len(ours)
    assert (found == 0) == (nms.score_threshold > 0.99)


@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_detections_on_a_real_image_are_mmyolos(name):
    variant, detector = built(name)
    images = sorted((data_dir() / "coco" / "val2017").glob("*.jpg"))[:1]
    if not images:
        pytest.skip("no real images: set ALIGN_DATA")
    tensor, transform = preprocess(read_image(images[0]), variant.input, variant.preprocess)
    theirs = mmyolos_detections(detector, tensor[None], transform, variant.nms)
    raw = run(detector, tensor[None])
    ours = postprocess(raw["boxes"][0], raw["scores"][0], transform, variant.nms)
    assert len(ours) == len(theirs.labels) > 0
    np.testing.assert_array_equal(ours.labels, theirs.labels.numpy())
    np.testing.assert_allclose(ours.scores, theirs.scores.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.boxes, theirs.bboxes.numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", [EMBEDDED, "yolov5_n", "yolov8_n"])
def test_nms_settings_are_those_of_the_config(name):
    pytest.importorskip("mmyolo")
    from alignment.models.mmyolo_source import load_config

    variant = load_variant(name)
    config = load_config(variant).model.test_cfg
    assert variant.nms == Nms(
        score_threshold=config.score_thr,
        iou_threshold=config.nms.iou_threshold,
        nms_pre=config.nms_pre,
        max_per_image=config.max_per_img,
        multi_label=config.multi_label,
    )


@pytest.mark.real_data
def test_yolox_nano_equals_the_independent_onnx():
    """mmyolo's model, built from our depthwise classes, against a file that others exported from the same weights."""
    from alignment.models.outputs import to_outputs
    from alignment.runners.onnxruntime import OnnxRuntimeRunner

    variant, detector = built("yolox_nano")
    other = load_variant("yolox_nano_onnx")
    images = sorted((data_dir() / "coco" / "val2017").glob("*.jpg"))[:3]
    if not other.weights.is_file() or not images:
        pytest.skip("no ONNX file or no images: set ALIGN_DATA")
    assert (variant.input, variant.preprocess, variant.nms) == (other.input, other.preprocess, other.nms)
    batch = np.stack([preprocess(read_image(p), variant.input, variant.preprocess)[0] for p in images])
    ours = run(detector, batch)
    with OnnxRuntimeRunner(other.weights) as runner:
        theirs = to_outputs(runner.run(batch), other)
    assert np.abs(ours["boxes"] - theirs.boxes).max() <= 0.02
    assert np.abs(ours["scores"] - theirs.scores).max() <= 1e-4
    assert ours["scores"].max() > 0.5


def exact_iou(a: tuple[int, ...], b: tuple[int, ...]) -> Fraction:
    """Of integer boxes; 0 where the union is empty."""
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - width * height
    return Fraction(width * height, union) if union else Fraction(0)


def greedy(boxes: list[tuple[int, ...]], labels: list[int], threshold: float, limit: int) -> list[int]:
    """The definition: a box stays unless one that stays before it, of its class, overlaps it too much."""
    kept: list[int] = []
    for index, box in enumerate(boxes):
        rivals = [boxes[k] for k in kept if labels[k] == labels[index]]
        if all(exact_iou(rival, box) <= Fraction(threshold) for rival in rivals):
            kept.append(index)
    return kept[:limit]


# Few coordinates: equal boxes, empty boxes and IoUs that equal the threshold are frequent.
box = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)).map(
    lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3])
)
# 1/4, 1/2, 3/4 and 1 are exact in float32, so equality is decided exactly
thresholds = st.sampled_from([0.25, 0.5, 0.75, 1.0])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(box, st.integers(0, 2)), max_size=24), thresholds, st.integers(1, 30))
def test_nms_is_greedy_by_class(rows, threshold, limit):
    boxes, labels = [row[0] for row in rows], [row[1] for row in rows]
    kept = nms_by_class(np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int32), threshold, limit)
    assert kept.tolist() == greedy(boxes, labels, threshold, limit)


@pytest.mark.parametrize("count", [200, 256, 257, 600])
@pytest.mark.parametrize("limit", [5, 10_000])
def test_nms_of_many_boxes_of_one_class(count, limit):
    rng = np.random.default_rng(count)
    corners = rng.integers(0, 60, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 24, (count, 2))], 1)
    labels = (rng.random(count) < 0.02).astype(np.int32)
    kept = nms_by_class(boxes.astype(np.float32), labels, 0.25, limit)
    expected = greedy([tuple(map(int, b)) for b in boxes], labels.tolist(), 0.25, limit)
    assert kept.tolist() == expected
    assert len(expected) < count


def test_nms_keeps_empty_boxes_and_drops_equal_ones():
    point, square = [2, 2, 2, 2], [0, 0, 4, 4]
    boxes = np.array([point, point, square, square, square], np.float32)
    with np.errstate(all="raise"):
        assert nms_by_class(boxes, np.array([0, 0, 0, 0, 1]), 0.5, 9).tolist() == [0, 1, 2, 4]
        assert nms_by_class(boxes[:0], np.array([], np.int32), 0.5, 9).tolist() == []


@given(st.lists(box, max_size=6), st.lists(box, max_size=6))
def test_iou_matrix_is_exact_on_integers(a, b):
    found = iou_matrix(np.array(a, float).reshape(-1, 4), np.array(b, float).reshape(-1, 4))
    expected = [[float(exact_iou(x, y)) for y in b] for x in a]
    np.testing.assert_array_equal(found, np.array(expected, float).reshape(len(a), len(b)))


SCORES = [0.0, 0.001, float(np.nextafter(np.float32(0.001), np.float32(1))), 0.25, 0.5, 0.9]


@given(
    st.lists(st.lists(st.sampled_from(SCORES), min_size=3, max_size=3), min_size=1, max_size=12),
    st.booleans(),
    st.integers(1, 20),
)
def test_candidates_exceed_the_threshold_and_ties_go_to_the_lower_row_then_class(rows, multi_label, nms_pre):
    scores = np.array(rows, np.float32)
    pairs = [(-s, r, c) for r, row in enumerate(scores) for c, s in enumerate(row) if s > np.float32(0.001)]
    if not multi_label:
        pairs = [p for p in pairs if p[2] == scores[p[1]].argmax()]
    expected = sorted(pairs)[:nms_pre]
    found = candidates(scores, Nms(score_threshold=0.001, nms_pre=nms_pre, multi_label=multi_label))
    assert list(zip(*(a.tolist() for a in found), strict=True)) == [(r, c, -s) for s, r, c in expected]


def test_candidates_are_those_of_mmdet():
    pytest.importorskip("mmyolo")
    import torch

    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from mmdet.models.utils import filter_scores_and_topk

    scores = np.random.default_rng(3).permutation(900).astype(np.float32).reshape(150, 6) / 900
    scores[::7] = 0.5  # exactly the threshold: not a candidate
    values, labels, rows, _ = filter_scores_and_topk(torch.from_numpy(scores), 0.5, 100)
    found = candidates(scores, Nms(score_threshold=0.5, nms_pre=100))
    for ours, theirs in zip(found, (rows, labels, values), strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
