"""``align explain``."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from alignment.commands.console import (
    Data,
    Golden,
    Images,
    Size,
    out,
    print_table,
    progress_bar,
    require_folders,
    sized,
    write_report,
)
from alignment.errors import AlignError
from alignment.results import ExplainedBox, Explanation
from alignment.scratch import scratch_folder
from alignment.variant import Variant, golden_dir, load_variant

_RANK = re.compile(r", rank \d+$")


def explain(
    what: Annotated[
        list[str], typer.Argument(metavar="VARIANT | RECORD RECORD", help="a variant, or the JSON files of two records")
    ],
    backend: Annotated[
        str,
        typer.Option(
            help="onnxruntime (NonMaxSuppression) or tensorrt (EfficientNMS_TRT); rotated: EfficientNMSRotated_TRT"
        ),
    ] = "onnxruntime",
    data: Data = None,
    images: Images = None,
    score_threshold: Annotated[float | None, typer.Option(help="of both NMS; default: the variant's")] = None,
    deployed_score_threshold: Annotated[float | None, typer.Option(help="another one for the deployed NMS")] = None,
    deployed_iou_threshold: Annotated[float | None, typer.Option(help="another one for the deployed NMS")] = None,
    topk: Annotated[int | None, typer.Option(help="only so many rows go on to the deployed NMS; default: all")] = None,
    size: Size = None,
    golden: Golden = None,
    show: Annotated[int, typer.Option(min=0, help="how many lines of boxes to print, those alike in one")] = 20,
    out_dir: Annotated[Path | None, typer.Option("--out", help="RUN folder: alignment.json, report.html")] = None,
) -> None:
    """Explain, box by box, why the NMS at the end of a deployed graph keeps other boxes than mmyolo's.

    Of two records: why the variant's own NMS keeps other boxes of the one than of the other.  Exit status 1: something
    is unexplained, or due to a threshold that differs though no option says so.
    """
    from alignment import session

    require_folders({"--out": out_dir})
    if len(what) not in (1, 2):
        raise AlignError(f"{len(what)} arguments", "give one variant, or two records")
    alignment = session.new_alignment(shlex.join(["align", *sys.argv[1:]]))
    with scratch_folder() as staging:
        if len(what) == 2:
            found = _explain_records(Path(what[0]), Path(what[1]), golden)
        else:
            pictures = staging if out_dir else None
            deployed = {"score_threshold": deployed_score_threshold, "iou_threshold": deployed_iou_threshold}
            asked = {"score_threshold": score_threshold}, deployed
            variant = sized(load_variant(what[0]), size)
            found = _explain_variant(variant, backend, data, images, asked, topk, golden, pictures)
        alignment.explanations.append(found)
        _print_explanation(found, show)
        if out_dir:
            write_report(alignment, staging, out_dir)
    wrong = f"by a wrong setting: {found.wrong_settings}, " if found.wrong_settings else ""
    ap = "" if found.subject_ap is None else f"AP {found.reference_ap:.4f} and {found.subject_ap:.4f}, "
    out.print(
        f"{found.images} images, {found.reference_detections} and {found.subject_detections} detections, {ap}"
        f"{found.differing} differ, {wrong}unexplained: {found.unexplained}",
        markup=False,
    )
    raise typer.Exit(0 if alignment.aligned else 1)


def _explain_variant(
    variant: Variant,
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
    from alignment.divergence import HEADS, explain_variant, explanation, head_kind
    from alignment.export.nms_head import require_boxes
    from alignment.session import require_available

    require_available(variant, data)
    if backend not in HEADS:
        raise AlignError(f"--backend {backend}: no graph ends in NMS there", f"choose from {', '.join(HEADS)}")
    require_boxes(variant)
    samples = open_samples(variant, data, images)
    changes, deployed = ({name: value for name, value in each.items() if value is not None} for each in asked)
    with progress_bar(variant.name) as move:
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
    kind = head_kind(variant, backend)
    sides = f"mmyolo's NMS on {reference_of(variant).backend}", f"{kind} on {backend}"
    return explanation(found, f"{variant.name}-{kind}", sides, samples.dataset.class_names)


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
        print_table(table)
    alike = _alike(found.boxes)
    for boxes in alike[:show]:
        out.print(_line(boxes), markup=False)
    if len(alike) > show:
        out.print(f"{len(alike) - show} more: --show {len(alike)}, or --out for every box", markup=False)


def _alike(boxes: list[ExplainedBox]) -> list[list[ExplainedBox]]:
    """The boxes in their order, those of an image together that went one way for one cause, whatever their rank."""
    found: dict[tuple[object, ...], list[ExplainedBox]] = {}
    for box in boxes:
        fates = (_RANK.sub("", fate) for fate in (box.reference, box.subject))
        found.setdefault((box.image_id, *fates, box.cause, box.follows, box.replay), []).append(box)
    return list(found.values())


def _line(boxes: list[ExplainedBox]) -> str:
    """One box, or several alike, from the best score down."""
    first, last = boxes[0], boxes[-1]
    which = f"row {first.row}, {first.label_name} {first.score:.4f}"
    fates = first.reference, first.subject
    if len(boxes) > 1:
        which = f"{len(boxes)} boxes of scores {first.score:.4f} to {last.score:.4f}, the first {which}"
        fates = _RANK.sub("", first.reference), _RANK.sub("", first.subject)
    follows = f" of {first.follows}" if first.follows else ""
    reference, subject = fates
    return (
        f"image {first.image_id}, {which}: reference {reference}; subject {subject}; "
        f"{first.cause}{follows}: {first.replay}"
    )
