"""What was measured between a reference and a subject, added up image by image."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from alignment.compare.detections import Agreement
from alignment.compare.tensors import ErrorAccumulator
from alignment.models.outputs import Outputs
from alignment.results import Scores, StageName, TensorResult


@dataclass
class Measured:
    """All that a verdict needs.

    Attributes:
        inputs: (images whose input bytes are equal, images looked at).
        tensors: ``boxes`` (px), ``scores`` and the raw outputs.
        matched, total: detections with a counterpart, and all; see `Agreement`.
        scores: AP of both sides.
        notes: what could not be measured and why, by stage.
    """

    inputs: tuple[int, int] = (0, 0)
    tensors: list[TensorResult] = field(default_factory=list)
    matched: int = 0
    total: int = 0
    scores: Scores | None = None
    notes: dict[StageName, str] = field(default_factory=dict)

    @property
    def agreement(self) -> float:
        """matched / total, 1 where nothing was found on either side."""
        return self.matched / self.total if self.total else 1.0


@dataclass
class _Tensor:
    difference: ErrorAccumulator = field(default_factory=ErrorAccumulator)
    reference: ErrorAccumulator = field(default_factory=ErrorAccumulator)
    subject: ErrorAccumulator = field(default_factory=ErrorAccumulator)
    referee_images: int = 0


class TensorErrors:
    """Errors of every named output: subject against reference, and both against float64 where that was run."""

    def __init__(self) -> None:
        self._tensors: dict[str, _Tensor] = {}

    def add(self, subject: Outputs, reference: Outputs | None, referee: Outputs | None) -> None:
        """Adds one batch.  Without a reference the subject is held to the referee itself."""
        truth = _named(referee) if referee else {}
        ours = _named(subject)
        theirs = _named(reference) if reference else truth
        for name in [n for n in ours if n in theirs]:
            tensor = self._tensors.setdefault(name, _Tensor())
            tensor.difference.add(ours[name], theirs[name])
            if name in truth:
                tensor.referee_images += len(ours[name])
                tensor.subject.add(ours[name], truth[name])
                if reference:
                    tensor.reference.add(theirs[name], truth[name])

    def results(self) -> list[TensorResult]:
        """One entry for each output that both sides have."""
        units = {"boxes": "px", "scores": "probability"}
        results = []
        for name, tensor in self._tensors.items():
            difference = tensor.difference.stats()
            if difference is not None:
                results.append(
                    TensorResult(
                        name=name,
                        unit=units.get(name, "raw"),
                        difference=difference,
                        reference_error=tensor.reference.stats(),
                        subject_error=tensor.subject.stats(),
                        referee_images=tensor.referee_images,
                    )
                )
        return results


def count_agreement(agreements: list[Agreement]) -> tuple[int, int]:
    """Sums (matched, total) over images."""
    return sum(a.matched for a in agreements), sum(a.total for a in agreements)


def _named(outputs: Outputs) -> dict[str, np.ndarray]:
    return {"boxes": outputs.boxes, "scores": outputs.scores, **outputs.raw}
