"""float64 on a few images: says which side of a difference is wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from alignment.data.samples import Sample
from alignment.errors import AlignError
from alignment.models.outputs import Outputs, detections_of, to_outputs
from alignment.nms.multiclass import Detections
from alignment.runners.base import Runner
from alignment.runners.open import open_referee
from alignment.variant import Variant


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
