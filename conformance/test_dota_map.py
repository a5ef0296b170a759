"""DOTA's mAP: against a plain reading of the protocol, against mmrotate's own code, and by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rotated_compare import BOX, TRUTH, dataset, detections, moved

from alignment.compare.dota_map import THRESHOLDS, Metric, dota_map, dota_scores
from alignment.data.coco import CocoDataset
from alignment.nms.multiclass import Detections
from alignment.nms.rotated import rotated_iou

pytestmark = pytest.mark.rotated
CLASSES = 3


def plain(data: CocoDataset, found: dict[int, Detections], threshold: float, metric: str) -> float:
    """VOC's devkit, detection by detection."""
    aps = []
    for label, category in enumerate(data.category_ids):
        truth = {image: [] for image in found}
        for entry in data.truth["annotations"]:
            if entry["category_id"] == category and entry["image_id"] in truth:
                truth[entry["image_id"]].append({"box": entry["rbox"], "crowd": entry["iscrowd"], "taken": False})
        total = sum(not one["crowd"] for present in truth.values() for one in present)
        if not total:
            continue
        ranked = [
            (-float(score), image, index)
            for image, one in found.items()
            for index, (score, own) in enumerate(zip(one.scores, one.labels, strict=True))
            if own == label
        ]
        hits, misses, points = 0, 0, []
        for _, image, index in sorted(ranked, key=lambda one: one[0]):
            box, best, nearest = found[image].boxes[index], -1.0, None
            for one in truth[image]:
                iou = float(np.float32(rotated_iou(box[None], np.array([one["box"]]))[0]))
                if iou > best:
                    best, nearest = iou, one
            if nearest is None or best < np.float32(threshold):
                misses += 1
            elif not nearest["crowd"]:
                hits, misses = hits + (not nearest["taken"]), misses + nearest["taken"]
                nearest["taken"] = True
            points.append((hits / total, hits / max(hits + misses, 1)))
        if metric == "voc07":
            best_from = [max((p for r, p in points if r >= recall), default=0.0) for recall in np.arange(0, 1.1, 0.1)]
            aps.append(sum(best_from) / 11)
        else:
            area, before = 0.0, 0.0
            for index, (recall, _) in enumerate(points):
                area += (recall - before) * max(p for _, p in points[index:])
                before = recall
            aps.append(area)
    return float(np.mean(aps)) if aps else -1.0


def scene(seed: int, images: int = 4, crowd: float = 0.2) -> tuple[CocoDataset, dict[int, Detections]]:
    """Truth, and detections near to it, twice, and elsewhere; scores are all different."""
    rng = np.random.default_rng(seed)

    def boxes(count: int) -> np.ndarray:
        columns = [
            rng.uniform(50, 300, (count, 2)),
            rng.uniform(15, 90, (count, 2)),
            rng.uniform(-1.5, 1.5, (count, 1)),
        ]
        return np.concatenate(columns, 1)

    truth, found = {}, {}
    for image in range(1, images + 1):
        rows = [(tuple(box), int(rng.integers(CLASSES))) for box in boxes(int(rng.integers(0, 9)))]
        noise = [[*rng.normal(0, 4, 4), rng.normal(0, 0.1)] for _ in range(2 * len(rows))]
        near = [(tuple(np.add(box, by)), rng.random(), k) for (box, k), by in zip(rows * 2, noise, strict=True)]
        far = [(tuple(box), rng.random(), int(rng.integers(CLASSES))) for box in boxes(4)]
        truth[image], found[image] = rows, detections(*near, *far)
    data = dataset(truth)
    for entry in data.truth["annotations"]:
        entry["iscrowd"] = int(rng.random() < crowd)
    return data, found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["voc07", "area"]))
def test_it_is_what_a_plain_reading_of_the_protocol_gives(seed, metric: Metric):
    data, found = scene(seed)
    expected = [plain(data, found, threshold, metric) for threshold in THRESHOLDS]
    assert dota_map(data, found, metric) == pytest.approx((np.mean(expected), expected[0]), abs=1e-12)


@pytest.mark.parametrize("metric", ["voc07", "area"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_mmrotate_gives(seed, metric, monkeypatch):
    pytest.importorskip("mmrotate")
    from alignment.models.mmyolo_source import require_mmrotate

    require_mmrotate()
    from mmrotate.evaluation.functional import mean_ap

    class Pool:
        """In this process."""

        def __init__(self, _: int) -> None: ...

        def starmap(self, function: Any, arguments: Any) -> list[Any]:
            return [function(*of) for of in arguments]

        def close(self) -> None: ...

    monkeypatch.setattr(mean_ap, "get_context", lambda _: type("Context", (), {"Pool": Pool}))
    data, found = scene(seed, images=6)
    results, annotations = [], []
    for image, one in found.items():
        rows = np.concatenate([one.boxes, one.scores[:, None]], 1)
        results.append([rows[one.labels == label] for label in range(CLASSES)])
        present = [entry for entry in data.truth["annotations"] if entry["image_id"] == image]
        parts: dict[str, Any] = {}
        for suffix, crowd in (("", 0), ("_ignore", 1)):
            chosen = [entry for entry in present if entry["iscrowd"] == crowd]
            parts[f"bboxes{suffix}"] = np.array([entry["rbox"] for entry in chosen], float).reshape(-1, 5)
            parts[f"labels{suffix}"] = np.array([entry["category_id"] - 1 for entry in chosen], int)
        if not len(parts["bboxes"]):
            # mmrotate then forgets the ignored ones: leave such an image to both without any.
            parts["bboxes_ignore"], parts["labels_ignore"] = np.empty((0, 5)), np.empty(0, int)
            data.truth["annotations"] = [e for e in data.truth["annotations"] if e["image_id"] != image]
        annotations.append(parts)
    for threshold, ours in ((0.5, dota_map(data, found, metric)[1]),):
        theirs, _ = mean_ap.eval_rbbox_map(
            results, annotations, iou_thr=threshold, use_07_metric=metric == "voc07", logger="silent"
        )
        assert 0.1 < theirs < 1
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("metric", ["voc07", "area"])
@pytest.mark.parametrize("by", [(0, 0, 0, 0, 0), (0, 0, 0, 0, np.pi)])
def test_perfect_detections_have_ap_1(metric, by):
    assert dota_map(dataset(TRUTH), moved(by), metric) == pytest.approx((1, 1))


def test_what_no_detection_or_no_truth_gives():
    assert dota_map(dataset(TRUTH), {image: detections() for image in TRUTH}) == (0, 0)
    assert dota_map(dataset({3: []}), {3: detections((BOX, 0.9, 0))}) == (-1, -1)
    assert dota_scores(dataset({3: []}), {3: detections((BOX, 0.9, 0))}, None) is None


def test_one_of_two_found_after_a_false_one():
    """Precision 1/2 up to recall 1/2: six of eleven recalls, or half the area."""
    truth = {1: [(BOX, 0), ((300, 200, 60, 30, -1.2), 0)]}
    found = {1: detections(((50, 300, 20, 20, 0), 0.9, 0), (BOX, 0.8, 0))}
    assert dota_map(dataset(truth), found)[1] == pytest.approx(6 / 11 / 2)
    assert dota_map(dataset(truth), found, "area")[1] == pytest.approx(1 / 4)


def test_all_detections_count_and_a_second_one_of_the_same_box_is_wrong():
    """COCO looks at a hundred detections of an image only."""
    many = [((20 * i, 0, 10, 5, 0), 0.9, 0) for i in range(150)]
    last = (BOX, 0.1, 0)
    assert dota_map(dataset({1: [(BOX, 0)]}), {1: detections(*many, last)})[1] == pytest.approx(1 / 151)
    twice = {1: detections((BOX, 0.9, 0), (BOX, 0.8, 0), ((300, 200, 60, 30, -1.2), 0.7, 0))}
    truth = dataset({1: [(BOX, 0), ((300, 200, 60, 30, -1.2), 0)]})
    assert dota_map(truth, twice, "area")[1] == pytest.approx((1 + 2 / 3) / 2)


def test_scores_of_a_case_hold_both_sides():
    data, found = scene(3, crowd=0)
    worse = {image: replace(one, scores=one.scores[::-1].copy()) for image, one in found.items()}
    scores = dota_scores(data, worse, found)
    assert (scores.ap, scores.ap50) == dota_map(data, worse)
    assert scores.area_ap50 == dota_map(data, worse, "area")[1]
    assert scores.reference_ap50 == dota_map(data, found)[1] != scores.ap50
