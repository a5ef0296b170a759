"""``align qat``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.table import Column, Table

from alignment.commands.console import (
    Data,
    Plain,
    Policy,
    VariantName,
    out,
    print_table,
    recipe_changes,
    require_folders,
    stage_bars,
)
from alignment.errors import AlignError
from alignment.storage import data_dir, writing
from alignment.variant import MMYoloSource, Variant, golden_dir, load_variant, with_quantization

if TYPE_CHECKING:
    from alignment.quantize.qat import Outcome
    from alignment.quantize.trained import Trained

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

    It begins with what `align quantize` finds by the variant's recipe, with the --policy and --plain that `align
    partial` was given. An epoch counts by agreement with FP32 on training images that were held out. Interrupted,
    it goes on next time. The result is a variant of its own: `align run DIR/NAME_qat.yaml --precision int8` takes
    it by every route. Exit status 1: no epoch was better than the start, or training diverged; the best weights are
    written all the same.
    """
    require_folders({"--out": out_dir})
    found = load_variant(variant)
    if found.quantization.trained is not None:
        raise AlignError(f"{found.name}: trained already", "begin with the variant that it was made of")
    chosen = _kept_float(with_quantization(found, recipe_changes(plain, policy)), start, keep_float)
    if not chosen.has_torch:
        raise AlignError(f"{chosen.name}: a bare ONNX file has no torch model to train", "give an mmyolo variant")
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from alignment.quantize import recipe
    from alignment.quantize.qat import Options, train

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
    checkpoint = out_dir / f"{chosen.name}.qat.checkpoint.pth"
    with stage_bars(chosen.name) as show:
        quantized = recipe.quantize(chosen, data, progress=show)
        outcome = train(chosen, quantized, options, checkpoint, data, show)
        paths = _write(outcome.trained, outcome.report(chosen, options), chosen, out_dir, data)
    checkpoint.unlink(missing_ok=True)
    _print(outcome)
    for path in paths:
        out.print(f"wrote {path}", markup=False)
    if outcome.diverged:
        out.print(f"diverged: {outcome.stopped}; the weights of epoch {outcome.best} are kept", markup=False)
    elif outcome.stopped:
        out.print(f"stopped early: {outcome.stopped}", markup=False)
    if outcome.best == 0:
        out.print("no epoch is better than the start, which is what was written")
    if outcome.diverged or outcome.best == 0:
        raise typer.Exit(1)


def _kept_float(variant: Variant, start: Path | None, patterns: list[str] | None) -> Variant:
    """The variant with these nodes in float, in place of those of its recipe where any are given."""
    nodes = list(patterns or ())
    if start is not None:
        from alignment.export.onnx_export import exported
        from alignment.quantize.keep_float import read_keep_float

        path = start / "keep_float.yaml" if start.is_dir() else start
        nodes += read_keep_float(path, exported(variant).onnx)
    return with_quantization(variant, {"keep_float": nodes}) if nodes else variant


def _write(trained: Trained, report: dict[str, Any], variant: Variant, folder: Path, data: Path | None) -> list[Path]:
    """Weights, variant, graphs and report; the variant is read again, so that what is written is what `run` takes."""
    from alignment.quantize import recipe

    weights, papers, own = (folder / f"{variant.name}{end}" for end in (".qat.npz", ".qat.json", "_qat.yaml"))
    trained.save(weights)
    with writing(own) as temporary:
        text = yaml.safe_dump(_fields(variant, weights.name), sort_keys=False, allow_unicode=True, width=1000)
        temporary.write_text(text, encoding="utf-8")
    graphs = recipe.quantize(load_variant(own), data).save(folder, variant.name)
    with writing(papers) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return [own, weights, papers, *graphs]


def _fields(variant: Variant, trained: str) -> dict[str, Any]:
    """The trained variant as YAML has it, under a name of its own: golden values are of one variant."""
    fields = variant.model_dump(mode="json", exclude_defaults=True, exclude={"notes"})
    assert isinstance(variant.source, MMYoloSource)
    fields["source"]["checkpoint"] = _portable(variant.source.checkpoint)
    recipe = {**variant.quantization.model_dump(mode="json", exclude_defaults=True), "trained": trained}
    return {**fields, "name": f"{variant.name}_qat", "quantization": recipe}


def _portable(path: Path) -> str:
    """A path by the variable that a variant's YAML may name it with, or as it is."""
    absolute = path.absolute()
    for name, folder in (("GOLDEN", golden_dir()), ("ALIGN_DATA", data_dir())):
        if absolute.is_relative_to(folder.absolute()):
            return f"${{{name}}}/{absolute.relative_to(folder.absolute())}"
    return str(absolute)


def _print(outcome: Outcome) -> None:
    names = list(dict.fromkeys(name for epoch in outcome.epochs for name in epoch))
    names = [*(name for name in names if name != "agreement"), "agreement"]
    table = Table(Column("epoch", justify="right"), *(Column(name, justify="right") for name in names))
    for number, epoch in enumerate(outcome.epochs):
        cells = [f"{epoch[name]:.4f}" if name in epoch else "" for name in names]
        table.add_row(f"{number}{' (best)' if number == outcome.best else ''}", *cells)
    print_table(table)
