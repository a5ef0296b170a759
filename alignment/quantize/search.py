"""The search for the few nodes that are worth keeping in float.

What a set of nodes is worth is measured, never added up from its members: two nodes that spoil the same thing gain
nothing one by one, and of two that mend the same thing one is enough.  A search goes by agreement with the float32
network, and AP decides between sets that agree alike: AP on a few dozen images wavers by more than one node changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from alignment.quantize.scoring import Score

Kept = frozenset[str]
#: The score of the network that is int8 but for these nodes.
Objective = Callable[[Kept], Score]
#: The node that joins a set next.
Step = Callable[[Kept], str]
#: How many of the best-ranked nodes are tried at each step.
TRIES = 8
#: How often a node of a finished set is exchanged for another, at most.
SWAPS = 3
NONE: Kept = frozenset()


@dataclass(frozen=True)
class Choice:
    """What a search came to.

    Attributes:
        chosen: the nodes that stay float.
        reached: whether that is what was asked for; else it is the best there was.
        ways: the sets that the search compared, by how they were found.
    """

    chosen: Kept
    reached: bool
    ways: dict[str, Kept]


def worth(score: Score) -> tuple[float, float]:
    """What scores are compared by."""
    return score.agreement, score.ap


class Search:
    """Sets of nodes that stay float, scored.  It is deterministic: of equals, the better ranked is taken.

    Args:
        rankings: by the name of a metric, all nodes that may stay float, the most sensitive first.  Which nodes are
            tried at a step the first of them says; the others are other ways to choose a set.
        objective: scores a set; it is asked once for each.
        tries: at each step so many of the best-ranked nodes are tried.
        swaps: at most so many nodes of a finished set are exchanged.
        progress: called with the number of sets scored, and how many there are at most.

    Attributes:
        ranking: the first of them.
        scores: of every set that was asked for, in that order.
        latencies: milliseconds, of every set that was timed.
        most: how many sets the search under way scores at most, counting those that it has scored.
    """

    def __init__(
        self,
        rankings: Mapping[str, Sequence[str]],
        objective: Objective,
        tries: int = TRIES,
        swaps: int = SWAPS,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.rankings, self.tries, self.swaps = {name: tuple(order) for name, order in rankings.items()}, tries, swaps
        self.ranking = next(iter(self.rankings.values()))
        self._objective, self._progress = objective, progress
        self.scores: dict[Kept, Score] = {}
        self.latencies: dict[Kept, float] = {}
        self.most = 1

    def score(self, kept: Kept) -> Score:
        """The score of a set, measured the first time."""
        if kept not in self.scores:
            self.scores[kept] = self._objective(kept)
            if self._progress:
                self._progress(len(self.scores), self.most)
        return self.scores[kept]

    def ranked(self, kept: Collection[str]) -> list[str]:
        """The members of a set, the most sensitive first."""
        return [node for node in self.ranking if node in kept]

    def by_count(self, count: int) -> Choice:
        """The best set of `count` nodes: never worse than the first `count` of any ranking.

        These are some starts; another is greedy: one node at a time, that with which the set scores best.  The best of
        them is improved by exchanges.
        """
        # Beginnings of rankings, steps of the greedy search, exchanges; and `needed` after it.
        self.most = 1 + 2 * count + len(self.rankings) + count * self.tries * (1 + self.swaps)
        greedy = NONE
        for _ in range(count):
            greedy = self._best(greedy | {node} for node in self._untaken(greedy))
        # All beginnings of the first ranking are scored: they are the curve that the greedy one is held against.
        for size in range(count):
            self.score(frozenset(self.ranking[:size]))
        ways = {f"top-{count} by {name}": frozenset(order[:count]) for name, order in self.rankings.items()}
        ways["greedy"] = greedy
        ways["exchanged"] = self._exchanged(self._best(ways.values()))
        return Choice(self._best(ways.values()), True, ways)

    def by_score(self, reached: Callable[[Score], bool], macs: Mapping[str, int]) -> Choice:
        """The set with the fewest multiplications in float that has a score which `reached` accepts.

        It grows along each ranking, and by gain for each multiplication, until it is reached; then every member that
        is not needed goes back to int8, the largest first.

        Args:
            reached: whether a score is good enough.
            macs: multiplications of each node of the ranking.
        """

        def cost(kept: Kept) -> int:
            return sum(macs[node] for node in kept)

        # Ways of growing, trimming what each gave, and `needed` after them.
        self.most = 1 + len(self.ranking) * (2 * len(self.rankings) + self.tries + 2)
        ways: dict[str, Kept] = {}
        most = math.inf
        along = {f"ranked by {name}": self._along(order) for name, order in self.rankings.items()}
        first = next(iter(along))
        for name, step in {first: along.pop(first), "greedy": self._by_gain(macs), **along}.items():
            grown = self._grown(step, reached, cost, most)
            if grown is not None:
                ways[name] = self._trimmed(grown, reached, macs)
                most = min(most, cost(ways[name]))
            elif name == "greedy" and not ways:
                break  # other rankings end at the same set, that of all nodes, which is not enough
        enough = [kept for kept in self.scores if reached(self.scores[kept])]
        if not enough:
            return Choice(self._best(self.scores), False, ways)
        # Among them those that were only tried on the way: a step goes by gain, and may pass one by.
        return Choice(min(enough, key=lambda kept: (cost(kept), -self.scores[kept].agreement)), True, ways)

    def by_latency(self, latency: Callable[[Kept], float], limit: float) -> Choice:
        """The most accurate set that takes at most `limit` ms.

        It grows by the node with which it scores best, as long as that helps, and is fast enough.

        Args:
            latency: times a set, in ms, infinity where no engine comes of it; it is asked once for each, and only for
                those that score better.
            limit: in ms.
        """
        self.most = 1 + len(self.ranking) * (self.tries + 1)
        kept = NONE
        # Where the whole in int8 is too slow a set may be fast: float may save copies between layouts.
        self._timed(kept, latency)
        while True:
            better = [kept | {node} for node in self._untaken(kept)]
            better = [s for s in better if worth(self.score(s)) > worth(self.score(kept))]
            better.sort(key=lambda s: worth(self.score(s)), reverse=True)
            step = next((s for s in better if self._timed(s, latency) <= limit), None)
            if step is None:
                break
            kept = step
        self.score(kept)
        return Choice(kept, self._timed(kept, latency) <= limit, {"greedy": kept})

    def needed(self, kept: Kept) -> dict[str, float]:
        """By how much agreement falls when one member alone goes back to int8, the most sensitive first."""
        whole = self.score(kept).agreement
        return {node: whole - self.score(kept - {node}).agreement for node in self.ranked(kept)}

    def _untaken(self, kept: Kept) -> list[str]:
        """The best-ranked nodes beside a set."""
        return [node for node in self.ranking if node not in kept][: self.tries]

    def _best(self, sets: Iterable[Kept]) -> Kept:
        return max(sets, key=lambda kept: worth(self.score(kept)))

    def _exchanged(self, kept: Kept) -> Kept:
        """One member exchanged for another node, the best such exchange, while that helps."""
        for _ in range(self.swaps):
            others = self._untaken(kept)
            tried = [kept - {old} | {new} for old in self.ranked(kept) for new in others]
            best = self._best([kept, *tried])
            if best == kept:
                break
            kept = best
        return kept

    def _along(self, order: Sequence[str]) -> Step:
        return lambda kept: next(node for node in order if node not in kept)

    def _by_gain(self, macs: Mapping[str, int]) -> Step:
        def step(kept: Kept) -> str:
            now = self.score(kept).agreement
            gains = {node: self.score(kept | {node}).agreement - now for node in self._untaken(kept)}
            # What loses is not weighed by its size: the largest would seem to lose least.
            return max(gains, key=lambda node: gains[node] / macs[node] if gains[node] > 0 else gains[node])

        return step

    def _grown(
        self, step: Step, reached: Callable[[Score], bool], cost: Callable[[Kept], int], most: float
    ) -> Kept | None:
        """Node by node until reached; None where that costs `most` or more, or all nodes are not enough."""
        kept = NONE
        while not reached(self.score(kept)):
            if len(kept) == len(self.ranking) or cost(kept) >= most:
                return None
            kept = kept | {step(kept)}
        return kept

    def _trimmed(self, kept: Kept, reached: Callable[[Score], bool], macs: Mapping[str, int]) -> Kept:
        for node in sorted(self.ranked(kept), key=lambda node: -macs[node]):
            if reached(self.score(kept - {node})):
                kept = kept - {node}
        return kept

    def _timed(self, kept: Kept, latency: Callable[[Kept], float]) -> float:
        if kept not in self.latencies:
            self.latencies[kept] = latency(kept)
        return self.latencies[kept]
