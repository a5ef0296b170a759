"""How rotated detections, boxes and angles are compared, and their AP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.compare.coco_map import coco_ap
from alignment.compare.detections import agree, corner_difference
from alignment.compare.measure import TensorErrors, comparable
from alignment.data.coco import CocoDataset, ImageEntry
from alignment.golden import DEFAULTS, Quantity
from alignment.models.outputs import Outputs
from alignment.nms.multiclass import Detections

pytestmark = pytest.mark.rotated


def detections(*rows: tuple) -> Detections:
    """Rows of (box, score, label)."""
    boxes = np.array([row[0] for row in rows], np.float32).reshape(-1, 5)
    scores, labels = np.array([row[1] for row in rows], np.float32), np.array([row[2] for row in rows], np.int32)
    return Detections(boxes, scores, labels, np.arange(len(rows), dtype=np.int32))


BOX = (100.0, 120.0, 80.0, 20.0, 0.4)


@pytest.mark.parametrize(
    ("box", "matched"),
    [
        (BOX, True),
        ((100, 120, 80, 20, 0.4 - np.pi), True),
        ((100, 120, 20, 80, 0.4 - np.pi / 2), True),
        ((100.5, 120, 80, 20, 0.4), True),
        ((100, 120, 80, 20, 0.41), True),
        ((100, 120, 80, 20, -0.4), False),
        ((100, 120, 20, 80, 0.4), False),
        ((100, 120, 80, 20, 0.55), False),
        ((100, 120, 80, 20, float("nan")), False),
    ],
    ids=["same", "half a turn", "other side first", "moved", "turned", "sign", "swapped", "turned too far", "nan"],
)
def test_a_counterpart_overlaps_as_a_rotated_box(box, matched):
    result = agree(detections((BOX, 0.8, 1)), detections((box, 0.8, 1)))
    assert result.reference.tolist() == result.subject.tolist() == [matched]
    assert agree(detections((BOX, 0.8, 1)), detections((box, 0.8, 2))).matched == 0
    assert agree(detections((BOX, 0.8, 1)), detections()).matched == 0


sides = st.floats(1, 200)
rotated_boxes = st.tuples(st.floats(-100, 100), st.floats(-100, 100), sides, sides, st.floats(-3, 3)).map(np.array)


@given(rotated_boxes, st.floats(-0.1, 0.1), st.integers(0, 3))
def test_corners_differ_by_the_angle_times_half_the_diagonal_however_a_box_is_written(box, angle, quarters):
    other = np.add(box, (0, 0, 0, 0, angle + quarters * np.pi / 2))
    if quarters % 2:
        other[[2, 3]] = other[[3, 2]]
    moved = 2 * np.sin(abs(angle) / 2) * np.hypot(*box[2:4]) / 2
    assert moved / np.sqrt(2) - 1e-9 <= corner_difference(box, other) <= moved + 1e-9
    assert corner_difference(box, np.add(box, (3, -2, 0, 0, 0))) == pytest.approx(3)


@given(st.lists(st.floats(-np.pi / 2, np.pi / 2), min_size=1, max_size=20), st.floats(-1.5, 1.5), st.integers(-2, 2))
def test_angles_are_compared_modulo_half_a_turn(reference, error, halves):
    reference = np.array(reference)
    subject, other = comparable("angles", reference + error + halves * np.pi, reference)
    np.testing.assert_allclose(subject - other, error, rtol=0, atol=1e-9)
    kept, _ = comparable("angles", reference + error, reference)
    np.testing.assert_array_equal(kept, reference + error)
    np.testing.assert_array_equal(comparable("boxes", reference + 4, reference)[0], reference + 4)


def test_angles_that_are_not_finite_stay_so():
    nan, inf = np.float32("nan"), np.float32("inf")
    subject = np.array([nan, inf, inf, 0], np.float32)
    found, _ = comparable("angles", subject, np.array([0, 0, inf, nan], np.float32))
    np.testing.assert_array_equal(found, subject)


@pytest.mark.parametrize("precision", DEFAULTS)
def test_every_precision_has_a_limit_for_every_quantity_that_is_measured_in_it(precision):
    values = {"raw", "boxes", "angles", "scores"}
    of_int8 = {"agreement_ap", "twin_agreement_ap", "twin_delta_ap"}
    assert set(DEFAULTS[precision]) == set(get_args(Quantity)) - (values if precision == "int8" else of_int8)


def test_boxes_and_angles_are_tensors_of_their_own():
    rng = np.random.default_rng(0)
    boxes, scores = rng.uniform(10, 90, (1, 50, 5)).astype(np.float32), rng.random((1, 50, 2), np.float32)
    boxes[..., 4] = np.pi / 2 - 0.001
    other = boxes.copy()
    other[..., 4] = -np.pi / 2 + 0.001
    other[..., 2] += 0.5
    errors = TensorErrors()
    errors.add(Outputs({}, other, scores), Outputs({}, boxes, scores), Outputs({}, boxes.astype(float), scores))
    found = {t.name: t for t in errors.results()}
    assert {name: t.unit for name, t in found.items()} == {"boxes": "px", "angles": "rad", "scores": "probability"}
    assert found["boxes"].difference.max_abs == 0.5
    assert found["boxes"].difference.count == 200
    assert found["angles"].difference.max_abs == pytest.approx(0.002, abs=1e-6)
    assert found["angles"].subject_error.max_abs == pytest.approx(0.002, abs=1e-6)


def dataset(truth: dict[int, list[tuple]]) -> CocoDataset:
    """Truth as rows of (box, class index) by image."""
    rows = [(image, box, label) for image, found in truth.items() for box, label in found]
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": label + 1,
            "rbox": list(box),
            "bbox": [box[0] - box[2] / 2, box[1] - box[3] / 2, box[2], box[3]],
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for number, (image, box, label) in enumerate(rows, 1)
    ]
    images = [{"id": image, "file_name": f"{image}.png", "width": 640, "height": 640} for image in truth]
    entries = [ImageEntry(image, f"{image}.png", Path(f"{image}.png")) for image in truth]
    categories = [{"id": i + 1, "name": str(i)} for i in range(3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return CocoDataset(Path(), "val2017", entries, [1, 2, 3], list("abc"), content)


TRUTH: dict[int, list[tuple]] = {1: [(BOX, 0), ((300, 200, 60, 30, -1.2), 1)], 2: [((50, 60, 40, 10, 1.5), 2)], 3: []}


def moved(by: tuple[float, ...], score: float = 0.9) -> dict[int, Detections]:
    """Detections where the truth is, each column moved."""
    return {
        image: detections(*((tuple(np.add(box, by)), score, label) for box, label in rows))
        for image, rows in TRUTH.items()
    }


@pytest.mark.parametrize("by", [(0, 0, 0, 0, 0), (0, 0, 0, 0, np.pi), (0, 0, 0, 0, -np.pi)])
def test_perfect_detections_have_ap_1_by_whichever_half_turn(by):
    assert coco_ap(dataset(TRUTH), moved(by)) == pytest.approx((1, 1))


def test_boxes_that_are_right_but_for_their_angle_have_ap_0():
    assert coco_ap(dataset(TRUTH), moved((0, 0, 0, 0, np.pi / 2))) == (0, 0)
    assert coco_ap(dataset(TRUTH), {image: detections() for image in TRUTH}) == (0, 0)
    assert coco_ap(dataset({3: []}), {3: detections((BOX, 0.9, 0))}) == (-1, -1)


def test_a_shift_along_costs_the_strict_thresholds_only():
    along = {
        image: detections(
            *(((x + w / 8 * np.cos(a), y + w / 8 * np.sin(a), w, h, a), 0.9, k) for (x, y, w, h, a), k in rows)
        )
        for image, rows in TRUTH.items()
    }
    # IoU 7/9: good up to 0.75, 6 of 10
    assert coco_ap(dataset(TRUTH), along) == pytest.approx((0.6, 1))


def test_without_angles_ap_is_that_of_upright_boxes():
    rng = np.random.default_rng(1)

    def scene(count: int) -> np.ndarray:
        return np.hstack([rng.uniform(50, 300, (count, 2)), rng.uniform(20, 90, (count, 2)), np.zeros((count, 1))])

    truth = {image: [(tuple(box), int(rng.integers(3))) for box in scene(12)] for image in range(1, 9)}
    rotated, upright = {}, {}
    for image, rows in truth.items():
        noisy = [(tuple(np.add(b, [*rng.normal(0, 6, 4), 0])), rng.random(), k) for b, k in rows] * 2
        found = rotated[image] = detections(*noisy, *((tuple(b), rng.random(), 0) for b in scene(5)))
        centre, half = found.boxes[:, :2].astype(float), found.boxes[:, 2:4].astype(float) / 2
        upright[image] = replace(found, boxes=np.hstack([centre - half, centre + half]))
    expected = coco_ap(dataset(truth), upright)
    assert 0.1 < expected[0] < expected[1] < 0.99
    assert coco_ap(dataset(truth), rotated) == pytest.approx(expected, abs=1e-12)
