"""How far two sets of detections agree, and COCO AP on truth made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from alignment.compare.coco_map import coco_ap
from alignment.compare.detections import IOU, SCORE, SCORE_DIFFERENCE, agree
from alignment.data.coco import CocoDataset, ImageEntry
from alignment.nms.multiclass import Detections

BOX = (100.0, 100.0, 200.0, 300.0)
NONE: list[tuple] = []
# With gaps, as COCO's own.
CATEGORY_IDS = [1, 5, 90]


def detections(*rows: tuple) -> Detections:
    """Rows of (box, score, label)."""
    boxes = np.array([row[0] for row in rows], np.float32).reshape(-1, 4)
    scores = np.array([row[1] for row in rows], np.float32)
    labels = np.array([row[2] for row in rows], np.int32)
    return Detections(boxes, scores, labels, np.arange(len(rows), dtype=np.int32))


def shifted(pixels: float, box: tuple = BOX) -> tuple:
    return box[0] + pixels, box[1], box[2] + pixels, box[3]


def scene(seed: int, count: int) -> list[tuple]:
    """Boxes far apart or overlapping, no two the same."""
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(0, 300, (count, 2)), rng.uniform(20, 200, (count, 2))
    boxes = np.concatenate([corner, corner + size], 1)
    return list(zip(map(tuple, boxes), rng.uniform(0.05, 1, count), rng.integers(0, 3, count), strict=True))


def disturbed(rows: list[tuple], seed: int) -> list[tuple]:
    rng = np.random.default_rng(seed)
    return [
        (tuple(np.array(box) + rng.normal(0, 2, 4)), np.clip(score + rng.normal(0, 0.03), 0, 1), label)
        for box, score, label in rows
        if rng.random() > 0.1
    ]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 30))
def test_identical_sides_agree_wholly(seed, count):
    found = detections(*scene(seed, count))
    result = agree(found, found)
    assert result.rate == 1
    assert result.total == 2 * int((found.scores >= SCORE).sum())
    assert (result.box_difference, result.score_difference) == (0, 0)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 30), order=st.randoms(use_true_random=False))
def test_the_order_of_detections_does_not_matter_and_the_sides_are_alike(seed, count, order):
    rows = scene(seed, count)
    others = disturbed(rows, seed)
    plain = agree(detections(*rows), detections(*others))
    mirrored = agree(detections(*others), detections(*rows))
    assert (mirrored.matched, mirrored.total) == (plain.matched, plain.total)
    left, right = order.sample(rows, len(rows)), order.sample(others, len(others))
    mixed = agree(detections(*left), detections(*right))
    assert (mixed.matched, mixed.total) == (plain.matched, plain.total)
    assert mixed.box_difference == plain.box_difference
    assert mixed.score_difference == plain.score_difference


@pytest.mark.parametrize(
    ("subject", "matched"),
    [
        ((BOX, 0.8, 1), 2),
        ((BOX, 0.8, 2), 0),
        # IoU of two boxes 100 wide, moved by d: (100 - d) / (100 + d), 0.9 at d = 5.26.
        ((shifted(5.2), 0.8, 1), 2),
        ((shifted(5.3), 0.8, 1), 0),
        ((BOX, 0.8 + SCORE_DIFFERENCE - 0.001, 1), 2),
        ((BOX, 0.8 + SCORE_DIFFERENCE + 0.001, 1), 0),
    ],
    ids=["same", "label", "IoU over 0.9", "IoU under 0.9", "score near", "score far"],
)
def test_a_counterpart_has_the_label_the_place_and_the_score(subject, matched):
    assert IOU == 0.9
    result = agree(detections((BOX, 0.8, 1)), detections(subject))
    assert (result.matched, result.total) == (matched, 2)
    assert result.reference.tolist() == result.subject.tolist() == [matched == 2]


def test_differences_are_those_of_matched_pairs_alone():
    reference = detections((BOX, 0.8, 1), (BOX, 0.9, 0))
    result = agree(reference, detections((shifted(2), 0.81, 1), (shifted(50), 0.3, 0)))
    assert result.box_difference == pytest.approx(2)
    assert result.score_difference == pytest.approx(0.01, abs=1e-6)
    assert result.reference.tolist() == [True, False]


def test_a_score_that_crosses_the_threshold_by_rounding_is_no_loss():
    result = agree(detections((BOX, SCORE + 0.001, 1)), detections((BOX, SCORE - 0.001, 1)))
    assert (result.matched, result.total, result.rate) == (1, 1, 1.0)


def test_what_is_weak_on_both_sides_is_not_counted():
    result = agree(detections((BOX, 0.1, 1)), detections((shifted(90), 0.2, 2)))
    assert (result.total, result.rate) == (0, 1.0)


def test_an_empty_side_matches_nothing_and_two_empty_sides_agree():
    assert agree(detections(), detections()).rate == 1
    for sides in ((detections((BOX, 0.8, 1)), detections()), (detections(), detections((BOX, 0.8, 1)))):
        assert (agree(*sides).rate, agree(*sides).total) == (0, 1)


def test_matching_is_one_to_one():
    result = agree(detections((BOX, 0.8, 1), (shifted(1), 0.8, 1)), detections((BOX, 0.8, 1)))
    assert result.reference.tolist() == [True, False]
    assert (result.matched, result.total) == (2, 3)


def test_the_best_overlap_is_taken_first_and_of_equal_ones_the_nearest_score():
    result = agree(detections((shifted(3), 0.8, 1), (BOX, 0.8, 1)), detections((BOX, 0.8, 1)))
    assert result.reference.tolist() == [False, True]
    first, second = (BOX, 0.50, 1), (BOX, 0.53, 1)
    for reference in ([first, second], [second, first]):
        found = agree(detections(*reference), detections((BOX, 0.54, 1), (BOX, 0.49, 1)))
        assert found.score_difference == pytest.approx(0.01, abs=1e-6)


def test_a_box_that_is_not_finite_has_no_counterpart():
    nan = (float("nan"),) * 4
    assert agree(detections((nan, 0.9, 1)), detections((BOX, 0.9, 1))).matched == 0


TRUTH = {1: [(BOX, 0), (shifted(200), 1)], 2: [((10.0, 20.0, 90.0, 110.0), 2)], 3: NONE}


def dataset(truth: dict[int, list[tuple]]) -> CocoDataset:
    """Truth as rows of (box, class index) by image."""
    rows = [(image, box, label) for image, found in truth.items() for box, label in found]
    annotations = []
    for number, (image, (x1, y1, x2, y2), label) in enumerate(rows, 1):
        size = [x2 - x1, y2 - y1]
        annotations.append(
            {
                "id": number,
                "image_id": image,
                "category_id": CATEGORY_IDS[label],
                "bbox": [x1, y1, *size],
                "area": size[0] * size[1],
                "iscrowd": 0,
            }
        )
    images = [{"id": image, "file_name": f"{image}.png", "width": 640, "height": 640} for image in truth]
    categories = [{"id": i, "name": str(i)} for i in CATEGORY_IDS]
    entries = [ImageEntry(image, f"{image}.png", Path(f"{image}.png")) for image in truth]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return CocoDataset(Path(), "val2017", entries, CATEGORY_IDS, list("abc"), content)


def found_as(truth: dict[int, list[tuple]], change=lambda box, label: (box, label)) -> dict[int, Detections]:
    """Detections of score 0.9 where the truth is, after `change`."""
    answers = {}
    for image, rows in truth.items():
        moved = [change(box, label) for box, label in rows]
        answers[image] = detections(*((box, 0.9, label) for box, label in moved))
    return answers


def test_perfect_detections_have_ap_1():
    assert coco_ap(dataset(TRUTH), found_as(TRUTH)) == pytest.approx((1, 1))


def test_wrong_labels_and_no_detections_have_ap_0():
    wrong = found_as(TRUTH, lambda box, label: (box, (label + 1) % 3))
    assert coco_ap(dataset(TRUTH), wrong) == (0, 0)
    assert coco_ap(dataset(TRUTH), {image: detections() for image in TRUTH}) == (0, 0)


def test_a_shift_costs_the_strict_thresholds_only():
    # Moved by an eighth of the width: IoU 7/9 for boxes 100 wide, 0.78 for the one of 80: good up to 0.75, 6 of 10.
    moved = found_as(TRUTH, lambda box, label: (shifted((box[2] - box[0]) / 8, box), label))
    assert coco_ap(dataset(TRUTH), moved) == pytest.approx((0.6, 1))


def test_truth_of_images_that_were_not_run_does_not_count():
    answers = found_as(TRUTH)
    assert coco_ap(dataset(TRUTH), {1: answers[1]}) == pytest.approx((1, 1))
    assert coco_ap(dataset(TRUTH), {1: answers[1], 2: detections()}) == pytest.approx((2 / 3, 2 / 3))


def test_a_class_that_is_never_found_costs_its_share():
    kept = {i: detections(*((b, 0.9, c) for b, c in rows if c != 1)) for i, rows in TRUTH.items()}
    assert coco_ap(dataset(TRUTH), kept) == pytest.approx((2 / 3, 2 / 3))


@pytest.mark.parametrize("some", [True, False], ids=["detections", "no detections"])
@pytest.mark.parametrize("truth", [{3: NONE}, TRUTH], ids=["no truth at all", "truth in other images only"])
def test_without_truth_there_is_no_ap(truth, some):
    answers = {3: detections((BOX, 0.9, 0)) if some else detections()}
    assert coco_ap(dataset(truth), answers) == (-1, -1)


def plain_ap(truth: CocoDataset, answers: dict[int, Detections]) -> tuple[float, float]:
    """As pycocotools is used everywhere: loadRes, all categories, all area ranges, summarize."""
    rows = [
        [image, box[0], box[1], box[2] - box[0], box[3] - box[1], score, truth.category_ids[label]]
        for image, found in answers.items()
        for box, score, label in zip(found.boxes.astype(float), found.scores, found.labels, strict=True)
    ]
    api = COCO()
    api.dataset = {"info": {}, **truth.truth}
    api.createIndex()
    evaluation = COCOeval(api, api.loadRes(np.array(rows)), "bbox")
    evaluation.params.imgIds = sorted(answers)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0], evaluation.stats[1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 12), strays=st.integers(1, 150), crowds=st.booleans())
def test_ap_is_that_of_pycocotools(seed, count, strays, crowds):
    rng = np.random.default_rng(seed)
    scenes = {image: scene(seed + image, count * (image < 3)) for image in range(4)}
    truth = dataset({image: [(box, label) for box, _, label in rows] for image, rows in scenes.items()})
    for annotation in truth.truth["annotations"]:
        annotation["iscrowd"] = int(crowds and rng.random() < 0.3)
    answers = {i: detections(*disturbed(rows, seed), *scene(seed + 9 + i, strays)) for i, rows in scenes.items()}
    answers[3].scores[:] = 0.5  # equal scores
    assert coco_ap(truth, answers) == pytest.approx(plain_ap(truth, answers), abs=1e-12)


def test_the_annotation_of_id_0_counts():
    truth = dataset(TRUTH)
    for annotation in truth.truth["annotations"]:
        annotation["id"] -= 1
    assert coco_ap(truth, found_as(TRUTH)) == pytest.approx((1, 1))
