"""Inputs that moved: the fewest values that one must put back for a pair to go as before, and what they crossed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from alignment.data.preprocess import Transform
from alignment.nms.causes import Limits, Side
from alignment.nms.rotated import rotated_iou_matrix
from alignment.nms.semantics import Fate, Semantics, iou_float32
from alignment.nms.steps import BY_OTHERS, State, Step

#: Up to so many rows, each is tried without.
_FEW = 16
#: With so many of the pairs that decided about it, a pair is tried together.
_TOGETHER = 4
Rerun = Callable[[np.ndarray, np.ndarray], State]


@dataclass(frozen=True)
class Values:
    """Scores of `scores`, pairs, and boxes of `boxes`, rows.

    Attributes:
        of: the pairs whose they are; empty where they are those of several rows with all their classes.
    """

    scores: tuple[int, ...]
    boxes: tuple[int, ...]
    of: tuple[int, ...] = ()


class Mover:
    """Puts values of the reference back into the subject.

    Args:
        reference, subject: the sides.
        rerun: post-processes boxes and scores as the subject does.
        step: from all of the reference's inputs to the subject's.
    """

    def __init__(self, reference: Side, subject: Side, rerun: Rerun, step: Step) -> None:
        self.reference, self.subject, self.rerun, self.step = reference, subject, rerun, step
        self.classes = reference.scores.shape[1]

    def least(self, pair: int, kept: bool) -> tuple[Values, Step] | None:
        """The first values of those worth a try that make `pair` `kept` or not, and what putting them back changes.

        In this order: its score, its box, both; those of each pair that decided about it; of it and such a pair
        together; several rows.
        """
        for values in self._attempts(pair):
            if (step := self._with(values)) and (pair in step.before.kept) == kept:
                return (values, step) if values.of else self._without_idle(pair, kept, values, step)
        return None

    def _attempts(self, pair: int) -> Iterator[Values]:
        suppressors = self.step.suppressors(pair)
        rivals = [one for one in self.step.rivals(pair) if one not in suppressors]
        groups: list[tuple[int, ...]] = [(one,) for one in (pair, *suppressors)]
        # A suppressed pair hangs on nothing but those that suppress it.
        groups += [(pair, one) for one in suppressors[:_TOGETHER]]
        groups += [(one,) for one in rivals]
        groups += [(pair, one) for one in rivals[:_TOGETHER]]
        for pairs in groups:
            rows = tuple(dict.fromkeys(one // self.classes for one in pairs))
            yield from (Values(pairs, (), pairs), Values((), rows, pairs), Values(pairs, rows, pairs))
        near = [one // self.classes for one in (pair, *suppressors, *rivals, *self._nearest(pair))]
        near = list(dict.fromkeys(near))
        for size in (*(2**power for power in range(1, len(near).bit_length())), len(near)):
            yield self._rows(near[:size])

    def _rows(self, rows: list[int]) -> Values:
        pairs = [row * self.classes + label for row in sorted(rows) for label in range(self.classes)]
        return Values(tuple(pairs), tuple(sorted(rows)))

    def _nearest(self, pair: int) -> list[int]:
        """Candidates, those with a score near the pair's first."""
        scores = self.reference.scores.ravel()
        found = np.union1d(self.step.before.pairs, self.step.after.pairs)
        return found[np.argsort(np.abs(scores[found] - scores[pair]), kind="stable")].tolist()

    def _with(self, values: Values) -> Step | None:
        """From the subject with `values` put back to the subject; None where these have not moved."""
        boxes, scores = self.put_back(values)
        same = np.array_equal(boxes, self.subject.boxes, equal_nan=True)
        if same and np.array_equal(scores, self.subject.scores, equal_nan=True):
            return None
        return Step(self.rerun(boxes, scores), self.step.after)

    def put_back(self, values: Values) -> tuple[np.ndarray, np.ndarray]:
        """The subject's boxes and scores with `values` of the reference."""
        boxes, scores = self.subject.boxes.copy(), self.subject.scores.copy()
        rows, pairs = list(values.boxes), list(values.scores)
        boxes[rows] = self.reference.boxes[rows]
        scores.reshape(-1)[pairs] = self.reference.scores.reshape(-1)[pairs]
        return boxes, scores

    def _without_idle(self, pair: int, kept: bool, values: Values, step: Step) -> tuple[Values, Step]:
        """Leaves out the rows that it does not take, where there are few."""
        if len(values.boxes) <= _FEW:
            for row in values.boxes:
                fewer = self._rows([one for one in values.boxes if one != row])
                if (without := self._with(fewer)) and (pair in without.before.kept) == kept:
                    values, step = fewer, without
        return values, step

    def moved(self, values: Values) -> dict[str, float]:
        """How far the ``scores``, the ``boxes`` and of rotated ones the ``angles`` among `values` moved, at most."""
        amounts, rows, pairs = {}, list(values.boxes), list(values.scores)
        if pairs:
            amounts["scores"] = distance(*(side.scores.reshape(-1)[pairs] for side in (self.reference, self.subject)))
        if rows:
            amounts |= box_distances(self.reference.boxes[rows], self.subject.boxes[rows])
        return {name: float(far.max()) for name, far in amounts.items()}

    def told(self, pair: int, values: Values, step: Step, transform: Transform | None, semantics: Semantics) -> str:
        """What was put back, how far it had moved, and what it crossed."""
        amounts = self.moved(values)
        if not values.of:
            count = len(values.boxes)
            shown = ", ".join(map(str, values.boxes[:5])) + (", ..." if count > 5 else "")
            far = " and ".join(f"{name} by up to {amount:.3g}" for name, amount in amounts.items())
            return f"{count} rows put back ({shown}): {far}"
        names = {"scores": "score", "boxes": "box", "angles": "angle"}
        whose = [
            "its own" if one == pair else f"row {one // self.classes}, class {one % self.classes}:" for one in values.of
        ]
        what = f"{' and '.join(whose)} {' and '.join(names[name] for name in amounts)} put back"
        far = ", ".join(f"{names[name]} moved by {amount:.3g}" for name, amount in amounts.items())
        moved = values.of[0]
        about = moved if moved in step.before.kept ^ step.after.kept else pair
        boxes, scores = self.put_back(values)
        crossed = _crossed(about, step, Side(semantics, boxes, scores), self.subject, transform)
        return f"{what}: {far}{crossed and f'; {crossed}'}"


def _crossed(pair: int, step: Step, before: Side, after: Side, transform: Transform | None) -> str:
    """Which threshold or competitor `pair` is on the other side of, and how near it was before."""
    lost = step.after if pair in step.before.kept else step.before
    fate, classes, scores = lost.fate(pair), before.scores.shape[1], before.scores.reshape(-1)
    semantics = before.semantics
    if fate == Fate.BELOW_THRESHOLD:
        margin = abs(float(scores[pair]) - semantics.score_threshold)
        return f"it was {margin:.3g} from the score threshold {semantics.score_threshold:g}"
    other = lost.by(pair) if fate == Fate.SUPPRESSED else None
    if other is not None and (pair % classes == other % classes or not semantics.classes.startswith("offset")):
        was, now = (
            _iou(semantics, side.boxes, pair // classes, other // classes, transform) for side in (before, after)
        )
        if (was > semantics.iou_threshold) != (now > semantics.iou_threshold):
            margin = abs(was - semantics.iou_threshold)
            return (
                f"IoU with row {other // classes}, class {other % classes} was {was:.7f}, {margin:.3g} from "
                f"{semantics.iou_threshold:g}, and is {now:.7f}"
            )
    if other is None and fate in BY_OTHERS:
        # Who took its place: of those that flipped the other way, the nearest by score.
        gained = [one for one in step.flipped if (one in step.before.kept) != (pair in step.before.kept)]
        other = min(gained, key=lambda one: abs(float(scores[one]) - float(scores[pair])), default=None)
    if other is None:
        return ""
    margin = abs(float(scores[pair]) - float(scores[other]))
    return f"it was {margin:.3g} from the score of row {other // classes}, class {other % classes}"


def _iou(semantics: Semantics, boxes: np.ndarray, one: int, other: int, transform: Transform | None) -> float:
    both = boxes[[one, other]]
    if semantics.frame == "original" and transform is not None:
        both = transform.to_original(both)
    if boxes.shape[1] == 5:
        return float(rotated_iou_matrix(both[:1], both[1:])[0, 0])
    return float(iou_float32(both[:1], both[1:], semantics.reorder)[0, 0])


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``|a - b|`` in float64; 0 where both are the same, also if no number."""
    with np.errstate(invalid="ignore"):
        far = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, far)


def box_distances(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """How far paired boxes ``[n, 4 or 5]`` are from each other: ``boxes`` ``[n]``, the largest difference in pixels; of
    rotated ones also ``angles`` ``[n]`` in radians, modulo half a turn, which makes the same box."""
    far = distance(a, b)
    found = {"boxes": far[:, :4].max(1)}
    if far.shape[1] == 5:
        with np.errstate(invalid="ignore"):
            found["angles"] = np.abs((far[:, 4] + np.pi / 2) % np.pi - np.pi / 2)
    return found


def too_far(amounts: dict[str, float], limits: Limits) -> str:
    """Why a movement is no rounding, if it is none; one that is no number is none."""
    far = [
        f"{name} moved by {amount:.3g}, and may by {getattr(limits, name):.3g}"
        for name, amount in amounts.items()
        if not amount <= getattr(limits, name)
    ]
    return "; ".join(far)
