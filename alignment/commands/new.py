"""``align new``."""

from __future__ import annotations

import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.table import Column, Table

from alignment.case import BACKENDS, PRECISIONS, cases_of, require_known
from alignment.commands.console import (
    names_in,
    out,
    print_table,
    progress_bar,
    require_folders,
    size_of,
    stage_bars,
    write_report,
)
from alignment.errors import AlignError
from alignment.guess.findings import LAYOUTS, Asked, Finding
from alignment.results import CaseResult
from alignment.scratch import scratch_folder
from alignment.variant import load_variant, zoo

if TYPE_CHECKING:
    from alignment.guess.bare import Guessed

_QUANTITIES = {"px": "boxes", "rad": "angles", "probability": "scores"}


def new(
    name: Annotated[str, typer.Argument(help="of the variant: lower case, digits and _")],
    onnx: Annotated[Path | None, typer.Option(help="an ONNX file")] = None,
    config: Annotated[str | None, typer.Option(help="an mmyolo config, one of its own by its path there")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="the weights of the config")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="overrides a dotted key of the config; repeatable")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="folder in COCO layout, or of pictures alone; default: $ALIGN_DATA/coco, else drawn shapes"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="how many to align on")] = 32,
    precision: Annotated[str, typer.Option(help="comma-separated: fp32, tf32, fp16")] = "fp32",
    out_dir: Annotated[Path, typer.Option("--out", help="folder for NAME.yaml, golden/NAME.yaml and runs/NAME")] = Path(
        "."
    ),
    force: Annotated[bool, typer.Option("--force", help="overwrite a NAME.yaml that is there")] = False,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="of the input, where it is dynamic")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="how many")] = None,
    layout: Annotated[str | None, typer.Option(help=f"of the head: {', '.join(LAYOUTS)}")] = None,
    output: Annotated[str | None, typer.Option(help="the output that holds the detections")] = None,
    anchors: Annotated[
        str | None, typer.Option(help='of undecoded maps: yolov5, yolov7, or "w,h,w,h,... w,h,..." by stride')
    ] = None,
    values: Annotated[
        Literal["0..1", "0..255", "imagenet", "-1..1"] | None, typer.Option("--range", help="of the input's values")
    ] = None,
    channels: Annotated[Literal["rgb", "bgr"] | None, typer.Option(help="their order")] = None,
    resize: Annotated[
        Literal["letterbox", "letterbox_top_left", "stretch"] | None, typer.Option(help="how images are fitted")
    ] = None,
) -> None:
    """Find out what a model is, write its YAML, run the alignment, propose golden values, and report.

    Killed before its report, the same command writes its YAML anew, unless somebody has changed that.
    """
    from alignment.guess.bare import guess_onnx
    from alignment.guess.config import ConfigSource, guess_config

    path = out_dir / f"{name}.yaml"
    origin = shlex.join(["align", *sys.argv[1:]])
    _require_new(name, path, force or _unfinished(path, out_dir / "runs" / name, origin))
    _require_source(onnx, config, checkpoint)
    read: dict[str, object] = {"--classes": classes, "--layout": layout, "--output": output, "--anchors": anchors}
    read |= {"--range": values, "--channels": channels}
    _require_unused("--config, which says that itself", read if config is not None else {})
    _require_unused("--onnx, which has no config", {"--option": option} if onnx is not None else {})
    require_folders({"--out": out_dir})
    precisions = names_in(precision)
    require_known("precision", precisions, PRECISIONS)
    sides = size_of(size) if size is not None else None
    asked = Asked(sides, classes, _layout(layout), output, _anchors(anchors), values, channels, resize)
    overrides = _options(option or [])
    if onnx is not None:
        with stage_bars(name) as show:
            found = guess_onnx(onnx, name, data, asked, show)
    else:
        assert config is not None
        assert checkpoint is not None
        found = guess_config(ConfigSource(config, checkpoint, overrides), name, data, asked)
    _write(found, path, origin, force)
    _align(found, path, images, precisions, out_dir)


def _write(found: Guessed, path: Path, origin: str, force: bool) -> None:
    """Says the guesses aloud, and writes the YAML."""
    from alignment.guess.write import variant_text, write_variant

    table = Table(Column("field", no_wrap=True), Column("value", no_wrap=True), "how sure", "evidence")
    colours = {"certain": "green", "likely": "yellow", "open": "red"}
    for finding in found.findings:
        colour = colours[finding.sure]
        table.add_row(
            finding.field, _plain(finding), f"[{colour}]{finding.sure}[/]", finding.evidence.replace("[", r"\[")
        )
    print_table(table)
    if likely := [finding.field for finding in found.findings if finding.sure == "likely"]:
        out.print(f"likely, but not certain: {', '.join(likely)}: check them in the YAML", markup=False)
    asked = path, found.variant, found.findings, origin
    if path.exists() and path.read_text(encoding="utf-8") != variant_text(*asked):
        _require_new(found.variant.name, path, force)
    write_variant(*asked)
    out.print(f"wrote {path}", markup=False)


def _align(found: Guessed, path: Path, images: int, precisions: tuple[str, ...], out_dir: Path) -> None:
    """Runs the cases that can run here, and writes golden values and the report."""
    from alignment import session
    from alignment.golden import update
    from alignment.pipeline import RunOptions

    variant = load_variant(path)
    golden, folder = out_dir / "golden", out_dir / "runs" / variant.name
    cases = cases_of(variant, BACKENDS, precisions)
    with scratch_folder() as staging:
        # Held to the defaults: what is there of another model of this name is proposed anew.
        how = RunOptions(golden=staging / "golden", out=staging)
        options = session.SessionOptions(found.data, images, how)
        with progress_bar(variant.name) as show:
            results, seconds, dataset = session.run_cases(variant, cases, options, show)
        kept = replace(options, run=replace(how, golden=golden))
        for case, result in zip(cases, results, strict=True):
            result.command = session.command(variant, case, kept)
        alignment = session.new_alignment(shlex.join(["align", *sys.argv[1:]]))
        session.add_results(alignment, variant, results, seconds, dataset)
        ran = [result for result in results if result.status != "skip"]
        for result in ran if all(result.status == "pass" for result in ran) else ():
            update(golden, result, dataset, f"proposed by align new {variant.name}")
        write_report(alignment, staging, folder)
    _print_proposal(golden, ran)
    for result in results:
        out.print(f"{result.case.id}: {result.status}: {result.reason}", markup=False)
        for doubt in result.doubts:
            out.print(f"[yellow]warning: {doubt}[/]")
    given = f" --data {shlex.quote(str(found.data))}" if found.data else ""
    again = f"align run {shlex.quote(str(path))}{given} --images {images} --golden {shlex.quote(str(golden))}"
    out.print(
        f"aligned on {found.pictures}" if alignment.aligned else "not aligned: no golden values proposed", markup=False
    )
    out.print(f"again: {again} --out {shlex.quote(str(folder))}", markup=False)
    raise typer.Exit(0 if alignment.aligned else 1)


def _print_proposal(folder: Path, results: list[CaseResult]) -> None:
    """What each limit stands on: the measured error, and how far both sides are from float64."""
    from alignment.golden import golden_path, read_golden

    if not results or not golden_path(folder, results[0].case.variant).is_file():
        return
    golden = read_golden(folder, results[0].case.variant)
    table = Table(
        Column("case", no_wrap=True), "quantity", "measured", "reference / subject to float64", "proposed limit"
    )
    known = golden.cases | {name: case for overlay in golden.overlays for name, case in overlay.cases.items()}
    for result in results:
        bands = {_QUANTITIES.get(t.unit, "raw"): t for stage in result.stages for t in stage.tensors}
        checks = {check.name: check.value for stage in result.stages for check in stage.checks}
        for quantity, limit in known[result.case.id].tolerances.items():
            tensor, band = bands.get(quantity), "what is measured" if result.reference == "float64" else ""
            if tensor and tensor.reference_error and tensor.subject_error:
                band = f"{tensor.reference_error.max_abs:.3g} / {tensor.subject_error.max_abs:.3g}"
            table.add_row(result.case.id, quantity, f"{checks[quantity]:.4g}", band, f"{limit.value:g}")
    print_table(table)
    out.print(f"proposed in {golden_path(folder, results[0].case.variant)}", markup=False)


def _require_new(name: str, path: Path, force: bool) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", name):
        raise AlignError(f"{name}: no name of a variant", "give lower case letters, digits and _")
    if name in {known.stem for known in zoo()}:
        raise AlignError(f"{name}: a variant of the zoo has that name", "give another")
    if path.exists() and not force:
        raise AlignError(f"{path}: is there already", "give another name, or --force to overwrite it")


def _unfinished(path: Path, run: Path, origin: str) -> bool:
    """Whether this very command has written the YAML, and was killed before the last file of its report."""
    from alignment.guess.write import header
    from alignment.report.run_folder import JUNIT

    if not path.is_file() or (run / JUNIT).is_file():
        return False
    return path.read_text(encoding="utf-8", errors="replace").startswith(header(origin))


def _require_source(onnx: Path | None, config: str | None, checkpoint: Path | None) -> None:
    if (onnx is None) == (config is None):
        raise AlignError("one model is needed", "give --onnx FILE, or --config FILE with --checkpoint FILE")
    if config is not None and checkpoint is None:
        raise AlignError(f"--config {config}: no weights", "give --checkpoint FILE")
    if config is None and checkpoint is not None:
        raise AlignError(f"--checkpoint {checkpoint}: of which model", "give --config FILE with it, not --onnx")


def _require_unused(by: str, options: dict[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            raise AlignError(f"{name} is not taken with {by}", f"leave out {name}")


def _layout(text: str | None) -> str | None:
    if text is not None and text not in LAYOUTS:
        raise AlignError(f"--layout {text}: no such layout", f"choose from {', '.join(LAYOUTS)}")
    return text


def _anchors(text: str | None) -> str | list[list[float]] | None:
    if text is None or text in ("yolov5", "yolov7"):
        return text
    try:
        levels = [[float(number) for number in level.split(",")] for level in text.split()]
    except ValueError:
        levels = []
    sound = all(len(level) % 2 == 0 and all(0 < side < math.inf for side in level) for level in levels)
    if not levels or not sound or len({len(level) for level in levels}) > 1:
        mend = 'give yolov5, yolov7, or width and height of as many for each stride: "10,13,16,30 30,61,62,45"'
        raise AlignError(f"--anchors {text}: no anchors", mend)
    return levels


def _options(given: list[str]) -> dict[str, Any]:
    pairs = [text.partition("=") for text in given]
    for key, equals, _ in pairs:
        if not equals or not key:
            raise AlignError(
                f"--option {key}: no KEY=VALUE", "give one such as model.bbox_head.head_module.num_classes=6"
            )
    try:
        return {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError:
        raise AlignError(f"--option {' '.join(given)}: a value that is no YAML", "mend it, or quote it") from None


def _plain(finding: Finding) -> str:
    return str(finding.value).replace("[", r"\[")
