"""Differences between post-processings are explained, each by what was really different; faults are no explanation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nms_scenes import scenes
from test_nms_semantics import MOVED, SEMANTICS, images

from alignment.nms.explain import PATH, Divergence, Limits, Side, explain
from alignment.nms.implementations import efficient_nms, mmyolo
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
    assert sorted(field for fields, _ in PATH for field in fields) == sorted(
        f.name for f in dataclasses.fields(Semantics)
    )


@settings(max_examples=400, deadline=None)
@given(images(values=NUMBERS), SEMANTICS, SEMANTICS)
def test_every_difference_of_two_semantics_is_explained(image, one, other):
    found = explain(Side(one, *image), Side(other, *image), LIMITS, MOVED)
    assert pairs(found) == kept(one, *image) ^ kept(other, *image)
    differing = {cause for fields, cause in PATH if any(getattr(one, f) != getattr(other, f) for f in fields)}
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
    (cause,) = {cause for fields, cause in PATH if field in fields}
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


@pytest.mark.parametrize(
    ("fault", "moved"), [(sigmoid_twice, "scores"), (class_shifted, "scores"), (boxes_swapped, "boxes")]
)
def test_a_fault_of_the_inputs_is_never_an_explanation(fault, moved):
    boxes, scores = scattered()
    found = explain(Side(REFERENCE, boxes, scores), Side(REFERENCE, *fault(boxes, scores)), LIMITS)
    assert {d.cause for d in found} == {"unexplained"}
    assert any(f"{moved} moved by" in d.replay for d in found)


def test_a_wrong_threshold_is_called_one():
    image = scattered()
    found = explain(Side(REFERENCE, *image), Side(dataclasses.replace(REFERENCE, score_threshold=0.3), *image), LIMITS)
    assert {d.cause for d in found} <= {"score_threshold", "cascade"}
    assert any("the subject with score_threshold 0.25 for 0.3" in d.replay for d in found)


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
    assert all(d.replay.endswith("equal scores taken in the subject's order") for d in (first, second))


def scene_sides(name: str, image: int, **changes: Any) -> tuple[Side, Side]:
    scene = SCENES[name]
    given = scene.settings
    nms = Nms(
        score_threshold=given["score_threshold"],
        iou_threshold=given["iou_threshold"],
        max_per_image=given["max_output_boxes"],
    )
    boxes, scores = scene.boxes[image], scene.scores[image]
    return Side(mmyolo(nms), boxes, scores), Side(efficient_nms({**given, **changes}), boxes, scores)


@pytest.mark.parametrize(
    ("name", "causes"),
    [
        ("at score threshold", {"score_threshold_edge"}),
        ("at iou threshold", {"iou_comparison"}),
        ("candidates 5001", {"candidate_cap"}),
        ("scattered large", {"candidate_cap"}),
        ("few survivors 0.001", {"padding", "score_threshold_edge"}),
        ("scattered background 0", {"background"}),
    ],
)
def test_mmyolo_against_efficient_nms(name, causes):
    found = explain(*scene_sides(name, 0), LIMITS, MOVED)
    assert found
    assert {d.cause for d in found} <= causes | {"cascade"}


@pytest.mark.topk
def test_topk_over_anchors_and_over_pairs():
    scene = SCENES["yolo 0.01"]
    nms = Nms(score_threshold=0.01, nms_pre=3840, max_per_image=300, iou_threshold=0.65)
    pairs_first = mmyolo(nms)
    anchors_first = dataclasses.replace(pairs_first, topk=200, topk_unit="anchors")
    boxes, scores = scene.boxes[0], scene.scores[0]
    found = explain(Side(pairs_first, boxes, scores), Side(anchors_first, boxes, scores), LIMITS, MOVED)
    assert {d.cause for d in found} <= {"topk_limit", "topk_unit", "cascade"}
    assert any(not d.subject.kept and d.subject.why.startswith("cut by topk, rank") for d in found)
