"""variant → samples → runner → record → compare → verdict: what `align run` and the test suite do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from alignment.case import Case, reference_of
from alignment.compare.coco_map import coco_ap
from alignment.compare.detections import SCORE, Agreement, agree
from alignment.compare.measure import Measured, TensorErrors, count_agreement
from alignment.compare.verdict import first_difference, judge, wrong_side
from alignment.data.coco import read_image
from alignment.data.samples import Sample, Samples
from alignment.golden import limits, read_golden
from alignment.models.outputs import Outputs, to_outputs
from alignment.nms.multiclass import Detections, postprocess
from alignment.results import Box, CaseResult, Scores, Timing, WorstImage
from alignment.runners.base import Runner
from alignment.runners.open import open_referee, open_runner
from alignment.runners.record import Record
from alignment.storage import writing
from alignment.variant import Variant, golden_dir

WORST_IMAGES = 3
PICTURE_SIZE = 640


@dataclass(frozen=True)
class RunOptions:
    """How to run.

    Attributes:
        golden: folder of golden values; its ``records`` are replayed where TensorRT cannot run.
        out: the RUN folder that receives pictures, or None.
        records: folder to write records of this run into, or None.
        referee_images: on how many images float64 is run, spread evenly.
    """

    golden: Path = field(default_factory=golden_dir)
    out: Path | None = None
    records: Path | None = None
    referee_images: int = 3


@dataclass
class _Side:
    """One runner and all that it answered."""

    case: Case
    runner: Runner
    inference_s: float = 0.0
    detections: dict[int, Detections] = field(default_factory=dict)
    errors: TensorErrors = field(default_factory=TensorErrors)
    record: Record | None = None

    def run(self, sample: Sample, variant: Variant) -> Outputs:
        """One image through the backend; only the backend itself is on the clock."""
        start = time.perf_counter()
        named = self.runner.run(sample.tensor[None])
        self.inference_s += time.perf_counter() - start
        return to_outputs(named, variant)


def align_live(
    variant: Variant,
    cases: list[Case],
    samples: Samples,
    options: RunOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[CaseResult], dict[str, float]]:
    """Runs the cases of one variant side by side on the same bytes, and judges them.

    The reference (see `reference_of`) always runs; it gets a verdict of its own when it is among `cases`.

    Args:
        progress: called with the number of images done, after each.

    Returns:
        Results in the order of `cases`, and seconds: ``start_s`` (loading models), ``images_s`` (all images through
        all stages), ``bare_s`` (inside the compared backends), ``referee_s``, ``judge_s``.

    Raises:
        AlignError: for a model or an image that cannot be used.
    """
    options = options or RunOptions()
    clock = [time.perf_counter()]
    wanted = {case: None for case in [reference_of(variant), *cases]}
    sides = [_Side(case, open_runner(variant, case)) for case in wanted]
    reference = sides[0]
    if options.records:
        identity = record_identity(variant, reference.runner)
        for side in sides:
            side.record = Record(side.case.id, identity)
    try:
        referee = open_referee(variant, reference.runner)
        clock.append(time.perf_counter())
        referee_s = _run_images(variant, sides, referee, samples, options, progress)
        clock.append(time.perf_counter())
        results = _judge_sides(variant, sides, samples, options)
    finally:
        for side in sides:
            side.runner.close()
    bare = sum(side.inference_s for side in sides)
    clock.append(time.perf_counter())
    seconds = dict(zip(("start_s", "images_s", "judge_s"), np.diff(clock).tolist(), strict=True))
    by_id = {result.case.id: result for result in results}
    return [by_id[case.id] for case in cases], {**seconds, "bare_s": bare, "referee_s": referee_s}


def record_identity(variant: Variant, reference: Runner) -> dict[str, str]:
    """What a record depends on; a record with another identity is stale."""
    digest = reference.provenance.get("weights_sha256") or reference.provenance.get("onnx_sha256", "")
    return {"variant_fingerprint": variant.fingerprint(), "weights_sha256": str(digest)}


def _run_images(
    variant: Variant,
    sides: list[_Side],
    referee: Runner | None,
    samples: Samples,
    options: RunOptions,
    progress: Callable[[int], None] | None,
) -> float:
    chosen = set(np.linspace(0, len(samples) - 1, min(options.referee_images, len(samples))).astype(int).tolist())
    referee_s = 0.0
    for index, sample in enumerate(samples):
        outputs = [side.run(sample, variant) for side in sides]
        truth = None
        if referee and index in chosen:
            start = time.perf_counter()
            truth = to_outputs(referee.run(sample.tensor[None]), variant)
            referee_s += time.perf_counter() - start
        for side, out in zip(sides, outputs, strict=True):
            side.errors.add(out, None if side is sides[0] else outputs[0], truth)
            found = postprocess(out.boxes[0], out.scores[0], sample.transform, variant.nms)
            side.detections[sample.entry.id] = found
            if side.record:
                side.record.add(sample.entry.id, sample.digest, out.boxes[0], out.scores[0], found)
        if progress:
            progress(index + 1)
    return referee_s


def _judge_sides(variant: Variant, sides: list[_Side], samples: Samples, options: RunOptions) -> list[CaseResult]:
    reference = sides[0]
    golden = read_golden(options.golden, variant.name)
    scores = [coco_ap(samples.dataset, side.detections) for side in sides]
    results: list[CaseResult] = []
    for side, (ap, ap50) in zip(sides, scores, strict=True):
        is_reference = side is reference
        agreements = {i: agree(reference.detections[i], found) for i, found in side.detections.items()}
        matched, total = count_agreement(list(agreements.values()))
        measured = Measured(
            inputs=(len(samples), len(samples)),
            tensors=side.errors.results(),
            matched=matched,
            total=total,
            scores=Scores(reference_ap=None if is_reference else scores[0][0], subject_ap=ap, subject_ap50=ap50),
            notes={"detections": "this is the reference"} if is_reference else {},
        )
        held_to = limits(golden, side.case, side.runner.provenance)
        stages = judge(measured, held_to, len(samples), samples.dataset.fingerprint)
        result = CaseResult(
            case=side.case.result_id(),
            status="fail" if first_difference(stages) else "pass",
            reason="",
            reference="float64" if is_reference else reference.case.id,
            first_difference=first_difference(stages),
            wrong_side=None if is_reference else wrong_side(measured.tensors),
            images=len(samples),
            stages=stages,
            scores=measured.scores,
            timing=Timing(inference_s=side.inference_s, images=len(samples)),
            warnings=side.runner.warnings,
            notes=[variant.notes] if variant.notes else [],
            provenance={**side.runner.provenance, "nms": variant.nms.model_dump()},
            reference_provenance={} if is_reference else reference.runner.provenance,
        )
        result.reason = explain(result)
        if not is_reference:
            result.worst = _worst_images(side, reference, agreements, samples, options.out)
        results.append(result)
        if side.record and options.records:
            side.record.result = result.model_copy(update={"worst": []})
            side.record.save(options.records)
    explain_tf32(results)
    return results


def explain(result: CaseResult) -> str:
    """One line for people: what was reached, or where the case fails first and who is wrong."""
    # A replayed stage holds one quantity to its limit several times; the largest value speaks, as for errors.
    checks = sorted((check for stage in result.stages for check in stage.checks), key=lambda check: check.value)
    values = {check.name: check for check in checks}
    if result.first_difference is None:
        parts = [
            f"{label} {values[name].value:.2g}{unit}"
            for name, label, unit in (("boxes", "boxes within", " px"), ("scores", "scores within", ""))
            if name in values
        ]
        if "agreement" in values:
            parts.append(f"agreement {values['agreement'].value:.4f}")
        if result.scores:
            parts.append(f"AP {result.scores.subject_ap:.4f}")
        return ", ".join(parts)
    stage = next(s for s in result.stages if s.name == result.first_difference)
    check = next(c for c in stage.checks if not c.ok)
    who = {
        "subject": f"; {result.case.backend} is the side that is far from float64",
        "reference": f"; the reference {result.reference} is the side that is far from float64",
        "neither": "; both sides are equally near to float64",
    }.get(result.wrong_side or "", "")
    return f"differs first at {stage.name}: {check.name} {check.value:.4g}, allowed {check.limit}{who}"


def explain_tf32(results: list[CaseResult]) -> None:
    """Names TF32 as the reason where the same engine without it agrees."""
    by_case = {(r.case.variant, r.case.backend, r.case.precision): r for r in results}
    for result in results:
        twin = by_case.get((result.case.variant, result.case.backend, "fp32"))
        if result.case.precision != "tf32":
            continue
        reason = "TF32 is on: convolutions multiply with 10-bit mantissas"
        if twin and twin.status == "pass":
            reason += f", and that is the reason: with TF32 off, {twin.reason}"
        result.reason = f"{result.reason}; {reason}"


def _worst_images(
    side: _Side, reference: _Side, agreements: dict[int, Agreement], samples: Samples, out: Path | None
) -> list[WorstImage]:
    entries = {entry.id: entry for entry in samples.dataset.images}
    order = sorted(agreements, key=lambda i: (agreements[i].rate, -agreements[i].box_difference, i))
    worst = []
    for image in order[:WORST_IMAGES]:
        entry, agreement = entries[image], agreements[image]
        pixels = read_image(entry.path)
        height, width = pixels.shape[:2]
        picture = None
        if out is not None:
            picture = f"pictures/{side.case.variant}-{image}.jpg"
            _write_picture(pixels, out / picture)
        names = samples.dataset.class_names
        worst.append(
            WorstImage(
                image_id=image,
                file_name=entry.file_name,
                width=width,
                height=height,
                picture=picture,
                box_difference=agreement.box_difference,
                score_difference=agreement.score_difference,
                agreement=agreement.rate,
                reference=boxes_of(reference.detections[image], agreement.reference, names),
                subject=boxes_of(side.detections[image], agreement.subject, names),
            )
        )
    return worst


def boxes_of(found: Detections, matched: np.ndarray, names: list[str]) -> list[Box]:
    """The detections that `matched` speaks of, as the report draws them."""
    strong = np.flatnonzero(found.scores >= SCORE)[: len(matched)]
    return [
        Box(
            xyxy=tuple(round(float(v), 2) for v in found.boxes[i]),  # type: ignore[arg-type]
            score=round(float(found.scores[i]), 5),
            label=int(found.labels[i]),
            label_name=names[int(found.labels[i])],
            matched=bool(ok),
        )
        for i, ok in zip(strong, matched, strict=True)
    ]


def _write_picture(pixels: np.ndarray, path: Path) -> None:
    scale = min(1.0, PICTURE_SIZE / max(pixels.shape[:2]))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    with writing(path) as temporary:
        temporary.write_bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes())


def skipped(case: Case, reason: str) -> CaseResult:
    """The result of a case that cannot be run or replayed here."""
    return CaseResult(case=case.result_id(), status="skip", reason=reason)
