"""A deployed NMS against mmyolo's own, on real images: every detection that only one of them keeps, explained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from pydantic import ValidationError

from alignment.case import Case, reference_of
from alignment.compare.coco_map import coco_ap
from alignment.data.coco import read_image
from alignment.data.samples import Samples
from alignment.deployed import deployed_semantics, seen_pairs
from alignment.errors import AlignError
from alignment.export.nms_head import ROWS, Kind, NmsHead, lint, require_boxes, with_nms
from alignment.export.onnx_export import ExportOptions, exported
from alignment.golden import limits, read_golden
from alignment.models.outputs import to_outputs
from alignment.nms.causes import WRONG_SETTINGS, Divergence, Limits, Moved, Side
from alignment.nms.explain import explain
from alignment.nms.implementations import mmyolo
from alignment.nms.multiclass import Detections, overlaps
from alignment.nms.rotated import upright
from alignment.nms.semantics import run
from alignment.pipeline import boxes_of, write_picture
from alignment.referee import MovedReferee
from alignment.results import CauseCount, ExplainedBox, Explanation, WorstImage
from alignment.risk import Risk
from alignment.runners.base import Runner
from alignment.runners.open import open_model, open_runner
from alignment.runners.record import ANGLE_STEP, BOX_STEP, SCORE_STEP, Candidates, Record
from alignment.scratch import scratch_folder
from alignment.variant import Nms, Variant, load_variant

#: How many boxes are shown as pictures, and from which IoU on other boxes are drawn in them.
CROPS, NEAR = 12, 0.3
Progress = Callable[[int], None]
#: The NMS that each backend runs at the end of its graph, and both where boxes are rotated.
HEADS: dict[str, Kind] = {"onnxruntime": "onnx_nms", "tensorrt": "efficient_nms"}
ROTATED_HEAD: Kind = "efficient_nms_rotated"


@dataclass
class Explained:
    """What was found.

    Attributes:
        images: how many.
        detections: how many the reference and the subject kept.
        divergences: image id → what only one of them kept, or both otherwise.
        notes: about the graph, before anything ran.
        ap: COCO AP of ``reference`` and ``subject``, and by cause: that of the subject with its divergences, and those
            that follow from it, undone.
        crops: pictures of the first of them.
        asked: settings that were to differ.
    """

    images: int = 0
    detections: tuple[int, int] = (0, 0)
    divergences: dict[int, list[Divergence]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ap: dict[str, float] = field(default_factory=dict)
    crops: list[WorstImage] = field(default_factory=list)
    asked: frozenset[str] = frozenset()

    @property
    def wrong_settings(self) -> int:
        """How many divergences come from a setting that differs though nobody asked for that."""
        wrong = set(WRONG_SETTINGS) - self.asked
        return sum(d.root in wrong for found in self.divergences.values() for d in found)

    @property
    def causes(self) -> Counter[str]:
        """How many divergences each cause has."""
        return Counter(d.cause for found in self.divergences.values() for d in found)


def head_kind(variant: Variant, backend: str) -> Kind:
    """The NMS that the graph of `variant` ends in on `backend`."""
    return ROTATED_HEAD if variant.rotated else HEADS[backend]


def explain_variant(
    variant: Variant,
    backend: str,
    samples: Samples,
    golden: Path,
    changes: dict[str, float] | None = None,
    topk: int | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    deployed: dict[str, float] | None = None,
) -> Explained:
    """Runs mmyolo's NMS on the reference's outputs, and a graph that ends in NMS on `backend`.

    Args:
        variant: with a torch model or a bare ONNX file of decoded outputs.
        backend: ``onnxruntime`` or ``tensorrt``.
        samples: images.
        golden: folder of golden values, whose limits say how far inputs may move.
        changes: fields of the variant's NMS in place of its own, for both sides.
        topk: K of a TopK over the rows before the deployed NMS.
        out: the RUN folder that receives pictures, or None.
        progress: called with the number of images done.
        deployed: fields of the NMS in place of those, for the deployed graph alone.

    Raises:
        AlignError: for a variant whose graph already ends in NMS, or a backend that is not on this machine.
    """
    require_boxes(variant)
    variant = variant.model_copy(update={"nms": _changed(variant.nms, changes)})
    model = onnx.load(exported(variant, ExportOptions(outputs="decoded")).onnx)
    head = NmsHead(head_kind(variant, backend), _changed(variant.nms, deployed), keep=True)
    count, notes = lint(topk, model, head)
    head = replace(head, topk=count)
    case = Case(variant.name, backend, "fp32")  # type: ignore[arg-type]
    found, risk = Explained(notes=notes, asked=frozenset(deployed or ())), Risk()
    with (
        scratch_folder() as folder,
        open_runner(variant, reference_of(variant)) as reference,
        _deployed(model, head, case, folder) as subject,
    ):
        allowed = _allowed(golden, (case, subject.provenance))
        semantics = deployed_semantics(head, subject.provenance.get("tensorrt"))
        referee = MovedReferee(variant, reference)
        for sample in samples:
            ours = to_outputs(reference.run(sample.tensor[None]), variant)
            named = subject.run(sample.tensor[None])
            seen = seen_pairs(named, head.kind)
            rows = named[ROWS][0] if ROWS in named else None
            one = Side(mmyolo(variant.nms, variant.rotated), ours.boxes[0], ours.scores[0])
            other = Side(semantics, named["boxes"][0], named["scores"][0], seen.kept, rows, seen.faults)
            differing = referee.judged(sample, one, other, explain(one, other, allowed, sample.transform))
            found.divergences[sample.entry.id] = differing
            risk.add(sample, one, seen, differing)
            found.images += 1
            if progress:
                progress(found.images)
    found.detections = risk.counts[0], risk.counts[1]
    if samples.dataset.truth["annotations"]:
        found.ap = {name: coco_ap(samples.dataset, detections)[0] for name, detections in risk.sides.items()}
    if out is not None:
        found.crops = _crops(found, risk, samples, out)
    return found


def _changed(nms: Nms, changes: dict[str, float] | None) -> Nms:
    try:
        return Nms.model_validate({**nms.model_dump(), **(changes or {})})
    except ValidationError as error:
        name, said = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        raise AlignError(f"{name} {(changes or {}).get(str(name))}: {said}", "give another one") from None


def _allowed(golden: Path, *cases: tuple[Case, dict[str, Any]]) -> Limits:
    """How far inputs of these cases may move, each with its provenance: the widest of their golden limits."""
    held_to = [limits(read_golden(golden, case.variant), case, place).tolerances for case, place in cases]
    return Limits(**{name: max(one[name].value for one in held_to) for name in ("boxes", "scores", "angles")})  # type: ignore[arg-type]


def _crops(found: Explained, risk: Risk, samples: Samples, out: Path) -> list[WorstImage]:
    """What surrounds the boxes of highest score that only one side keeps, with what overlaps them on both sides."""
    entries, names = {entry.id: entry for entry in samples.dataset.images}, samples.dataset.class_names
    crops = []
    for index, (image, d) in enumerate(ordered(found)[:CROPS]):
        sides = risk.sides["reference"][image], risk.sides["subject"][image]
        has = [np.flatnonzero((side.rows == d.row) & (side.labels == d.label)) for side in sides]
        if not any(map(len, has)):
            continue
        owner = 0 if len(has[0]) else 1
        box = sides[owner].boxes[has[owner][0]]
        pixels = read_image(entries[image].path)
        left, top, right, bottom = _around(upright(box[None])[0], pixels.shape)
        picture = f"pictures/{samples.variant.name}-differing-{index}.jpg"
        write_picture(pixels[top:bottom, left:right], out / picture)
        shown = []
        for side, own in zip(sides, has, strict=True):
            near = np.flatnonzero((overlaps(box[None], side.boxes)[0] > NEAR) & (side.labels == d.label))
            moved = side.boxes[near].copy()
            # The centre of a rotated box, both corners of another.
            moved[:, :2] -= np.array([left, top], np.float32)
            if moved.shape[1] == 4:
                moved[:, 2:] -= np.array([left, top], np.float32)
            part = Detections(moved, side.scores[near], side.labels[near], side.rows[near])
            shown.append(boxes_of(part, ~np.isin(near, own), names, least=-np.inf))
        crops.append(
            WorstImage(
                image_id=image,
                file_name=f"{entries[image].file_name}: {names[d.label]} {d.score:.4f}, {d.cause}",
                width=right - left,
                height=bottom - top,
                picture=picture,
                box_difference=0.0,
                score_difference=0.0,
                agreement=0.0,
                reference=shown[0],
                subject=shown[1],
            )
        )
    return crops


def _around(box: np.ndarray, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a crop, half a box larger on each side and no smaller than 64 pixels."""
    # Where a box is not finite the picture is of what is left of it.
    x1, y1, x2, y2 = np.nan_to_num(box, nan=0.0, posinf=1e6, neginf=-1e6).tolist()
    margin_x, margin_y = max((x2 - x1) / 2, 32 - (x2 - x1) / 2), max((y2 - y1) / 2, 32 - (y2 - y1) / 2)
    height, width = shape[:2]
    # Of a box outside it is of the picture's edge.
    left, top = int(np.clip(x1 - margin_x, 0, width - 1)), int(np.clip(y1 - margin_y, 0, height - 1))
    return left, top, int(np.clip(x2 + margin_x, left + 1, width)), int(np.clip(y2 + margin_y, top + 1, height))


def ordered(found: Explained) -> list[tuple[int, Divergence]]:
    """All divergences with their image: unexplained ones first, then by falling score."""
    every = [(image, d) for image, each in found.divergences.items() for d in each]
    return sorted(every, key=lambda one: (one[1].cause != "unexplained", -one[1].score))


def explain_records(reference: Path, subject: Path, golden: Path, progress: Progress | None = None) -> Explained:
    """Explains what two records of one variant keep otherwise, under the variant's own NMS.

    A record holds the best candidates of an image only, so that detections below the last of these are left out, and
    not the geometry of the images, so that IoU is that of the network input's pixels.

    Args:
        reference, subject: JSON files of records.
        golden: folder of golden values, the wider of whose limits for the two cases say how far inputs may move.
        progress: see `explain_variant`.

    Raises:
        AlignError: for records that cannot be read, or are not of one variant and one set of images.
    """
    one, other = Record.load(reference), Record.load(subject)
    for path, record in ((reference, one), (subject, other)):
        if record.compact:
            raise AlignError(f"{path}: an int8 record holds detections alone", "give records of fp32 or fp16")
    if one.identity != other.identity or one.digests != other.digests:
        raise AlignError(
            f"{reference} and {subject}: other weights, settings or images", "give two records of one variant"
        )
    cases = [Case(*record.case.split("-")) for record in (one, other)]  # type: ignore[arg-type]
    variant = load_variant(cases[1].variant)
    require_boxes(variant)
    if one.identity["variant_fingerprint"] != variant.fingerprint():
        raise AlignError(f"{reference}: of another {variant.name} than the zoo's", "record it anew")
    places = [record.result.provenance if record.result else {} for record in (one, other)]
    widest = _allowed(golden, *zip(cases, places, strict=True))
    allowed = Limits(widest.boxes + BOX_STEP, widest.scores + SCORE_STEP, widest.angles + ANGLE_STEP)
    moved: Moved = "numeric" if all(case.precision == "fp32" for case in cases) else "precision"
    found, kept = Explained(), [0, 0]
    for image in one.digests:
        tables = [table[image] for record in (one, other) for table in (record.candidates, record.detections)]
        if any(table.labels.max(initial=0) >= variant.classes for table in tables):
            raise AlignError(f"{subject}: image {image}: of more classes than {variant.name} has", "record it anew")
        count = max(int(table.rows.max(initial=-1)) for table in tables) + 1
        sides, threshold = _from_candidates(one.candidates[image], other.candidates[image], count, variant.classes)
        nms = variant.nms.model_copy(update={"score_threshold": max(threshold, variant.nms.score_threshold)})
        semantics = replace(mmyolo(nms, variant.rotated), frame="input", classes="apart", split=None)
        ours, theirs = (
            Side(semantics, *side, faults=_recorded_faults(record, image, threshold, variant.classes))
            for side, record in zip(sides, (one, other), strict=True)
        )
        differing = explain(ours, theirs, allowed, moved=moved)
        found.divergences[image] = differing
        found.images += 1
        for index, side in enumerate((ours, theirs)):
            kept[index] += len(run(semantics, side.boxes, side.scores).kept)
        if progress:
            progress(found.images)
    found.detections = kept[0], kept[1]
    return found


def _from_candidates(
    one: Candidates, other: Candidates, count: int, classes: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], float]:
    """Boxes and scores of both sides over `count` rows, and the score from which both hold all.

    What one side lacks lies below that score, and is put just there.
    """
    threshold = max(one.floor, other.floor)
    sides = []
    for own, others in ((one, other), (other, one)):
        boxes = np.zeros((max(count, 1), own.boxes.shape[1]), np.float32)
        scores = np.zeros((len(boxes), classes), np.float32)
        boxes[others.rows], boxes[own.rows] = others.boxes, own.boxes
        scores[others.rows, others.labels] = np.minimum(others.scores, np.float32(threshold))
        scores[own.rows, own.labels] = own.scores
        sides.append((boxes, scores))
    return sides, threshold


def _recorded_faults(record: Record, image: int, threshold: float, classes: int) -> dict[int, str]:
    """Detections of a record above `threshold`, the score down to which it holds all candidates, that are none."""
    candidates, found = record.candidates[image], record.detections[image]
    scores = dict(zip((candidates.rows * classes + candidates.labels).tolist(), candidates.scores, strict=True))
    faults = {}
    for row, label, score in zip(found.rows.tolist(), found.labels.tolist(), found.scores, strict=True):
        pair = row * classes + label
        if score > threshold and scores.get(pair) != score:
            of = f"score {scores[pair]:.6g}" if pair in scores else "none"
            faults[pair] = f"{record.case} has a detection of score {score:.6g} here, and a candidate of {of}"
    return faults


def _deployed(model: onnx.ModelProto, head: NmsHead, case: Case, folder: Path) -> Runner:
    path = folder / "deployed.onnx"
    onnx.save(with_nms(model, head), path)
    return open_model(path, case)


def explanation(found: Explained, name: str, sides: tuple[str, str], class_names: list[str]) -> Explanation:
    """What was found, as RUN folders hold it.

    Args:
        found: of `explain_variant` or `explain_records`.
        name: an id for it, one of its own in a RUN.
        sides: what reference and subject are.
        class_names: one a class; fewer where they are not known.
    """
    every, counts = ordered(found), Counter[str](found.causes)
    followers: Counter[str] = Counter(d.root for _, d in every if d.cause == "cascade")
    names = [*class_names, *(f"class {index}" for index in range(len(class_names), _last_class(found) + 1))]
    return Explanation(
        id=name,
        reference=sides[0],
        subject=sides[1],
        images=found.images,
        reference_detections=found.detections[0],
        subject_detections=found.detections[1],
        reference_ap=found.ap.get("reference"),
        subject_ap=found.ap.get("subject"),
        differing=len(every),
        unexplained=found.causes["unexplained"],
        wrong_settings=found.wrong_settings,
        causes=[
            CauseCount(cause=cause, boxes=counts[cause], followers=followers[cause], ap_without=found.ap.get(cause))
            for cause in sorted(counts | followers, key=lambda cause: -counts[cause])
        ],
        boxes=[
            ExplainedBox(
                image_id=image,
                row=d.row,
                label=d.label,
                label_name=names[d.label],
                score=d.score,
                reference=d.reference.why,
                subject=d.subject.why,
                cause=d.cause,
                follows=f"row {d.follows[0]}, {names[d.follows[1]]}" if d.follows else "",
                replay=d.replay,
            )
            for image, d in every
        ],
        worst=found.crops,
        notes=found.notes,
    )


def _last_class(found: Explained) -> int:
    labels = [
        label for each in found.divergences.values() for d in each for label in (d.label, (d.follows or (0, 0))[1])
    ]
    return max(labels, default=0)
