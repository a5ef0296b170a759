"""Rotated IoU against shapely, and rotated NMS against its definition and against the stand-in for mmcv's op."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alignment.data.preprocess import Transform
from alignment.nms import rotated
from alignment.nms.implementations import mmyolo
from alignment.nms.multiclass import by_class
from alignment.nms.rotated import corners, rotated_iou, rotated_iou_matrix
from alignment.nms.semantics import Fate, Fates, run
from alignment.variant import Nms

pytestmark = [pytest.mark.nms, pytest.mark.rotated]
shapely = pytest.importorskip("shapely")
MANY = settings(max_examples=300, deadline=None)


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


def sizes() -> st.SearchStrategy[float]:
    """1e-3 to 1e4, every magnitude alike."""
    return number(-3, 4).map(lambda exponent: 10.0**exponent)


boxes = st.tuples(number(-50, 50), number(-50, 50), sizes(), sizes(), number(-7, 7)).map(np.array)


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    """Unrelated boxes, and ones that touch, coincide, contain each other or are nearly parallel."""
    first = draw(boxes)
    if draw(st.booleans()):
        return first, draw(boxes)
    x, y, w, h, angle = first
    along = draw(st.sampled_from([0, 0.5, 1])) * w
    across = draw(st.sampled_from([0, 0.5, 1])) * h
    scale = draw(st.sampled_from([0.25, 0.5, 1, 2]))
    nudge = draw(st.sampled_from([0.0, 1e-15, 1e-12, 1e-9, 1e-6, 1e-3]))
    turn = draw(st.sampled_from([0, np.pi / 2, np.pi, -np.pi / 2])) + nudge
    cos, sin = np.cos(angle), np.sin(angle)
    centre = x + along * cos - across * sin, y + along * sin + across * cos
    return first, np.array([*centre, w * scale, h * scale * (1 + nudge), angle + turn])


def by_shapely(a: np.ndarray, b: np.ndarray) -> float:
    """IoU in coordinates about the first box and in units of the smallest side, where shapely loses least."""
    unit = np.array([*[min(a[2], a[3], b[2], b[3])] * 4, 1])
    origin = np.array([*a[:2], 0, 0, 0])
    one, other = (shapely.Polygon(corners((box - origin) / unit)) for box in (a, b))
    common = one.intersection(other).area
    return common / (one.area + other.area - common)


def iou(a, b) -> float:
    return float(rotated_iou(np.array([a], float), np.array([b], float))[0])


def rounding(a: np.ndarray, b: np.ndarray) -> float:
    """How far a rounding of the angles or places moves IoU at most: by the longest side in units of the shortest."""
    return 1e-14 * max(np.abs([*a[:4], *b[:4]])) / min(*a[2:4], *b[2:4])


@MANY
@given(pairs())
def test_iou_equals_shapely(pair):
    assert iou(*pair) == pytest.approx(by_shapely(*pair), abs=1e-9 + rounding(*pair))


@MANY
@given(pairs(), st.integers(-2, 2), number(-7, 7), st.tuples(number(-1e3, 1e3), number(-1e3, 1e3)))
def test_iou_does_not_depend_on_how_or_where_a_box_is_written(pair, halves, turn, shift):
    a, b = pair
    same = pytest.approx(iou(a, b), abs=1e-9 + 10 * rounding(*(np.add(box, (*shift, 0, 0, 0)) for box in pair)))
    x, y, w, h, angle = b
    assert iou(b, a) == same
    assert iou(a, (x, y, w, h, angle + halves * np.pi)) == same
    assert iou(a, (x, y, h, w, angle + np.pi / 2)) == same
    assert iou(*(np.add(box, (*shift, 0, 0, 0)) for box in pair)) == same
    cos, sin = np.cos(turn), np.sin(turn)
    assert iou(*((cos * u - sin * v, sin * u + cos * v, c, d, e + turn) for u, v, c, d, e in pair)) == same


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param((3, 4, 5, 2, 0.7), (3, 4, 5, 2, 0.7), 1, id="identical"),
        pytest.param((0, 0, 2, 2, 0), (2, 0, 2, 2, 0), 0, id="touching edges"),
        pytest.param((0, 0, 2, 2, 0), (2, 2, 2, 2, 0), 0, id="touching corners"),
        pytest.param((0, 0, 2, 2, 0), (1 + 2**0.5, 0, 2, 2, np.pi / 4), 0, id="corner on edge"),
        pytest.param((0, 0, 2, 2, 1), (0, 0, 4, 4, 1), 1 / 4, id="contained"),
        pytest.param((0, 0, 6, 2, 0), (0, 0, 6, 2, np.pi / 2), 4 / 20, id="cross"),
        pytest.param((0, 0, 2, 2, 0), (0, 0, 2, 2, np.pi / 4), 2**-0.5, id="octagon"),
        pytest.param((0, 0, 4, 2, 0), (2, 0, 4, 2, 0), 1 / 3, id="half over"),
        pytest.param((1e4, 1e4, 1e-3, 1e-3, 0.3), (0, 0, 4e4, 4e4, 0), 1e-6 / 1.6e9, id="small in huge"),
        pytest.param((0, 0, 0, 5, 0.3), (0, 0, 5, 5, 0), 0, id="no width"),
        pytest.param((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), 0, id="points"),
        pytest.param((0, 0, -2, 2, 0), (0, 0, 2, 2, 0), 0, id="negative width"),
        pytest.param((0, 0, -2, -2, 0), (0, 0, 2, 2, 0), 1, id="both negative, as mmcv has it"),
    ],
)
def test_iou_of_special_boxes(a, b, expected):
    assert iou(a, b) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def random_boxes(count: int, seed: int, span: float = 100.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-np.pi / 2, np.pi / 2, (count, 1))
    return np.hstack([rng.uniform(0, span, (count, 2)), rng.uniform(2, 40, (count, 2)), angle])


def test_the_matrix_is_that_of_all_pairs_also_in_chunks(monkeypatch):
    a, b = random_boxes(40, 0), random_boxes(30, 1)
    monkeypatch.setattr(rotated, "_PAIRS", 17)
    each = rotated_iou(np.repeat(a, 30, 0), np.tile(b, (40, 1))).reshape(40, 30)
    found = rotated_iou_matrix(a, b)
    np.testing.assert_allclose(found, each, rtol=0, atol=1e-15)
    assert 0 < (found > 0).mean() < 1
    assert rotated_iou_matrix(a[:0], b).shape == (0, 30)
    assert rotated_iou_matrix(a, b[:0]).shape == (40, 0)


def test_the_matrix_is_that_of_the_wanted_pairs_and_computes_no_others(monkeypatch):
    a, b = random_boxes(40, 0), random_boxes(30, 1)
    where = np.random.default_rng(2).random((40, 30)) < 0.3
    whole, computed = rotated_iou_matrix(a, b), []
    monkeypatch.setattr(rotated, "rotated_iou", lambda *of: computed.append(len(of[0])) or rotated_iou(*of))
    np.testing.assert_array_equal(rotated_iou_matrix(a, b, where), np.where(where, whole, 0))
    assert 0 < np.count_nonzero(whole[where]) <= sum(computed) <= np.count_nonzero(where)


def test_the_matrix_equals_that_of_the_stand_in_for_mmcv():
    torch = pytest.importorskip("torch")
    mmcv_ext = pytest.importorskip("alignment.models.mmcv_ext")
    a, b = random_boxes(60, 2), random_boxes(50, 3)
    theirs = torch.empty(3000, dtype=torch.float64)
    mmcv_ext.box_iou_rotated(torch.from_numpy(a), torch.from_numpy(b), theirs)
    np.testing.assert_allclose(rotated_iou_matrix(a, b), theirs.view(60, 50).numpy(), rtol=0, atol=1e-12)


def test_corners_are_those_of_the_synthetic_truth():
    from alignment.data import synthetic_rotated

    found = random_boxes(20, 4)
    np.testing.assert_allclose(
        corners(found), [synthetic_rotated.corners(box) for box in found], rtol=1e-14, atol=1e-12
    )


def nms_by_class(found: np.ndarray, labels: np.ndarray, threshold: float, limit: int) -> Fates:
    """Fates of boxes ``[n, 5]``, by falling score; `labels` ``[n]``."""
    scores = np.zeros((len(found), labels.max(initial=0) + 1), np.float32)
    scores[np.arange(len(found)), labels] = np.linspace(1, 0.5, len(found))
    nms = Nms(iou_threshold=threshold, max_per_image=limit)
    return run(replace(by_class(nms, found.shape[1] == 5), frame="input"), found, scores)


def kept_of(found: np.ndarray, labels: np.ndarray, threshold: float, limit: int) -> list[int]:
    """Indices of the kept boxes, rising."""
    return nms_by_class(found, labels, threshold, limit).kept.tolist()


def greedy(found: np.ndarray, labels: np.ndarray, threshold: float, limit: int) -> list[int]:
    """The definition: a box stays unless one that stays before it, of its class, overlaps it as much."""
    kept: list[int] = []
    for index, box in enumerate(found.astype(np.float64)):
        rivals = [k for k in kept if labels[k] == labels[index]]
        if all(np.float32(iou(found[k], box)) < np.float32(threshold) for k in rivals):
            kept.append(index)
    return kept[:limit]


# Few coordinates: equal boxes, boxes without area and IoUs that equal the threshold are frequent.
coarse = st.tuples(
    st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(1, 4), st.sampled_from([0, 1, 2, 4])
).map(lambda t: (*t[:4], t[4] * np.pi / 8))


@MANY
@example([((0, 0, 4, 2, 0), 0), ((2, 0, 4, 2, 0), 0)], 1 / 3, 9)
@given(
    st.lists(st.tuples(coarse, st.integers(0, 2)), max_size=16),
    st.sampled_from([0.1, 1 / 3, 0.5, 1.0]),
    st.integers(1, 20),
)
def test_nms_is_greedy_by_class(rows, threshold, limit):
    found = np.array([row[0] for row in rows], np.float32).reshape(-1, 5)
    labels = np.array([row[1] for row in rows], np.int32)
    fates = nms_by_class(found, labels, threshold, limit)
    assert fates.kept.dtype == np.int64
    assert fates.rows.tolist() == list(range(len(found)))
    assert fates.kept.tolist() == greedy(found, labels, threshold, limit)
    for index in np.flatnonzero(fates.fates == Fate.SUPPRESSED):
        reached = [
            k
            for k in greedy(found, labels, threshold, len(found))
            if k < index
            and labels[k] == labels[index]
            and np.float32(iou(found[k], found[index])) >= np.float32(threshold)
        ]
        assert fates.by[index] == reached[0]
        assert fates.iou[index] == np.float32(iou(found[reached[0]], found[index]))


def test_a_box_goes_that_reaches_the_threshold_as_float32_and_upright_nms_keeps_it():
    halves, labels = np.array([[0, 0, 4, 2, 0], [2, 0, 4, 2, 0]], np.float32), np.zeros(2, np.int32)
    assert kept_of(halves, labels, 1 / 3, 9) == [0]
    assert kept_of(halves, labels, float(np.nextafter(np.float32(1 / 3), np.float32(1))), 9) == [0, 1]
    # as float64 the IoU, 0.33333333333333331, would not reach this threshold
    assert kept_of(halves, labels, 1 / 3 + 1e-12, 9) == [0]
    upright = np.array([[0, 0, 4, 2], [2, 0, 6, 2]], np.float32)
    assert kept_of(upright, labels, float(np.float32(1 / 3)), 9) == [0, 1]


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("span", [60.0, 400.0])
def test_nms_of_many_boxes_equals_the_stand_in_for_mmcv(classes, threshold, span):
    torch = pytest.importorskip("torch")
    mmcv_ext = pytest.importorskip("alignment.models.mmcv_ext")
    rng = np.random.default_rng(6)
    found = np.repeat(random_boxes(100, 5, span), 5, 0) + rng.normal(0, [0.3, 0.3, 0.3, 0.3, 0.02], (500, 5))
    found, labels = rng.permutation(found).astype(np.float32), rng.integers(0, classes, 500)
    scores = torch.linspace(1, 0.1, 500)
    labelled = torch.from_numpy(np.hstack([found, labels[:, None]]).astype(np.float32))
    theirs = mmcv_ext.nms_rotated(labelled, scores, scores, labelled, labelled, threshold, True)
    kept = kept_of(found, labels, threshold, 500)
    assert kept == theirs.tolist()
    assert len(kept) < 500
    assert kept_of(found, labels, threshold, 7) == kept[:7]


@pytest.mark.parametrize("classes", [1, 15])
@pytest.mark.parametrize("changes", [{}, {"nms_pre": 60}, {"max_per_image": 20}, {"iou_threshold": 0.5}])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.37, 0.371)])
def test_mmyolos_rotated_semantics_are_mmdets_filter_and_mmcvs_nms(classes, changes, scale):
    """Class offsets of some thousand pixels round the boxes, and the way back to the image does."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("mmyolo")
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from mmcv.ops import batched_nms
    from mmdet.models.utils import filter_scores_and_topk

    rng = np.random.default_rng(8)
    found = np.repeat(random_boxes(60, 9, 500.0), 4, 0) + rng.normal(0, [2, 2, 2, 2, 0.1], (240, 5))
    found = np.abs(found[rng.permutation(240)]).astype(np.float32)
    scores = rng.permutation(np.linspace(0, 1, 240 * classes)).reshape(240, classes).astype(np.float32) ** 4
    settings_ = Nms(score_threshold=0.05, iou_threshold=0.1, nms_pre=2000, max_per_image=2000)
    nms, transform = settings_.model_copy(update=changes), Transform(scale, (0.0, 0.0), (800, 800))
    values, labels, rows, _ = filter_scores_and_topk(torch.from_numpy(scores), nms.score_threshold, nms.nms_pre)
    placed = torch.from_numpy(transform.to_original(found[rows.numpy()]))
    _, kept = batched_nms(placed, values, labels, {"type": "nms_rotated", "iou_threshold": nms.iou_threshold})
    pairs = (rows * classes + labels).numpy()[kept.numpy()][: nms.max_per_image]
    fates = run(mmyolo(nms, True), found, scores, transform)
    assert len(pairs) > 10
    np.testing.assert_array_equal((fates.rows * classes + fates.labels)[fates.kept], pairs)


def test_boxes_that_are_not_finite_or_empty_suppress_nothing():
    nan, inf = float("nan"), float("inf")
    rows = [
        [0, 0, 4, 4, 0],
        [nan, 0, 4, 4, 0],
        [0, 0, inf, 4, 0],
        [0, 0, 4, 4, nan],
        [0, inf, 4, 4, 1],
        [0, 0, 4, 0, 0],
    ]
    found = np.array([*rows, *rows], np.float32)
    with np.errstate(all="raise"):
        kept = kept_of(found, np.zeros(12, np.int32), 0.5, 99)
        assert kept_of(found[:0], np.zeros(0, np.int32), 0.5, 9) == []
    assert kept == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(("span", "threshold"), [(300.0, 0.1), (300.0, 0.9), (60.0, 0.1)])
def test_two_thousand_candidates_take_less_than_half_a_second(span, threshold):
    found, labels = random_boxes(2000, 7, span).astype(np.float32), np.zeros(2000, np.int32)

    def seconds() -> float:
        start = time.perf_counter()
        nms_by_class(found, labels, threshold, 2000)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5
