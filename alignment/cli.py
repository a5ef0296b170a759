"""``align``: run, table, export, quantize, layers, explain, variants, doctor, schema, synthetic.

Exit status: 0 aligned, 1 not aligned, 2 wrong usage or input.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from alignment.case import ROUTES
from alignment.errors import AlignError
from alignment.results import Alignment, CaseResult, Explanation
from alignment.storage import require_folder
from alignment.variant import Variant, golden_dir, load_variant, resized, with_quantization, zoo

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Data = Annotated[Path | None, typer.Option(help="COCO-layout root, for variants on COCO; default $ALIGN_DATA/coco")]
Images = Annotated[int | None, typer.Option(min=1, help="the first so many images only")]
Size = Annotated[
    str | None, typer.Option(metavar="HxW", help="another input size, 416 or 384x640; default: the variant's own")
]
Golden = Annotated[Path | None, typer.Option(help="folder of golden values; default: the packaged one")]


def _reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turns an AlignError, and what the file system refuses, into one line on stderr and exit status 2."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except AlignError as error:
            err.print(f"align: {error}", markup=False)
            raise typer.Exit(2) from None
        except BrokenPipeError:  # whoever reads the output has had enough of it
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            err.print(f"align: {where}{error.strerror or error}", markup=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print("align: interrupted; nothing half-written was left", markup=False)
            raise typer.Exit(130) from None

    return run


@app.command()
@_reported
def run(
    variants: Annotated[
        list[str] | None, typer.Argument(help="names or YAML files; default: the embedded ones")
    ] = None,
    backend: Annotated[str, typer.Option(help="comma-separated")] = "torch,onnxruntime,tensorrt",
    precision: Annotated[str, typer.Option(help="comma-separated: fp32, tf32, fp16, int8")] = "fp32",
    route: Annotated[str, typer.Option(help="of int8, comma-separated; default: all")] = ",".join(ROUTES),
    data: Data = None,
    images: Images = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="images that go through a backend at once")] = 1,
    out_dir: Annotated[Path | None, typer.Option("--out", help="RUN folder: alignment.json, report.html")] = None,
    golden: Golden = None,
    records: Annotated[Path | None, typer.Option(help="write records of this run into this folder")] = None,
    update_golden: Annotated[
        str | None, typer.Option(metavar="REASON", help="write what is measured as golden")
    ] = None,
    strict: Annotated[bool, typer.Option(help="a case that cannot be run fails")] = False,
) -> None:
    """Run variants through the backends, compare them stage by stage, and say whether they are aligned."""
    from alignment import session
    from alignment.case import cases_of
    from alignment.golden import update
    from alignment.pipeline import RunOptions
    from alignment.report.run_folder import write_run

    _require_folders({"--out": out_dir, "--records": records, "--golden": golden if update_golden else None})
    folder = golden or golden_dir()
    chosen = [_sized(v, size) for v in (map(load_variant, variants) if variants else embedded())]
    plan = [(v, cases_of(v, _split(backend), _split(precision), _split(route))) for v in chosen]
    if not any(cases for _, cases in plan):
        what = f"--backend {backend} --precision {precision} --route {route}: no such case"
        raise AlignError(what, session.NO_CASE_MEND)
    with tempfile.TemporaryDirectory(prefix="align-run-") as staging:
        how = RunOptions(golden=folder, out=Path(staging), records=records, batch=batch)
        options = session.SessionOptions(data, images, how)
        for variant, cases in plan if variants else ():
            session.require(variant, cases, options)
        measured: list[tuple[CaseResult, dict[str, Any]]] = []
        alignment = session.new_alignment(shlex.join(["align", *sys.argv[1:]]))
        for variant, cases in plan:
            with _progress(variant.name) as show:
                results, seconds, dataset = session.run_cases(variant, cases, options, show)
            session.add_results(alignment, variant, results, seconds, dataset)
            measured += [(result, dataset) for result in results if result.status != "skip"]
        _print_results(alignment)
        if out_dir:
            # Pictures leave the staging folder only now: a run that fails on its way leaves nothing behind.
            if (pictures := Path(staging) / "pictures").is_dir():
                shutil.copytree(pictures, out_dir / "pictures", dirs_exist_ok=True)
            write_run(alignment, out_dir)
            out.print(f"report: {out_dir / 'report.html'}", markup=False)
    # Golden values change only now: a run that fails at its last variant changes none.
    for result, dataset in measured if update_golden else ():
        if result.replayed:
            out.print(f"{result.case.id}: replayed, which measures nothing: its golden values stay", markup=False)
        else:
            out.print(f"wrote {update(folder, result, dataset, str(update_golden))}", markup=False)
    failed = any(c.status == "fail" or (strict and c.status == "skip") for c in alignment.cases)
    raise typer.Exit(1 if failed else 0)


@app.command()
@_reported
def table(run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders that runs wrote")]) -> None:
    """Print RUNs as one Markdown table: a row a variant, a column a backend and precision."""
    from alignment.report.markdown import to_markdown
    from alignment.report.run_folder import merge, read_run

    out.print(to_markdown(merge([read_run(folder) for folder in run_dirs])), markup=False, end="")


@app.command()
@_reported
def export(
    variant: str,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for the ONNX file and its node map")] = Path("."),
    opset: Annotated[int, typer.Option(help="13 to 17")] = 17,
    batch: Annotated[int | None, typer.Option(help="fixed batch size; default: dynamic")] = None,
    outputs: Annotated[str, typer.Option(help="decoded, raw or both")] = "decoded",
    nms: Annotated[str | None, typer.Option(help="end the graph in efficient_nms (TensorRT's) or onnx_nms")] = None,
    topk: Annotated[int | None, typer.Option(help="with --nms: only so many rows go on to it; default: all")] = None,
    size: Size = None,
) -> None:
    """Export a variant to ONNX, with its node map beside it."""
    from alignment.export.nms_head import NmsHead, end_in_nms, require_boxes
    from alignment.export.onnx_export import ExportOptions
    from alignment.export.onnx_export import export as write

    _require_folders({"--out": out_dir})
    if nms is not None and outputs == "raw":
        raise AlignError("--outputs raw: no boxes to run --nms on", "export decoded or both")
    if outputs not in ("decoded", "raw", "both"):
        raise AlignError(f"--outputs {outputs}: no such choice", "choose from decoded, raw, both")
    chosen = _sized(load_variant(variant), size)
    head = None if nms is None else NmsHead(nms, chosen.nms)  # type: ignore[arg-type]
    if head:
        require_boxes(chosen)
    model = write(chosen, out_dir, ExportOptions(opset, batch, outputs))  # type: ignore[arg-type]
    for note in end_in_nms(model.onnx, head, topk) if head else ():
        out.print(note, markup=False)
    out.print(f"wrote {model.onnx}\nwrote {model.node_map}", markup=False)


@app.command()
@_reported
def quantize(
    variant: str,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for the QDQ graph, ranges, cache and scales")],
    method: Annotated[
        str | None, typer.Option(help="of activations; default: the variant's own, as are the others")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="of weights: minmax or mse")] = None,
    policy: Annotated[str | None, typer.Option(help="where quantizers go: tensorrt, conv-only or full")] = None,
    keep_float: Annotated[
        list[str] | None, typer.Option(help="ONNX node, with wildcards, that stays float; repeatable")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="calibrate on so many")] = None,
    calibration: Annotated[str | None, typer.Option(help="separate: activations in float; joint: in int8")] = None,
    rounding: Annotated[str | None, typer.Option(help="of weights: nearest, adaround, or brecq, by blocks")] = None,
    bias_correction: Annotated[bool | None, typer.Option(help="take mean errors off biases")] = None,
    equalization: Annotated[bool | None, typer.Option(help="scale channels between convolutions")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images that go through ONNX Runtime at once")] = 1,
    ranges: Annotated[
        Path | None, typer.Option(help="a TensorRT calibration cache, whose ranges are taken for the tensors it names")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where weights are searched for")] = "cpu",
    data: Data = None,
) -> None:
    """Quantize a variant to int8: a QDQ graph, a range for every tensor, a calibration cache, and every scale."""
    from alignment.engine.int8 import ranges_in_cache
    from alignment.quantize import recipe
    from alignment.quantize.trouble import troubles

    _require_folders({"--out": out_dir})
    asked = {
        "method": method,
        "weights": weights,
        "policy": policy,
        "keep_float": keep_float,
        "images": images,
        "calibration": calibration,
        "rounding": rounding,
        "bias_correction": bias_correction,
        "equalization": equalization,
    }
    chosen = with_quantization(load_variant(variant), {k: v for k, v in asked.items() if v is not None})
    given = None if ranges is None else ranges_in_cache(_text(ranges))
    with _stages(chosen.name) as show:
        found = recipe.quantize(chosen, data, batch, show, device, given)
    known = _modules(chosen)
    for trouble in troubles(found, known):
        out.print(f"[yellow]{escape(str(trouble))}[/]")
    for unit in found.units:
        if unit.adaround >= unit.nearest:
            out.print(f"{unit.name}: AdaRound does not lower its error: rounded to nearest", markup=False)
    counts = found.placement
    for path in found.save(out_dir, chosen.name):
        out.print(f"wrote {path}", markup=False)
    out.print(
        f"{len(counts.weights)} nodes in int8, {len(counts.activations)} quantizers, {len(counts.float_nodes)} nodes "
        f"bound to float, {len(found.ranges)} ranges from {found.calibration.images} images",
        markup=False,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AlignError(f"{path}: {error}", "give a TensorRT calibration cache") from None


def _modules(variant: Variant) -> dict[str, str]:
    """Torch module of each ONNX node, where a torch model stands behind the variant."""
    from alignment.export.onnx_export import exported, read_node_map

    node_map = exported(variant).node_map
    return {} if node_map is None else {name: entry["module"] for name, entry in read_node_map(node_map).items()}


@app.command()
@_reported
def layers(
    variant: str,
    backend: Annotated[str, typer.Option(help="onnxruntime or tensorrt")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="fp32, fp16, or on tensorrt tf32")] = "fp32",
    data: Data = None,
    show: Annotated[int, typer.Option(help="how many of the tensors furthest out of the band to list")] = 10,
) -> None:
    """Hold every intermediate tensor to float64 on one image, and name the first node that leaves the band."""
    from alignment.case import Case, cases_of
    from alignment.data.samples import open_samples
    from alignment.export.float16 import float32_nodes
    from alignment.export.onnx_export import exported
    from alignment.export.plugin_nms import refuse_plugin
    from alignment.layers import RANGE, compare_layers, first_outside, first_range_fault
    from alignment.runners.open import open_model

    chosen = load_variant(variant)
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
    out.print(table)
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


@app.command()
@_reported
def explain(
    what: Annotated[list[str], typer.Argument(metavar="VARIANT | RECORD RECORD", help="records: their JSON files")],
    backend: Annotated[
        str, typer.Option(help="onnxruntime (ends in NonMaxSuppression) or tensorrt (EfficientNMS_TRT)")
    ] = "onnxruntime",
    data: Data = None,
    images: Images = None,
    score_threshold: Annotated[float | None, typer.Option(help="of both sides; default: the variant's")] = None,
    deployed_score_threshold: Annotated[float | None, typer.Option(help="another one of the deployed NMS")] = None,
    deployed_iou_threshold: Annotated[float | None, typer.Option(help="another one of the deployed NMS")] = None,
    topk: Annotated[int | None, typer.Option(help="only so many rows go on to the deployed NMS; default: all")] = None,
    golden: Golden = None,
    show: Annotated[int, typer.Option(min=0, help="how many of the boxes to list")] = 20,
    out_dir: Annotated[Path | None, typer.Option("--out", help="RUN folder: alignment.json, report.html")] = None,
) -> None:
    """Explain every detection that mmyolo's NMS and the one at the end of a deployed graph do not both keep alike.

    Of two records: every one that they do not both lead to under the variant's own NMS.  Exit status 1: something is
    unexplained, or due to a threshold that differs though no option says so.
    """
    from alignment import session
    from alignment.report.run_folder import write_run

    _require_folders({"--out": out_dir})
    if len(what) not in (1, 2):
        raise AlignError(f"{len(what)} arguments", "give one variant, or two records")
    alignment = session.new_alignment(shlex.join(["align", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory(prefix="align-explain-") as staging:
        if len(what) == 2:
            found = _explain_records(Path(what[0]), Path(what[1]), golden)
        else:
            pictures = Path(staging) if out_dir else None
            deployed = {"score_threshold": deployed_score_threshold, "iou_threshold": deployed_iou_threshold}
            asked = {"score_threshold": score_threshold}, deployed
            found = _explain_variant(what[0], backend, data, images, asked, topk, golden, pictures)
        alignment.explanations.append(found)
        _print_explanation(found, show)
        if out_dir:
            if (Path(staging) / "pictures").is_dir():
                shutil.copytree(Path(staging) / "pictures", out_dir / "pictures", dirs_exist_ok=True)
            write_run(alignment, out_dir)
            out.print(f"report: {out_dir / 'report.html'}", markup=False)
    wrong = f"by a wrong setting: {found.wrong_settings}, " if found.wrong_settings else ""
    ap = "" if found.subject_ap is None else f"AP {found.reference_ap:.4f} and {found.subject_ap:.4f}, "
    out.print(
        f"{found.images} images, {found.reference_detections} and {found.subject_detections} detections, {ap}"
        f"{found.differing} differ, {wrong}unexplained: {found.unexplained}",
        markup=False,
    )
    raise typer.Exit(0 if alignment.aligned else 1)


def _explain_variant(
    name: str,
    backend: str,
    data: Path | None,
    images: int | None,
    asked: tuple[dict[str, float | None], dict[str, float | None]],
    topk: int | None,
    golden: Path | None,
    pictures: Path | None,
) -> Explanation:
    """`asked`: settings of NMS on both sides, and of the deployed one alone; None for those that are as they were."""
    from alignment.case import reference_of
    from alignment.data.samples import open_samples
    from alignment.divergence import HEADS, explain_variant, explanation
    from alignment.export.nms_head import require_boxes
    from alignment.session import unavailable

    variant = load_variant(name)
    if reason := unavailable(variant, data):
        what, _, mend = reason.rpartition(": ")
        raise AlignError(what, mend)
    if backend not in HEADS:
        raise AlignError(f"--backend {backend}: no graph ends in NMS there", f"choose from {', '.join(HEADS)}")
    require_boxes(variant)
    samples = open_samples(variant, data, images)
    changes, deployed = ({name: value for name, value in each.items() if value is not None} for each in asked)
    with _progress(variant.name) as move:
        found = explain_variant(
            variant,
            backend,
            samples,
            golden or golden_dir(),
            changes,
            topk,
            pictures,
            lambda n: move(n, len(samples)),
            deployed,
        )
    sides = f"mmyolo's NMS on {reference_of(variant).backend}", f"{HEADS[backend]} on {backend}"
    return explanation(found, f"{variant.name}-{HEADS[backend]}", sides, samples.dataset.class_names)


def _explain_records(reference: Path, subject: Path, golden: Path | None) -> Explanation:
    from alignment.divergence import explain_records, explanation

    found = explain_records(reference, subject, golden or golden_dir())
    return explanation(found, f"{subject.stem}-nms", (reference.stem, subject.stem), [])


def _print_explanation(found: Explanation, show: int) -> None:
    for note in found.notes:
        out.print(note, markup=False)
    table = Table("cause", "boxes", "followers", "AP without", title=f"{found.subject} against {found.reference}")
    for cause in found.causes:
        ap = "-" if cause.ap_without is None else f"{cause.ap_without:.4f}"
        table.add_row(cause.cause, str(cause.boxes), str(cause.followers or "-"), ap)
    if found.causes:
        out.print(table)
    for box in found.boxes[:show]:
        follows = f" of {box.follows}" if box.follows else ""
        out.print(
            f"image {box.image_id}, row {box.row}, {box.label_name} {box.score:.4f}: reference {box.reference}; "
            f"subject {box.subject}; {box.cause}{follows}: {box.replay}",
            markup=False,
        )
    if len(found.boxes) > show:
        out.print(f"{len(found.boxes) - show} more: --show {len(found.boxes)}, or --out for all of them", markup=False)


@app.command()
@_reported
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
    out.print(table)


@app.command()
@_reported
def doctor() -> None:
    """Say what this machine can and cannot run, and why."""
    from alignment.doctor import examine

    table = Table("what", "state", "detail")
    for finding in examine():
        colour = {"ok": "green", "missing": "red", "note": "yellow"}[finding.state]
        table.add_row(finding.what, f"[{colour}]{finding.state}[/]", finding.detail)
    out.print(table)


@app.command()
@_reported
def schema() -> None:
    """Print the JSON schema of ``alignment.json``."""
    from alignment.report.run_folder import json_schema

    out.print(json.dumps(json_schema(), indent=2), markup=False)


@app.command()
@_reported
def synthetic() -> None:
    """Draw the embedded synthetic set and print where it is."""
    from alignment.data.synthetic import synthetic_root

    out.print(str(synthetic_root()), markup=False)


def embedded() -> list[Variant]:
    """The variants that need nothing beyond the repository."""
    return [v for v in map(load_variant, zoo()) if v.embedded]


def _sized(variant: Variant, size: str | None) -> Variant:
    if size is None:
        return variant
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise AlignError(f"--size {size}: not a size in pixels", "give one such as 416 or 384x640")
    return resized(variant, int(sides[0]), int(sides[-1]))


def _require_folders(named: dict[str, Path | None]) -> None:
    """Finds out before any work is done what could not be written after it."""
    for option, path in named.items():
        if path is not None:
            require_folder(path, option)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> str:
        """``12.3 images/s``."""
        return f"{task.speed:.1f} images/s" if task.speed else ""


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left; gives the function that moves it: images done, images in all."""
    with _bar(_Rate()) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _stages(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage; gives the function that moves one: stage, how many done, how many in all."""
    with _bar() as bar:
        tasks: dict[str, Any] = {}

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{name} {stage}", total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield move


def _bar(*columns: ProgressColumn) -> Progress:
    shown = (BarColumn(), MofNCompleteColumn(), *columns, TimeElapsedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}")
    # Where there is no terminal a bar is a blank line before the one of an error.
    return Progress(text, *shown, console=err, transient=True, disable=not err.is_terminal)


def _print_results(alignment: Alignment) -> None:
    table = Table("case", "verdict", "why")
    colours = {"pass": "green", "fail": "red", "skip": "yellow"}
    for case in alignment.cases:
        table.add_row(case.case.id, f"[{colours[case.status]}]{case.status}[/]", _plain(case))
    out.print(table)
    for name in dict.fromkeys(c.case.variant for c in alignment.cases):
        bare, images = alignment.timing.get(f"{name}.bare_s"), alignment.timing.get(f"{name}.images_s")
        if bare and images:
            judge = alignment.timing[f"{name}.judge_s"]
            start = alignment.timing[f"{name}.start_s"]
            ratio = (images + judge) / bare
            out.print(
                f"{name}: {images + judge:.1f} s for all images and stages, {bare:.1f} s of it bare inference: "
                f"{ratio:.2f} x (loading models took {start:.1f} s more)",
                markup=False,
            )


def _plain(case: CaseResult) -> str:
    return case.reason.replace("[", r"\[")


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
