"""Partial quantization of a variant: what is asked for, the search for it, and what is written of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.quantize.candidates import Candidates
from alignment.quantize.keep_float import KEEP_FLOAT, write_keep_float
from alignment.quantize.partial_result import PARTIAL, Goal, Point
from alignment.quantize.ranking import rank_correlations
from alignment.quantize.scoring import Score, Scorer
from alignment.quantize.search import NONE, SWAPS, TRIES, Choice, Kept, Search
from alignment.quantize.sensitivity import METRICS, Mode, Sensitivity
from alignment.storage import writing

BUDGET = "give AP=0.3 for 0.3 points of AP (0.003 of 1) lost at most, or agreement=0.95 for that agreement at least"


def budget(text: str) -> Goal:
    """The goal that ``--budget`` names: ``AP=0.3`` or ``agreement=0.95``.  Raises AlignError for another text."""
    kind, _, number = text.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if kind not in ("AP", "agreement") or not 0 <= limit <= (100 if kind == "AP" else 1):
        raise AlignError(f"--budget {text}: no budget", BUDGET)
    return Goal(kind, limit)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Partial:
    """What came of a search.

    Attributes:
        candidates: what it chose from.
        goal: what was asked for.
        metric: that ranked the candidates.
        sensitivity: where the ranking is from.
        reference: the score of the float32 network.
        images: how many it was scored on.
        search: all that was scored.
        found: what was chosen.
        needed: by how much agreement falls when a chosen node alone goes back to int8.
        correlations: see `rank_correlations`.
    """

    candidates: Candidates
    goal: Goal
    metric: str
    sensitivity: Sensitivity
    reference: Score
    images: int
    search: Search
    found: Choice
    needed: dict[str, float]
    correlations: dict[str, dict[str, float]] = field(default_factory=dict)

    def point(self, kept: Kept) -> Point:
        """A set that was scored."""
        score, share = self.search.scores[kept], self.candidates.int8_share(kept)
        lost = self.reference.ap - score.ap
        latency = self.search.latencies.get(kept, math.inf)
        timed = latency if math.isfinite(latency) else None
        return Point(self.search.ranked(kept), share, score.ap, lost, score.agreement, timed)

    @property
    def points(self) -> list[Point]:
        """Every set that was scored, in that order."""
        return [self.point(kept) for kept in self.search.scores]

    @property
    def ways(self) -> dict[str, Point]:
        """The sets that are compared, by how they were found: nothing in float first."""
        return {name: self.point(kept) for name, kept in {"all in int8": NONE, **self.found.ways}.items()}

    @property
    def reasons(self) -> dict[str, str]:
        """Why each node stays float, those that the recipe names included; in the order of the graph."""
        values = {layer.node: layer.metrics[self.metric] for layer in self.sensitivity.layers}
        reasons = {}
        for node in self.candidates.named(self.found.chosen):
            if node in self.found.chosen:
                rank = self.search.ranking.index(node) + 1
                value = f"{values[node]:.4g}" if node in values else "not in the ranking"
                gain = f"in int8 as the only one of these it would cost {self.needed[node]:.4f} of agreement"
                reasons[node] = f"rank {rank} by {self.metric} ({value}); {gain}"
            else:
                reasons[node] = f"the recipe keeps {self.candidates.kept_by_recipe[node]}"
        return reasons

    def report(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        variant = self.candidates.variant
        return {
            "variant": variant.name,
            "graph_sha256": file_digest(self.candidates.source),
            "recipe": variant.quantization.model_dump(mode="json"),
            "goal": asdict(self.goal),
            "reached": self.found.reached,
            "images": self.images,
            "reference": asdict(self.reference),
            "ranking": {"metric": self.metric, "mode": self.sensitivity.mode, "nodes": list(self.search.ranking)},
            "chosen": asdict(self.point(self.found.chosen)),
            "ways": {name: asdict(point) for name, point in self.ways.items()},
            "rank_correlations": {
                metric: {cost: None if math.isnan(value) else value for cost, value in found.items()}
                for metric, found in self.correlations.items()
            },
            "points": [asdict(point) for point in self.points],
        }

    def save(self, folder: Path) -> list[Path]:
        """Writes ``keep_float.yaml``, ``partial.json`` and ``pareto.svg``, and returns the paths."""
        from alignment.report.pareto import draw_pareto

        paths = [folder / name for name in (KEEP_FLOAT, PARTIAL, "pareto.svg")]
        variant = self.candidates.variant
        write_keep_float(paths[0], variant.name, self.candidates.source, self.reasons, variant.quantization)
        with writing(paths[1]) as file:
            file.write_text(json.dumps(self.report(), indent=1) + "\n", encoding="utf-8")
        with writing(paths[2]) as file:
            draw_pareto(file, variant.name, self.points, self.point(self.found.chosen), self.ways)
        return paths


def swept(
    candidates: Candidates,
    scorer: Scorer,
    progress: Callable[[str, int, int], None] | None,
    executor: Executor | None = None,
) -> Sensitivity:
    """The sweep that a search goes by, on the same images; the rest as `alignment.quantize.sweep.sweep` has it."""
    from alignment.quantize.sweep import sweep

    mode: Mode = "leave-one-out" if candidates.variant.quantization.searched else "quantize-one"
    return sweep(
        candidates.variant, candidates.quantized(()), scorer.samples, mode, executor=executor, progress=progress
    )[0]


def partial(
    candidates: Candidates,
    scorer: Scorer,
    sensitivity: Sensitivity,
    goal: Goal,
    metric: str = "agreement",
    tries: int = TRIES,
    swaps: int = SWAPS,
    latency: Callable[[Kept], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Partial:
    """Searches for the nodes to keep in float.

    Args:
        candidates: what may stay float.
        scorer: of the same variant.
        sensitivity: of the same graph; candidates that it does not know come last.
        goal: what is asked for.
        metric: by which candidates are ranked that are tried; the first ones of other metrics are sets to compare.
        tries, swaps: see `Search`.
        latency: times a set, in ms, for a goal of that kind.
        progress: called with the number of sets scored, and how many there are at most.

    Raises:
        AlignError: for a sensitivity of another graph or without that metric, more nodes than there are, or a budget of
            AP on images without truth.
    """
    _require_same(candidates, sensitivity)
    rankings = {metric: _ranking(candidates, sensitivity, metric)}
    rankings |= {other: _ranking(candidates, sensitivity, other) for other in _metrics(sensitivity) if other != metric}

    def objective(kept: Kept) -> Score:
        return scorer.score_made(candidates.identity(kept), lambda: candidates.quantized(kept).model)

    search = Search(rankings, objective, tries, swaps, progress)
    reference = scorer.float_score
    if goal.kind == "AP" and reference.ap < 0:
        raise AlignError(f"{candidates.variant.name}: its images have no truth to lose AP on", "give agreement=0.95")
    search.score(NONE)
    if goal.kind == "layers":
        if goal.limit > len(candidates.nodes):
            raise AlignError(
                f"--layers {goal.limit:g}: {len(candidates.nodes)} nodes are in int8", "ask for so many at most"
            )
        found = search.by_count(int(goal.limit))
    elif goal.kind == "latency":
        assert latency is not None
        found = search.by_latency(latency, goal.limit)
    else:
        found = search.by_score(lambda score: goal.accepts(score, reference), candidates.macs)
    needed = search.needed(found.chosen)
    correlations = rank_correlations(sensitivity, candidates.nodes)
    images = len(scorer.samples)
    return Partial(candidates, goal, metric, sensitivity, reference, images, search, found, needed, correlations)


def _metrics(sensitivity: Sensitivity) -> list[str]:
    """What all its layers were measured by."""
    return [metric for metric in METRICS if all(metric in layer.metrics for layer in sensitivity.layers)]


def _ranking(candidates: Candidates, sensitivity: Sensitivity, metric: str) -> list[str]:
    known = [node for node in sensitivity.ranking(metric) if node in candidates.nodes]
    return [*known, *(node for node in candidates.nodes if node not in known)]


def _require_same(candidates: Candidates, sensitivity: Sensitivity) -> None:
    ours, theirs = file_digest(candidates.source), sensitivity.identity.get("reference_sha256")
    if theirs != ours:
        what = f"--ranking: the ranking is of {sensitivity.variant}'s graph {str(theirs)[:12]}, this one is {ours[:12]}"
        raise AlignError(what, "make it anew with `align sensitivity`")
