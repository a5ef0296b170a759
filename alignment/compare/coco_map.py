"""COCO AP of detections, by pycocotools."""

from __future__ import annotations

import contextlib
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
