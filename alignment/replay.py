"""Verdicts from records: TensorRT's real answers, judged on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alignment.case import Case, reference_of, twin_of
from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.compare.detections import agree
from alignment.compare.dota_map import dota_scores
from alignment.compare.measure import UNITS, Measured, comparable, count_agreement, split_angles
from alignment.compare.tensors import ErrorAccumulator, count_nonfinite
from alignment.compare.verdict import doubts, first_difference, judge, wrong_side
from alignment.data.samples import Samples
from alignment.errors import AlignError
from alignment.golden import limits, read_golden
from alignment.models.outputs import ENDS_IN_NMS
from alignment.pipeline import explain, quantized_identity
from alignment.results import CaseResult, Scores, TensorResult
from alignment.runners.record import (
    CANDIDATE_SCORE,
    CANDIDATES,
    FULL_IMAGES,
    STEPS,
    Candidates,
    Record,
    record_path,
)
from alignment.variant import Variant


def has_record(golden: Path, case: Case) -> bool:
    """Whether a record of that case is among the golden ones."""
    return record_path(golden / "records", case.id).is_file()


def replay(variant: Variant, case: Case, golden: Path, samples: Samples | None) -> CaseResult:
    """Judges the record of a case against the record of its reference, both made in the same run.

    Args:
        variant: as it is now; a record of another model or preprocessing is refused.
        case: whose record lies in ``golden/records``.
        golden: the golden folder.
        samples: the images, for the input and mAP stages; None leaves those two unchecked.

    Raises:
        AlignError: for a record that is missing, damaged or stale.
    """
    path = record_path(golden / "records", case.id)
    record = Record.load(path)
    reference = Record.load(record_path(golden / "records", reference_of(variant).id))
    _refuse_stale(record, reference, variant, case, path)
    recorded = record.result
    if recorded is None:
        raise AlignError(f"{path}: holds no result", "make the record again")
    images = list(record.digests)
    if samples is not None:
        images = [e.id for e in samples.dataset.images if e.id in record.digests]
    measured = _measure(record, reference, recorded, images)
    if variant.ends_in_nms:
        measured.held = {}
        measured.notes.update({"raw": ENDS_IN_NMS, "decoded": ENDS_IN_NMS})
    if samples is not None and images:
        measured.inputs = _equal_inputs(record, samples, images)
        measured.scores = _scores(record, reference, _twin(case, golden), samples, images)
    else:
        measured.notes["input"] = "no images here: give --data to check the bytes that went in"
        measured.notes["map"] = _recorded_ap(recorded)
    held_to = limits(read_golden(golden, variant.name), case, recorded.provenance, len(images))
    stages = judge(measured, held_to, len(images), samples.dataset.fingerprint if samples else None)
    result = recorded.model_copy(
        update={
            "status": "fail" if first_difference(stages) else "pass",
            "first_difference": first_difference(stages),
            "wrong_side": wrong_side(measured.tensors),
            "replayed": True,
            "images": len(images),
            "stages": stages,
            "scores": measured.scores or recorded.scores,
            "warnings": [
                *(warning for warning in recorded.warnings if warning not in recorded.doubts),
                *doubts(measured.scores or recorded.scores),
            ],
            "worst": [],
        }
    )
    gpu = recorded.provenance.get("gpu", "another machine")
    result.reason = f"{explain(result, variant)} (replayed record of {gpu})"
    return result


def _twin(case: Case, golden: Path) -> Record | None:
    twin = twin_of(case)
    return Record.load(record_path(golden / "records", twin.id)) if twin and has_record(golden, twin) else None


def _scores(record: Record, reference: Record, twin: Record | None, samples: Samples, images: list[int]) -> Scores:
    ours, theirs = ({i: r.detections[i] for i in images} for r in (record, reference))
    ap, ap50 = coco_ap(samples.dataset, ours)
    found = Scores(reference_ap=coco_ap(samples.dataset, theirs)[0], subject_ap=ap, subject_ap50=ap50)
    if record.rotated:
        found.dota = dota_scores(samples.dataset, ours, theirs)
    if "quantization" in record.identity:
        found.agreement_ap = agreement_ap(samples.dataset, theirs, ours)
    if twin is not None:
        others = {i: twin.detections[i] for i in images}
        found.twin, found.twin_ap = twin.case, coco_ap(samples.dataset, others)[0]
        found.twin_agreement_ap = agreement_ap(samples.dataset, others, ours)
    return found


def _refuse_stale(record: Record, reference: Record, variant: Variant, case: Case, path: Path) -> None:
    mend = "make the record again: align run VARIANT --backend torch,tensorrt --records DIR"
    if any(record.identity[key] != value for key, value in reference.identity.items()):
        raise AlignError(f"{path}: made with other weights than the record of its reference", mend)
    if list(record.digests) != list(reference.digests):
        raise AlignError(f"{path}: of other images than the record of its reference", mend)
    if record.identity["variant_fingerprint"] != variant.fingerprint():
        raise AlignError(f"{path}: stale: the variant's YAML changed since", mend)
    if any(record.identity.get(key) != value for key, value in quantized_identity(variant, case).items()):
        raise AlignError(f"{path}: stale: `quantization` in the variant's YAML changed since", mend)
    if variant.weights.is_file():
        from alignment.export.onnx_export import file_digest

        if record.identity["weights_sha256"] != file_digest(variant.weights):
            raise AlignError(f"{path}: stale: made with other weights than {variant.weights}", mend)


def _measure(record: Record, reference: Record, recorded: CaseResult, images: list[int]) -> Measured:
    matched, total = count_agreement([agree(reference.detections[i], record.detections[i]) for i in images])
    nonfinite = sum(count_nonfinite(record.detections[i].boxes, record.detections[i].scores) for i in images)
    streamed = [t for s in recorded.stages for t in s.tensors]
    measured = Measured(tensors=[*streamed, *_recomputed(record, reference, images)], matched=matched, total=total)
    measured.nonfinite = nonfinite
    measured.notes["raw"] = "error statistics as measured where the record was made; a record cannot recheck them"
    if record.compact:
        measured.notes["decoded"] = "statistics as recorded: an int8 record holds detections alone"
        return measured
    both = _full_on_both_sides(record, reference, images)
    due = [i for i in list(record.digests)[:FULL_IMAGES] if i in images]
    measured.held = {
        "full tensors": (len(both), len(due)),
        "statistics": (len({t.name for t in streamed if t.name in UNITS}), 2 + record.rotated),
    }
    cut = sum(len(record.candidates[i].scores) >= CANDIDATES for i in images)
    measured.notes["decoded"] = (
        f"statistics over all images as recorded; rechecked here: the full tensors of {len(both)} images, and of each "
        f"image the candidates of score >= {CANDIDATE_SCORE}, at most the best {CANDIDATES} (so many are listed of "
        f"{cut} of {len(images)} images, where nothing is rechecked below the last of them)"
    )
    return measured


def _recomputed(record: Record, reference: Record, images: list[int]) -> list[TensorResult]:
    full = {name: ErrorAccumulator() for name in UNITS}
    candidates = {name: ErrorAccumulator() for name in UNITS}
    whole = _full_on_both_sides(record, reference, images)
    for image in images if not record.compact else ():
        ours, theirs = _shared(record.candidates[image], reference.candidates[image])
        others = _named(theirs.boxes, theirs.scores)
        for name, a in _named(ours.boxes, ours.scores).items():
            candidates[name].add(*comparable(name, a, others[name]))
        candidates["scores"].add(*_of_one_side(record.candidates[image], reference.candidates[image]))
        if image in whole:
            others = _named(*reference.full[image])
            for name, a in _named(*record.full[image]).items():
                a, b = comparable(name, a, others[name])
                full[name].add(_beyond_rounding(a, b, STEPS[name]), b)
    results = []
    for kind, tensors in (("full tensors", full), ("candidates", candidates)):
        for name, errors in tensors.items():
            if stats := errors.stats():
                results.append(TensorResult(name=f"{name}, {kind}", unit=UNITS[name], difference=stats))
    return results


def _full_on_both_sides(record: Record, reference: Record, images: list[int]) -> list[int]:
    """The images of which both sides hold full tensors, of equal shapes."""
    return [
        i
        for i in images
        if i in record.full
        and i in reference.full
        and [a.shape for a in record.full[i]] == [b.shape for b in reference.full[i]]
    ]


def _named(boxes: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    return {**split_angles(boxes), "scores": scores}


def _shared(a: Candidates, b: Candidates) -> tuple[Candidates, Candidates]:
    """The pairs that both sides list, in one order."""
    _, left, right = np.intersect1d(_keys(a), _keys(b), return_indices=True)
    return _take(a, left), _take(b, right)


def _of_one_side(a: Candidates, b: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the pairs that only one side lists, and the nearest that the other can give them.

    A side lists all pairs above its `floor`: what it does not list has no higher score than that.
    """
    keys = _keys(a), _keys(b)
    ours, theirs = a.scores[~np.isin(keys[0], keys[1])], b.scores[~np.isin(keys[1], keys[0])]
    return (
        np.concatenate([ours, np.minimum(theirs, np.float32(a.floor))]),
        np.concatenate([np.minimum(ours, np.float32(b.floor)), theirs]),
    )


def _keys(c: Candidates) -> np.ndarray:
    return c.rows.astype(np.int64) << 16 | c.labels


def _beyond_rounding(a: np.ndarray, b: np.ndarray, step: float) -> np.ndarray:
    """`a` moved towards `b` by one step of fixed point, which is what rounding both can add to their difference."""
    difference = a - b
    return b + np.sign(difference) * np.maximum(np.abs(difference) - np.float32(step), 0)


def _take(c: Candidates, index: np.ndarray) -> Candidates:
    return Candidates(c.rows[index], c.labels[index], c.boxes[index], c.scores[index])


def _equal_inputs(record: Record, samples: Samples, images: list[int]) -> tuple[int, int]:
    entries = {e.id: e for e in samples.dataset.images}
    equal = sum(samples.digest(entries[i]) == record.digests[i] for i in images)
    return equal, len(images)


def _recorded_ap(recorded: CaseResult) -> str:
    note = "no images here: give --data to score the recorded detections"
    if recorded.scores and recorded.scores.reference_ap is not None:
        note += f"; recorded: {recorded.scores.subject_ap:.4f} against {recorded.scores.reference_ap:.4f}"
    return note
