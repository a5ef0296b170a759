"""What a search for the nodes to keep in float came to, as ``partial.json`` has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from alignment.reading import read_model

if TYPE_CHECKING:
    from alignment.quantize.scoring import Score

PARTIAL = "partial.json"


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Attributes:
        kind: ``layers``: so many nodes in float; ``AP``: so many points, hundredths of 0..1, lost at most;
            ``agreement``: at least that; ``latency``: ms at most.
        limit: of it.
    """

    kind: Literal["layers", "AP", "agreement", "latency"]
    limit: float

    def __str__(self) -> str:
        return {
            "layers": f"{self.limit:g} nodes in float",
            "AP": f"at most {self.limit:g} points of AP lost",
            "agreement": f"agreement of at least {self.limit:g}",
            "latency": f"at most {self.limit:g} ms",
        }[self.kind]

    def accepts(self, score: Score, reference: Score) -> bool:
        """Whether a score is as good as was asked for, beside that of the float32 network."""
        if self.kind == "AP":
            return reference.ap - score.ap <= self.limit / 100
        return score.agreement >= self.limit


@dataclass(frozen=True)
class Point:
    """A set of nodes that was scored.

    Attributes:
        kept: the nodes that stay float, the most sensitive first.
        int8_macs: the share of the network's multiplications that are done in int8.
        ap: 0..1.
        ap_lost: against the float32 network, 0..1.
        agreement: with the float32 network, 0..1.
        latency_ms: where it was timed, and an engine came of it.
    """

    kept: list[str]
    int8_macs: float
    ap: float
    ap_lost: float
    agreement: float
    latency_ms: float | None = None


def frontier(points: Iterable[Point], cost: Callable[[Point], float], loss: Callable[[Point], float]) -> list[Point]:
    """The Pareto front by rising cost: points than which none is as cheap and loses less, nor cheaper and as good."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (cost(point), loss(point))):
        if not best or loss(point) < loss(best[-1]):
            best.append(point)
    return best


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Reference(_Model):
    """The score of the float32 network: AP and agreement, 0..1."""

    ap: float
    agreement: float


class Ranking(_Model):
    """The nodes by one metric, the most sensitive first."""

    metric: str
    mode: str
    nodes: list[str]


class PartialResult(_Model):
    """A search that is over.

    Attributes:
        variant: its name.
        recipe: of quantization.
        goal: what was asked for, and `reached` whether it was found.
        images: how many each set was scored on.
        ranking: by which nodes were tried.
        chosen: the set that was found.
        ways: the sets that are compared, by how they were found.
        rank_correlations: metric → cost → how well it ranks, see `alignment.quantize.ranking`.
        points: every set that was scored.
    """

    variant: str
    recipe: dict[str, Any] = {}
    goal: Goal
    reached: bool
    images: int
    reference: Reference
    ranking: Ranking
    chosen: Point
    ways: dict[str, Point]
    rank_correlations: dict[str, dict[str, float | None]] = {}
    points: list[Point]

    @classmethod
    def load(cls, path: Path) -> PartialResult:
        """Reads what `align partial` wrote.  Raises AlignError for a file that is missing, damaged or another."""
        return read_model(
            cls, path, "no result of a search", "write one by `align partial`", "make it anew with `align partial`"
        )
