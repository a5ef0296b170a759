"""The ladder from float to int8: one variant as it is, quantized, partly quantized and trained, on every backend.

Each rung is scored by the same images, decoding and NMS, and agreement is with one reference, that of `align run`.  A
score belongs to what was measured, graph and images, and not to where: a ladder that was begun without a GPU is
finished on one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from alignment import __version__
from alignment.case import BACKENDS, Backend, Case, reference_of
from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.data.samples import Samples
from alignment.engine import capabilities
from alignment.errors import QUANTIZATION_MEND, AlignError
from alignment.export.onnx_export import file_digest
from alignment.models.outputs import detect
from alignment.nms.multiclass import Detections
from alignment.quantize.candidates import Candidates
from alignment.quantize.keep_float import BESIDE
from alignment.quantize.qat_files import own_yaml, read_papers
from alignment.quantize.recipe import calibration_samples
from alignment.results import Ladder, Rung, RungScore
from alignment.runners.open import open_runner
from alignment.variant import Variant, load_variant

Progress = Callable[[str, int, int], None]
#: Raise it when a score comes to mean another number: those that were written are then left alone.
MEANING = 1


@dataclass(frozen=True)
class Step:
    """A rung before it is scored.

    Attributes:
        name: short.
        variant: the model, and the recipe that makes it int8.
        int8: whether it is, by the route ``qdq``.
        how: what was done, in words.
        command: what makes it.
    """

    name: str
    variant: Variant
    int8: bool = True
    how: str = ""
    command: str = ""

    def case(self, backend: Backend) -> Case:
        """The rung on a backend."""
        return Case(self.variant.name, backend, *(("int8", "qdq") if self.int8 else ("fp32", None)))  # type: ignore[arg-type]


def trained_from(path: Path, start: Variant) -> tuple[Path, Variant]:
    """A variant that was trained from another, and its YAML file.

    Args:
        path: that file, or the folder of it.
        start: the other.

    Raises:
        AlignError: for another network, or one that was not trained.
    """
    path = own_yaml(path, start.name) if path.is_dir() else path
    own = load_variant(path)
    if own.fingerprint() != start.fingerprint() or file_digest(own.weights) != file_digest(start.weights):
        raise AlignError(f"{path}: another network than {start.name}", "give what `align qat` made of this variant")
    if own.quantization.trained is None:
        raise AlignError(f"{path}: not trained", "give the NAME_qat.yaml that `align qat` wrote")
    return path, own


def trained_step(path: Path, start: Variant, partial: Variant | None) -> Step:
    """The rung of a trained variant.

    Args:
        path: its YAML file, or the folder of it.
        start: the variant, by the recipe of the ladder.
        partial: the same with nodes in float, where the ladder has such a rung.

    Raises:
        AlignError: for another network, or another recipe.
    """
    path, own = trained_from(path, start)
    ours, theirs = (variant.quantization.model_dump(exclude=BESIDE) for variant in (start, own))
    for field, value in theirs.items():
        if value != ours[field]:
            what = f"{path}: trained with {field} {value}, but the ladder is of {field} {ours[field]}"
            raise AlignError(what, "give one recipe to both")
    kept = set(own.quantization.keep_float)
    begun = f"{len(kept)} kept in float"
    if partial is not None and kept == set(partial.quantization.keep_float):
        begun = "partial"
    elif kept == set(start.quantization.keep_float):
        begun = "PTQ"
    told = read_papers(path.parent, start.name)
    teachers = _teachers(told)
    name = ", ".join([f"QAT from {begun}", *([teachers] if teachers else [])])
    return Step(name, own, True, _training(told), f"align run {own.arguments} --precision int8 --route qdq")


def _teachers(told: dict[str, Any]) -> str:
    options = told.get("options", {})
    found = ["labels"] if options.get("labels") else []
    return " + ".join([*found, *(["distillation"] if options.get("distill") else [])])


def _training(told: dict[str, Any]) -> str:
    if not told:
        return "trained"
    epochs, best, options = len(told["epochs"]) - 1, told["best"], told["options"]
    came = f"epoch {best} of {epochs} is the best" if best else f"none of {epochs} epochs is better than the start"
    distilled = f", {' and '.join(options['distill'])} of the float model" if options["distill"] else ""
    scales = "learnt" if options["learn_scales"] else "kept"
    by = "labels" if options["labels"] else "no labels"
    return f"trained on {told['images']} images, by {by}{distilled}, scales {scales}: {came}"


def lacks(variant: Variant, backend: str) -> str | None:
    """Why a backend cannot run the rungs of a variant here, None where it can."""
    if backend == "torch" and not variant.has_torch:
        return "a bare ONNX file has no torch model"
    if backend == "torch" and find_spec("pytorch_quantization") is None:
        return f"pytorch-quantization is not installed: {QUANTIZATION_MEND}"
    return capabilities.missing() if backend == "tensorrt" else None


def measure(
    steps: Sequence[Step],
    samples: Samples,
    backends: Sequence[str],
    known: Ladder | None = None,
    data: Path | None = None,
    progress: Progress | None = None,
    keep: Callable[[Ladder], None] | None = None,
) -> Ladder:
    """Scores rungs on backends.

    Args:
        steps: the rungs, FP32 first.
        samples: the images.
        backends: where; one that cannot run here is told in `Ladder.missing`.
        known: an earlier ladder: its scores of the same graphs and images are taken, of other backends too.
        data: COCO-layout root, for variants on COCO.
        progress: called with what is being scored, how many images are done, and all.
        keep: called with what there is, after every score.

    Raises:
        AlignError: for a model that cannot be quantized or loaded.
    """
    variant, keys = steps[0].variant, _Keys(samples, data)
    reference = _Reference(variant, samples)
    found = Ladder(
        variant=variant.name,
        images=len(samples),
        reference=reference.case.id,
        recipe=steps[1].variant.quantization.model_dump(mode="json") if len(steps) > 1 else {},
        rungs=[_rung(step, data) for step in steps],
        missing={backend: why for backend in backends if (why := lacks(variant, backend))},
    )
    scores = {score.key: score for rung in (known.rungs if known else ()) for score in rung.scores}
    wanted = [(step, rung, backend) for step, rung in zip(steps, found.rungs, strict=True) for backend in BACKENDS]
    for step, rung, backend in wanted:
        if score := scores.get(keys.of(step, backend)):
            rung.scores.append(score)
    found.missing = {b: why for b, why in found.missing.items() if not all(rung.on(b) for rung in found.rungs)}
    for step, rung, backend in wanted:
        if backend in backends and rung.on(backend) is None and backend not in found.missing:
            rung.scores.append(_score(step, backend, reference, keys.of(step, backend), progress))
            rung.scores.sort(key=lambda score: BACKENDS.index(score.backend))  # type: ignore[arg-type]
            if keep:
                keep(found)
    return found


def _rung(step: Step, data: Path | None) -> Rung:
    candidates = Candidates(step.variant, data)
    int8 = candidates.nodes if step.int8 else ()
    share = candidates.int8_share() if step.int8 else 0.0
    in_float = len(candidates.macs) - len(int8)
    return Rung(name=step.name, how=step.how, command=step.command, float_nodes=in_float, int8_macs=share)


class _Reference:
    """What agreement is with: run when it is first asked for."""

    def __init__(self, variant: Variant, samples: Samples) -> None:
        self.variant, self.samples = variant, samples
        self.case = reference_of(variant)
        self.provenance: dict[str, Any] = {}

    @cached_property
    def detections(self) -> dict[int, Detections]:
        with open_runner(self.variant, self.case) as runner:
            self.provenance = runner.provenance
            return detect(self.samples, runner.run)


def _score(step: Step, backend: Backend, reference: _Reference, key: str, progress: Progress | None) -> RungScore:
    case, samples = step.case(backend), reference.samples
    truth = reference.detections
    if case == reference.case:
        found, provenance = truth, reference.provenance
    else:
        with open_runner(step.variant, case, data=samples.dataset.root) as runner:
            found, provenance = (
                detect(samples, _counted(runner.run, case.id, len(samples), progress)),
                runner.provenance,
            )
    ap = coco_ap(samples.dataset, found)[0]
    agreement = agreement_ap(samples.dataset, truth, found)
    return RungScore(backend=backend, ap=ap, agreement_ap=agreement, key=key, provenance=provenance)


def _counted(
    run: Callable[[np.ndarray], dict[str, np.ndarray]], stage: str, total: int, progress: Progress | None
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    done = 0

    def counted(batch: np.ndarray) -> dict[str, np.ndarray]:
        nonlocal done
        answers, done = run(batch), done + 1
        if progress:
            progress(stage, done, total)
        return answers

    return counted


class _Keys:
    """What scores are of: graph and images, whatever they are measured with."""

    def __init__(self, samples: Samples, data: Path | None) -> None:
        dataset = samples.dataset
        self._images = [dataset.content_fingerprint, dataset.fingerprint, len(samples)]
        self._data = data
        self._calibrated: dict[int, str] = {}

    def of(self, step: Step, backend: str) -> str:
        variant, count = step.variant, step.variant.quantization.images
        parts: list[Any] = [MEANING, __version__, backend, variant.fingerprint(), file_digest(variant.weights)]
        if step.int8:
            if count not in self._calibrated:
                self._calibrated[count] = calibration_samples(variant, self._data).dataset.content_fingerprint
            parts += [variant.quantization.fingerprint(), self._calibrated[count]]
        return hashlib.sha256(json.dumps([*parts, *self._images]).encode()).hexdigest()[:16]
