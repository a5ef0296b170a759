"""Decoding and post-processing against mmyolo's own, and greedy NMS against its definition."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.coco import read_image
from alignment.data.preprocess import Transform, preprocess
from alignment.data.synthetic import draw
from alignment.nms.multiclass import by_class, iou_matrix, postprocess
from alignment.nms.semantics import Fate, Semantics
from alignment.nms.semantics import run as post_process
from alignment.storage import data_dir
from alignment.variant import Nms, Variant, load_variant

EMBEDDED = "yolov8_embedded"
REAL = ["yolov5_n", "yolov8_n", "yolox_nano"]


@dataclass
class Model:
    """A detector and its answers on some images, computed once."""

    variant: Variant
    detector: Any
    batch: np.ndarray
    transforms: list[Transform]
    outputs: dict[str, np.ndarray]

    def levels(self) -> list[list[Any]]:
        """The raw outputs as the head returns them: lists of levels, one a kind."""
        import torch

        return [
            [torch.from_numpy(self.outputs[f"{kind}_s{s}"].copy()) for s in self.detector.strides]
            for kind in self.detector.kinds
        ]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other on a busy machine."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(name: str, images: list[np.ndarray]) -> Model:
    """Skips where the variant's weights or mmyolo are absent."""
    pytest.importorskip("mmyolo")
    from alignment.models.mmyolo_source import build_detector

    variant = load_variant(name)
    if not variant.weights.is_file():
        pytest.skip(f"{variant.weights} is not there: set ALIGN_DATA")
    detector = build_detector(variant)
    tensors, transforms = zip(*(preprocess(i, variant.input, variant.preprocess) for i in images), strict=True)
    batch = np.stack(tensors)
    return Model(variant, detector, batch, list(transforms), run(detector, batch))


def real_images(count: int) -> list[np.ndarray]:
    paths = sorted((data_dir() / "coco" / "val2017").glob("*.jpg"))[:count]
    if len(paths) < count:
        pytest.skip("no real images: set ALIGN_DATA")
    return [read_image(path) for path in paths]


def run(detector: Any, batch: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    with torch.inference_mode():
        values = detector(torch.from_numpy(batch))
    return {name: value.numpy() for name, value in zip(detector.output_names, values, strict=True)}


@pytest.fixture(scope="module")
def embedded() -> Model:
    return built(EMBEDDED, [draw("val2017", index)[0] for index in range(6)])


@pytest.fixture(scope="module", params=[EMBEDDED, *(pytest.param(name, marks=pytest.mark.real_data) for name in REAL)])
def model(request) -> Model:
    if request.param == EMBEDDED:
        return request.getfixturevalue("embedded")
    return built(request.param, real_images(1))


def before_nms(model: Model, patch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """What the head's own predict_by_feat has decoded when it comes to threshold and TopK: boxes and scores."""
    import torch
    from mmyolo.models.dense_heads import yolov5_head

    head = model.detector.model.bbox_head
    boxes, scores = [], []
    decode, choose = head.bbox_coder.decode, yolov5_head.filter_scores_and_topk

    def decode_seen(*args: Any) -> Any:
        boxes.append(decode(*args))
        return boxes[-1].clone()

    def choose_seen(values: Any, *args: Any, **named: Any) -> Any:
        scores.append(values.clone())
        return choose(values, *args, **named)

    patch.setattr(head.bbox_coder, "decode", decode_seen)
    patch.setattr(yolov5_head, "filter_scores_and_topk", choose_seen)
    config = copy.deepcopy(head.test_cfg)
    config.update(multi_label=True, score_thr=-1)  # no row is filtered before
    metas = [{"ori_shape": model.batch.shape[2:], "scale_factor": (1.0, 1.0)}] * len(model.batch)
    head.predict_by_feat(*model.levels(), batch_img_metas=metas, cfg=config, rescale=False, with_nms=False)
    return boxes[0].numpy(), torch.stack(scores).numpy()


def test_decoding_is_the_heads_own_to_the_bit(model, monkeypatch):
    boxes, scores = before_nms(model, monkeypatch)
    np.testing.assert_array_equal(model.outputs["boxes"], boxes)
    np.testing.assert_array_equal(model.outputs["scores"], scores)
    assert scores.min() < 0.01 < 0.5 < scores.max() < 1, "the scores are alive"
    assert boxes.dtype == scores.dtype == np.float32


def test_raw_outputs_are_the_heads(model):
    import torch

    detector, size = model.detector, model.variant.input
    with torch.inference_mode():
        raw = detector.model.bbox_head(detector.model.extract_feat(torch.from_numpy(model.batch)))
    flat = [level.numpy() for kind in raw if kind is not None for level in kind]
    names = [name for name in model.outputs if name not in ("boxes", "scores")]
    assert len(names) == len(flat) == 3 * len(detector.kinds)
    for name, expected in zip(names, flat, strict=True):
        stride = int(name.rpartition("_s")[2])
        assert expected.shape[2:] == (size.height // stride, size.width // stride)
        np.testing.assert_array_equal(model.outputs[name], expected)


def test_fusion_keeps_the_answers_and_the_original(model):
    from alignment.models.detector import fused

    weights = {name: value.clone() for name, value in model.detector.state_dict().items()}
    double = model.batch[:1].astype(np.float64)
    after = run(fused(model.detector).double(), double)
    before = run(copy.deepcopy(model.detector).double(), double)
    # each weight is rounded once more to float32; in float64 nothing else differs
    assert np.abs(before["boxes"] - after["boxes"]).max() < 0.02
    assert np.abs(before["scores"] - after["scores"]).max() < 1e-4
    assert all(value.equal(weights[name]) for name, value in model.detector.state_dict().items())


def mmyolos_detections(model: Model, nms: Nms) -> list[Any]:
    """mmyolo's own post-processing of the raw outputs, rescaled and clamped, with `nms` in its words."""
    head = model.detector.model.bbox_head
    config = copy.deepcopy(head.test_cfg)
    config.update(
        multi_label=nms.multi_label,
        score_thr=nms.score_threshold,
        nms_pre=nms.nms_pre,
        max_per_img=nms.max_per_image,
        yolox_style=False,
    )
    config.nms.iou_threshold = nms.iou_threshold
    metas = []
    for transform in model.transforms:
        left, top = transform.offset
        pad = np.array([top, 0, left, 0], np.float32)
        metas.append({"ori_shape": transform.original, "scale_factor": transform.scale, "pad_param": pad})
    return head.predict_by_feat(*model.levels(), batch_img_metas=metas, cfg=config, rescale=True)


def assert_detections_are_mmyolos(model: Model, nms: Nms) -> int:
    """How many detections were compared."""
    boxes, scores, found = model.outputs["boxes"], model.outputs["scores"], 0
    for index, theirs in enumerate(mmyolos_detections(model, nms)):
        ours = postprocess(boxes[index], scores[index], model.transforms[index], nms)
        np.testing.assert_array_equal(ours.labels, theirs.labels.numpy())
        np.testing.assert_allclose(ours.scores, theirs.scores.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours.boxes, theirs.bboxes.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_array_equal(ours.scores, scores[index][ours.rows, ours.labels])
        found += len(ours)
    return found


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
    """Seen equal to the bit on these images.

    mmcv's batched_nms keeps classes apart by adding class × (largest coordinate + 1) to the boxes: up to about 2500
    here, where float32 steps are 2.4e-4 px.  That moves an IoU by some 1e-5, so a pair of boxes as near as that to
    the threshold might be judged otherwise there; ours compares the boxes themselves.
    """
    nms = embedded.variant.nms.model_copy(update=changes)
    found = assert_detections_are_mmyolos(embedded, nms)
    assert (found == 0) == (nms.score_threshold > 0.99)


def test_detections_with_the_models_own_settings_are_mmyolos(model):
    assert assert_detections_are_mmyolos(model, model.variant.nms) > 10


def nms_by_class(boxes: np.ndarray, labels: np.ndarray, threshold: float, limit: int) -> list[int]:
    """Indices of the boxes ``[n, 4]``, by falling score, that are kept; `labels` ``[n]``."""
    scores = np.zeros((len(boxes), labels.max(initial=0) + 1), np.float32)
    scores[np.arange(len(boxes)), labels] = np.linspace(1, 0.5, len(boxes))
    semantics = replace(by_class(Nms(iou_threshold=threshold, max_per_image=limit), rotated=False), frame="input")
    fates = post_process(semantics, boxes, scores)
    return fates.rows[fates.kept].tolist()


def test_class_offsets_move_an_iou_in_mmcv():
    """The difference in semantics that remains, at its smallest: with a large class index, mmcv's boxes are rounded.

    Two boxes of one class, IoU 0.33342: beyond the threshold, but 0.33333 once 79 × 641 px are added in float32.
    """
    pytest.importorskip("mmyolo")
    import torch

    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from mmcv.ops import batched_nms

    boxes = np.array([[0, 0, 10, 10], [4.999, 0, 14.999, 10], [630, 630, 640, 640]], np.float32)
    threshold = 0.33340
    labels = np.array([79, 79, 0])
    scores = torch.tensor([0.9, 0.8, 0.7])
    config = {"type": "nms", "iou_threshold": threshold}
    _, near = batched_nms(torch.from_numpy(boxes), scores, torch.zeros(3, dtype=torch.long), config)
    _, far = batched_nms(torch.from_numpy(boxes), scores, torch.from_numpy(labels), config)
    ours = nms_by_class(boxes, labels, threshold, 9)
    assert ours == near.tolist() == [0, 2]
    assert far.tolist() == [0, 1, 2]


@pytest.mark.real_data
def test_yolox_nano_equals_the_independent_onnx():
    """mmyolo's model, built from our depthwise classes, against a file that others exported from the same weights."""
    from alignment.models.outputs import to_outputs
    from alignment.runners.onnxruntime import OnnxRuntimeRunner

    other = load_variant("yolox_nano_onnx")
    if not other.weights.is_file():
        pytest.skip(f"{other.weights} is not there: set ALIGN_DATA")
    model = built("yolox_nano", real_images(3))
    variant, ours = model.variant, model.outputs
    assert (variant.input, variant.preprocess, variant.nms) == (other.input, other.preprocess, other.nms)
    with OnnxRuntimeRunner(other.weights) as runner:
        theirs = to_outputs(runner.run(model.batch), other)
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
    assert kept == greedy(boxes, labels, threshold, limit)


@pytest.mark.parametrize("count", [200, 256, 257, 600])
@pytest.mark.parametrize("limit", [5, 10_000])
def test_nms_of_many_boxes_of_one_class(count, limit):
    rng = np.random.default_rng(count)
    corners = rng.integers(0, 60, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 24, (count, 2))], 1)
    labels = (rng.random(count) < 0.02).astype(np.int32)
    kept = nms_by_class(boxes.astype(np.float32), labels, 0.25, limit)
    expected = greedy([tuple(map(int, b)) for b in boxes], labels.tolist(), 0.25, limit)
    assert kept == expected
    assert len(expected) < count


def test_nms_keeps_empty_boxes_and_drops_equal_ones():
    point, square = [2, 2, 2, 2], [0, 0, 4, 4]
    boxes = np.array([point, point, square, square, square], np.float32)
    with np.errstate(all="raise"):
        assert nms_by_class(boxes, np.array([0, 0, 0, 0, 1]), 0.5, 9) == [0, 1, 2, 4]
        assert nms_by_class(boxes[:0], np.array([], np.int32), 0.5, 9) == []


@given(st.lists(box, max_size=6), st.lists(box, max_size=6))
def test_iou_matrix_is_exact_on_integers(a, b):
    found = iou_matrix(np.array(a, float).reshape(-1, 4), np.array(b, float).reshape(-1, 4))
    expected = [[float(exact_iou(x, y)) for y in b] for x in a]
    np.testing.assert_array_equal(found, np.array(expected, float).reshape(len(a), len(b)))


def candidates(scores: np.ndarray, nms: Nms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, labels and scores of the pairs that come to NMS, by falling score."""
    fates = post_process(
        replace(by_class(nms, rotated=False), frame="input"), np.zeros((len(scores), 4), np.float32), scores
    )
    taken = ~np.isin(fates.fates, [Fate.NOT_BEST_CLASS, Fate.CUT_BY_TOPK])
    return fates.rows[taken], fates.labels[taken], fates.scores[taken]


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


@given(
    st.lists(st.sampled_from([-np.inf, -2.0, -1.0, -0.0, 0.0, 1e-40, 1.0, 2.0, np.inf, np.nan]), max_size=40),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.sampled_from(["rising", "falling"]),
    st.permutations(range(40)),
    st.integers(0, 40),
)
def test_scores_of_any_kind_fall_and_what_is_no_number_comes_first(values, dtype, ties, first, count):
    scores = np.array(values, dtype).reshape(-1, 1)
    semantics = Semantics(-np.inf, 0.5, score_inclusive=True, nan_passes=True, floor=-32768.0, ties=ties)
    fates = post_process(semantics, np.zeros((len(values), 4), np.float32), scores, first=np.array(first[:count], int))
    seen = {row: place for place, row in enumerate(first[:count])}
    sign = 1 if ties == "rising" else -1
    order = sorted(
        range(len(values)),
        key=lambda row: (
            not np.isnan(scores[row, 0]),
            0 if np.isnan(scores[row, 0]) else -scores[row, 0],
            seen.get(row, 40),
            sign * row,
        ),
    )
    assert fates.rows.tolist() == order
    np.testing.assert_array_equal(fates.scores, scores[order, 0])


def test_candidates_are_those_of_mmdet():
    pytest.importorskip("mmyolo")
    import torch

    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from mmdet.models.utils import filter_scores_and_topk

    scores = np.random.default_rng(3).permutation(900).astype(np.float32).reshape(150, 6) / 900
    scores[::7] = 0.5  # exactly the threshold: no candidates
    values, labels, rows, _ = filter_scores_and_topk(torch.from_numpy(scores), 0.5, 500)
    found = candidates(scores, Nms(score_threshold=0.5, nms_pre=500))
    for ours, theirs in zip(found, (rows, labels, values), strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
