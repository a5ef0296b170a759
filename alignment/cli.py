"""``align``: run, new, report, gate, table, export, quantize, sensitivity, partial, qat, ladder, culprit, layers,
explain, inspect, variants, doctor, cache, schema, synthetic.

Exit status: 0 aligned, 1 not aligned, 2 wrong usage or input.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from alignment.cache import Key, until_done
from alignment.case import ROUTES
from alignment.commands import cache
from alignment.commands.console import (
    Commands,
    Data,
    Golden,
    Images,
    Size,
    VariantName,
    names_in,
    out,
    print_table,
    progress_bar,
    reported,
    require_folders,
    sized,
    write_report,
)
from alignment.commands.culprit import culprit
from alignment.commands.explain import explain
from alignment.commands.gate import gate
from alignment.commands.inspect import inspect
from alignment.commands.ladder import ladder
from alignment.commands.new import new
from alignment.commands.partial import partial
from alignment.commands.qat import qat
from alignment.commands.quantize import quantize
from alignment.commands.report import report
from alignment.commands.sensitivity import sensitivity
from alignment.errors import AlignError
from alignment.results import Alignment, CaseResult
from alignment.runners.base import limit_openmp
from alignment.scratch import scratch_folder
from alignment.variant import Variant, golden_dir, load_variant, zoo

app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
@reported
def run(
    context: typer.Context,
    variants: Annotated[
        list[str] | None, typer.Argument(help="names or YAML files; default: the embedded ones")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="comma-separated: torch, onnxruntime, tensorrt")
    ] = "torch,onnxruntime,tensorrt",
    precision: Annotated[str, typer.Option(help="comma-separated: fp32, tf32, fp16, int8")] = "fp32",
    route: Annotated[str, typer.Option(help="how int8 reaches a backend, comma-separated")] = ",".join(ROUTES),
    data: Data = None,
    images: Images = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="images that go through a backend at once")] = 1,
    out_dir: Annotated[Path | None, typer.Option("--out", help="RUN folder: alignment.json, report.html, ...")] = None,
    golden: Golden = None,
    records: Annotated[Path | None, typer.Option(help="folder to write records of this run into")] = None,
    update_golden: Annotated[
        str | None, typer.Option(metavar="REASON", help="write what is measured as golden values")
    ] = None,
    strict: Annotated[bool, typer.Option(help="a case that is skipped is a failure")] = False,
) -> None:
    """Run variants through the backends, compare them stage by stage, and say whether they are aligned."""
    from alignment import session
    from alignment.case import cases_of
    from alignment.golden import update
    from alignment.pipeline import RunOptions

    require_folders({"--out": out_dir, "--records": records, "--golden": golden if update_golden else None})
    folder = golden or golden_dir()
    chosen = [sized(v, size) for v in (map(load_variant, variants) if variants else embedded())]
    plan = [(v, cases_of(v, names_in(backend), names_in(precision), names_in(route))) for v in chosen]
    if not any(cases for _, cases in plan):
        what = f"--backend {backend} --precision {precision} --route {route}: no such case"
        raise AlignError(what, session.NO_CASE_MEND)
    # Of this very command, so that another one measures for itself.
    asked = {"folder": str(Path.cwd()), "options": {k: str(v) for k, v in context.params.items()}}
    with scratch_folder() as staging, until_done(Key("run", chosen[0].name, asked)) as journal:
        how = RunOptions(golden=folder, out=staging, records=records, batch=batch, journal=journal)
        options = session.SessionOptions(data, images, how)
        for variant, cases in plan if variants else ():
            session.require(variant, cases, options)
        measured: list[tuple[CaseResult, dict[str, Any]]] = []
        alignment = session.new_alignment(shlex.join(["align", *sys.argv[1:]]))
        for variant, cases in plan:
            with progress_bar(variant.name) as show:
                results, seconds, dataset = session.run_cases(variant, cases, options, show)
            session.add_results(alignment, variant, results, seconds, dataset)
            measured += [(result, dataset) for result in results if result.status != "skip"]
        _print_results(alignment)
        if out_dir:
            write_report(alignment, staging, out_dir)
    # Golden values change only now: a run that fails at its last variant changes none.
    for result, dataset in measured if update_golden else ():
        if result.replayed:
            out.print(f"{result.case.id}: replayed, which measures nothing: its golden values stay", markup=False)
        else:
            out.print(f"wrote {update(folder, result, dataset, str(update_golden))}", markup=False)
    skipped = sum(case.status == "skip" for case in alignment.cases) if strict else 0
    if skipped:
        out.print(f"{skipped} case{'s' * (skipped > 1)} skipped: --strict makes that a failure", markup=False)
    raise typer.Exit(1 if skipped or not alignment.aligned else 0)


@app.command()
@reported
def table(run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders that runs wrote")]) -> None:
    """Print RUNs as one Markdown table: a row a variant, a column a backend and precision."""
    from alignment.report.markdown import to_markdown
    from alignment.report.run_folder import merge, read_run

    out.print(to_markdown(merge([read_run(folder) for folder in run_dirs])), markup=False, end="")


@app.command()
@reported
def export(
    variant: VariantName,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for the ONNX file and its node map")] = Path("."),
    opset: Annotated[int, typer.Option(help="of ONNX, 13 to 17")] = 17,
    batch: Annotated[int | None, typer.Option(help="fixed batch size; default: dynamic")] = None,
    outputs: Annotated[
        str, typer.Option(help="decoded (boxes and scores), raw (of the last convolutions) or both")
    ] = "decoded",
    nms: Annotated[
        str | None,
        typer.Option(help="end the graph in efficient_nms (TensorRT's plugin), onnx_nms, or efficient_nms_rotated"),
    ] = None,
    topk: Annotated[
        int | None, typer.Option(help="with --nms: only so many rows of best score go on to it; default: all")
    ] = None,
    size: Size = None,
) -> None:
    """Export a variant to ONNX, with its node map (ONNX node to torch module) beside it."""
    from alignment.export.nms_head import NmsHead, end_in_nms, require_boxes
    from alignment.export.onnx_export import ExportOptions
    from alignment.export.onnx_export import export as write

    require_folders({"--out": out_dir})
    if nms is not None and outputs == "raw":
        raise AlignError("--outputs raw: no boxes to run --nms on", "export decoded or both")
    if outputs not in ("decoded", "raw", "both"):
        raise AlignError(f"--outputs {outputs}: no such choice", "choose from decoded, raw, both")
    chosen = sized(load_variant(variant), size)
    head = None if nms is None else NmsHead(nms, chosen.nms)  # type: ignore[arg-type]
    if head:
        require_boxes(chosen, head.kind)
    stem = f"{chosen.name}.{head.kind}" if head else chosen.name
    model = write(chosen, out_dir, ExportOptions(opset, batch, outputs), stem)  # type: ignore[arg-type]
    for note in end_in_nms(model.onnx, head, topk) if head else ():
        out.print(note, markup=False)
    out.print(f"wrote {model.onnx}\nwrote {model.node_map}", markup=False)


@app.command()
@reported
def layers(
    variant: VariantName,
    backend: Annotated[str, typer.Option(help="onnxruntime or tensorrt")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="fp32, fp16, or on tensorrt tf32")] = "fp32",
    data: Data = None,
    size: Size = None,
    show: Annotated[int, typer.Option(help="how many tensors to list, those first that are furthest off")] = 10,
) -> None:
    """Hold every intermediate tensor to float64 on one image, and name the first that is off by more than rounding."""
    from alignment.case import Case, cases_of
    from alignment.data.samples import open_samples
    from alignment.export.float16 import float32_nodes
    from alignment.export.onnx_export import exported
    from alignment.export.plugin_nms import refuse_plugin
    from alignment.layers import RANGE, compare_layers, first_outside, first_range_fault
    from alignment.runners.open import open_model

    chosen = sized(load_variant(variant), size)
    cases: list[Case] = cases_of(chosen, (backend,), (precision,))
    if not cases or backend == "torch":
        raise AlignError(
            f"no layers to compare for {backend} {precision}", "choose onnxruntime with fp32 or fp16, or tensorrt"
        )
    sample = next(iter(open_samples(chosen, data, 1)))
    model = refuse_plugin(exported(chosen).onnx, "no float64 for every tensor")
    patterns = chosen.float32_nodes
    # With every tensor an output, TensorRT 8.6 has no implementation of a decoding that is bound to float32.
    keep = float32_nodes(model, patterns, decoding=backend != "tensorrt") if precision == "fp16" else ()
    found = compare_layers(
        model, lambda path: open_model(path, cases[0], keep=keep), sample.tensor[None], cases[0].precision, patterns
    )
    worst = sorted(found, key=lambda layer: layer.error / layer.band if layer.band else 0.0, reverse=True)
    table = Table("node", "op", "error", "band", "error / band", title=f"{cases[0].id}: {len(found)} tensors")
    for layer in worst[:show]:
        ratio = layer.error / layer.band if layer.band else 0.0
        table.add_row(layer.node, layer.op, f"{layer.error:.3g}", f"{layer.band:.3g}", f"{ratio:.2f}")
    print_table(table)
    first, fault = first_outside(found), first_range_fault(found)
    if first:
        out.print(f"first outside the float64 band: {first.place}", markup=False)
    if fault and fault.range_fault:
        out.print(
            f"first {fault.range_fault} of float16: {fault.place}: {fault.low:.3g} to {fault.high:.3g} in float64; "
            f"{RANGE[fault.range_fault]}: name that node in the variant's float32_nodes, and those up to where "
            "the values fit again",
            markup=False,
        )
    if first or fault:
        raise typer.Exit(1)
    out.print("every tensor is inside the float64 band")


app.command()(reported(quantize))
app.command()(reported(sensitivity))
app.command()(reported(culprit))
app.command()(reported(partial))
app.command()(reported(qat))
app.command()(reported(ladder))
app.command()(reported(explain))
app.command()(reported(inspect))
app.command()(reported(gate))
app.command()(reported(new))
app.command()(reported(report))
kept = typer.Typer(no_args_is_help=True, help="What is kept in ALIGN_CACHE: list it, or make room.")
kept.command()(reported(cache.ls))
kept.command()(reported(cache.prune))
app.add_typer(kept, name="cache")


@app.command()
@reported
def variants() -> None:
    """List the variants of the zoo, and whether they can run here."""
    from alignment.session import unavailable

    table = Table(Column("variant", no_wrap=True), "source", "input", "classes", "dataset", "here")
    for path in zoo():
        v = load_variant(path)
        source = v.source.config if v.source.kind == "mmyolo" else v.source.file.name
        missing = unavailable(v, None)
        here = "ready"
        if missing:
            here = "no " + ("weights" if not v.weights.is_file() else "mmrotate" if "mmrotate" in missing else "images")
        table.add_row(v.name, source, f"{v.input.height} x {v.input.width}", str(v.classes), v.dataset, here)
    print_table(table)


@app.command()
@reported
def doctor() -> None:
    """Say what this machine can and cannot run, and why."""
    from alignment.doctor import examine

    table = Table("what", "state", "detail")
    for finding in examine():
        colour = {"ok": "green", "missing": "red", "note": "yellow"}[finding.state]
        table.add_row(finding.what, f"[{colour}]{finding.state}[/]", finding.detail)
    print_table(table)


@app.command()
@reported
def schema() -> None:
    """Print the JSON schema of alignment.json."""
    from alignment.report.run_folder import json_schema

    out.print(json.dumps(json_schema(), indent=2), markup=False)


@app.command()
@reported
def synthetic() -> None:
    """Draw the synthetic images of the embedded variants, and print where they are."""
    from alignment.data.synthetic import synthetic_root

    out.print(str(synthetic_root()), markup=False)


def embedded() -> list[Variant]:
    """The variants that need nothing beyond the repository."""
    return [v for v in map(load_variant, zoo()) if v.embedded]


def _print_results(alignment: Alignment) -> None:
    table = Table(Column("case", no_wrap=True), "verdict", "why")
    colours = {"pass": "green", "fail": "red", "skip": "yellow"}
    for cases in _together(alignment.cases):
        ids, first = [case.case.id for case in cases], cases[0]
        why = _plain(first) if len(ids) == 1 else f"{len(ids)} cases: {_plain(first)}"
        table.add_row("\n".join(ids), f"[{colours[first.status]}]{first.status}[/]", why)
    longest = max((len(case.case.id) for case in alignment.cases), default=0)
    print_table(table, least=longest + 40)  # room for the verdict and a few words
    for name, doubt in dict.fromkeys((c.case.variant, doubt) for c in alignment.cases for doubt in c.doubts):
        out.print(f"[yellow]warning: {name}: {doubt}[/]")
    for name in dict.fromkeys(c.case.variant for c in alignment.cases):
        bare, images = alignment.timing.get(f"{name}.bare_s"), alignment.timing.get(f"{name}.images_s")
        resumed = alignment.timing.get(f"{name}.resumed_images")
        if resumed:
            out.print(f"{name}: {resumed:.0f} images were done when the same command was killed", markup=False)
        elif bare and images:
            judge = alignment.timing[f"{name}.judge_s"]
            start = alignment.timing[f"{name}.start_s"]
            ratio = (images + judge) / bare
            out.print(
                f"{name}: {images + judge:.1f} s for all images and stages, {bare:.1f} s of it bare inference: "
                f"{ratio:.2f} x (loading models took {start:.1f} s more)",
                markup=False,
            )


def _together(cases: list[CaseResult]) -> list[list[CaseResult]]:
    """The cases, those in one list that are skipped for one reason."""
    rows: dict[str, list[CaseResult]] = {}
    for case in cases:
        rows.setdefault(case.reason if case.status == "skip" else case.case.id, []).append(case)
    return list(rows.values())


def _plain(case: CaseResult) -> str:
    return case.reason.replace("[", r"\[")


def main() -> None:
    """Entry point."""
    limit_openmp()
    app()


if __name__ == "__main__":
    main()
