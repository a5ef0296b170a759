"""``align quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from alignment.commands.console import Data, VariantName, kept_float, out, require_folders, stage_bars
from alignment.reading import read_text
from alignment.variant import Variant, load_variant

if TYPE_CHECKING:
    from alignment.quantize.recipe import Quantized


def quantize(
    variant: VariantName,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for the QDQ graph, ranges, cache and scales")],
    method: Annotated[
        str | None,
        typer.Option(
            help="how ranges of activations are chosen: minmax, moving_average, percentile, histogram, entropy or mse; "
            "default of this and the next options: the variant's own"
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="the same of weights: minmax or mse")] = None,
    policy: Annotated[str | None, typer.Option(help="where quantizers go: tensorrt, conv-only or full")] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(help="ONNX node, with wildcards, or a keep_float.yaml or its folder, with its recipe; repeatable"),
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="calibrate on so many")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="separate: ranges of the float network; joint: of one with quantized weights")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(help="of weights: nearest, adaround (layer by layer) or brecq (by blocks)")
    ] = None,
    bias_correction: Annotated[
        bool | None, typer.Option(help="take the mean error of each channel off its bias")
    ] = None,
    equalization: Annotated[
        bool | None, typer.Option(help="scale channels so that convolutions in a row have weights of one size")
    ] = None,
    qdq_only: Annotated[
        bool,
        typer.Option(
            "--qdq-only",
            help="write the QDQ graph and its scales alone: tensors that no policy quantizes are not calibrated, which "
            "takes little more than half the time; default: every tensor is, as routes other than qdq need",
        ),
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="images that go through ONNX Runtime at once")] = 1,
    ranges: Annotated[
        Path | None, typer.Option(help="a TensorRT calibration cache, whose ranges are taken for the tensors it names")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where adaround and brecq run")] = "cpu",
    data: Data = None,
) -> None:
    """Quantize a variant to int8: a QDQ graph, a range for every tensor, a calibration cache, and every scale."""
    from alignment.engine.int8 import ranges_in_cache
    from alignment.quantize import recipe

    require_folders({"--out": out_dir})
    asked: dict[str, Any] = {
        "method": method,
        "weights": weights,
        "policy": policy,
        "images": images,
        "calibration": calibration,
        "rounding": rounding,
        "bias_correction": bias_correction,
        "equalization": equalization,
    }
    files = [Path(name) for name in keep_float or () if name.endswith((".yaml", ".yml")) or Path(name).is_dir()]
    patterns = [name for name in keep_float or () if Path(name) not in files]
    asked = {field: value for field, value in asked.items() if value is not None}
    chosen = kept_float(load_variant(variant), patterns, files, asked)
    given = None if ranges is None else ranges_in_cache(_text(ranges), ranges)
    with stage_bars(chosen.name) as show:
        found = recipe.quantize(chosen, data, batch, show, device, given, every=not qdq_only)
    _print(found, chosen)
    for path in found.save(out_dir, chosen.name):
        out.print(f"wrote {path}", markup=False)
    calibrated = sum(amax > 0 for amax in found.amax.values())
    out.print(
        f"{len(found.placement.weights)} nodes in int8, {len(found.placement.activations)} quantizers, "
        f"{len(found.placement.float_nodes)} nodes bound to float, {calibrated} ranges from "
        f"{found.calibration.images} images",
        markup=False,
    )


def _print(found: Quantized, variant: Variant) -> None:
    """What will go wrong, and what did no good."""
    from alignment.export.onnx_export import exported, modules_of
    from alignment.quantize.trouble import troubles

    known = modules_of(exported(variant).onnx)
    for trouble in troubles(found, known):
        out.print(f"[yellow]{escape(str(trouble))}[/]")
    for unit in found.units:
        if unit.adaround >= unit.nearest:
            out.print(f"{unit.name}: AdaRound does not lower its error: rounded to nearest", markup=False)


def _text(path: Path) -> str:
    mend = "give a TensorRT calibration cache"
    return read_text(path, mend, mend)
