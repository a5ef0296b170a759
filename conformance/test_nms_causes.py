"""Every cause where it is planted, by its name, and its proof replayed here, apart from the code that found it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nms_scenes import scenes
from test_nms_semantics import MOVED, SEMANTICS, images

from alignment.data.preprocess import Transform
from alignment.nms.causes import Cause, Divergence, Limits, Side
from alignment.nms.explain import explain, kept
from alignment.nms.implementations import efficient_nms, mmyolo, torchvision_nms
from alignment.nms.semantics import Semantics, run
from alignment.variant import Nms

pytestmark = pytest.mark.nms
SCENES = scenes()
LIMITS = Limits(boxes=0.02, scores=1e-4)
THIRDS = Transform((0.3, 0.3), (16.0, 0.0), (640, 576))
BASE = Semantics(0.25, 0.5, max_output=100)


def agrees(d: Divergence, reference: Side, subject: Side, transform: Transform | None = None) -> bool:
    """Whether both sides say the same of the pair when one takes over what the proof says, and nothing else."""
    proof, pair = d.proof, d.row * reference.scores.shape[1] + d.label
    assert proof is not None
    own, other = (subject, reference) if proof.side == "subject" else (reference, subject)
    taken = {name: getattr(other.semantics, name) for name in proof.fields}
    boxes, scores = own.boxes.copy(), own.scores.copy()
    for row in proof.boxes:
        boxes[row] = other.boxes[row]
    for one in proof.scores:
        place = divmod(one, scores.shape[1])
        scores[place] = other.scores[place]
    order, rounding = (other if taken_over else own for taken_over in (proof.order, "iou_rounding" in taken))
    seen = order.seen, order.seen_rows, rounding.seen
    fates = run(dataclasses.replace(own.semantics, **taken), boxes, scores, transform, *seen)
    replayed = pair in (fates.rows * scores.shape[1] + fates.labels)[fates.kept]
    return replayed == (pair in kept(other, transform))


def sides(one: Semantics, other: Semantics, boxes: Any, scores: Any, seen: Any = None) -> tuple[Side, Side]:
    image = np.array(boxes, np.float32), np.array(scores, np.float32)
    return Side(one, *image), Side(other, *image, None if seen is None else np.array(seen))


def changed(image: tuple[Any, Any], base: Semantics = BASE, **changes: Any) -> tuple[Side, Side]:
    return sides(base, dataclasses.replace(base, **changes), *image)


def scattered() -> tuple[np.ndarray, np.ndarray]:
    return SCENES["scattered"].boxes[0], SCENES["scattered"].scores[0]


def apart(count: int) -> np.ndarray:
    corner = np.arange(count, dtype=np.float32)[:, None] * 20
    return np.concatenate([corner, corner * 0, corner + 10, corner * 0 + 10], 1)


AT_HALF = [[0, 0, 10, 10], [0, 0, 5, 10]], [[0.9], [0.8]]
AT_SIX = [[0, 0, 10, 10], [0, 0, 6, 10]], [[0.9], [0.8]]
FALLING = apart(4), [[0.9, 0.8], [0.7, 0.3], [0.6, 0.2], [0.5, 0.1]]
EQUAL = apart(4), np.full((4, 1), 0.5)
OVERLAPPING = [[0, 0, 10, 10], [1, 0, 11, 10]], [[0.9, 0.3], [0.5, 0.8]]
#: Their largest coordinate is -1, so that the offset of every class is 0.
BELOW_ZERO = [[-100, -100, -1, -1], [-99, -99, -1, -1]], [[0.9, 0], [0, 0.8]]
MMCV = Semantics(0.25, 0.6, max_output=300)


def far_away() -> tuple[np.ndarray, np.ndarray]:
    """Boxes that class offsets round, so that an IoU comes out on the other side of 1/2."""
    boxes, scores = np.tile(np.array(AT_HALF[0], np.float32), (40, 1)), np.zeros((80, 80), np.float32)
    boxes[::2, 2] += np.linspace(-1e-4, 1e-4, 40, dtype=np.float32)
    boxes += np.repeat(np.arange(40, dtype=np.float32) * 333.3, 2)[:, None]
    scores[np.arange(80), 79] = np.linspace(0.9, 0.3, 80)
    return boxes, scores


def thirds() -> tuple[np.ndarray, np.ndarray]:
    """Pairs with an IoU of 1/2, which the way back to the original image rounds."""
    boxes = np.tile(np.array(AT_HALF[0], np.float32), (40, 1))
    boxes += np.repeat(np.arange(40, dtype=np.float32) * 37.7, 2)[:, None]
    return boxes, np.linspace(0.9, 0.3, 80, dtype=np.float32)[:, None]


PLANTED: dict[str, tuple[Side, Side]] = {
    "score_threshold": changed(scattered(), score_threshold=0.3),
    "score_threshold_edge": changed((apart(2), [[0.25], [0.5]]), score_inclusive=True),
    "iou_threshold": changed(scattered(), iou_threshold=0.7),
    "iou_threshold_edge": sides(MMCV, torchvision_nms(0.25, 0.6, 300), *AT_SIX),
    "iou_comparison": changed(AT_HALF, iou_inclusive=True),
    "iou_rounding": sides(BASE, dataclasses.replace(BASE, iou_rounding=1e-5), *AT_HALF, [0]),
    "degenerate_box": changed(([[10, 10, 0, 0], [0, 0, 10, 10]], [[0.9], [0.8]]), reorder=True),
    "multi_label": changed(FALLING, multi_label=False),
    "background": changed(OVERLAPPING, background=1),
    "topk_limit": changed(FALLING, dataclasses.replace(BASE, topk=4), topk=2),
    "topk_unit": changed(FALLING, dataclasses.replace(BASE, topk=2), topk_unit="anchors"),
    "topk_tie": sides(dataclasses.replace(BASE, topk=2), dataclasses.replace(BASE, topk=2), *EQUAL, [2, 3]),
    "candidate_cap": changed(FALLING, candidate_cap=2),
    "class_agnostic": changed(OVERLAPPING, classes="together"),
    "class_offset_overlap": changed(BELOW_ZERO, classes="offset"),
    "class_offset_rounding": changed(far_away(), classes="offset"),
    "coordinate_frame": changed(thirds(), frame="original"),
    "max_output": changed(FALLING, max_output=2),
    "padding": changed(FALLING, floor=-32768.0),
    "nms_order_tie": sides(BASE, BASE, [[0, 0, 10, 10], [1, 0, 11, 10]], [[0.5], [0.5]], [1]),
}


@pytest.mark.parametrize("cause", PLANTED)
def test_a_cause_is_found_where_it_is_planted_and_its_proof_holds(cause):
    found = explain(*PLANTED[cause], LIMITS, THIRDS)
    assert Counter(d.cause for d in found)[cause] > 0
    assert {d.root for d in found} == {cause}
    for d in found:
        assert len(d.proof.fields) + d.proof.order == 1, "one parameter"
        assert agrees(d, *PLANTED[cause], THIRDS)


def test_every_cause_is_planted_somewhere():
    assert {*PLANTED, "numeric", "precision", "cascade", "unexplained"} == set(get_args(Cause))


@pytest.mark.topk
@pytest.mark.parametrize("unit", ["pairs", "anchors"])
@pytest.mark.parametrize("rows", [None, [3, 2, 1, 0]])
def test_topk_ties_are_ties(unit, rows):
    semantics = dataclasses.replace(BASE, topk=2, topk_unit=unit)
    reference, subject = sides(semantics, semantics, *EQUAL, [3, 2])
    subject = dataclasses.replace(subject, seen_rows=None if rows is None else np.array(rows))
    found = explain(reference, subject, LIMITS)
    assert {d.row for d in found} == {0, 1, 2, 3}
    assert {d.cause for d in found} == {"topk_tie"}
    assert all(agrees(d, reference, subject) for d in found)


def test_a_threshold_that_differs_by_a_rounding_is_an_edge():
    below = float(np.nextafter(np.float32(0.25), np.float32(0)))
    (found,) = explain(*changed((apart(2), [[0.25], [0.5]]), score_threshold=below), LIMITS)
    assert found.cause == "score_threshold_edge"
    (found,) = explain(*changed((apart(2), [[0.25], [0.5]]), score_threshold=0.2499), LIMITS)
    assert found.cause == "score_threshold"
    assert found.replay.startswith("the settings differ: ")


@settings(max_examples=300, deadline=None)
@given(
    images(values=st.integers(0, 8).map(lambda i: i / 8)),
    SEMANTICS,
    SEMANTICS,
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_all_proofs_hold(image, one, other, seed, moves):
    """Of any two semantics, on the same inputs or moved ones: nothing is unexplained, and no replay only claims."""
    boxes, scores = image
    rng = np.random.default_rng(seed)
    moved = (boxes + moves * rng.uniform(-0.01, 0.01, boxes.shape)).astype(np.float32)
    drifted = (scores + moves * rng.uniform(-5e-5, 5e-5, scores.shape)).astype(np.float32)
    reference, subject = Side(one, boxes, scores), Side(other, moved, drifted)
    found = explain(reference, subject, LIMITS, MOVED)
    ours, theirs = (set(kept(side, MOVED).tolist()) for side in (reference, subject))
    assert {d.row * scores.shape[1] + d.label for d in found} == ours ^ theirs
    for d in found:
        assert d.cause != "unexplained"
        assert agrees(d, reference, subject, MOVED)
        assert not re.search(r"\b(None|True|False)\b", d.replay), "no words of Python's"
        # Who follows, follows from one that differs too, and not in a circle.
        follows, steps = d.follows, 0
        while follows is not None:
            (before,) = [e for e in found if (e.row, e.label) == follows]
            follows, steps = before.follows, steps + 1
            assert steps <= len(found)


def test_parameters_that_explain_a_pair_only_together_are_all_said():
    """TopK over pairs cuts the third one; without TopK the first suppresses it; TopK over rows cuts none of its row."""
    boxes, scores = [[0, 0, 5, 10], [5, 0, 10, 10], [0, 0, 5, 10]], [[0.6, 0.4], [0.3, 0.3], [0.5, 0.4]]
    one = Semantics(0.25, 0.5, max_per_class=1, topk_unit="anchors")
    reference, subject = sides(one, Semantics(0.25, 0.5, topk=2, classes="together"), boxes, scores)
    found = explain(reference, subject, LIMITS)
    (joint,) = [d for d in found if len(d.proof.fields) > 1]
    assert joint.cause == "topk_unit"
    assert joint.replay == "the reference with topk_unit pairs instead of anchors, topk 2 instead of no limit"
    assert all(agrees(d, reference, subject) for d in found)


def test_of_pairs_that_follow_each_other_by_different_changes_the_first_is_a_root():
    boxes = [[0, 0, 8, 10], [2, 0, 12, 10], [4, 0, 12, 10], [4, 0, 14, 10]]
    scores = [[0.8, 0.9], [0.9, 0.7], [0.7, 0.5], [0.9, 0.7]]
    one = Semantics(
        0.25, 0.5, multi_label=False, topk=3, candidate_cap=3, ties="falling", max_per_class=1, topk_unit="anchors"
    )
    one = dataclasses.replace(one, max_output=2)
    reference, subject = sides(one, dataclasses.replace(one, topk_unit="pairs", max_output=1), boxes, scores)
    found = explain(reference, subject, LIMITS)
    assert {(d.row, d.label): d.follows for d in found} == {(0, 1): None, (1, 0): None, (3, 0): (1, 0)}
    assert all(agrees(d, reference, subject) for d in found)


def nms_sides(name: str, image: int = 0) -> tuple[Side, Side]:
    scene = SCENES[name]
    given = scene.settings
    nms = Nms(
        score_threshold=given["score_threshold"],
        iou_threshold=given["iou_threshold"],
        max_per_image=given["max_output_boxes"],
    )
    image_of = scene.boxes[image], scene.scores[image]
    return Side(mmyolo(nms), *image_of), Side(efficient_nms(given), *image_of)


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
    reference, subject = nms_sides(name)
    found = explain(reference, subject, LIMITS, MOVED)
    assert {d.cause for d in found} == causes
    assert all(agrees(d, reference, subject, MOVED) for d in found)


NUMBER = r"([-+.e\d]+)"
SCORE = re.compile(rf"its own score put back: score moved by {NUMBER}; it was {NUMBER} from the score")
IOU = re.compile(rf"was {NUMBER}, {NUMBER} from {NUMBER}, and is {NUMBER}$")


@settings(max_examples=200, deadline=None)
@given(images(values=st.integers(0, 8).map(lambda i: i / 8)), st.integers(0, 2**32 - 1))
def test_what_moved_did_so_by_more_than_its_margin(image, seed):
    boxes, scores = image
    rng = np.random.default_rng(seed)
    moved = (boxes + rng.uniform(-0.01, 0.01, boxes.shape)).astype(np.float32)
    drifted = (scores + rng.uniform(-5e-5, 5e-5, scores.shape)).astype(np.float32)
    for d in explain(Side(BASE, boxes, scores), Side(BASE, moved, drifted), LIMITS):
        assert "put back" in d.replay
        assert {d.root} == {"numeric"}
        if found := SCORE.search(d.replay):
            amount, margin = map(float, found.groups())
            assert margin <= 1.01 * amount
        if found := IOU.search(d.replay):
            was, margin, threshold, now = map(float, found.groups())
            assert margin == pytest.approx(abs(was - threshold), abs=2e-6)
            assert margin <= abs(now - was) + 1e-6


@pytest.mark.parametrize("cause", ["numeric", "precision"])
def test_a_score_that_crosses_the_threshold_is_put_back_alone(cause):
    reference = Side(BASE, apart(2), np.array([[0.25002, 0.1], [0.5, 0.4]], np.float32))
    subject = dataclasses.replace(reference, scores=np.array([[0.24998, 0.1001], [0.5, 0.4]], np.float32))
    (found,) = explain(reference, subject, LIMITS, moved=cause)
    assert found.cause == cause
    assert found.proof.scores == (0,)
    assert found.proof.boxes == ()
    assert found.replay.startswith(
        "its own score put back: score moved by 4e-05; it was 2e-05 from the score threshold"
    )
    assert agrees(found, reference, subject)


def test_a_box_that_crosses_the_iou_threshold_is_put_back_alone():
    scores = np.array([[0.9], [0.8]], np.float32)
    reference = Side(BASE, np.array([[0, 0, 10, 10], [0, 0, 4.999, 10]], np.float32), scores)
    subject = Side(BASE, np.array([[0, 0, 10, 10], [0, 0, 5.002, 10]], np.float32), scores + np.float32(1e-5))
    (found,) = explain(reference, subject, LIMITS)
    assert (found.cause, found.proof.boxes, found.proof.scores) == ("numeric", (1,), ())
    assert "its own box put back: box moved by 0.003; IoU with row 0, class 0 was 0.4999" in found.replay
    assert "0.0001 from 0.5, and is 0.5002" in found.replay


def test_a_competitor_that_moved_and_did_not_differ_itself_is_named():
    """Both sides keep the first box; it moved, and takes the second with it."""
    scores = np.array([[0.9], [0.8]], np.float32)
    reference = Side(BASE, np.array([[0, 0, 10, 10], [0, 0, 4.999, 10]], np.float32), scores)
    subject = Side(BASE, np.array([[0, 0, 9.99, 10], [0, 0, 4.999, 10]], np.float32), scores)
    (found,) = explain(reference, subject, LIMITS)
    assert (found.cause, found.follows, found.proof.boxes) == ("numeric", None, (0,))
    assert found.replay.startswith("row 0, class 0: box put back: box moved by 0.01")


def test_of_two_that_change_places_one_follows_the_other():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10]], np.float32)
    reference = Side(BASE, boxes, np.array([[0.50001], [0.5]], np.float32))
    subject = Side(BASE, boxes, np.array([[0.50001], [0.50004]], np.float32))
    first, second = explain(reference, subject, LIMITS)
    assert {first.cause, second.cause} == {"numeric", "cascade"}
    own = first if first.cause == "numeric" else second
    assert "score moved by" in own.replay
    assert "1e-05 from the score of row" in own.replay.replace("1.00e-05", "1e-05").replace("9.98e-06", "1e-05")
    assert all(agrees(d, reference, subject) for d in (first, second))
