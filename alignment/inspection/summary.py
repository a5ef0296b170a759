"""What the layers of an engine come to, by precision and by finding, and what two engines compute otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from alignment.inspection.findings import KINDS, Finding
from alignment.inspection.saved import Inspection


class Sum(NamedTuple):
    """Layers or findings of one kind: how many, what the layers take where that was measured, and ONNX nodes of it."""

    name: str
    number: int
    milliseconds: float | None
    nodes: int | None = None


def by_precision(engine: Inspection) -> list[Sum]:
    """By what the layers run in, ``moves`` being those that only move tensors; then what became of other nodes."""
    kinds = ["moves" if one.moves else one.runs_in or "?" for one in engine.engine_graph.layers]
    counts = engine.engine_graph.precisions.counts()
    found = []
    for kind in dict.fromkeys([*sorted(set(kinds)), *counts]):
        places = {place for place, other in enumerate(kinds) if other == kind}
        found.append(Sum(kind, len(places), _milliseconds(engine, places) if places else None, counts.get(kind)))
    return found


def by_finding(engine: Inspection, found: Sequence[Finding]) -> list[Sum]:
    """By what was found, each layer counted once."""
    places = {kind: [finding.place for finding in found if finding.kind == kind] for kind in KINDS}
    return [Sum(kind, len(own), _milliseconds(engine, set(own))) for kind, own in places.items()]


def otherwise(left: Inspection, right: Inspection) -> list[tuple[str, str, str]]:
    """The ONNX nodes that both engines compute, in another precision, and these; in the order of the first graph."""
    ours, theirs = (engine.engine_graph.precisions.mapped for engine in (left, right))
    both = ((node, ours[node].runs_in, theirs[node].runs_in) for node in ours if node in theirs)
    return [(node, one, other) for node, one, other in both if one != other]


def _milliseconds(engine: Inspection, places: set[int]) -> float | None:
    return sum(engine.milliseconds(place) or 0.0 for place in places) if engine.times else None
