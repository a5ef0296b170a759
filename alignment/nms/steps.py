"""One change from one state of a post-processing to another: who flipped, and who decided about whom."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from alignment.nms.semantics import Fate, Fates

#: Fates that another pair decided: a pair goes another way because that one did.
BY_OTHERS = (Fate.SUPPRESSED, Fate.CUT_BY_MAX_OUTPUT, Fate.CUT_BY_TOPK, Fate.CUT_BY_CAP)
_DECIDERS = 32


class State:
    """The fates of the pairs of one image, found by pair (row × C + class)."""

    def __init__(self, fates: Fates, classes: int) -> None:
        self.fates, self.classes = fates, classes
        self.pairs = fates.rows * classes + fates.labels

    @cached_property
    def kept(self) -> set[int]:
        """The pairs kept."""
        return set(self.pairs[self.fates.kept].tolist())

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.pairs)
        return self.pairs[order], order

    def place(self, pair: int) -> int | None:
        """Where a pair stands by falling score; None where it did not pass."""
        pairs, order = self._sorted
        at = int(np.searchsorted(pairs, pair))
        return int(order[at]) if at < len(pairs) and pairs[at] == pair else None

    def fate(self, pair: int) -> Fate:
        """What became of a pair."""
        place = self.place(pair)
        return Fate.BELOW_THRESHOLD if place is None else Fate(int(self.fates.fates[place]))

    def by(self, pair: int) -> int | None:
        """The pair that suppressed it."""
        place = self.place(pair)
        if place is None or self.fates.by[place] < 0:
            return None
        return int(self.pairs[self.fates.by[place]])


class Step:
    """One change: the states before and after it."""

    def __init__(self, before: State, after: State, capped: bool = False) -> None:
        """Args: `capped`: whether the change is one of how many detections there may be."""
        self.before, self.after, self.capped = before, after, capped

    @cached_property
    def flipped(self) -> list[int]:
        """The pairs kept in one state only, by falling score."""
        return sorted(self.before.kept ^ self.after.kept, key=self.rank)

    def rank(self, pair: int) -> int:
        """Its place by score, at its best."""
        places = (state.place(pair) for state in (self.before, self.after))
        return min((p for p in places if p is not None), default=len(self.before.pairs))

    def suppressor(self, pair: int) -> int | None:
        """The pair that suppresses it before or after."""
        found = self.before.by(pair)
        return self.after.by(pair) if found is None else found

    def decided_by(self, pair: int) -> int | None:
        """The pair that flipped too and decided about this one; None where the change itself did."""
        for state, other_state in ((self.before, self.after), (self.after, self.before)):
            other = state.by(pair)
            if other is not None and other not in other_state.kept:
                return other
            if state.fate(pair) == Fate.CUT_BY_MAX_OUTPUT and not self.capped:
                first = self.flipped[0]
                if self.rank(first) < self.rank(pair):
                    return first
        return None

    def chain(self, pair: int) -> list[int]:
        """The pair, the one that decided about it, and so on to the root, which the change itself decided.

        Of pairs that change places, so that each follows from the other, the first is the root.
        """
        found = [pair]
        while (other := self.decided_by(found[-1])) is not None:
            if other in found:
                circle = found[found.index(other) :]
                root = min(circle, key=lambda one: (self.rank(one), one))
                return [pair] if root == pair else [*found[: found.index(root)], root]
            found.append(other)
        return found

    def suppressors(self, pair: int) -> list[int]:
        """The pairs that suppressed it before or after, those that suppressed them, and so on; a few dozen at most."""
        found, queue = [pair], [pair]
        while queue and len(found) < _DECIDERS:
            now = queue.pop(0)
            for state in (self.before, self.after):
                other = state.by(now)
                if other is not None and other not in found:
                    found.append(other)
                    queue.append(other)
        return found[1:]

    def rivals(self, pair: int) -> list[int]:
        """The pairs that flipped too, those first that flipped the other way; a few dozen at most."""
        here = pair in self.before.kept
        others = [one for one in self.flipped if one != pair]
        return sorted(others, key=lambda one: (one in self.before.kept) == here)[:_DECIDERS]
