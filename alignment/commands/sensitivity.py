"""``align sensitivity``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
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
from alignment.errors import AlignError
from alignment.quantize.sensitivity import METRICS, MODES, PARTS, Sensitivity, require_metric
from alignment.variant import load_variant, with_quantization

#: Of a recipe that is not plain.
SEARCHED = (
    "its weights or biases were searched for a network that is all int8, and are off in one that is float but for a "
    "layer: take --plain, or --mode leave-one-out"
)


def sensitivity(
    variant: VariantName,
    metric: Annotated[str, typer.Option(help=f"that layers are ranked by: {', '.join(METRICS)}")] = "agreement",
    mode: Annotated[
        str, typer.Option(help="quantize-one: each layer alone in int8; leave-one-out: each alone in float")
    ] = "quantize-one",
    part: Annotated[str, typer.Option(help="what reads int8: both, weights or activations")] = "both",
    units: Annotated[str, typer.Option(help="layers with learnt weights, or all nodes that read int8")] = "weights",
    policy: Policy = None,
    plain: Plain = False,
    images: Images = None,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="JSON of all numbers; it is kept in the cache")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG of the ranking")] = None,
    show: Annotated[int, typer.Option(min=1, help="how many layers to list")] = 20,
    data: Data = None,
) -> None:
    """Rank the layers of a variant by what each costs in int8, in ONNX Runtime; interrupted, it goes on next time."""
    from alignment.data.samples import open_samples
    from alignment.executor import open_executor
    from alignment.quantize.recipe import quantize
    from alignment.quantize.sweep import sweep

    require_metric(metric)
    for option, value, choices in (
        ("--mode", mode, MODES),
        ("--part", part, PARTS),
        ("--units", units, ("weights", "all")),
    ):
        _require(option, value, choices)
    require_folders({"--out": out_file and out_file.parent, "--plot": plot and plot.parent})
    if plot:
        from alignment.report.pareto import require_matplotlib

        require_matplotlib()
    chosen = with_quantization(load_variant(variant), recipe_changes(plain, policy))
    if mode == "quantize-one" and chosen.quantization.searched:
        out.print(f"[yellow]{escape(chosen.name)}: {SEARCHED}[/]")
    samples = open_samples(chosen, data, images)
    with open_executor(workers, scheduler) as executor, stage_bars(chosen.name) as bars:
        quantized = quantize(chosen, data, progress=bars, every=False)
        found, path = sweep(
            chosen,
            quantized,
            samples,
            mode,  # type: ignore[arg-type]
            part,  # type: ignore[arg-type]
            units,  # type: ignore[arg-type]
            executor=executor,
            progress=bars,
        )
    print_table(_table(found, metric, show))
    if out_file:
        found.save(out_file)
    out.print(f"wrote {out_file or path}", markup=False)
    if plot:
        from alignment.report.ranking import draw_ranking

        draw_ranking(found, metric, plot)
        out.print(f"wrote {plot}", markup=False)


def _require(option: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise AlignError(f"{option} {value}: no such choice", f"choose from {', '.join(choices)}")


def _table(found: Sensitivity, metric: str, show: int) -> Table:
    """The most sensitive layers, and all their numbers."""
    layers = {layer.node: layer for layer in found.layers}
    ranking = found.ranking(metric)
    macs = sum(layer.macs for layer in found.layers) or 1
    names = [metric, *(name for name in layers[ranking[0]].metrics if name != metric)]
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("MACs", *names)]
    title = f"{found.variant}: {found.mode}, {found.part}, {found.images} images, by {metric}: {METRICS[metric].what}"
    table = Table(*(Column(name, overflow="fold") for name in ("node", "module")), *numbers, title=title)
    for node in ranking[:show]:
        layer = layers[node]
        values = [_cell(name, layer.metrics) for name in names]
        table.add_row(escape(node), escape(layer.module), f"{layer.macs / macs:.1%}", *values)
    table.add_section()
    base = [_cell(name, found.baseline) for name in names]
    table.add_row("none" if found.mode == "quantize-one" else "all", "", "", *base)
    return table


def _cell(name: str, numbers: Mapping[str, float]) -> str:
    if name not in numbers:
        return ""
    return f"{numbers[name]:.6f}" if name.startswith("cosine") else f"{numbers[name]:.3g}"
