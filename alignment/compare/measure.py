"""What was measured between a reference and a subject, added up image by image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from alignment.compare.detections import Agreement
from alignment.compare.tensors import ErrorAccumulator, count_nonfinite
from alignment.models.outputs import Outputs
from alignment.results import ErrorStats, Scores, StageName, TensorResult

#: Units of the decoded tensors; the others are raw outputs.
UNITS = {"boxes": "px", "angles": "rad", "scores": "probability"}
#: Of a tensor that there is nothing to hold to.
_NOTHING = ErrorStats(count=0, max_abs=0, mean_abs=0, p99_abs=0, cosine=0, sqnr_db=None)

#: Fields of `_Tensor`.
_PARTS, _COUNTS = ("difference", "reference", "subject"), ("referee_images", "nonfinite")


@dataclass
class Measured:
    """All that a verdict needs.

    Attributes:
        inputs: (images whose input bytes are equal, images looked at).
        tensors: ``boxes`` (px), of rotated ones also ``angles`` (rad), ``scores`` and the raw outputs.
        matched, total: detections with a counterpart, and all; see `Agreement`.
        scores: AP of both sides.
        nonfinite: how many values of the subject's detections are NaN or infinite; those of tensors say it themselves.
        held: of a record, what it holds of that which it must hold: name → (there, due).
        notes: what could not be measured and why, by stage.
    """

    inputs: tuple[int, int] = (0, 0)
    tensors: list[TensorResult] = field(default_factory=list)
    matched: int = 0
    total: int = 0
    scores: Scores | None = None
    nonfinite: int = 0
    held: dict[str, tuple[int, int]] = field(default_factory=dict)
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
    nonfinite: int = 0


class TensorErrors:
    """Errors of every named output: subject against reference, and both against float64 where that was run.

    Attributes:
        nonfinite: values of detections that a graph's own NMS kept which are NaN or infinite.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, _Tensor] = {}
        self.nonfinite = 0

    def add(self, subject: Outputs, reference: Outputs | None, referee: Outputs | None) -> None:
        """Adds one batch.  Without a reference the subject is held to the referee itself."""
        truth = _named(referee) if referee else {}
        ours = _named(subject)
        theirs = _named(reference) if reference else truth
        self.nonfinite += sum(count_nonfinite(found.boxes, found.scores) for found in subject.kept or ())
        for name, values in ours.items():
            if spoilt := count_nonfinite(values):
                self._tensors.setdefault(name, _Tensor()).nonfinite += spoilt
        for name in [n for n in ours if n in theirs]:
            tensor = self._tensors.setdefault(name, _Tensor())
            tensor.difference.add(*comparable(name, ours[name], theirs[name]))
            if name in truth:
                tensor.referee_images += len(ours[name])
                tensor.subject.add(*comparable(name, ours[name], truth[name]))
                if reference:
                    tensor.reference.add(*comparable(name, theirs[name], truth[name]))

    def results(self) -> list[TensorResult]:
        """One entry for each output that both sides have, or that is not finite."""
        results = []
        for name, tensor in self._tensors.items():
            difference = tensor.difference.stats() or (_NOTHING if tensor.nonfinite else None)
            if difference is not None:
                results.append(
                    TensorResult(
                        name=name,
                        unit=UNITS.get(name, "raw"),
                        difference=difference,
                        reference_error=tensor.reference.stats(),
                        subject_error=tensor.subject.stats(),
                        referee_images=tensor.referee_images,
                        nonfinite=tensor.nonfinite,
                    )
                )
        return results

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it, for `from_arrays`."""
        arrays = {"names": np.array(json.dumps(list(self._tensors))), "nonfinite": np.array(self.nonfinite)}
        for number, tensor in enumerate(self._tensors.values()):
            arrays[f"{number}/counts"] = np.array([getattr(tensor, name) for name in _COUNTS])
            for part in _PARTS:
                arrays |= {f"{number}/{part}/{key}": a for key, a in getattr(tensor, part).to_arrays().items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TensorErrors:
        """What `to_arrays` gave."""
        found = cls()
        found.nonfinite = int(arrays["nonfinite"])
        for number, name in enumerate(json.loads(str(arrays["names"]))):
            tensor = found._tensors[name] = _Tensor()
            for part in _PARTS:
                keys = {key: arrays[f"{number}/{part}/{key}"] for key in ("sums", "bins", "counts")}
                setattr(tensor, part, ErrorAccumulator.from_arrays(keys))
            for field_name, count in zip(_COUNTS, arrays[f"{number}/counts"].tolist(), strict=True):
                setattr(tensor, field_name, count)
        return found


def count_agreement(agreements: list[Agreement]) -> tuple[int, int]:
    """Sums (matched, total) over images."""
    return sum(a.matched for a in agreements), sum(a.total for a in agreements)


def split_angles(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """``boxes`` ``[..., 4]`` in pixels; of rotated boxes ``[..., 5]`` cx, cy, w, h, and ``angles`` ``[...]`` apart."""
    if boxes.shape[-1] == 4:
        return {"boxes": boxes}
    return {"boxes": boxes[..., :4], "angles": boxes[..., 4]}


def comparable(name: str, subject: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two tensors as they are; ``angles`` of the subject by as many half turns as bring each nearest.

    Half a turn makes the same box, and le90 has a border at ±pi/2, where rounding decides for one of two angles.
    """
    if name != "angles":
        return subject, reference
    with np.errstate(invalid="ignore"):
        turns = np.rint((reference - subject) / np.pi)
        return np.where(np.isfinite(turns) & (turns != 0), subject + turns * np.pi, subject), reference


def _named(outputs: Outputs) -> dict[str, np.ndarray]:
    return {**split_angles(outputs.boxes), "scores": outputs.scores, **outputs.raw}
