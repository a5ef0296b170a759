"""What a post-processing makes of boxes and scores: which candidates it keeps, and what became of every other one.

A `Semantics` says what one implementation does (those that deployments meet are in `implementations`), `run` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from alignment.data.preprocess import Transform
from alignment.nms.rotated import rotated_iou_matrix

# Boxes settled at a time: intermediate arrays stay in the CPU's cache.
_BLOCK = 128

Unit = Literal["pairs", "anchors"]
Classes = Literal["apart", "offset", "offset_or_apart", "together"]
Frame = Literal["original", "input"]


class Fate(IntEnum):
    """What became of a (row, class) pair."""

    KEPT = 0
    BELOW_THRESHOLD = 1
    BACKGROUND = 2
    NOT_BEST_CLASS = 3
    CUT_BY_TOPK = 4
    CUT_BY_CAP = 5
    SUPPRESSED = 6
    CUT_BY_MAX_OUTPUT = 7


@dataclass(frozen=True)
class Semantics:
    """What a post-processing does, one field a choice.

    Attributes:
        score_threshold: compared in the scores' own type, or in float32 where `threshold_float32`.
        score_inclusive: whether a score at the threshold passes.
        nan_passes: whether a score that is no number does.
        multi_label: whether a row may pass with several classes, or only with its best.
        background: a class that is no detection.
        floor: the score of what does not pass, where that stays a candidate; None where it is dropped.
        topk: how many candidates of highest score go on.
        topk_unit: ``pairs``: of the (row, class) pairs that passed; ``anchors``: of the rows, by their best score,
            before any threshold; what follows takes rows by that score, no longer by index.
        candidate_cap: how many pairs NMS takes.
        ties: equal scores go by row and class, ``rising`` or ``falling``.
        frame: whose pixels the IoU is taken in: of the network's ``input``, or of the ``original`` image.
        classes: ``apart``: other classes never suppress; ``offset``: the same by adding class × (largest coordinate
            + 1) to the boxes in their own type; ``together``: they do suppress.
        split: with ``offset``, from how many boxes on classes are taken one by one all the same; ``offset_or_apart``
            also leaves the boxes where they are then.
        iou_threshold: compared in float32.
        iou_inclusive: whether a box goes whose IoU with a kept one is the threshold.
        iou_rounding: how far its IoU may be from the true one: boxes whose IoU is that near to the threshold may go
            either way, and go as they were seen to.
        reorder: whether x1 > x2 or y1 > y2 is mended before the IoU, and boxes without area overlap nothing.
        max_per_class: how many detections of a class.
        max_output: how many detections.
    """

    score_threshold: float
    iou_threshold: float
    threshold_float32: bool = False
    score_inclusive: bool = False
    nan_passes: bool = False
    multi_label: bool = True
    background: int | None = None
    floor: float | None = None
    topk: int | None = None
    topk_unit: Unit = "pairs"
    candidate_cap: int | None = None
    ties: Literal["rising", "falling"] = "rising"
    frame: Frame = "input"
    classes: Classes = "apart"
    split: int | None = None
    iou_inclusive: bool = False
    iou_rounding: float = 0.0
    reorder: bool = False
    max_per_class: int | None = None
    max_output: int | None = None


@dataclass(frozen=True)
class Fates:
    """What became of the pairs of one image: of those that passed the score threshold, by falling score.

    Attributes:
        rows, labels: ``[n] int64``.
        scores: ``[n]``.
        fates: ``[n] int8``, `Fate`.
        by: ``[n] int64``: position here of the kept box that suppressed it, -1 where none did.
        iou: ``[n] float32`` with that box.
    """

    rows: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    fates: np.ndarray
    by: np.ndarray
    iou: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Positions of the detections, by falling score."""
        return np.flatnonzero(self.fates == Fate.KEPT)


def run(
    semantics: Semantics,
    boxes: np.ndarray,
    scores: np.ndarray,
    transform: Transform | None = None,
    first: np.ndarray | None = None,
    first_rows: np.ndarray | None = None,
    seen: np.ndarray | None = None,
) -> Fates:
    """Post-processes one image.

    Args:
        semantics: how.
        boxes: ``[N, 4]``, x1, y1, x2, y2 in pixels of the network's input, or rotated ``[N, 5]``.
        scores: ``[N, C]``.
        transform: to the original image; needed where the IoU is taken there.
        first: pairs, as row × C + class, that go first among equal scores, in this order: what an implementation that
            sorts ties in no order was seen to keep.
        first_rows: the same of rows, for a TopK over anchors; default: the rows of `first`.
        seen: pairs, as row × C + class, that the implementation was seen to keep; see `Semantics.iou_rounding`.
    """
    classes = scores.shape[1]
    ranked, most_rows = None, semantics.topk if semantics.topk_unit == "anchors" else None
    if most_rows is not None:
        # What follows sees the rows in the order in which TopK gives them.
        if first_rows is None and first is not None:
            first_rows = np.array(list(dict.fromkeys((first // classes).tolist())), np.int64)
        ranked = _falling(scores.max(1), np.arange(len(scores)), semantics.ties, first_rows)
        boxes, scores = boxes[ranked], scores[ranked]
        first = None if first is None else np.argsort(ranked)[first // classes] * classes + first % classes
    flat, values, fates = _passing(semantics, scores)
    order = _falling(values, flat, semantics.ties, first)
    flat, values, fates = flat[order], values[order], fates[order]
    rows, labels = np.divmod(flat, classes)
    if most_rows is not None:
        fates[(fates == Fate.KEPT) & (rows >= most_rows)] = Fate.CUT_BY_TOPK
    alive = np.flatnonzero(fates == Fate.KEPT)
    if semantics.topk is not None and semantics.topk_unit == "pairs":
        fates[alive[semantics.topk :]] = Fate.CUT_BY_TOPK
        alive = alive[: semantics.topk]
    if semantics.candidate_cap is not None:
        fates[alive[semantics.candidate_cap :]] = Fate.CUT_BY_CAP
        alive = alive[: semantics.candidate_cap]
    placed, groups = _for_nms(semantics, boxes[rows[alive]], labels[alive], transform)
    by, iou = np.full(len(flat), -1, np.int64), np.zeros(len(flat), np.float32)
    found = _Greedy(semantics, placed, groups, values[alive])
    if seen is not None and semantics.iou_rounding:
        original = rows[alive] if ranked is None else ranked[rows[alive]]
        found.seen = np.isin(original * classes + labels[alive], seen)
    found.settle(labels[alive])
    hit = found.by >= 0
    by[alive[hit]], iou[alive[hit]] = alive[found.by[hit]], found.iou[hit]
    fates[alive] = found.fates
    return Fates(rows if ranked is None else ranked[rows], labels, values, fates, by, iou)


def _passing(semantics: Semantics, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that passed the threshold, and those that stay though they did not: flat index, score, fate so far."""
    classes, values = scores.shape[1], scores.ravel()
    compared = _float32(values) if semantics.threshold_float32 else values
    threshold = compared.dtype.type(semantics.score_threshold)
    with np.errstate(invalid="ignore"):
        if semantics.nan_passes:
            over = ~(compared < threshold if semantics.score_inclusive else compared <= threshold)
        else:
            over = compared >= threshold if semantics.score_inclusive else compared > threshold
    flat = np.flatnonzero(over)
    fates = np.full(len(flat), Fate.KEPT, np.int8)
    if semantics.background is not None:
        fates[flat % classes == semantics.background] = Fate.BACKGROUND
    if not semantics.multi_label:
        fates[scores.argmax(1)[flat // classes] != flat % classes] = Fate.NOT_BEST_CLASS
    if semantics.floor is None:
        return flat, values[flat], fates
    # They go by their index, behind the others: no more than the cap lets through can matter.
    room = len(values) if semantics.candidate_cap is None else semantics.candidate_cap
    seen = len(values) if semantics.topk is None or semantics.topk_unit == "pairs" else semantics.topk * classes
    over[flat[fates == Fate.BACKGROUND]] = False
    lower = np.flatnonzero(~over[:seen])[:room]
    flat = np.sort(np.concatenate([flat[fates == Fate.KEPT], lower]))
    floored = np.where(over[flat], values[flat], scores.dtype.type(semantics.floor))
    return flat, floored, np.full(len(flat), Fate.KEPT, np.int8)


def _falling(values: np.ndarray, flat: np.ndarray, ties: str, first: np.ndarray | None = None) -> np.ndarray:
    """The order by falling score; what is not a number comes first, as in a sort by bits.  `flat` rises."""
    order = np.arange(len(flat)) if ties == "rising" else np.arange(len(flat))[::-1]
    if first is not None and len(first):
        by_pair = np.argsort(first)
        place = by_pair[np.searchsorted(first, flat, sorter=by_pair).clip(max=len(first) - 1)]
        place = np.where(first[place] == flat, place, len(first))
        order = order[np.argsort(place[order], kind="stable")]
    elif ties == "rising":
        return _by_falling(values)
    return order[_by_falling(values[order])]


def _by_falling(values: np.ndarray) -> np.ndarray:
    """Positions ``[n]`` by falling value ``[n]``, equal ones as they stand, those that are no number first."""
    if values.dtype != np.float32:
        order = np.argsort(-values, kind="stable")
        return np.roll(order, np.count_nonzero(np.isnan(values)))
    # Value and position as one integer: twice as fast as a stable argsort, and a low threshold passes millions.
    bits = (values + np.float32(0)).view(np.int32)  # -0 becomes 0
    keys = np.where(bits < 0, bits & 0x7FFFFFFF, ~bits)
    keys[np.isnan(values)] = -(2**31)
    placed = keys.astype(np.int64) << 32 | np.arange(len(values))
    placed.sort()
    return placed & 0xFFFFFFFF


def _for_nms(
    semantics: Semantics, boxes: np.ndarray, labels: np.ndarray, transform: Transform | None
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as NMS sees them, and which of them may suppress each other: those of one group."""
    if semantics.frame == "original":
        assert transform is not None
        boxes = transform.to_original(boxes)
    together = np.zeros(len(labels), np.int64)
    if semantics.classes == "together":
        return boxes, together
    if semantics.classes == "apart" or not len(boxes):
        return boxes, labels
    whole = semantics.split is not None and len(boxes) >= semantics.split
    if whole and semantics.classes == "offset_or_apart":
        return boxes, labels
    return with_class_offsets(boxes, labels), labels if whole else together


def with_class_offsets(boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Boxes moved apart by class, as mmcv's ``batched_nms`` does: in the boxes' own type, so that a large offset rounds
    them, and by one more than the largest coordinate, so that negative ones can still meet."""
    moved = boxes.copy()
    if boxes.shape[1] == 5:
        largest = boxes[:, :2].max() + boxes[:, 2:4].max()
        moved[:, :2] += labels.astype(boxes.dtype)[:, None] * (largest + boxes.dtype.type(1))
    else:
        moved += labels.astype(boxes.dtype)[:, None] * (boxes.max() + boxes.dtype.type(1))
    return moved


class _Greedy:
    """Greedy NMS of `boxes` by falling score; `fates`, `by` and `iou` say what becomes of each.

    `seen` says of each whether it was seen to be kept, where that is known.
    """

    seen: np.ndarray | None = None

    def __init__(self, semantics: Semantics, boxes: np.ndarray, groups: np.ndarray, scores: np.ndarray) -> None:
        self.semantics, self.boxes, self.groups, self.scores = semantics, boxes, groups, scores
        self.rotated, count = boxes.shape[1] == 5, len(boxes)
        self.fates = np.full(count, Fate.KEPT, np.int8)
        self.by, self.iou = np.full(count, -1, np.int64), np.zeros(count, np.float32)

    def settle(self, labels: np.ndarray) -> None:
        """All boxes, of which `labels` are the classes."""
        limit = self.semantics.max_output
        if self.semantics.max_per_class is not None:
            self._settle_each(labels, self.semantics.max_per_class)
        elif self.rotated:
            # One group at a time: even to find out which rotated boxes are near is dear.
            self._settle_each(self.groups, limit)
        else:
            self._settle_members(np.arange(len(labels)), limit)
        if limit is not None:
            self.fates[np.flatnonzero(self.fates == Fate.KEPT)[limit:]] = Fate.CUT_BY_MAX_OUTPUT

    def _settle_each(self, parts: np.ndarray, limit: int | None) -> None:
        for part in np.unique(parts):
            self._settle_members(np.flatnonzero(parts == part), limit)

    def _settle_members(self, members: np.ndarray, limit: int | None) -> None:
        """A block at a time: kept boxes clear what follows of those they suppress, the rest settles among itself."""
        limit = len(members) if limit is None else limit
        # Rotated boxes clear all that follows, so that what is gone costs no more IoUs.  Others clear only as far as
        # the limit lets one look.
        reach = max(len(members), 1) if self.rotated else _BLOCK
        kept = np.empty(0, np.int64)
        for start in range(0, len(members), reach):
            if len(kept) >= limit:
                self.fates[members[start:]] = Fate.CUT_BY_MAX_OUTPUT
                break
            rest = self._cleared(kept, members[start : start + reach])
            while len(rest):
                block, rest = self._settled(rest[:_BLOCK]), rest[_BLOCK:]
                kept = np.concatenate([kept, block])
                if len(kept) >= limit:
                    self.fates[rest] = Fate.CUT_BY_MAX_OUTPUT
                    break
                rest = self._cleared(block, rest)
        self.fates[kept[limit:]] = Fate.CUT_BY_MAX_OUTPUT

    def _cleared(self, kept: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """What `kept` leaves of `rest`."""
        if not len(kept) or not len(rest):
            return rest
        iou, meets = self._meets(kept, rest, self._rivals(kept, rest))
        gone = np.flatnonzero(meets.any(0))
        by = meets[:, gone].argmax(0)
        self._suppress(rest[gone], kept[by], iou[by, gone])
        return np.delete(rest, gone)

    def _settled(self, block: np.ndarray) -> np.ndarray:
        """What is left of `block` when its boxes have suppressed each other."""
        iou, meets = self._meets(block, block, np.triu(self._rivals(block, block), 1))
        alive = np.ones(len(block), bool)
        for index in np.flatnonzero(meets.any(1)):
            if alive[index]:
                gone = meets[index] & alive
                self._suppress(block[gone], block[index], iou[index, gone])
                alive &= ~gone
        return block[alive]

    def _suppress(self, gone: np.ndarray, by: np.ndarray, iou: np.ndarray) -> None:
        self.fates[gone], self.by[gone], self.iou[gone] = Fate.SUPPRESSED, by, iou

    def _rivals(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether one of `a` suppresses one of `b` where they overlap enough: ``[n, m] bool``."""
        rivals = self.groups[a][:, None] == self.groups[b]
        if self.semantics.nan_passes:
            with np.errstate(invalid="ignore"):
                rivals &= self.scores[b] <= self.scores[a][:, None]
        return rivals

    def _meets(self, a: np.ndarray, b: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """IoU ``[n, m] float32`` of boxes `a` with boxes `b`; and of pairs `where`, whether it is enough."""
        if self.rotated:
            iou = rotated_iou_matrix(self.boxes[a], self.boxes[b], where).astype(np.float32)
        else:
            iou = iou_float32(self.boxes[a], self.boxes[b], self.semantics.reorder)
        threshold = np.float32(self.semantics.iou_threshold)
        with np.errstate(invalid="ignore"):
            meets = iou >= threshold if self.semantics.iou_inclusive else iou > threshold
            if self.seen is not None:
                meets = np.where(np.abs(iou - threshold) <= self.semantics.iou_rounding, ~self.seen[b], meets)
        return iou, meets & where


def iou_float32(a: np.ndarray, b: np.ndarray, reorder: bool) -> np.ndarray:
    """IoU of every box of `a` ``[n, 4]`` with every one of `b` ``[m, 4]``, rounded as deployed code does.

    Sides are rounded to the boxes' own type, areas are float32.  0 / 0 of two boxes without area is no number,
    which reaches no threshold.
    """
    if reorder:
        a, b = (np.concatenate([np.minimum(x[:, :2], x[:, 2:]), np.maximum(x[:, :2], x[:, 2:])], 1) for x in (a, b))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ax1, ay1, ax2, ay2 = a.T[:, :, None]
        bx1, by1, bx2, by2 = np.ascontiguousarray(b.T)
        width = _float32(np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1), 0))
        height = _float32(np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1), 0))
        common = width * height
        area_a = _float32(ax2 - ax1) * _float32(ay2 - ay1)
        area_b = _float32(bx2 - bx1) * _float32(by2 - by1)
        iou = common / (area_a + area_b - common)
    return np.where(common <= 0, np.float32(0), iou) if reorder else iou


def _float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32, copy=False)
