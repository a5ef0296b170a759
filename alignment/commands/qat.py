"""``align qat``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Column, Table

from alignment.commands.console import (
    Data,
    Plain,
    Policy,
    VariantName,
    kept_float,
    out,
    print_table,
    recipe_changes,
    require_folders,
    stage_bars,
)
from alignment.errors import AlignError
from alignment.variant import Variant, load_variant

if TYPE_CHECKING:
    from alignment.quantize.qat import Outcome

DISTILL = {"none": (), "features": ("features",), "logits": ("logits",), "both": ("features", "logits")}


def qat(
    variant: VariantName,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for the trained variant and its graphs")],
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", help="a keep_float.yaml of `align partial`, or its folder"),
    ] = None,
    keep_float: Annotated[
        list[str] | None, typer.Option(help="ONNX node, with wildcards, that stays float; repeatable")
    ] = None,
    policy: Policy = None,
    plain: Plain = False,
    epochs: Annotated[int, typer.Option(min=1, help="at most; the best of them is kept")] = 6,
    lr: Annotated[float, typer.Option(min=0, max=1e6, help="learning rate of weights, in quantization steps")] = 0.01,
    learn_scales: Annotated[
        bool, typer.Option("--learn-scales/--keep-scales", help="whether scales of activations are trained (LSQ)")
    ] = True,
    scale_lr: Annotated[
        float, typer.Option(min=0, max=1e6, help="learning rate of scales, in parts of themselves")
    ] = 0.01,
    distill: Annotated[
        Literal["none", "features", "logits", "both"], typer.Option(help="what is learnt from the float model")
    ] = "both",
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="whether the truth is learnt from, by mmyolo's losses")
    ] = True,
    images: Annotated[int, typer.Option(min=1, help="train on so many images at most")] = 224,
    held_out: Annotated[int, typer.Option(min=1, help="so many others say which epoch is best")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="images at once")] = 8,
    patience: Annotated[int, typer.Option(min=1, help="so many epochs without a better one end it")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="of the order of images, and of flips")] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where it trains")] = "cpu",
    data: Data = None,
) -> None:
    """Train a quantized variant for a few epochs, by mmyolo's losses or by what the float model says.

    It begins with what `align quantize` finds by the variant's recipe, or by that of the keep_float.yaml. An epoch
    counts by agreement with FP32 on training images that were held out. Interrupted, it goes on next time. The result
    is a variant of its own: `align run DIR/NAME_qat.yaml --precision int8` takes it by every route. Exit status 1: no
    epoch was better than the start, or training diverged; the best weights are written all the same.
    """
    require_folders({"--out": out_dir})
    chosen = _trainable(load_variant(variant))
    chosen = kept_float(chosen, keep_float or (), [start] if start else [], recipe_changes(plain, policy))
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from alignment.quantize.qat import Options
    from alignment.quantize.qat_files import train_into

    options = Options(
        epochs=epochs,
        lr=lr,
        scale_lr=scale_lr,
        batch=batch,
        images=images,
        held_out=held_out,
        labels=labels,
        distill=DISTILL[distill],
        learn_scales=learn_scales,
        patience=patience,
        seed=seed,
        device=device,
    )
    with stage_bars(chosen.name) as show:
        outcome, paths = train_into(out_dir, chosen, options, data, show)
    _print(outcome, paths)
    if outcome.diverged or outcome.best == 0:
        raise typer.Exit(1)


def _trainable(variant: Variant) -> Variant:
    """The variant itself.  Raises AlignError for one that was trained, or that has no torch model."""
    if variant.quantization.trained is not None:
        raise AlignError(f"{variant.name}: trained already", "begin with the variant that it was made of")
    if not variant.has_torch:
        raise AlignError(f"{variant.name}: a bare ONNX file has no torch model to train", "give an mmyolo variant")
    return variant


def _print(outcome: Outcome, paths: list[Path]) -> None:
    names = list(dict.fromkeys(name for epoch in outcome.epochs for name in epoch))
    names = [*(name for name in names if name != "agreement"), "agreement"]
    table = Table(Column("epoch", justify="right"), *(Column(name, justify="right") for name in names))
    for number, epoch in enumerate(outcome.epochs):
        cells = [f"{epoch[name]:.4f}" if name in epoch else "" for name in names]
        table.add_row(f"{number}{' (best)' if number == outcome.best else ''}", *cells)
    print_table(table)
    for path in paths:
        out.print(f"wrote {path}", markup=False)
    if outcome.diverged:
        out.print(f"diverged: {outcome.stopped}; the weights of epoch {outcome.best} are kept", markup=False)
    elif outcome.stopped:
        out.print(f"stopped early: {outcome.stopped}", markup=False)
    if outcome.best == 0:
        out.print("no epoch is better than the start, which is what was written")
