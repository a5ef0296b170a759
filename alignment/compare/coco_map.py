"""COCO AP of detections, by pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from alignment.data.coco import CocoDataset
from alignment.nms.multiclass import Detections
from alignment.nms.rotated import rotated_iou_matrix

_NONE = np.empty((0, 4)), np.empty(0)


def coco_ap(dataset: CocoDataset, detections: Mapping[int, Detections]) -> tuple[float, float]:
    """AP over IoU 0.50:0.95 and AP at 0.50, on the images that `detections` names.

    For rotated detections IoU is that of the rotated boxes, of the truth's ``rbox``.  All else is COCO's protocol: 101
    recall points, at most 100 detections an image and class.  DOTA's own mAP is another, at IoU 0.5 alone.

    Args:
        dataset: truth; class index k is its k-th category.
        detections: image id → detections in pixels of the original image; an image without any belongs in it too.

    Returns:
        (AP, AP50), 0..1; 0 where nothing was detected, −1 where there is no truth.
    """
    evaluation = _Evaluation(dataset, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 0]
    return _mean(precision), _mean(precision[0])


def agreement_ap(
    dataset: CocoDataset, reference: Mapping[int, Detections], subject: Mapping[int, Detections], score: float = 0.3
) -> float:
    """AP of the subject's detections with the reference's of at least `score` as truth: 1 where both find the same.

    It needs no labels, and resolves finer than AP against a few hundred of them.

    Args:
        dataset: on whose images both ran.
        reference: image id → detections in pixels of the original image.
        subject: the same of the other side; images that `reference` lacks are left out.
        score: the least that makes one of the reference's detections truth.

    Returns:
        0..1; 1 where neither has a detection of that score, 0 where only the subject has.
    """
    truth: list[dict[str, Any]] = []
    for image, found in reference.items():
        for row in np.flatnonzero(found.scores >= score):
            box = found.boxes[row].astype(float)
            entry: dict[str, Any] = {"image_id": image, "iscrowd": 0, "id": len(truth) + 1}
            entry["category_id"] = dataset.category_ids[int(found.labels[row])]
            if len(box) == 5:
                shape = {"rbox": box.tolist(), "area": float(box[2] * box[3])}
            else:
                wide, high = box[2:] - box[:2]
                shape = {"bbox": [*box[:2].tolist(), float(wide), float(high)], "area": float(wide * high)}
            truth.append(entry | shape)
    if not truth:
        return 0.0 if any((found.scores >= score).any() for found in subject.values()) else 1.0
    judged = dataclasses.replace(dataset, truth={**dataset.truth, "annotations": truth})
    return coco_ap(judged, {image: subject[image] for image in reference})[0]


def _mean(precision: np.ndarray) -> float:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else -1.0


class _Evaluation(COCOeval):
    """COCOeval without what `coco_ap` does not need, which is most of its time.

    Of summarize()'s twelve numbers two are needed: one area range is left, and the categories that have truth; no mean
    counts the others.  Detections stay arrays; only those that some truth is near to are matched, which COCOeval does
    in Python loops over a dict each.  The others are false positives at every threshold.
    """

    def __init__(self, dataset: CocoDataset, detections: Mapping[int, Detections]) -> None:
        super().__init__(iouType="bbox")
        truth = [a for a in dataset.truth["annotations"] if a["image_id"] in detections]
        settings = self.params
        settings.imgIds = sorted(detections)
        settings.catIds = sorted({a["category_id"] for a in truth})
        settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
        settings.maxDets = [100]
        # Numbered anew: COCOeval takes a match with the annotation of id 0 for none.
        for number, annotation in enumerate(truth, 1):
            entry = {**annotation, "id": number, "ignore": annotation["iscrowd"]}
            self._gts[entry["image_id"], entry["category_id"]].append(entry)
        self._found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        for image, found in detections.items():
            order = np.argsort(-found.scores, kind="stable")
            labels = found.labels[order]
            for label in np.unique(labels).tolist():
                best = order[labels == label][: settings.maxDets[-1]]
                self._found[image, dataset.category_ids[label]] = found.boxes[best].astype(float), found.scores[best]

    def _prepare(self) -> None:
        """Nothing: truth and detections are in place."""

    def computeIoU(self, imgId: int, catId: int) -> np.ndarray:
        """``[detections, truth]``, detections by falling score."""
        truth, (boxes, _) = self._gts[imgId, catId], self._found.get((imgId, catId), _NONE)
        if not truth or not len(boxes):
            return np.empty((len(boxes), len(truth)))
        if boxes.shape[1] == 5:
            return rotated_iou_matrix(boxes, np.array([t["rbox"] for t in truth], float))
        placed = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        return mask.iou(placed, [t["bbox"] for t in truth], [t["iscrowd"] for t in truth])

    def evaluateImg(self, imgId: int, catId: int, aRng: list, maxDet: int) -> dict[str, Any] | None:
        """Which detections match at which threshold: of those near some truth as COCOeval says, of the others none."""
        key, thresholds = (imgId, catId), self.params.iouThrs
        truth, (_, scores) = self._gts[key], self._found.get(key, _NONE)
        if not truth and not len(scores):
            return None
        matches, ignored = np.zeros((2, len(thresholds), len(scores)), bool)
        if truth:
            near = ~(self.ious[key] < thresholds[0]).all(1)
            self.ious[key] = self.ious[key][near]
            self._dts[key] = [{"id": i, "score": s, "area": 0} for i, s in enumerate(scores[near].tolist(), 1)]
            result = super().evaluateImg(imgId, catId, aRng, maxDet)
            matches[:, near], ignored[:, near] = result["dtMatches"] > 0, result["dtIgnore"]
        truth_ignored = np.array([t["ignore"] for t in truth])
        return {"dtScores": scores, "dtMatches": matches, "dtIgnore": ignored, "gtIgnore": truth_ignored}
