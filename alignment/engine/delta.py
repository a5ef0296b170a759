"""Delta debugging: the smallest set of units that makes a whole bad, by asking whether sets of units are bad.

`minimal` is QuickXplain (Junker, AAAI 2004) with the step of ddmin (Zeller and Hildebrandt, TSE 2002) that looks at
each half alone first: where one unit is to blame, sets shrink at every step, and with them what hides it.

What is assumed, and what is checked: `minimal` needs badness to be monotone, a set that holds a bad one being bad.
Real oracles are so only nearly: noise of many units hides a fault among them.  So `search` asks for its answer once
more: whether the whole without it is good, and whether each member of it is needed for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

#: Whether these units together are bad; units come in the order of the whole.
Oracle = Callable[[tuple[str, ...]], bool]
#: So many questions and no end: what is wrong is everywhere, or noise.
LIMIT = 100


@dataclass(frozen=True)
class Blamed:
    """What `search` found.

    Attributes:
        removal: the units without which nothing is bad, in the order of the whole; empty where nothing was.
        cores: smallest sets that are bad by themselves, in the order of discovery: one unit, or several that are bad
            only together.  `removal` has a unit of each.
        closed: whether without `removal` the whole, and each block of it, is good, as the oracle says; not where there
            were more questions than allowed.
        needed: whether that is so for no part of `removal` with one unit less.
        questions: how many different sets the oracle was asked for.
    """

    removal: tuple[str, ...]
    cores: tuple[tuple[str, ...], ...]
    closed: bool
    needed: bool
    questions: int


def minimal(bad: Oracle, units: Sequence[str], background: Sequence[str] = ()) -> tuple[str, ...]:
    """A smallest part of `units` that is bad together with `background`, no unit of which can be spared.

    At most 2 ⌈log₂ n⌉ questions where it is one unit.

    Args:
        bad: monotone.
        units: bad together with `background`, which by itself is not.
        background: units that are there anyway.
    """
    if len(units) == 1:
        return tuple(units)
    middle = len(units) // 2
    left, right = tuple(units[:middle]), tuple(units[middle:])
    for half in (left, right):
        if bad((*background, *half)):
            return minimal(bad, half, background)
    # Only both together: what of the right is needed beside all of the left, then what of the left beside that.
    of_right = minimal(bad, right, (*background, *left))
    of_left = minimal(bad, left, (*background, *of_right))
    return (*of_left, *of_right)


def search(
    bad: Oracle,
    units: Sequence[str],
    blocks: int = 1,
    cost: Callable[[str], float] = lambda unit: 0.0,
    limit: int = LIMIT,
) -> Blamed:
    """The smallest set of units whose removal leaves nothing bad: one of every smallest bad set.

    Where one unit is to blame: at most 2 ⌈log₂ n⌉ + 2 questions.

    Args:
        bad: asked once for each set; not for the empty one, which is taken to be good.
        units: in an order in which neighbours belong together, the topological one.
        blocks: the units are cut into so many runs, each of which is looked at before the whole is: for faults that
            the noise of the whole hides.
        cost: of a unit's removal; where several units are bad only together, the cheapest goes.
        limit: stop after so many questions, with what was found by then.
    """
    oracle = _Remembering(bad, units, limit)
    wholes = [*cut(units, blocks), tuple(units)] if blocks > 1 else [tuple(units)]
    removed: set[str] = set()
    cores: list[tuple[str, ...]] = []
    closed = needed = False
    try:
        for whole in wholes:
            while oracle(rest := _minus(whole, removed)):
                cores.append(minimal(oracle, rest))
                removed.add(min(reversed(cores[-1]), key=cost))

        def good(without: set[str]) -> bool:
            return not any(oracle(_minus(whole, without)) for whole in wholes)

        closed = good(removed)
        for unit in [unit for unit in units if unit in removed] if closed and len(removed) > 1 else ():
            # A set found later may have made an earlier removal superfluous.
            removed = removed - {unit} if good(removed - {unit}) else removed
        needed = closed and not any(good(removed - {unit}) for unit in removed)
    except _Spent:
        closed = needed = False
    return Blamed(_minus(units, set(units) - removed), tuple(cores), closed, needed, oracle.questions)


class _Spent(Exception):
    """More questions than are allowed."""


class _Remembering:
    """An oracle that is asked once for each set, in the order of the whole, and never for the empty one."""

    def __init__(self, bad: Oracle, units: Sequence[str], limit: int) -> None:
        self._bad, self._units, self._limit = bad, units, limit
        self._known: dict[frozenset[str], bool] = {frozenset(): False}

    @property
    def questions(self) -> int:
        return len(self._known) - 1

    def __call__(self, chosen: Iterable[str]) -> bool:
        key = frozenset(chosen)
        if key not in self._known:
            if self.questions == self._limit:
                raise _Spent
            self._known[key] = self._bad(tuple(unit for unit in self._units if unit in key))
        return self._known[key]


def _minus(units: Sequence[str], removed: set[str]) -> tuple[str, ...]:
    return tuple(unit for unit in units if unit not in removed)


def cut(units: Sequence[str], blocks: int) -> list[tuple[str, ...]]:
    """Runs of about equal length, so many of them as there are units for."""
    count = min(blocks, len(units))
    ends = [round(index * len(units) / count) for index in range(count + 1)] if count else []
    return [tuple(units[start:end]) for start, end in pairwise(ends)]
