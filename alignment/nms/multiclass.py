"""mmyolo's post-processing in NumPy: from decoded boxes and scores of one image to its detections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignment.data.preprocess import Transform
from alignment.nms.rotated import rotated_nms_by_class
from alignment.variant import Nms

# Boxes settled at a time: their pairs with up to 300 kept ones stay in the CPU's cache.
_BLOCK = 128


@dataclass(frozen=True)
class Detections:
    """Detections of one image, by falling score.

    Attributes:
        boxes: ``[n, 4] float32``, x1, y1, x2, y2 in pixels of the original image; rotated ones ``[n, 5]``: cx, cy, w, h
            and the angle in radians.
        scores: ``[n] float32``.
        labels: ``[n] int32`` class indices.
        rows: ``[n] int32``, which of the N priors each comes from.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


def candidates(scores: np.ndarray, settings: Nms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The (row, class) pairs whose score exceeds the threshold, the best `nms_pre` of them.

    As mmdet's ``filter_scores_and_topk``: a score must exceed the threshold.  Ties go to the lower row, then class.

    Args:
        scores: ``[N, C]``.

    Returns:
        rows, labels (int32) and scores, by falling score.
    """
    if settings.multi_label:
        # flatnonzero over the flat array is several times faster than nonzero over two axes
        flat = np.flatnonzero(scores.ravel() > settings.score_threshold)
        rows, labels = np.divmod(flat, scores.shape[1])
        values = scores.ravel()[flat]
    else:
        rows, labels = np.arange(len(scores)), scores.argmax(1)
        values = scores[rows, labels]
        over = values > settings.score_threshold
        rows, labels, values = rows[over], labels[over], values[over]
    order = np.argsort(-values, kind="stable")[: settings.nms_pre]
    return rows[order].astype(np.int32), labels[order].astype(np.int32), values[order]


def postprocess(boxes: np.ndarray, scores: np.ndarray, transform: Transform, settings: Nms) -> Detections:
    """Threshold, TopK, back to the original image, NMS by class, cap, clip: in mmyolo's order.

    Args:
        boxes: ``[N, 4]``, rotated ones ``[N, 5]``, in pixels of the network input.
        scores: ``[N, C]``.
    """
    rows, labels, values = candidates(scores, settings)
    placed = transform.to_original(boxes[rows].astype(np.float32))
    nms = rotated_nms_by_class if placed.shape[1] == 5 else nms_by_class
    kept = nms(placed, labels, settings.iou_threshold, settings.max_per_image)
    return Detections(
        transform.clip(placed[kept]), values[kept].astype(np.float32, copy=False), labels[kept], rows[kept]
    )


def nms_by_class(boxes: np.ndarray, labels: np.ndarray, iou_threshold: float, limit: int) -> np.ndarray:
    """Greedy NMS within each class; a box goes when its IoU with a kept one exceeds the threshold.

    Args:
        boxes: ``[n, 4]``, by falling score.
        labels: ``[n]``.
        limit: stop after so many kept boxes.

    Returns:
        Indices of the kept boxes, rising.
    """
    corners = np.ascontiguousarray(boxes.T)
    kept = np.empty(0, np.int64)
    for start in range(0, len(boxes), _BLOCK):
        if len(kept) >= limit:
            break
        # What earlier boxes leave of a block is settled within it.
        block = np.arange(start, min(start + _BLOCK, len(boxes)))
        gone = _overlap(corners[:, kept], corners[:, block], iou_threshold) & (labels[kept, None] == labels[block])
        block = block[~gone.any(0)]
        rivals = _overlap(corners[:, block], corners[:, block], iou_threshold) & (labels[block, None] == labels[block])
        rivals = np.triu(rivals, 1)
        alive = np.ones(len(block), bool)
        for index in np.flatnonzero(rivals.any(1)):
            if alive[index]:
                alive &= ~rivals[index]
        kept = np.concatenate([kept, block[alive]])
    return kept[:limit]


def _overlap(a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the IoU of each box of `a` ``[4, n]`` with each of `b` ``[4, m]`` exceeds the threshold: ``[n, m]``."""
    ax1, ay1, ax2, ay2 = a[:, :, None]
    bx1, by1, bx2, by2 = b
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 of two empty boxes compares as no overlap
        width, height = np.minimum(ax2, bx2) - np.maximum(ax1, bx1), np.minimum(ay2, by2) - np.maximum(ay1, by1)
        common = np.maximum(width, 0) * np.maximum(height, 0)
        return common / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - common) > threshold


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every box of `a` ``[n, 4]`` with every box of `b` ``[m, 4]``: ``[n, m]``."""
    overlap = _intersection(a[:, None], b[None])
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.prod(np.maximum(size, 0), axis=-1)
