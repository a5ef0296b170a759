"""Why two post-processings keep different boxes: the cause of each difference, and the proof of it.

Two sides post-process one image: the reference with its inputs, the subject with its own.  Between them lies a path of
single changes: one parameter of the semantics after the other, then the inputs.  A pair that only one side keeps flips
somewhere on that path, so it has a cause; the proof is a replay in which nothing but that cause is undone, and the
difference is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from alignment.data.preprocess import Transform
from alignment.nms.semantics import Fate, Fates, Semantics, run

Cause = Literal[
    "topk_limit",
    "topk_tie",
    "topk_unit",
    "candidate_cap",
    "score_threshold",
    "score_threshold_edge",
    "iou_threshold",
    "iou_threshold_edge",
    "iou_comparison",
    "class_agnostic",
    "class_offset_rounding",
    "class_offset_overlap",
    "coordinate_frame",
    "multi_label",
    "background",
    "max_output",
    "padding",
    "nms_order_tie",
    "numeric",
    "precision",
    "cascade",
    "unexplained",
]
#: The parameters in the order in which one side is turned into the other, each with the cause that it stands for.
PATH: tuple[tuple[tuple[str, ...], Cause], ...] = (
    (("score_threshold",), "score_threshold"),
    (("score_inclusive", "threshold_float32", "nan_passes"), "score_threshold_edge"),
    (("multi_label",), "multi_label"),
    (("background",), "background"),
    (("topk_unit",), "topk_unit"),
    (("topk",), "topk_limit"),
    (("candidate_cap",), "candidate_cap"),
    (("classes", "split"), "class_offset_rounding"),
    (("frame",), "coordinate_frame"),
    (("reorder",), "iou_threshold_edge"),
    (("iou_inclusive",), "iou_comparison"),
    (("iou_threshold",), "iou_threshold"),
    (("max_per_class", "max_output"), "max_output"),
    (("floor",), "padding"),
    (("ties",), "nms_order_tie"),
)
_DECIDERS = 32
#: Fates that another pair decided: a pair goes another way because that one did.
_BY_OTHERS = (Fate.SUPPRESSED, Fate.CUT_BY_MAX_OUTPUT, Fate.CUT_BY_TOPK, Fate.CUT_BY_CAP)


@dataclass(frozen=True)
class Side:
    """One side: how it post-processes, and what.

    Attributes:
        semantics: how.
        boxes: ``[N, 4]`` or ``[N, 5]``, see `run`.
        scores: ``[N, C]``.
        seen: the pairs (row × C + class) that the real implementation kept, in its order, where it was run.
    """

    semantics: Semantics
    boxes: np.ndarray
    scores: np.ndarray
    seen: np.ndarray | None = None


@dataclass(frozen=True)
class Limits:
    """How far inputs may have moved for that to be an explanation: `boxes` in pixels of the input, `scores`."""

    boxes: float
    scores: float


@dataclass(frozen=True)
class Outcome:
    """What became of one pair on one side, in words: `kept`, and `why` not."""

    kept: bool
    why: str


@dataclass(frozen=True)
class Divergence:
    """A (row, class) pair that one side keeps and the other does not.

    Attributes:
        row, label: the pair.
        score: on the side that keeps it.
        reference, subject: what became of it.
        cause: see `Cause`; ``unexplained`` where no replay proves one.
        replay: what was undone, after which both sides say the same of this pair.
        follows: of a ``cascade``, the pair that it follows from.
    """

    row: int
    label: int
    score: float
    reference: Outcome
    subject: Outcome
    cause: Cause
    replay: str
    follows: tuple[int, int] | None = None


def explain(
    reference: Side,
    subject: Side,
    limits: Limits,
    transform: Transform | None = None,
    moved: Literal["numeric", "precision"] = "numeric",
) -> list[Divergence]:
    """Every pair that only one side keeps, with its cause.

    Args:
        reference: one side.
        subject: the other; rows and classes are the same.
        limits: how far its inputs may be from the reference's.
        transform: to the original image.
        moved: what it is called when inputs that differ are the cause.

    Returns:
        By falling score.
    """
    return _Explainer(reference, subject, limits, transform, moved).divergences()


class _Explainer:
    def __init__(
        self,
        reference: Side,
        subject: Side,
        limits: Limits,
        transform: Transform | None,
        moved: Literal["numeric", "precision"],
    ) -> None:
        self.reference, self.subject, self.limits, self.transform = reference, subject, limits, transform
        self.moved: Cause = moved
        self.classes = reference.scores.shape[1]
        self._replays: dict[Cause, tuple[set[int], set[int]]] = {}
        self.ours = self._run(reference.semantics, reference.boxes, reference.scores, reference.seen)
        self.theirs = self._run(subject.semantics, subject.boxes, subject.scores, subject.seen)

    def divergences(self) -> list[Divergence]:
        """See `explain`."""
        ours, theirs = (set(self._seen(*side)) for side in ((self.reference, self.ours), (self.subject, self.theirs)))
        differing = sorted(ours ^ theirs, key=lambda pair: (-self._score(pair, pair in ours), pair))
        if not differing:
            return []
        steps = list(self._steps())
        found = []
        for pair in differing:
            outcomes = (
                self._outcome(self.ours, pair, pair in ours),
                self._outcome(self.theirs, pair, pair in theirs),
            )
            cause, text, follows = self._cause(pair, pair in ours, pair in theirs, steps)
            row, label = divmod(pair, self.classes)
            root = None if follows is None else (follows // self.classes, follows % self.classes)
            found.append(Divergence(row, label, self._score(pair, pair in ours), *outcomes, cause, text, root))
        return found

    def _run(self, semantics: Semantics, boxes: np.ndarray, scores: np.ndarray, first: np.ndarray | None) -> Fates:
        return run(semantics, boxes, scores, self.transform, first)

    def _pairs(self, fates: Fates) -> np.ndarray:
        return fates.rows * self.classes + fates.labels

    def _seen(self, side: Side, fates: Fates) -> list[int]:
        """What a side kept: as it was seen, or as its semantics say."""
        return (self._pairs(fates)[fates.kept] if side.seen is None else side.seen).tolist()

    def _score(self, pair: int, of_reference: bool) -> float:
        return float((self.reference if of_reference else self.subject).scores.ravel()[pair])

    def _steps(self) -> Iterator[_Step]:
        """From the reference to the subject, one parameter at a time; inputs and ties come last."""
        now, then = self.reference.semantics, self.subject.semantics
        before = self.ours
        for fields, cause in PATH:
            changes = {field: getattr(then, field) for field in fields if getattr(now, field) != getattr(then, field)}
            if not changes:
                continue
            now = replace(now, **changes)
            after = self._run(now, self.reference.boxes, self.reference.scores, self.reference.seen)
            yield _Step(cause, tuple(changes), before, after, self.classes)
            before = after
        tied = self._run(now, self.reference.boxes, self.reference.scores, self.subject.seen)
        yield _Step("nms_order_tie", (), before, tied, self.classes)
        yield _Step(self.moved, (), tied, self.theirs, self.classes)

    def _cause(self, pair: int, in_ours: bool, in_theirs: bool, steps: list[_Step]) -> tuple[Cause, str, int | None]:
        for side, kept, fates, name in (
            (self.reference, in_ours, self.ours, "reference"),
            (self.subject, in_theirs, self.theirs, "subject"),
        ):
            if side.seen is not None and kept != (pair in self._kept(fates)):
                return "unexplained", f"the {name} does not do what its settings say", None
        # Undone at either end of the path it is a change of one side as it is; on the way, along with what precedes it.
        turns = [step for step in steps if (pair in step.kept_before) != (pair in step.kept_after)]
        for step in (turns[-1], turns[0], *turns[1:-1]):
            if step.cause == self.moved and not step.fields:
                return self._moved(pair, step)
            root, follows = self._root(pair, step)
            cause = self._named(step, root)
            replay = self._replayed(pair, step, in_ours, in_theirs)
            if follows is None:
                return cause, replay, None
            return "cascade", f"follows from {cause}: {replay}", follows
        return "unexplained", "no single change explains it", None

    def _kept(self, fates: Fates) -> set[int]:
        return set(self._pairs(fates)[fates.kept].tolist())

    def _replayed(self, pair: int, step: _Step, in_ours: bool, in_theirs: bool) -> str:
        """What was undone: on one side alone where that does it, else on the way from one to the other."""
        if not step.fields:
            return "equal scores taken in the subject's order"
        said = ", ".join(
            f"{field} {getattr(self.reference.semantics, field)} for {getattr(self.subject.semantics, field)}"
            for field in step.fields
        )
        undone, done = self._alone(step)
        if (pair in undone) == in_ours:
            return f"the subject with {said}"
        if (pair in done) == in_theirs:
            return f"the reference without {said}"
        return f"{said}, where all that precedes it in the order of causes is the same"

    def _alone(self, step: _Step) -> tuple[set[int], set[int]]:
        """What the subject keeps with the reference's parameter, and the reference with the subject's."""
        if step.cause not in self._replays:
            kept = []
            for side, other in ((self.subject, self.reference), (self.reference, self.subject)):
                changes = {field: getattr(other.semantics, field) for field in step.fields}
                fates = self._run(replace(side.semantics, **changes), side.boxes, side.scores, side.seen)
                kept.append(self._kept(fates))
            self._replays[step.cause] = kept[0], kept[1]
        return self._replays[step.cause]

    def _root(self, pair: int, step: _Step) -> tuple[int, int | None]:
        """The pair whose own fate the step changed, and the one that `pair` follows from directly.

        Of pairs that change places, so that each follows from the other, the first is the root.
        """
        chain = [pair]
        while (other := step.decided_by(chain[-1])) is not None:
            if other in chain:
                root = min(chain[chain.index(other) :], key=lambda one: (step.rank(one), one))
                return root, None if root == pair else chain[1]
            chain.append(other)
        return chain[-1], chain[1] if len(chain) > 1 else None

    def _named(self, step: _Step, root: int) -> Cause:
        """The cause's name: classes and ties stand for more than one."""
        if step.cause == "class_offset_rounding":
            if "together" in (self.reference.semantics.classes, self.subject.semantics.classes):
                return "class_agnostic"
            other = step.suppressor(root)
            if other is not None and other % self.classes != root % self.classes:
                return "class_offset_overlap"
        if step.cause == "nms_order_tie":
            fates = {step.fate(step.before, root), step.fate(step.after, root)}
            if fates & {Fate.CUT_BY_TOPK, Fate.CUT_BY_CAP}:
                return "topk_tie"
        return step.cause

    def _moved(self, pair: int, step: _Step) -> tuple[Cause, str, int | None]:
        """Puts back the subject's inputs, as few as will do: the pair's own, those of one that decided, several."""
        before = pair in step.kept_before
        deciders = step.deciders(pair)
        own, others = pair // self.classes, [other // self.classes for other in deciders]
        attempts: list[tuple[list[int], int | None]] = [([own], None)]
        attempts += [([row], other) for row, other in zip(others, deciders, strict=True)]
        near = list(dict.fromkeys([own, *others, *self._nearest(pair, step)]))
        sizes = [2**power for power in range(1, len(near).bit_length())]
        attempts += [(near[:size], None) for size in (*sizes, len(near))]
        for rows, other in attempts:
            said = self._put_back(pair, sorted(rows), before)
            if not said:
                continue
            if too_far := self._too_far(rows):
                return "unexplained", too_far, None
            return (
                (self.moved, said, None) if other is None else ("cascade", f"follows from {self.moved}: {said}", other)
            )
        return "unexplained", "putting back what moved does not undo it", None

    def _nearest(self, pair: int, step: _Step) -> list[int]:
        """Rows of candidates, those with a score near the pair's first."""
        scores = self.reference.scores.ravel()
        found = np.union1d(*(self._pairs(fates) for fates in (step.before, step.after)))
        order = np.argsort(np.abs(scores[found] - scores[pair]), kind="stable")
        return list(dict.fromkeys((found[order] // self.classes).tolist()))

    def _put_back(self, pair: int, index: list[int], before: bool) -> str:
        """Runs the subject with the reference's inputs in some rows; says so where `pair` then goes as before."""
        boxes, scores = self.subject.boxes.copy(), self.subject.scores.copy()
        for name, array, theirs in (("score", scores, self.reference.scores), ("box", boxes, self.reference.boxes)):
            array[index] = theirs[index]
            if (pair in self._kept(self._run(self.subject.semantics, boxes, scores, self.subject.seen))) == before:
                shown = ", ".join(map(str, index[:5])) + (f" and {len(index) - 5} more" if len(index) > 5 else "")
                which = "its own" if index == [pair // self.classes] else f"row {shown}:"
                return f"{which} {'score' if name == 'score' else 'score and box'} put back"
        return ""

    def _too_far(self, rows: list[int]) -> str:
        """Why the movement of `rows` is no rounding, if it is none."""
        for name, limit in (("boxes", self.limits.boxes), ("scores", self.limits.scores)):
            ours, theirs = (getattr(side, name)[rows].astype(np.float64) for side in (self.reference, self.subject))
            far = float(np.abs(ours - theirs).max(initial=0.0))
            if not far <= limit:
                return f"{name} moved by {far:.3g}, and may by {limit:.3g}"
        return ""

    def _outcome(self, fates: Fates, pair: int, kept: bool) -> Outcome:
        if kept:
            return Outcome(True, "kept")
        place = np.flatnonzero(self._pairs(fates) == pair)
        if not len(place):
            return Outcome(False, "below the score threshold")
        at = int(place[0])
        fate = Fate(int(fates.fates[at]))
        if fate == Fate.SUPPRESSED:
            by = int(self._pairs(fates)[fates.by[at]])
            row, label = divmod(by, self.classes)
            return Outcome(False, f"suppressed by row {row}, class {label} at IoU {float(fates.iou[at]):.6f}")
        words = fate.name.lower().replace("_", " ")
        return Outcome(False, f"{words}, rank {at + 1}" if fate in _BY_OTHERS else words)


class _Step:
    """One change on the way: fates before and after, and who flipped."""

    def __init__(self, cause: Cause, fields: tuple[str, ...], before: Fates, after: Fates, classes: int) -> None:
        self.cause, self.fields, self.before, self.after, self.classes = cause, fields, before, after, classes
        self._sorted: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.kept_before, self.kept_after = (
            set((f.rows * classes + f.labels)[f.kept].tolist()) for f in (before, after)
        )
        flipped = self.kept_before ^ self.kept_after
        self.flipped = sorted(flipped, key=lambda pair: self.rank(pair))

    def rank(self, pair: int) -> int:
        """Its place by score, at its best."""
        places = (self._place(fates, pair) for fates in (self.before, self.after))
        return min((p for p in places if p is not None), default=len(self.before.rows))

    def fate(self, fates: Fates, pair: int) -> Fate:
        """What became of a pair."""
        place = self._place(fates, pair)
        return Fate.BELOW_THRESHOLD if place is None else Fate(int(fates.fates[place]))

    def by(self, fates: Fates, pair: int) -> int | None:
        """The pair that suppressed it."""
        place = self._place(fates, pair)
        if place is None or fates.by[place] < 0:
            return None
        at = int(fates.by[place])
        return int(fates.rows[at] * self.classes + fates.labels[at])

    def _place(self, fates: Fates, pair: int) -> int | None:
        if id(fates) not in self._sorted:
            self._sorted[id(fates)] = _sorted(fates, self.classes)
        pairs, order = self._sorted[id(fates)]
        at = int(np.searchsorted(pairs, pair))
        return int(order[at]) if at < len(pairs) and pairs[at] == pair else None

    def suppressor(self, pair: int) -> int | None:
        """The pair that suppresses it before or after."""
        found = self.by(self.before, pair)
        return self.by(self.after, pair) if found is None else found

    def decided_by(self, pair: int) -> int | None:
        """The pair that flipped too and decided about this one; None where the change itself did."""
        for fates, kept_other in ((self.before, self.kept_after), (self.after, self.kept_before)):
            other = self.by(fates, pair)
            if other is not None and other not in kept_other:
                return other
            if self.fate(fates, pair) == Fate.CUT_BY_MAX_OUTPUT and self.cause != "max_output":
                first = self.flipped[0]
                if self.rank(first) < self.rank(pair):
                    return first
        return None

    def deciders(self, pair: int) -> list[int]:
        """The pairs that decided about it, those that decided about them, and so on; a few dozen at most."""
        found, queue = [pair], [pair]
        while queue and len(found) < _DECIDERS:
            now = queue.pop(0)
            for fates in (self.before, self.after):
                other = self.by(fates, now)
                if other is not None and other not in found:
                    found.append(other)
                    queue.append(other)
        return [*found[1:], *(other for other in self.flipped if other not in found)][:_DECIDERS]


def _sorted(fates: Fates, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs in rising order, and where each stands."""
    pairs = fates.rows * classes + fates.labels
    order = np.argsort(pairs)
    return pairs[order], order
