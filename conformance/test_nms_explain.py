"""Differences between post-processings are explained, each by what was really different; faults are no explanation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nms_scenes import scenes
from test_nms_semantics import MOVED, SEMANTICS, images

from alignment.nms import explain as explaining
from alignment.nms.causes import PATH, Divergence, Limits, Side
from alignment.nms.explain import explain
from alignment.nms.implementations import mmyolo
from alignment.nms.semantics import Semantics, run
from alignment.variant import Nms

pytestmark = pytest.mark.nms
SCENES = scenes()
LIMITS = Limits(boxes=0.02, scores=1e-4)
NUMBERS = st.integers(0, 8).map(lambda i: i / 8)
OTHER = {
    "score_threshold": st.just(0.375),
    "score_inclusive": st.just(True),
    "multi_label": st.just(False),
    "background": st.just(1),
    "topk_unit": st.just("anchors"),
    "topk": st.integers(1, 6),
    "candidate_cap": st.integers(1, 6),
    "classes": st.sampled_from(["offset", "together"]),
    "frame": st.just("original"),
    "reorder": st.just(True),
    "iou_inclusive": st.just(True),
    "iou_threshold": st.just(0.2),
    "max_output": st.integers(1, 4),
    "floor": st.just(-32768.0),
    "ties": st.just("falling"),
}
#: What a change of one field may be called, beside the cause that `PATH` gives it.
ALSO = {"classes": {"class_agnostic", "class_offset_overlap"}, "ties": {"topk_tie"}}


def kept(semantics: Semantics, boxes: np.ndarray, scores: np.ndarray) -> set[tuple[int, int]]:
    fates = run(semantics, boxes, scores, MOVED)
    return set(zip(fates.rows[fates.kept].tolist(), fates.labels[fates.kept].tolist(), strict=True))


def pairs(found: list[Divergence]) -> set[tuple[int, int]]:
    return {(d.row, d.label) for d in found}


def test_every_choice_is_the_cause_of_something():
    assert sorted(field for field, _ in PATH) == sorted(f.name for f in dataclasses.fields(Semantics))


@settings(max_examples=400, deadline=None)
@given(images(values=NUMBERS), SEMANTICS, SEMANTICS)
def test_every_difference_of_two_semantics_is_explained(image, one, other):
    found = explain(Side(one, *image), Side(other, *image), LIMITS, MOVED)
    assert pairs(found) == kept(one, *image) ^ kept(other, *image)
    differing = {cause for field, cause in PATH if getattr(one, field) != getattr(other, field)}
    named = {"class_offset_rounding": {"class_agnostic", "class_offset_overlap"}, "nms_order_tie": {"topk_tie"}}
    allowed = differing | {"cascade"} | set().union(*(named.get(c, set()) for c in differing))
    assert {d.cause for d in found} <= allowed
    for d in found:
        assert d.reference.kept != d.subject.kept
        assert d.replay


@pytest.mark.parametrize("field", OTHER)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_difference_is_called_by_its_name(field, data):
    image = data.draw(images(values=NUMBERS))
    base = Semantics(0.25, 0.5, topk=12 if field == "topk_unit" else None)
    other = dataclasses.replace(base, **{field: data.draw(OTHER[field])})
    cause = dict(PATH)[field]
    found = explain(Side(base, *image), Side(other, *image), LIMITS, MOVED)
    assert {d.cause for d in found} <= {cause, "cascade", *ALSO.get(field, ())}
    # Who follows, follows from one that differs too.
    for d in found:
        assert (d.follows is not None) == (d.cause == "cascade")
        assert d.follows is None or d.follows in pairs(found)
    # The first to differ follows from none.
    assert not found or any(d.cause != "cascade" for d in found)


@settings(max_examples=200, deadline=None)
@given(images(values=NUMBERS), st.integers(0, 2**32 - 1), st.sampled_from([0.25, 0.5, 0.75]))
def test_small_movements_explain_what_they_change(image, seed, threshold):
    """Inputs on a grid lie exactly at thresholds and ties, so that any movement changes something."""
    boxes, scores = image
    rng = np.random.default_rng(seed)
    moved = (boxes + rng.uniform(-0.01, 0.01, boxes.shape)).astype(np.float32)
    drifted = (scores + rng.uniform(-5e-5, 5e-5, scores.shape)).astype(np.float32)
    semantics = Semantics(threshold, threshold, max_output=6)
    found = explain(Side(semantics, boxes, scores), Side(semantics, moved, drifted), LIMITS)
    assert pairs(found) == kept(semantics, boxes, scores) ^ kept(semantics, moved, drifted)
    assert {d.cause for d in found} <= {"numeric", "cascade"}, found


def scattered(count: int = 60, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    scene = SCENES["scattered"]
    return scene.boxes[0, :count], scene.scores[0, :count, :classes]


REFERENCE = Semantics(0.25, 0.5, max_output=100)


def sigmoid_twice(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes, 1 / (1 + np.exp(-scores))


def class_shifted(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes, np.roll(scores, 1, 1)


def boxes_swapped(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes[::-1].copy(), scores


def coordinates_swapped(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y1, x1, y2, x2: NMS is none the wiser."""
    return boxes[:, [1, 0, 3, 2]], scores


def shifted(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes + np.float32(50), scores


def half_as_large(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes * np.float32(0.5), scores


def a_little_less_sure(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes, np.where(scores > 0.3, scores * np.float32(0.98), scores)


FAULTS = [
    (sigmoid_twice, "scores"),
    (class_shifted, "scores"),
    (boxes_swapped, "boxes"),
    (coordinates_swapped, "boxes"),
    (shifted, "boxes"),
    (half_as_large, "boxes"),
    (a_little_less_sure, "scores"),
]


@pytest.mark.parametrize(("fault", "moved"), FAULTS)
def test_a_fault_of_the_inputs_is_never_an_explanation(fault, moved):
    boxes, scores = scattered()
    found = explain(Side(REFERENCE, boxes, scores), Side(REFERENCE, *fault(boxes, scores)), LIMITS)
    assert {d.cause for d in found} == {"unexplained"}
    assert any(f"{moved} moved by" in d.replay for d in found)
    assert all(d.proof is None for d in found)


def apart() -> tuple[np.ndarray, np.ndarray]:
    """Four boxes of which none overlaps another."""
    corner = np.arange(4, dtype=np.float32)[:, None] * 20
    return np.concatenate([corner, corner * 0, corner + 10, corner * 0 + 10], 1), np.full((4, 1), 0.5, np.float32)


@pytest.mark.parametrize(
    ("name", "by", "said"),
    [
        ("boxes", 3.0, "boxes moved by 3, and may by 0.02"),
        ("scores", 0.001, "scores moved by 0.001, and may by 0.0001"),
        ("scores", np.nan, "scores moved by nan, and may by 0.0001"),
    ],
)
def test_one_value_that_moved_too_far_is_found_though_both_sides_keep_its_box(name, by, said):
    boxes, scores = apart()
    moved = {"boxes": boxes.copy(), "scores": scores.copy()}
    moved[name][2] += np.float32(by)
    semantics = dataclasses.replace(REFERENCE, nan_passes=True)
    (found,) = explain(Side(semantics, boxes, scores), Side(semantics, **moved), LIMITS)
    assert found.row == 2
    assert found.reference.kept
    assert found.subject.kept
    assert (found.cause, found.replay, found.proof) == ("unexplained", said, None)


def test_a_competitor_that_moved_too_far_explains_nothing():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 4.999, 10]], np.float32)
    scores = np.array([[0.9], [0.8]], np.float32)
    moved = boxes.copy()
    moved[0, 2] = 9.9
    found = explain(Side(REFERENCE, boxes, scores), Side(REFERENCE, moved, scores), LIMITS)
    assert [d.row for d in found] == [0, 1]
    assert [d.subject.kept for d in found] == [True, False]
    assert {(d.cause, d.replay) for d in found} == {("unexplained", "boxes moved by 0.1, and may by 0.02")}


def test_values_that_are_no_number_on_both_sides_have_not_moved():
    boxes, scores = apart()
    scores[:3, 0] = np.nan, np.inf, -np.inf
    semantics = dataclasses.replace(REFERENCE, nan_passes=True)
    drifted = scores + np.float32(1e-5)
    assert not explain(Side(semantics, boxes, scores), Side(semantics, boxes, drifted), LIMITS)


def test_a_gross_fault_costs_no_replays(monkeypatch):
    """Every other box of a large image is elsewhere: hundreds of replays would say nothing more."""
    scene = SCENES["yolo 0.01"]
    boxes, scores = scene.boxes[0], scene.scores[0]
    low, high = boxes[:, :2], boxes[:, 2:]
    runs = []
    monkeypatch.setattr(explaining, "run", lambda *of: runs.append(1) or run(*of))
    semantics = dataclasses.replace(REFERENCE, max_output=300)
    centres = np.concatenate([(low + high) / 2, high - low], 1)
    centres[::2] = boxes[::2]
    found = explain(Side(semantics, boxes, scores), Side(semantics, centres, scores), LIMITS)
    assert len(found) > 150
    assert {d.cause for d in found} == {"unexplained"}
    assert any(d.replay.startswith("inputs are wrong: ") for d in found)
    assert len(runs) == 2


def test_what_the_real_one_gave_otherwise_than_its_row_is_not_explained():
    boxes, scores = scattered()
    side = Side(REFERENCE, boxes, scores)
    fates = run(REFERENCE, boxes, scores)
    pair = int(fates.rows[fates.kept[0]]) * 3 + int(fates.labels[fates.kept[0]])
    (found,) = explain(side, dataclasses.replace(side, faults={pair: "given as class 7"}), LIMITS)
    assert (found.cause, found.replay) == ("unexplained", "given as class 7")


def test_a_wrong_threshold_is_called_one():
    image = scattered()
    found = explain(Side(REFERENCE, *image), Side(dataclasses.replace(REFERENCE, score_threshold=0.3), *image), LIMITS)
    assert {d.root for d in found} == {"score_threshold"}
    assert any(d.replay == "the settings differ: the subject with score_threshold 0.25 instead of 0.3" for d in found)


def test_an_implementation_that_does_not_do_what_it_says_is_not_explained():
    """The real one was seen to drop a box that nothing in its settings drops."""
    boxes, scores = scattered()
    fates = run(REFERENCE, boxes, scores)
    seen = (fates.rows * scores.shape[1] + fates.labels)[fates.kept][1:]
    found = explain(Side(REFERENCE, boxes, scores), Side(REFERENCE, boxes, scores, seen), LIMITS)
    assert "unexplained" in {d.cause for d in found}
    assert any(d.replay == "the subject does not do what its settings say" for d in found)


def test_ties_go_as_they_were_seen():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10]], np.float32)
    scores = np.full((2, 1), 0.5, np.float32)
    (first, second) = explain(Side(REFERENCE, boxes, scores), Side(REFERENCE, boxes, scores, np.array([1])), LIMITS)
    assert {first.cause, second.cause} == {"nms_order_tie", "cascade"}
    assert all("with equal scores in the reference's order" in d.replay for d in (first, second))


@pytest.mark.topk
def test_topk_over_anchors_and_over_pairs():
    scene = SCENES["yolo 0.01"]
    nms = Nms(score_threshold=0.01, nms_pre=3840, max_per_image=300, iou_threshold=0.65)
    pairs_first = mmyolo(nms)
    anchors_first = dataclasses.replace(pairs_first, topk=200, topk_unit="anchors")
    boxes, scores = scene.boxes[0], scene.scores[0]
    found = explain(Side(pairs_first, boxes, scores), Side(anchors_first, boxes, scores), LIMITS, MOVED)
    assert {d.root for d in found} == {"topk_limit"}
    assert any(not d.subject.kept and d.subject.why.startswith("cut by topk, rank") for d in found)
