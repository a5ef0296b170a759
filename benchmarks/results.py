"""What a benchmark found: the typed content of ``<case>.json``, and the ratios that follow from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, computed_field

from alignment.reading import read_model
from alignment.storage import writing

SCHEMA_VERSION = 1
Kind = Literal["ours", "peer", "floor"]
Clock = Literal["cpu_s", "wall_s"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Turn(_Model):
    """Seconds of one turn: of the wall clock, and of all processors, child processes included."""

    wall_s: float
    cpu_s: float


class Memory(_Model):
    """Resident memory in MB of a fresh process, before the work and at its highest."""

    before_mb: float
    peak_mb: float


class Measured(_Model):
    """One contestant at one size."""

    size: int
    turns: list[Turn] = []
    memory: Memory | None = None

    def seconds(self, clock: Clock) -> list[float]:
        """Of every turn."""
        return [getattr(turn, clock) for turn in self.turns]


class Spread(_Model):
    """Quartiles of what was found in `turns` turns."""

    low: float
    median: float
    high: float
    turns: int

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """None of nothing."""
        if not values:
            return None
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(low=low, median=median, high=high, turns=len(values))


class Entry(_Model):
    """One contestant.

    `versions` are those of the packages that it stands for; `fault` says why it was not measured, or not at all sizes;
    `scores` are what the case says about its result at the largest size.
    """

    name: str
    kind: Kind
    versions: dict[str, str] = {}
    fault: str = ""
    sizes: list[Measured] = []
    scores: dict[str, float] = {}

    def at(self, size: int) -> Measured | None:
        """What was measured at a size."""
        return next((one for one in self.sizes if one.size == size and one.turns), None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def growth(self) -> float | None:
        """b of processor seconds = a × size^b, a straight line through the logarithms of the medians."""
        points = [(one.size, float(np.median(one.seconds("cpu_s")))) for one in self.sizes if one.turns]
        logarithms = [(math.log(size), math.log(seconds)) for size, seconds in points if seconds > 0]
        if len(logarithms) < 2:
            return None
        x, y = np.array(logarithms).T
        return float(np.polyfit(x, y, 1)[0])


class Request(_Model):
    """What was asked for; with `only`, the contestants whose names hold one of these words, and the first of ours.

    A file that answers another request is measured anew.
    """

    case: str
    variant: str
    repeat: int
    sizes: list[int]
    only: list[str] = []


class CaseResult(_Model):
    """One case; `entries` are in the order of their turns.  `skipped` says why nothing was measured."""

    schema_version: Literal[1] = 1
    request: Request
    title: str
    axis: str
    created: str
    machine: dict[str, str]
    skipped: str = ""
    entries: list[Entry] = []

    @property
    def ours(self) -> Entry | None:
        """The first of ours, which the others are held to."""
        return next((entry for entry in self.entries if entry.kind == "ours"), None)

    @property
    def floor(self) -> Entry | None:
        """The first floor: what the work cannot cost less than."""
        return next((entry for entry in self.entries if entry.kind == "floor"), None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratios(self) -> dict[str, dict[Clock, Spread]]:
        """Ours ÷ each other contestant, turn by turn, at the largest size that both were measured at."""
        return {
            entry.name: {clock: found for clock in ("cpu_s", "wall_s") if (found := ratio(self.ours, entry, clock))}
            for entry in self.entries
            if self.ours and entry is not self.ours
        }

    def save(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all."""
        with writing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CaseResult:
        """Reads what `save` wrote.  Raises AlignError for a file that is missing or something else."""
        return read_model(cls, path, "no result of a benchmark", "name a folder of results", "delete it, and run again")


def common_size(one: Entry, other: Entry) -> int | None:
    """The largest size that both were measured at."""
    return max(
        (measured.size for measured in one.sizes if one.at(measured.size) and other.at(measured.size)), default=None
    )


def ratio(one: Entry | None, other: Entry | None, clock: Clock) -> Spread | None:
    """`one` ÷ `other`, turn by turn: what else the machine does slows both sides of a turn."""
    size = common_size(one, other) if one and other else None
    if size is None:
        return None
    a, b = one.at(size), other.at(size)  # type: ignore[union-attr]
    pairs = zip(a.seconds(clock), b.seconds(clock), strict=False)  # type: ignore[union-attr]
    return Spread.of([first / second for first, second in pairs if second > 0])


def further(one: Entry | None, other: Entry | None, clock: Clock) -> Spread | None:
    """The same for what the largest size costs more than the smallest: of what either does only once, nothing is left.

    None where one of them does not grow in a turn: the machine was then too busy to tell.
    """
    size = common_size(one, other) if one and other else None
    least = min((measured.size for measured in one.sizes if one.at(measured.size)), default=size) if one else size
    if one is None or other is None or size is None or least == size:
        return None
    turns: list[list[float]] = []
    for entry in (one, other):
        first, last = entry.at(least), entry.at(size)  # type: ignore[arg-type]
        if first is None or last is None:
            return None
        turns.append([b - a for a, b in zip(first.seconds(clock), last.seconds(clock), strict=False)])
    if min(map(min, turns)) <= 0:
        return None
    return Spread.of([a / b for a, b in zip(*turns, strict=False)])
