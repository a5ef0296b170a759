"""variant → samples → runner → record → compare → verdict: what `align run` and the test suite do."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from alignment.case import Case, reference_of, twin_of
from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.compare.detections import SCORE, Agreement, agree
from alignment.compare.dota_map import dota_scores
from alignment.compare.measure import Measured, TensorErrors, count_agreement
from alignment.compare.verdict import NOT_FINITE, doubts, first_difference, judge, wrong_side
from alignment.data.coco import CocoDataset, read_image
from alignment.data.samples import Sample, Samples
from alignment.golden import limits, read_golden
from alignment.journal import Journal
from alignment.models.onnx_heads import require_plausible
from alignment.models.outputs import ENDS_IN_NMS, Outputs, detections_of, to_outputs
from alignment.nms.multiclass import Detections
from alignment.nms.rotated import corners
from alignment.referee import Referee
from alignment.results import Box, CaseResult, Scores, StageName, Timing, WorstImage
from alignment.runners.base import Runner
from alignment.runners.open import open_runner
from alignment.runners.record import Record
from alignment.signatures import graph_signature
from alignment.storage import writing
from alignment.variant import Variant, golden_dir

WORST_IMAGES = 3
PICTURE_SIZE = 640
#: Images that a backend answers in a row before the next one has them: threads of two backends that take turns at
#: every image wait for each other, which costs a sixth of both.
TURN = 4
#: A median of fewer calls says nothing.
LEAST_CALLS = 8


@dataclass(frozen=True)
class RunOptions:
    """How to run.

    Attributes:
        golden: folder of golden values; its ``records`` are replayed where TensorRT cannot run.
        out: the RUN folder that receives pictures, or None.
        records: folder to write records of this run into, or None.
        referee_images: on how many images float64 is run: the first, so that a run over fewer has the same ones.
        batch: how many images go through a backend at once.
        journal: folder in which what was measured is kept for the same run, should this one be killed, or None; whoever
            gives it removes it.  A run that writes records keeps nothing.
    """

    golden: Path = field(default_factory=golden_dir)
    out: Path | None = None
    records: Path | None = None
    referee_images: int = 3
    batch: int = 1
    journal: Path | None = None


@dataclass
class _Side:
    """One runner and all that it answered.

    `calls` are seconds in the backend, `latency` milliseconds by the device's own clock; `equal_inputs` counts the
    images that it got, and left, unchanged.
    """

    case: Case
    runner: Runner
    calls: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    equal_inputs: int = 0
    detections: dict[int, Detections] = field(default_factory=dict)
    errors: TensorErrors = field(default_factory=TensorErrors)
    record: Record | None = None

    def answer(self, samples: list[Sample], variant: Variant) -> list[Outputs]:
        """What the backend says about some images, which go through it at once."""
        return self.run(np.stack([sample.tensor for sample in samples]), samples, variant)

    def run(self, batch: np.ndarray, samples: list[Sample], variant: Variant) -> list[Outputs]:
        """Some images through the backend, answered one by one; only the backend itself is on the clock.

        Args:
            batch: ``[B, 3, H, W]``, a copy of the samples' tensors: a backend that writes into it spoils it for no
                other one, and is found out when the bytes are compared afterwards.
        """
        start = time.perf_counter()
        named = self.runner.run(batch)
        self.calls.append(time.perf_counter() - start)
        for image, sample in zip(batch, samples, strict=True):
            self.equal_inputs += np.array_equal(image.view(np.int32), sample.tensor.view(np.int32))
        return to_outputs(named, variant, len(batch)).images()

    def timing(self, images: int, batch: int) -> Timing:
        """Seconds in all and, where there were calls enough, for one: the first warms up, the last may be smaller."""
        found = Timing(inference_s=sum(self.calls), images=images, batch=batch)
        if self.latency:
            found.latency_ms, found.clock = float(np.median(self.latency)), "gpu"
        elif len(self.calls) >= LEAST_CALLS + 2:
            found.latency_ms, found.clock = 1e3 * float(np.median(self.calls[1:-1])), "wall"
        return found


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
        all stages), ``bare_s`` (inside the compared backends), ``referee_s``, ``judge_s``; and ``resumed_images``, how
        many an earlier run did that was killed, if any: ``images_s`` is without these, ``bare_s`` is not.

    Raises:
        AlignError: for a model or an image that cannot be used.
    """
    options = options or RunOptions()
    clock = [time.perf_counter()]
    twins = [twin for case in cases if (twin := twin_of(case))]
    wanted = dict.fromkeys([reference_of(variant), *cases, *twins])
    root = samples.dataset.root
    with ExitStack() as opened:
        sides = [_Side(case, opened.enter_context(open_runner(variant, case, options.batch, root))) for case in wanted]
        reference = sides[0]
        if options.records:
            identity = record_identity(variant, reference.runner)
            for side in sides:
                known = identity | quantized_identity(variant, side.case)
                side.record = Record(side.case.id, known, compact=side.case.precision == "int8")
        referee = Referee.open(variant, reference.runner)
        clock.append(time.perf_counter())
        journal = None
        if options.journal and not options.records:
            how = (options.batch, options.referee_images, _turn(options.batch))
            journal = Journal.open(options.journal, samples, sides, how)
        _run_images(variant, sides, referee, samples, options, journal, progress)
        clock.append(time.perf_counter())
        _time_devices(sides, samples, options.batch)
        clock.append(time.perf_counter())
        results = _judge_sides(variant, sides, referee, samples, options)
    bare = sum(sum(side.calls) for side in sides)
    clock.append(time.perf_counter())
    seconds = dict(zip(("start_s", "images_s", "latency_s", "judge_s"), np.diff(clock).tolist(), strict=True))
    by_id = {result.case.id: result for result in results}
    signed = next((case for case in cases if case.backend != "torch"), None)
    if signed:
        by_id[signed.id].signature = graph_signature(variant, samples)
    seconds |= {"bare_s": bare, "referee_s": referee.seconds}
    if journal and journal.resumed:
        seconds["resumed_images"] = journal.resumed
    return [by_id[case.id] for case in cases], seconds


def record_identity(variant: Variant, reference: Runner) -> dict[str, str]:
    """What a record depends on; a record with another identity is stale."""
    digest = reference.provenance.get("weights_sha256") or reference.provenance.get("onnx_sha256", "")
    return {"variant_fingerprint": variant.fingerprint(), "weights_sha256": str(digest)}


def quantized_identity(variant: Variant, case: Case) -> dict[str, str]:
    """What a record of int8 depends on beside that."""
    return {"quantization": variant.quantization.fingerprint()} if case.precision == "int8" else {}


def _run_images(
    variant: Variant,
    sides: list[_Side],
    referee: Referee,
    samples: Samples,
    options: RunOptions,
    journal: Journal | None,
    progress: Callable[[int], None] | None,
) -> None:
    images = [entry.id for entry in samples.dataset.images]
    done = journal.restore(images, sides, referee) if journal else 0
    if progress and done:
        progress(done)
    for index, (sample, outputs) in enumerate(_answered(variant, sides, samples, options.batch, done), done):
        if not variant.has_torch and not variant.ends_in_nms and index == 0:
            require_plausible(outputs[0].boxes, outputs[0].scores, variant)
        truth = referee.run(sample, variant) if index < options.referee_images else None
        for side, out in zip(sides, outputs, strict=True):
            side.errors.add(out, None if side is sides[0] else outputs[0], truth)
            found = detections_of(out, sample.transform, variant)
            side.detections[sample.entry.id] = found
            if side.record:
                side.record.add(sample.entry.id, sample.digest, out.boxes[0], out.scores[0], found)
        if journal:
            journal.keep(images, index + 1, sides, referee)
        if progress:
            progress(index + 1)


def _time_devices(sides: list[_Side], samples: Samples, size: int) -> None:
    """Asks the devices that have a clock how long they take for one batch."""
    batch = np.stack([samples.load(entry).tensor for entry in samples.dataset.images[:size]])
    for side in sides:
        side.latency = side.runner.latency(batch)


def _answered(
    variant: Variant, sides: list[_Side], samples: Samples, size: int, first: int
) -> Iterator[tuple[Sample, tuple[Outputs, ...]]]:
    """Each sample from the `first` with what the sides say about it; `size` samples go through a backend at once."""
    images = samples.after(first)
    while turn := list(itertools.islice(images, _turn(size))):
        batches = [turn[start : start + size] for start in range(0, len(turn), size)]
        answers = [[found for batch in batches for found in side.answer(batch, variant)] for side in sides]
        yield from zip(turn, zip(*answers, strict=True), strict=True)


def _turn(batch: int) -> int:
    """Images of a turn: whole batches."""
    return max(TURN // batch, 1) * batch


def _judge_sides(
    variant: Variant, sides: list[_Side], referee: Referee, samples: Samples, options: RunOptions
) -> list[CaseResult]:
    reference = sides[0]
    golden = read_golden(options.golden, variant.name)
    by_case = {side.case: side for side in sides}
    aps = {side.case: coco_ap(samples.dataset, side.detections) for side in sides}
    results: list[CaseResult] = []
    for side in sides:
        is_reference = side is reference
        others = referee.detections if is_reference and referee.detections else reference.detections
        agreements = {i: agree(other, side.detections[i]) for i, other in others.items()}
        matched, total = count_agreement(list(agreements.values()))
        measured = Measured(
            inputs=(side.equal_inputs, len(samples)),
            tensors=side.errors.results(),
            matched=matched,
            total=total,
            nonfinite=side.errors.nonfinite,
            scores=_scores(side, None if is_reference else reference, by_case, aps, samples.dataset, variant.rotated),
            notes=_notes(variant, is_reference and not referee.detections),
        )
        held_to = limits(golden, side.case, side.runner.provenance, len(samples))
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
            timing=side.timing(len(samples), options.batch),
            engine=side.runner.engine(),
            warnings=[*side.runner.warnings, *doubts(measured.scores)],
            notes=[note for note in (variant.notes, referee.note) if note],
            provenance={
                **side.runner.provenance,
                "batch": options.batch,
                "nms": "in the graph" if variant.ends_in_nms else variant.nms.model_dump(),
            },
            reference_provenance={} if is_reference else reference.runner.provenance,
        )
        result.reason = explain(result, variant)
        if not is_reference:
            result.worst = _worst_images(side, reference, agreements, samples, options.out)
        results.append(result)
        if side.record and options.records:
            side.record.result = result.model_copy(update={"worst": []})
            side.record.save(options.records)
    explain_tf32(results)
    return results


def _scores(
    side: _Side,
    reference: _Side | None,
    by_case: dict[Case, _Side],
    aps: dict[Case, tuple[float, float]],
    dataset: CocoDataset,
    rotated: bool,
) -> Scores:
    ap, ap50 = aps[side.case]
    found = Scores(subject_ap=ap, subject_ap50=ap50)
    if rotated:
        other = None if reference is None else reference.detections
        found.dota = dota_scores(dataset, side.detections, other)
    if reference is None:
        return found
    found.reference_ap = aps[reference.case][0]
    if side.case.precision == "int8":
        found.agreement_ap = agreement_ap(dataset, reference.detections, side.detections)
    if case := twin_of(side.case):
        found.twin, found.twin_ap = case.id, aps[case][0]
        found.twin_agreement_ap = agreement_ap(dataset, by_case[case].detections, side.detections)
    return found


def _notes(variant: Variant, judges_itself: bool) -> dict[StageName, str]:
    """Which stages have nothing to compare, and why."""
    notes: dict[StageName, str] = {"detections": "this is the reference"} if judges_itself else {}
    return {**notes, "raw": ENDS_IN_NMS, "decoded": ENDS_IN_NMS} if variant.ends_in_nms else notes


def explain(result: CaseResult, variant: Variant) -> str:
    """One line for people: what was reached, or where the case fails first and who is wrong."""
    # A replayed stage holds one quantity to its limit several times; the largest value speaks, as for errors.
    checks = sorted((check for stage in result.stages for check in stage.checks), key=lambda check: check.value)
    values = {check.name: check for check in checks}
    if result.first_difference is None:
        parts = [
            f"{label} {values[name].value:.2g}{unit}"
            for name, label, unit in (
                ("boxes", "boxes within", " px"),
                ("angles", "angles within", " rad"),
                ("scores", "scores within", ""),
            )
            if name in values
        ]
        if "agreement" in values:
            parts.append(f"agreement {values['agreement'].value:.4f}")
        if result.scores and result.scores.agreement_ap is not None:
            parts.append(f"AP against the reference's detections {result.scores.agreement_ap:.4f}")
        if result.scores and result.scores.twin_agreement_ap is not None:
            parts.append(f"against {result.scores.twin} {result.scores.twin_agreement_ap:.4f}")
        if result.scores:
            ap = result.scores.subject_ap
            parts.append(f"AP {ap:.4f}" if ap >= 0 else "no truth, so no AP")
        if result.scores and result.scores.dota:
            parts.append(f"DOTA's AP50 {result.scores.dota.ap50:.4f}")
        return ", ".join(parts)
    stage = next(s for s in result.stages if s.name == result.first_difference)
    check = next(c for c in stage.checks if not c.ok)
    who = {
        "subject": f"; {result.case.backend} is the side that is far from float64",
        "reference": f"; the reference {result.reference} is the side that is far from float64",
        "neither": "; both sides are equally near to float64",
    }.get(result.wrong_side or "", "")
    if check.name == NOT_FINITE:
        who = ""
    reason = f"differs first at {stage.name}: {check.name} {check.value:.4g}, allowed {check.limit}{who}"
    if result.case.precision == "fp16":
        reason += f"; `align layers {variant.arguments} --backend {result.case.backend} --precision fp16` says why"
    return reason


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
            write_picture(pixels, out / picture)
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


def boxes_of(found: Detections, matched: np.ndarray, names: list[str], least: float = SCORE) -> list[Box]:
    """The detections of score ≥ `least` that `matched` speaks of, as the report draws them."""
    strong = np.flatnonzero(found.scores >= least)[: len(matched)]
    return [
        Box(
            **_drawn_shape(found.boxes[i]),
            score=round(float(found.scores[i]), 5),
            label=int(found.labels[i]),
            label_name=names[int(found.labels[i])],
            matched=bool(ok),
        )
        for i, ok in zip(strong, matched, strict=True)
    ]


def _drawn_shape(box: np.ndarray) -> dict[str, Any]:
    if len(box) == 4:
        return {"xyxy": [round(float(v), 2) for v in box]}
    around = np.round(corners(box.astype(np.float64)), 2)
    return {"xyxy": [*around.min(0).tolist(), *around.max(0).tolist()], "corners": around.tolist()}


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Writes ``[H, W, 3] uint8`` BGR as JPEG, at most `PICTURE_SIZE` pixels wide and high."""
    height, width = pixels.shape[:2]
    scale = PICTURE_SIZE / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    with writing(path) as temporary:
        temporary.write_bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes())


def skipped(case: Case, reason: str) -> CaseResult:
    """The result of a case that cannot be run or replayed here."""
    return CaseResult(case=case.result_id(), status="skip", reason=reason)
