"""The outputs of a model in one form, whatever backend and head they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from alignment.data.preprocess import Transform
from alignment.errors import AlignError
from alignment.models.onnx_end2end import kept_by_graph
from alignment.models.onnx_heads import decode, shapes_of
from alignment.nms.multiclass import Detections, postprocess
from alignment.variant import OnnxSource, Variant

if TYPE_CHECKING:
    from alignment.data.samples import Sample, Samples

#: Why there is nothing raw or decoded to compare.
ENDS_IN_NMS = "the model ends in NMS: what it gives are detections"


@dataclass(frozen=True)
class Outputs:
    """What a model said about one batch.

    Attributes:
        raw: head outputs by name, first axis B.
        boxes: ``[B, N, 4]``, x1, y1, x2, y2 in pixels of the network input; where the variant is rotated
            ``[B, N, 5]``, cx, cy, w, h, angle.
        scores: ``[B, N, C]``, probabilities.
        kept: of a model that ends in NMS, what that kept of each image, boxes in pixels of the network input; N is
            then 0.
    """

    raw: dict[str, np.ndarray]
    boxes: np.ndarray
    scores: np.ndarray
    kept: tuple[Detections, ...] | None = None

    def images(self) -> list[Outputs]:
        """The same image by image, each a batch of one."""
        return [
            Outputs(
                {name: value[i : i + 1] for name, value in self.raw.items()},
                self.boxes[i : i + 1],
                self.scores[i : i + 1],
                self.kept and self.kept[i : i + 1],
            )
            for i in range(len(self.boxes))
        ]


def to_outputs(named: dict[str, np.ndarray], variant: Variant, images: int | None = None) -> Outputs:
    """Sorts a runner's outputs, and decodes them where the graph does not.

    Args:
        images: how many went in; default: as many as the outputs are for, or one where rows of detections do not say.

    Raises:
        AlignError: when the graph of a bare ONNX file does not have the outputs that its head layout asks for, or has
            them for another number of images.
    """
    if variant.ends_in_nms:
        images = images or 1
        kept = kept_by_graph(named, variant, images)
        none = np.empty((images, 0, 5 if variant.rotated else 4), np.float32)
        return Outputs({}, none, np.empty((images, 0, variant.classes), np.float32), kept)
    if isinstance(variant.source, OnnxSource):
        found = Outputs(*decode(named, variant))
        if images is not None and len(found.boxes) != images:
            raise AlignError(
                f"{variant.weights}: {images} images went in, but outputs are {shapes_of(named)}",
                "export it with a dynamic batch, or leave --batch at what the graph was made for",
            )
        return found
    raw = {name: value for name, value in named.items() if name not in ("boxes", "scores")}
    return Outputs(raw, named["boxes"], named["scores"])


def detections_of(outputs: Outputs, transform: Transform, variant: Variant) -> Detections:
    """Detections of a batch of one image, in pixels of the original: by our NMS, or what the graph's own kept."""
    if outputs.kept is None:
        return postprocess(outputs.boxes[0], outputs.scores[0], transform, variant.nms)
    (kept,) = outputs.kept
    return replace(kept, boxes=transform.clip(transform.to_original(kept.boxes)))


def answered(
    samples: Iterable[Sample], variant: Variant, run: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> Iterator[tuple[Sample, Outputs, Detections]]:
    """Each image with what a network gives for it, and the detections of that in pixels of the original image.

    Args:
        samples: the images.
        variant: whose they are.
        run: a network: ``[1, 3, H, W] float32``, a copy that it may write into, → its outputs by name.
    """
    for sample in samples:
        outputs = to_outputs(run(sample.tensor[None].copy()), variant, 1)
        yield sample, outputs, detections_of(outputs, sample.transform, variant)


def detect(samples: Samples, run: Callable[[np.ndarray], dict[str, np.ndarray]]) -> dict[int, Detections]:
    """Image id → detections in pixels of the original image; see `answered`."""
    return {sample.entry.id: found for sample, _, found in answered(samples, samples.variant, run)}
