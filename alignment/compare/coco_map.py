"""COCO AP of detections, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping

import numpy as np

from alignment.data.coco import CocoDataset
from alignment.nms.multiclass import Detections


def coco_ap(dataset: CocoDataset, detections: Mapping[int, Detections]) -> tuple[float, float]:
    """AP over IoU 0.50:0.95 and AP at 0.50, on the images that `detections` names.

    Args:
        dataset: truth; class index k is its k-th category.
        detections: image id → detections in pixels of the original image; an image without any belongs in it too.

    Returns:
        (AP, AP50), 0..1; 0 where nothing was detected, −1 where there is no truth.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows = [_rows(image, found, dataset.category_ids) for image, found in detections.items() if len(found)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **dataset.truth}
        truth.createIndex()
        if not rows:
            known = any(a["image_id"] in detections for a in dataset.truth["annotations"])
            return (0.0, 0.0) if known else (-1.0, -1.0)
        evaluation = COCOeval(truth, truth.loadRes(np.concatenate(rows)), "bbox")
        settings = evaluation.params
        settings.imgIds = sorted(detections)
        # Of summarize()'s twelve numbers two are needed: leaving out the other area ranges, and the categories without
        # truth (which no mean counts), costs a quarter of the time and changes neither.
        settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
        settings.maxDets = [100]
        settings.catIds = sorted({a["category_id"] for a in truth.loadAnns(truth.getAnnIds(imgIds=settings.imgIds))})
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 0]
    return _mean(precision), _mean(precision[0])


def _mean(precision: np.ndarray) -> float:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else -1.0


def _rows(image: int, found: Detections, category_ids: list[int]) -> np.ndarray:
    """``[n, 7]``: image, x, y, w, h, score, category; the array form that pycocotools reads."""
    boxes = found.boxes.astype(np.float64)
    categories = np.array(category_ids)[found.labels]
    size = boxes[:, 2:] - boxes[:, :2]
    columns = [np.full((len(found), 1), image), boxes[:, :2], size, found.scores[:, None], categories[:, None]]
    return np.concatenate(columns, axis=1)
