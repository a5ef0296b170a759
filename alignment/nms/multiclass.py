"""mmyolo's post-processing in NumPy: from decoded boxes and scores of one image to its detections."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from alignment.data.preprocess import Transform
from alignment.nms.implementations import mmyolo
from alignment.nms.rotated import rotated_iou_matrix
from alignment.nms.semantics import Semantics, run
from alignment.variant import Nms


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


def postprocess(boxes: np.ndarray, scores: np.ndarray, transform: Transform, settings: Nms) -> Detections:
    """Threshold, TopK, back to the original image, NMS by class, cap, clip: in mmyolo's order.

    Args:
        boxes: ``[N, 4]``, rotated ones ``[N, 5]``, in pixels of the network input.
        scores: ``[N, C]``.
    """
    boxes = boxes.astype(np.float32, copy=False)
    fates = run(by_class(settings, boxes.shape[1] == 5), boxes, scores, transform)
    kept = fates.kept
    rows = fates.rows[kept]
    return Detections(
        transform.clip(transform.to_original(boxes[rows])),
        fates.scores[kept].astype(np.float32, copy=False),
        fates.labels[kept].astype(np.int32),
        rows.astype(np.int32),
    )


def by_class(settings: Nms, rotated: bool) -> Semantics:
    """mmyolo's, but boxes of other classes are left alone: mmcv moves them apart, which rounds them (see
    `with_class_offsets`)."""
    return replace(mmyolo(settings, rotated), classes="apart", split=None)


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every box of `a` ``[n, 4]`` with every box of `b` ``[m, 4]``, or of rotated ``[., 5]``: ``[n, m]``."""
    return rotated_iou_matrix(a, b) if a.shape[1] == 5 else iou_matrix(a, b)


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every box of `a` ``[n, 4]`` with every box of `b` ``[m, 4]``: ``[n, m]``."""
    overlap = _intersection(a[:, None], b[None])
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.prod(np.maximum(size, 0), axis=-1)
