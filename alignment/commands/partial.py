"""``align partial``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from alignment.commands.console import (
    Data,
    Images,
    Plain,
    Policy,
    Scheduler,
    VariantName,
    Workers,
    out,
    print_table,
    recipe_changes,
    require_folders,
    stage_bars,
)
from alignment.errors import AlignError, BuildError
from alignment.variant import load_variant, with_quantization

if TYPE_CHECKING:
    from alignment.quantize.candidates import Candidates
    from alignment.quantize.partial import Goal, Partial, Point
    from alignment.quantize.scoring import Scorer
    from alignment.quantize.search import Kept


def partial(
    variant: VariantName,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for keep_float.yaml, partial.json and pareto.svg")],
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="AP=0.3",
            help="lose at most 0.3 points of AP, 0.003 of 1, against FP32, with as few multiplications in float as "
            "possible; or agreement=0.95, for that agreement with FP32 at least",
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="keep so many nodes in float, the best set of them")] = None,
    latency: Annotated[
        float | None, typer.Option(min=0, help="take at most so many ms on TensorRT here, as accurate as possible")
    ] = None,
    ranking: Annotated[
        Path | None, typer.Option(metavar="FILE.sensitivity.json", help="of `align sensitivity`; default: sweep now")
    ] = None,
    metric: Annotated[str, typer.Option(help="of the ranking, by which nodes are tried")] = "agreement",
    tries: Annotated[int, typer.Option(min=1, help="try so many of the best-ranked nodes at each step")] = 8,
    level: Annotated[int, typer.Option(min=0, max=5, help="with --latency: of the builder; 3 is what is deployed")] = 3,
    swaps: Annotated[int, typer.Option(min=0, help="with --layers: exchange nodes of the set so often at most")] = 3,
    policy: Policy = None,
    plain: Plain = False,
    images: Images = None,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    data: Data = None,
) -> None:
    """Find the few nodes to keep in float: by measured gain, as two sensitive nodes may have one cause.

    Sets are compared by agreement with FP32 in ONNX Runtime, which resolves finer than AP on a few images.  Scores are
    kept: interrupted, it goes on next time.  Exit status 1: what was asked for cannot be reached; the best is written.
    """
    goal = _goal(budget, layers, latency)
    require_folders({"--out": out_dir})
    from alignment.executor import open_executor
    from alignment.quantize.candidates import Candidates
    from alignment.quantize.keep_float import KEEP_FLOAT
    from alignment.quantize.partial import partial as search
    from alignment.quantize.partial import swept
    from alignment.quantize.scoring import Scorer
    from alignment.quantize.sensitivity import Sensitivity, require_metric
    from alignment.report.pareto import require_matplotlib

    require_matplotlib()
    require_metric(metric)
    chosen = with_quantization(load_variant(variant), recipe_changes(plain, policy))
    given = None if ranking is None else Sensitivity.load(ranking)
    with open_executor(workers, scheduler) as executor, stage_bars(chosen.name) as show:
        candidates, scorer = Candidates(chosen, data), Scorer(chosen, data, images, executor)
        timed = _timer(candidates, scorer, level) if goal.kind == "latency" else None
        asked = (given or swept(candidates, scorer, show, executor), goal, metric, tries, swaps, timed)
        found = search(candidates, scorer, *asked, lambda done, most: show("sets, at most", done, most))
    _print(found)
    for path in found.save(out_dir):
        out.print(f"wrote {path}", markup=False)
    out.print(f"it is taken by: align quantize {variant} --keep-float {out_dir / KEEP_FLOAT} --out DIR", markup=False)
    if not found.found.reached:
        out.print(f"not reached: {goal}; what is written is the best that was found")
        raise typer.Exit(1)


def _goal(budget: str | None, layers: int | None, latency: float | None) -> Goal:
    """What is asked for; TensorRT is here where it is needed."""
    from alignment.engine.capabilities import Capabilities
    from alignment.quantize.partial import Goal
    from alignment.quantize.partial import budget as named

    if sum(option is not None for option in (budget, layers, latency)) != 1:
        raise AlignError("align partial wants one goal", "give one of --budget, --layers and --latency")
    if budget is not None:
        return named(budget)
    if layers is not None:
        return Goal("layers", layers)
    Capabilities.current()
    return Goal("latency", latency or 0.0)


def _timer(candidates: Candidates, scorer: Scorer, level: int) -> Callable[[Kept], float]:
    """Times a set on TensorRT; infinity, and why, where no engine comes of it."""
    from alignment.runners.int8 import qdq_latency

    image = next(iter(scorer.samples)).tensor

    def timed(kept: Kept) -> float:
        try:
            return qdq_latency(candidates.variant, candidates.quantized(kept), image, level)
        except BuildError as error:
            out.print(f"no engine with {', '.join(sorted(kept)) or 'nothing more'} in float: {error}", markup=False)
            return math.inf

    return timed


def _print(found: Partial) -> None:
    numbers = [Column(name, justify="right") for name in ("in float", "MACs in int8", "AP", "AP lost", "agreement")]
    title = f"{found.candidates.variant.name}, {found.images} images: {found.goal}"
    table = Table("nodes", *numbers, title=title)
    table.add_row("FP32", "", "", f"{found.reference.ap:.4f}", "", "1.0000")
    for name, point in {**found.ways, "chosen": found.point(found.found.chosen)}.items():
        table.add_row(name, *_cells(point))
    print_table(table)
    for node, reason in found.reasons.items():
        out.print(f"{node}: {reason}", markup=False)
    costs = next(iter(found.correlations.values()), {})
    if costs:
        table = Table("metric", *(Column(cost, justify="right") for cost in costs), title="rank correlation with lost")
        for metric, values in found.correlations.items():
            table.add_row(metric, *(f"{value:+.3f}" for value in values.values()))
        print_table(table)


def _cells(point: Point) -> list[str]:
    counts = [f"{len(point.kept)}", f"{point.int8_macs:.1%}"]
    return [*counts, f"{point.ap:.4f}", f"{point.ap_lost:+.4f}", f"{point.agreement:.4f}"]
