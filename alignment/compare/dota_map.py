"""DOTA's mAP of rotated detections: Pascal VOC's protocol, with the IoU of rotated boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from alignment.data.coco import CocoDataset
from alignment.nms.multiclass import Detections
from alignment.nms.rotated import rotated_iou_matrix
from alignment.results import DotaScores

#: ``voc07``: the mean of the best precision from each of 11 recalls on, as DOTA's devkit has it; ``area``: the area
#: under the curve, as VOC 2012.
Metric = Literal["voc07", "area"]
#: As DOTA's devkit and mmdet have them: 0.3, 0.6 and 0.7 are one rounding above the number.
RECALLS = np.arange(0, 1.1, 0.1)
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def dota_map(
    dataset: CocoDataset, detections: Mapping[int, Detections], metric: Metric = "voc07"
) -> tuple[float, float]:
    """AP over IoU 0.50:0.95 and AP at 0.50, means over the classes that have truth, on the images of `detections`.

    It is mmrotate's ``eval_rbbox_map``: all detections count; each, by falling score, is right where the truth that it
    overlaps most, at an IoU that reaches the threshold, is not found yet.  (DOTA's own devkit asks for an IoU above
    it.)  Truth that is marked as crowd is neither to be found nor wrong to find.

    Args:
        dataset: truth with ``rbox``; class index k is its k-th category.
        detections: image id → rotated detections in pixels of the original image; an image without any belongs in it.
        metric: how a curve becomes a number.

    Returns:
        (AP, AP50), 0..1; −1 where there is no truth.
    """
    truth = [entry for entry in dataset.truth["annotations"] if entry["image_id"] in detections]
    found = []
    for label, category in enumerate(dataset.category_ids):
        of_class = [entry for entry in truth if entry["category_id"] == category]
        if any(not entry["iscrowd"] for entry in of_class):
            found.append([_average(curve, metric) for curve in _curves(of_class, detections, label)])
    if not found:
        return -1.0, -1.0
    by_threshold = np.mean(found, 0)
    return float(by_threshold.mean()), float(by_threshold[0])


def dota_scores(
    dataset: CocoDataset, subject: Mapping[int, Detections], reference: Mapping[int, Detections] | None
) -> DotaScores | None:
    """Of both sides of a case; None where there is no truth."""
    ap, ap50 = dota_map(dataset, subject)
    if ap < 0:
        return None
    other = None if reference is None else dota_map(dataset, reference)[1]
    return DotaScores(ap=ap, ap50=ap50, area_ap50=dota_map(dataset, subject, "area")[1], reference_ap50=other)


def _curves(truth: list[dict], detections: Mapping[int, Detections], label: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Recall and precision after each detection of one class, for each of `THRESHOLDS`."""
    scores, right, wrong = [], [], []
    for image, one in detections.items():
        chosen = np.flatnonzero(one.labels == label)
        chosen = chosen[np.argsort(-one.scores[chosen], kind="stable")]
        present = [entry for entry in truth if entry["image_id"] == image]
        hits, misses = _judged(one.boxes[chosen], present)
        scores.append(one.scores[chosen])
        right.append(hits)
        wrong.append(misses)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits, misses = (np.concatenate(parts, 1)[:, order].cumsum(1) for parts in (right, wrong))
    total = sum(not entry["iscrowd"] for entry in truth)
    return [(hit / total, hit / np.maximum(hit + miss, 1)) for hit, miss in zip(hits, misses, strict=True)]


def _judged(boxes: np.ndarray, truth: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Which of the detections of an image, by falling score, are right and which wrong: ``[thresholds, n] bool``."""
    right = np.zeros((len(THRESHOLDS), len(boxes)), bool)
    if not truth or not len(boxes):
        return right, ~right
    iou = rotated_iou_matrix(boxes, np.array([entry["rbox"] for entry in truth], float))
    nearest, crowd = iou.argmax(1), np.array([bool(entry["iscrowd"]) for entry in truth])
    # Box IoU is compared as float32, as mmcv has it.
    reached = iou.max(1).astype(np.float32) >= THRESHOLDS.astype(np.float32)[:, None]
    for hits, enough in zip(right, reached, strict=True):
        candidates = np.flatnonzero(enough & ~crowd[nearest])
        hits[candidates[np.unique(nearest[candidates], return_index=True)[1]]] = True
    return right, ~right & ~(reached & crowd[nearest])


def _average(curve: tuple[np.ndarray, np.ndarray], metric: Metric) -> float:
    recall, precision = curve
    # The best precision from each recall on, and 0 beyond the last.
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if metric == "voc07":
        return float(best[np.searchsorted(recall, RECALLS)].mean())
    return float((np.diff(recall, prepend=0.0) * best[:-1]).sum())
