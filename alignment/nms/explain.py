"""Why two post-processings keep different boxes: the cause of each difference, and the proof of it.

Two sides post-process one image: the reference with its inputs, the subject with its own.  A pair that only one side
keeps has a cause: a parameter of the semantics, or inputs that moved.  The proof is a replay: one side takes over that
one parameter, or those few values, from the other, and then both say the same of this pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from alignment.data.preprocess import Transform
from alignment.nms.causes import (
    INPUTS,
    ORDER,
    PATH,
    WRONG_SETTINGS,
    Cause,
    Divergence,
    End,
    Limits,
    Moved,
    Outcome,
    Proof,
    Side,
)
from alignment.nms.moved import Mover, box_distances, distance, too_far
from alignment.nms.semantics import Fate, Semantics, run
from alignment.nms.steps import BY_OTHERS, State, Step

#: With more pairs of an image beyond the limits than this, its inputs are wrong, and no replay is worth its time.
GROSS = 16
_CAUSE_OF: dict[str, Cause] = {**dict(PATH), ORDER: "nms_order_tie"}
_CAPS: frozenset[str] = frozenset({"max_output", "max_per_class"})
_LIMITS: frozenset[str] = _CAPS | {"topk", "candidate_cap"}


def explain(
    reference: Side,
    subject: Side,
    limits: Limits,
    transform: Transform | None = None,
    moved: Moved = "numeric",
) -> list[Divergence]:
    """Every pair that only one side keeps, or whose box or score is another than `limits` allow, with its cause.

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


def kept(side: Side, transform: Transform | None = None) -> np.ndarray:
    """The pairs (row × C + class) that a side keeps, by falling score: as it was seen, or as its semantics say."""
    if side.seen is not None:
        return side.seen
    fates = run(side.semantics, side.boxes, side.scores, transform)
    return (fates.rows * side.scores.shape[1] + fates.labels)[fates.kept]


@dataclass(frozen=True)
class _Answer:
    """Of one pair: see `Divergence`; `cause` is the one at the root."""

    cause: Cause
    replay: str
    proof: Proof | None = None
    follows: int | None = None


class _Explainer:
    def __init__(
        self, reference: Side, subject: Side, limits: Limits, transform: Transform | None, moved: Moved
    ) -> None:
        self.reference, self.subject, self.limits, self.transform = reference, subject, limits, transform
        self.moved: Cause = moved
        self.classes = reference.scores.shape[1]
        self.parameters = tuple(_differing(reference, subject))
        self.all = frozenset(self.parameters)
        self._states: dict[frozenset[str], State] = {}
        self._steps: dict[tuple[End, frozenset[str]], Step] = {}
        self.ours, self.theirs = self._state(frozenset()), self._state(self.all)
        self.in_ours, self.in_theirs = self._seen(reference, self.ours), self._seen(subject, self.theirs)
        self.differing = self.in_ours ^ self.in_theirs

    def divergences(self) -> list[Divergence]:
        """See `explain`."""
        far, faults = self._far(), {**self.reference.faults, **self.subject.faults}
        gross = ""
        if len(far) > GROSS:
            total = len(self.in_ours | self.in_theirs)
            gross = f"inputs are wrong: {len(far)} of {total} detections moved further than they may"
        answers = {}
        for pair in sorted(self.differing | far.keys() | faults.keys(), key=lambda pair: (-self._score(pair), pair)):
            if said := "; ".join(filter(None, (faults.get(pair), far.get(pair)))) or gross:
                answers[pair] = _Answer("unexplained", said)
            else:
                answers[pair] = self._answer(pair)
        _break_circles(answers)
        return [self._divergence(pair, answer) for pair, answer in answers.items()]

    def _divergence(self, pair: int, answer: _Answer) -> Divergence:
        cause, text, follows = answer.cause, answer.replay, None
        if answer.follows is not None:
            cause, text = "cascade", f"follows from {answer.cause}: {answer.replay}"
            follows = divmod(answer.follows, self.classes)
        row, label = divmod(pair, self.classes)
        return Divergence(
            row=row,
            label=label,
            score=self._score(pair),
            reference=self._outcome(self.ours, pair, pair in self.in_ours),
            subject=self._outcome(self.theirs, pair, pair in self.in_theirs),
            cause=cause,
            replay=text,
            root=answer.cause,
            follows=follows,
            proof=answer.proof,
        )

    def _seen(self, side: Side, state: State) -> set[int]:
        return state.kept if side.seen is None else set(side.seen.tolist())

    def _score(self, pair: int) -> float:
        side = self.reference if pair in self.in_ours else self.subject
        return float(side.scores.reshape(-1)[pair])

    def _state(self, taken: frozenset[str]) -> State:
        """The reference with some of the subject's parameters."""
        if taken not in self._states:
            fields = {name: getattr(self.subject.semantics, name) for name in taken - {ORDER, INPUTS}}
            parts = (INPUTS, ORDER, "iou_rounding")
            inputs, order, rounding = (self.subject if name in taken else self.reference for name in parts)
            semantics = replace(self.reference.semantics, **fields)
            seen = order.seen, order.seen_rows, rounding.seen
            fates = run(semantics, inputs.boxes, inputs.scores, self.transform, *seen)
            self._states[taken] = State(fates, self.classes)
        return self._states[taken]

    def _far(self) -> dict[int, str]:
        """Of the pairs that either side keeps, those whose own box or score moved further than it may."""
        pairs = np.array(sorted(self.in_ours | self.in_theirs), np.int64)
        if INPUTS not in self.all or not len(pairs):
            return {}
        rows = pairs // self.classes
        moved = box_distances(self.reference.boxes[rows], self.subject.boxes[rows])
        moved["scores"] = distance(*(side.scores.reshape(-1)[pairs] for side in (self.reference, self.subject)))
        beyond = np.any([~(values <= getattr(self.limits, name)) for name, values in moved.items()], 0)
        amounts = ({name: float(values[i]) for name, values in moved.items()} for i in np.flatnonzero(beyond))
        return dict(zip(pairs[beyond].tolist(), (too_far(one, self.limits) for one in amounts), strict=True))

    def _answer(self, pair: int) -> _Answer:
        for side, in_side, state, name in (
            (self.reference, self.in_ours, self.ours, "reference"),
            (self.subject, self.in_theirs, self.theirs, "subject"),
        ):
            if side.seen is not None and (pair in in_side) != (pair in state.kept):
                return _Answer("unexplained", f"the {name} does not do what its settings say")
        turned = self._turned(pair)
        if INPUTS in turned:
            # They come last, so that on the reference's inputs both semantics say the same of the pair.
            return self._put_back(pair, frozenset())
        # Undone at either end of the path it is a change of one side as it is.
        for name in dict.fromkeys((turned[-1], turned[0], *turned, *self.parameters)):
            if name != INPUTS and (answer := self._replayed(pair, frozenset((name,)))):
                return answer
        return self._joint(pair, turned)

    def _turned(self, pair: int) -> list[str]:
        """The parameters that turn the pair's fate where the reference takes over the subject's one after the other."""
        found, before = [], self.ours
        for count, name in enumerate(self.parameters, 1):
            after = self._state(frozenset(self.parameters[:count]))
            if (pair in before.kept) != (pair in after.kept):
                found.append(name)
            before = after
        return found

    def _agrees(self, pair: int, end: End, changed: frozenset[str]) -> bool:
        """Whether one side that takes over `changed` says of the pair what the other says."""
        if end == "subject":
            return (pair in self._state(self.all - changed).kept) == (pair in self.in_ours)
        return (pair in self._state(changed).kept) == (pair in self.in_theirs)

    def _replayed(self, pair: int, changed: frozenset[str]) -> _Answer | None:
        """The answer that a change of these parameters on one side gives; inputs are put back into the subject only."""
        if self._agrees(pair, "subject", changed):
            return self._told(pair, "subject", changed) if INPUTS not in changed else self._put_back(pair, changed)
        if INPUTS not in changed and self._agrees(pair, "reference", changed):
            return self._told(pair, "reference", changed)
        return None

    def _joint(self, pair: int, turned: list[str]) -> _Answer:
        """A smallest set of parameters that one side must take over: two, or what cannot be made smaller by one."""
        for two in combinations(self.parameters, 2):
            answer = self._replayed(pair, frozenset(two))
            if answer is not None and answer.proof is not None:
                return answer
        first, last = self.parameters.index(turned[0]), self.parameters.index(turned[-1])
        sets: tuple[tuple[End, tuple[str, ...]], ...] = (
            ("subject", self.parameters[first:]),
            ("reference", self.parameters[: last + 1]),
        )
        smallest = []
        for end, given in sets:
            changed = frozenset(given)
            for name in given:
                if self._agrees(pair, end, changed - {name}):
                    changed -= {name}
            smallest.append((end, changed))
        end, changed = min(smallest, key=lambda one: len(one[1]))
        return self._put_back(pair, changed) if INPUTS in changed else self._told(pair, end, changed)

    def _told(self, pair: int, end: End, changed: frozenset[str]) -> _Answer:
        """What undoing `changed` shows about a pair: its cause, and whom it follows."""
        step = self._step(end, changed)
        chain = step.chain(pair)
        names = [name for name in self.parameters if name in changed]
        cause, said = self._named(names[0], step, chain[-1]), self._said(end, names)
        if cause in WRONG_SETTINGS:
            said = f"the settings differ: {said}"
        follows = next((one for one in chain[1:] if one in self.differing), None)
        if follows is None and len(chain) > 1:
            said += f", where {self._name(chain[1])} decides it, of which both sides say the same"
        fields = tuple(name for name in names if name != ORDER)
        return _Answer(cause, said, Proof(end, fields, ORDER in changed), follows)

    def _step(self, end: End, changed: frozenset[str]) -> Step:
        if (end, changed) not in self._steps:
            before, after = (
                (self._state(self.all - changed), self.theirs)
                if end == "subject"
                else (self.ours, self._state(changed))
            )
            self._steps[end, changed] = Step(before, after, capped=bool(changed & _CAPS))
        return self._steps[end, changed]

    def _said(self, end: End, names: Iterable[str]) -> str:
        own, others = (self.subject, self.reference) if end == "subject" else (self.reference, self.subject)
        other_end = "reference" if end == "subject" else "subject"
        changes = [
            f"equal scores in the {other_end}'s order"
            if name == ORDER
            else f"IoUs at the threshold as the {other_end} takes them"
            if getattr(own.semantics, name) == getattr(others.semantics, name)
            else f"{name} {_word(others.semantics, name)} instead of {_word(own.semantics, name)}"
            for name in names
        ]
        return f"the {end} with {', '.join(changes)}"

    def _named(self, name: str, step: Step, root: int) -> Cause:
        """The cause's name: some parameters stand for more than one."""
        cause = _CAUSE_OF[name]
        if cause == "class_offset_rounding":
            if "together" in (self.reference.semantics.classes, self.subject.semantics.classes):
                return "class_agnostic"
            other = step.suppressor(root)
            if other is not None and other % self.classes != root % self.classes:
                return "class_offset_overlap"
        if cause == "nms_order_tie":
            fates = {step.before.fate(root), step.after.fate(root)}
            if fates & {Fate.CUT_BY_TOPK, Fate.CUT_BY_CAP}:
                return "topk_tie"
        if cause in WRONG_SETTINGS:
            a, b = (np.float32(getattr(side.semantics, name)) for side in (self.reference, self.subject))
            if abs(a - b) <= np.spacing(np.maximum(abs(a), abs(b))):
                # One number, rounded to float32 in another way.
                return "score_threshold_edge" if name == "score_threshold" else "iou_threshold_edge"
        return cause

    def _put_back(self, pair: int, changed: frozenset[str]) -> _Answer:
        """Puts as few of the reference's inputs as will do into the subject, that also takes over `changed`."""
        names = [name for name in self.parameters if name in changed and name != INPUTS]
        base = self.all - set(names)
        fields = {name: getattr(self.reference.semantics, name) for name in names if name != ORDER}
        semantics = replace(self.subject.semantics, **fields)
        order = self.reference if ORDER in names else self.subject

        def rerun(boxes: np.ndarray, scores: np.ndarray) -> State:
            fates = run(semantics, boxes, scores, self.transform, order.seen, order.seen_rows, self.subject.seen)
            return State(fates, self.classes)

        whole = Step(self._state(base - {INPUTS}), self._state(base))
        mover = Mover(self.reference, self.subject, rerun, whole)
        found = mover.least(pair, pair in self.in_ours)
        if found is None:
            return _Answer("unexplained", "putting back what moved does not undo it")
        values, step = found
        if said := too_far(mover.moved(values), self.limits):
            return _Answer("unexplained", said)
        said = mover.told(pair, values, step, self.transform, semantics)
        follows = next((one for one in values.of[:1] if one != pair and one in self.differing), None)
        cause = self.moved
        if names:
            said, cause = f"{self._said('subject', names)}, and {said}", self._named(names[0], step, pair)
        proof = Proof("subject", tuple(fields), ORDER in names, values.scores, values.boxes)
        return _Answer(cause, said, proof, follows)

    def _name(self, pair: int) -> str:
        return f"row {pair // self.classes}, class {pair % self.classes}"

    def _outcome(self, state: State, pair: int, is_kept: bool) -> Outcome:
        if is_kept:
            return Outcome(True, "kept")
        place = state.place(pair)
        if place is None:
            return Outcome(False, "below the score threshold")
        fate, by = state.fate(pair), state.by(pair)
        if by is not None:
            return Outcome(False, f"suppressed by {self._name(by)} at IoU {float(state.fates.iou[place]):.6f}")
        words = fate.name.lower().replace("_", " ")
        return Outcome(False, f"{words}, rank {place + 1}" if fate in BY_OTHERS else words)


def _word(semantics: Semantics, name: str) -> str:
    value = getattr(semantics, name)
    if value is None:
        return "no limit" if name in _LIMITS else "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _differing(reference: Side, subject: Side) -> Iterator[str]:
    """The parameters in which two sides differ, in the order of `PATH`."""
    for name, _ in PATH:
        ours, theirs = (getattr(side.semantics, name) for side in (reference, subject))
        # How each takes an IoU at the threshold is its own where both round.
        if ours != theirs or (name == "iou_rounding" and ours and not _same(reference.seen, subject.seen)):
            yield name
    if not all(_same(getattr(reference, name), getattr(subject, name)) for name in ("seen", "seen_rows")):
        yield ORDER
    if not all(_same(getattr(reference, name), getattr(subject, name)) for name in ("boxes", "scores")):
        yield INPUTS


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def _break_circles(answers: dict[int, _Answer]) -> None:
    """Where pairs follow each other in a circle, the first of it follows none.  `answers` go by falling score."""
    for start in answers:
        seen, pair = {start}, answers[start].follows
        while pair is not None and pair in answers and pair not in seen:
            seen.add(pair)
            pair = answers[pair].follows
        if pair == start:
            answers[start] = replace(answers[start], follows=None)
