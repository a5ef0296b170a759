"""How far two sets of detections agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignment.nms.multiclass import Detections, overlaps
from alignment.nms.rotated import corners

SCORE = 0.25
IOU = 0.9
SCORE_DIFFERENCE = 0.05


@dataclass(frozen=True)
class Agreement:
    """Result of `agree` for one image.

    Attributes:
        reference: ``[n] bool``: which of the reference's detections of score ≥ `SCORE` the subject has too.
        subject: the same the other way round.
        box_difference: largest coordinate difference of matched pairs, pixels of the original image; see
            `corner_difference`.
        score_difference: largest score difference of matched pairs.
    """

    reference: np.ndarray
    subject: np.ndarray
    box_difference: float
    score_difference: float

    @property
    def matched(self) -> int:
        """Detections with a counterpart, both sides counted."""
        return int(self.reference.sum() + self.subject.sum())

    @property
    def total(self) -> int:
        """Detections of score ≥ `SCORE`, both sides counted."""
        return len(self.reference) + len(self.subject)

    @property
    def rate(self) -> float:
        """matched / total, 1 where neither side found anything."""
        return self.matched / self.total if self.total else 1.0


def agree(reference: Detections, subject: Detections) -> Agreement:
    """Matches the detections of two sides on one image.

    A detection of score ≥ 0.25 has a counterpart when the other side has one, of any score, with the same label, IoU
    ≥ 0.9 and a score at most 0.05 away; one to one, best IoU first, then nearest score.  Counterparts below 0.25
    count so that a score that crosses 0.25 by rounding is no loss.  Rotated boxes are matched by their rotated IoU.
    """
    forward, box_a, score_a = _match(reference, subject)
    backward, box_b, score_b = _match(subject, reference)
    return Agreement(forward, backward, max(box_a, box_b), max(score_a, score_b))


def corner_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest coordinate difference of two boxes ``[4]``, of two rotated boxes ``[5]`` that of their corners.

    The corners are taken in that of the four orders, a quarter turn apart, in which they are nearest: one rectangle
    can be written as four boxes.
    """
    if len(a) == 4:
        return float(np.abs(a - b).max())
    one, other = corners(a.astype(np.float64)), corners(b.astype(np.float64))
    return min(float(np.abs(np.roll(one, turn, 0) - other).max()) for turn in range(4))


def _match(one: Detections, other: Detections) -> tuple[np.ndarray, float, float]:
    strong = np.flatnonzero(one.scores >= SCORE)
    found = np.zeros(len(strong), bool)
    if not len(strong) or not len(other):
        return found, 0.0, 0.0
    iou = overlaps(one.boxes[strong], other.boxes)
    with np.errstate(invalid="ignore"):  # of infinite scores, which match nothing
        gap = np.abs(one.scores[strong, None] - other.scores[None])
    fits = (one.labels[strong, None] == other.labels[None]) & (iou >= IOU) & (gap <= SCORE_DIFFERENCE)
    free = np.ones(len(other), bool)
    box = score = 0.0
    rows, columns = np.nonzero(fits)
    for index in np.lexsort((gap[rows, columns], -iou[rows, columns])):
        row, column = rows[index], columns[index]
        if not found[row] and free[column]:
            found[row], free[column] = True, False
            box = max(box, corner_difference(one.boxes[strong[row]], other.boxes[column]))
            score = max(score, float(gap[row, column]))
    return found, box, score
