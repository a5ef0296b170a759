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
            return (0.0, 0.0) if dataset.truth["annotations"] else (-1.0, -1.0)
        evaluation = COCOeval(truth, truth.loadRes(np.concatenate(rows)), "bbox")
        evaluation.params.imgIds = sorted(detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def _rows(image: int, found: Detections, category_ids: list[int]) -> np.ndarray:
    """``[n, 7]``: image, x, y, w, h, score, category; the array form that pycocotools reads."""
    boxes = found.boxes.astype(np.float64)
    categories = np.array(category_ids)[found.labels]
    size = boxes[:, 2:] - boxes[:, :2]
    columns = [np.full((len(found), 1), image), boxes[:, :2], size, found.scores[:, None], categories[:, None]]
    return np.concatenate(columns, axis=1)
