"""float64 on a few images: says which side of a difference is wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from alignment.data.samples import Sample
from alignment.errors import AlignError
from alignment.models.outputs import Outputs, detections_of, to_outputs
from alignment.nms.causes import Divergence, Side
from alignment.nms.moved import box_distances
from alignment.nms.multiclass import Detections
from alignment.runners.base import Runner
from alignment.runners.open import open_referee
from alignment.variant import Variant

#: On how many images with inputs that moved float64 is asked about them.
ASKED = 2


@dataclass
class Referee:
    """The model in float64, where that can be run: a bare ONNX file may hold nodes that cannot.

    Attributes:
        seconds: spent in it.
        detections: by image id, of a model that ends in NMS.
        note: why there is no referee.
    """

    runner: Runner | None = None
    seconds: float = 0.0
    detections: dict[int, Detections] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def open(cls, variant: Variant, reference: Runner) -> Referee:
        """Loads the model of `variant` in float64."""
        try:
            return cls(open_referee(variant, reference))
        except AlignError as error:
            return cls(note=f"no float64 referee: {error}")

    def run(self, sample: Sample, variant: Variant) -> Outputs | None:
        """One image; None where float64 cannot be run."""
        if self.runner is None:
            return None
        start = time.perf_counter()
        try:
            named = self.runner.run(sample.tensor[None])
        except AlignError as error:
            self.runner, self.note = None, f"no float64 referee: {error}"
            return None
        truth = to_outputs(named, variant)
        self.seconds += time.perf_counter() - start
        if variant.ends_in_nms:
            self.detections[sample.entry.id] = detections_of(truth, sample.transform, variant)
        return truth


class MovedReferee:
    """Says of inputs that moved which side float64 is nearer to, on the first images that have such."""

    def __init__(self, variant: Variant, reference: Runner) -> None:
        self.variant, self.reference, self.left = variant, reference, ASKED
        self.referee: Referee | None = None

    def judged(self, sample: Sample, one: Side, other: Side, differing: list[Divergence]) -> list[Divergence]:
        """The same divergences, those of moved inputs with what float64 says of these."""
        if not self.left or not any(d.root == "numeric" for d in differing):
            return differing
        self.left -= 1
        self.referee = self.referee or Referee.open(self.variant, self.reference)
        truth = self.referee.run(sample, self.variant)
        return differing if truth is None else [with_truth(d, truth, one, other) for d in differing]


def with_truth(d: Divergence, truth: Outputs, reference: Side, subject: Side) -> Divergence:
    """A divergence of moved inputs with the error of both sides against float64; any other as it is."""
    if d.root != "numeric" or d.proof is None:
        return d
    said = [d.replay]
    for name, index, shape in (("scores", d.proof.scores, (-1,)), ("boxes", d.proof.boxes, reference.boxes.shape)):
        if index:
            true = getattr(truth, name)[0].reshape(shape)[list(index)]
            values = (getattr(side, name).reshape(shape)[list(index)] for side in (reference, subject))
            ours, theirs = (float(_distance(name, value, true).max()) for value in values)
            nearer = "reference" if ours <= theirs else "subject"
            far = f"the reference is {ours:.3g} from it, the subject {theirs:.3g}"
            said.append(f"float64 of the {name} is nearer to the {nearer}: {far}")
    return replace(d, replay="; ".join(said))


def _distance(name: str, value: np.ndarray, true: np.ndarray) -> np.ndarray:
    return np.abs(value - true) if name == "scores" else np.stack(list(box_distances(value, true).values()))
