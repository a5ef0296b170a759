"""One layer of a sweep, as pieces of work: its graph on a chunk of images, held to FP32 and to the unchanged graph.

A `Job` can be pickled and names the files that it reads, so that any process that sees them may run it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.data.coco import CocoDataset
from alignment.data.preprocess import Transform
from alignment.errors import AlignError
from alignment.models.outputs import Outputs, detections_of, to_outputs
from alignment.nms.multiclass import Detections
from alignment.quantize.ledger import Sums, no_room, told, unseen
from alignment.quantize.sensitivity import kl_divergence
from alignment.runners.onnxruntime import open_session
from alignment.variant import Variant


class Store:
    """Tensors by name, each a file with a row for each image, written in their order."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images
        self._shapes: dict[str, tuple[int, ...]] = {}

    def write(self, image: int, values: Mapping[str, np.ndarray]) -> None:
        """Adds the tensors of one image.

        Raises:
            AlignError: for a tensor whose shape is not the same for every image, and for a disk that is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            before = self._shapes.setdefault(name, value.shape)
            if before != value.shape:
                raise AlignError(f"tensor {name}: {value.shape}, but {before} before", "give a fixed input size")
            path = self._path(name)
            try:
                # Not through a map: what a full disk does to that is no exception, but the end of the process.
                with path.open("ab" if image else "wb") as file:
                    if not image:
                        header = {"descr": value.dtype.str, "fortran_order": False}
                        np.lib.format.write_array_header_2_0(file, {**header, "shape": (self.images, *value.shape)})
                    file.write(value.tobytes())
            except OSError as error:
                raise no_room(path, error) from None

    def read(self, name: str) -> np.ndarray:
        """``[images, ...]``, mapped from its file."""
        try:
            return np.load(self._path(name), mmap_mode="r")  # type: ignore[no-any-return]
        except OSError as error:
            raise unseen(self._path(name), error.strerror) from None

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npy"


@dataclass(frozen=True)
class Truth:
    """What graphs are held to on a chunk of images.

    Attributes:
        variant: whose network it is.
        transforms: of the images.
        outputs: FP32's raw outputs and scores.
    """

    variant: Variant
    transforms: tuple[Transform, ...]
    outputs: Store


class Meter:
    """Adds up how far a graph's outputs are from FP32's, image by image of a chunk.

    Attributes:
        sums: up to the image before, which those of the chunk are added to.
        found: the chunk's detections.
    """

    def __init__(self, truth: Truth, sums: Sums) -> None:
        self.sums, self.found = deepcopy(sums), list[Detections]()
        self._truth, self._references = truth, dict[str, np.ndarray]()

    def add(self, named: dict[str, np.ndarray]) -> None:
        """Adds what a graph gives for the next image."""
        truth, index = self._truth, len(self.found)
        outputs = to_outputs(named, truth.variant, 1)
        for name, value in compared(outputs, truth.variant).items():
            if name not in self._references:
                self._references[name] = truth.outputs.read(name)
            reference = self._references[name][index]
            if name == "scores":
                self.sums.kl += kl_divergence(reference, value)
            if name != "scores" or not outputs.raw:
                self.sums.outputs.add(reference, value)
        self.found.append(detections_of(outputs, truth.transforms[index], truth.variant))


def compared(outputs: Outputs, variant: Variant) -> dict[str, np.ndarray]:
    """The scores, and the raw outputs, or where there are none boxes, as parts of the input's longer side."""
    if outputs.kept is not None:
        return {}
    if outputs.raw:
        return {**outputs.raw, "scores": outputs.scores}
    boxes = outputs.boxes / np.float32(max(variant.input.height, variant.input.width))
    return {"boxes": boxes[..., :4], "scores": outputs.scores}


@dataclass(frozen=True)
class Job:
    """One layer's run over a chunk of images.

    Attributes:
        node: its name.
        tensor: its output.
        graph: file of the graph that begins where it has to.
        outputs: of the network.
        truth: what these are held to.
        kept: the unchanged graph's tensors.
        sums: of the layer, over the images before.
    """

    node: str
    tensor: str
    graph: Path
    outputs: tuple[str, ...]
    truth: Truth
    kept: Store
    sums: Sums


def measure(job: Job) -> tuple[Sums, list[Detections]]:
    """The sums with those of the chunk, and its detections.

    Raises:
        AlignError: for values that are not finite, and for files that are not there.
    """
    session = open_session(job.graph, f"{job.graph} of {job.node}", optimize=False, threads=1)
    reads = [value.name for value in session.get_inputs()]
    gives = [value.name for value in session.get_outputs()]
    kept = {name: job.kept.read(name) for name in {*reads, job.tensor, *job.outputs} - ({*gives} - {job.tensor})}
    meter = Meter(job.truth, job.sums)
    for image in range(job.kept.images):
        answers = dict(zip(gives, session.run(gives, {name: kept[name][image] for name in reads}), strict=True))
        meter.add({name: answers[name] if name in answers else kept[name][image] for name in job.outputs})
        meter.sums.own.add(kept[job.tensor][image], answers[job.tensor])
    if not np.isfinite(meter.sums.to_array()).all():
        raise AlignError(f"node {job.node}: in int8 the network gives values that are not finite", "run `align layers`")
    return meter.sums, meter.found


def judge(graph: Path, reference: Path, dataset: CocoDataset, ap: float) -> dict[str, float]:
    """All metrics of a graph that was run on all images; of one that ends in NMS only what its detections say.

    Args:
        graph: its `alignment.quantize.ledger.Ledger`.
        reference: that of FP32.
        dataset: the images with their annotations.
        ap: of FP32.

    Raises:
        AlignError: for files that are not there.
    """
    (sums, found), (_, truth) = told(graph, dataset), told(reference, dataset)
    metrics = {"map": ap - coco_ap(dataset, found)[0], "agreement": 1 - agreement_ap(dataset, truth, found)}
    if tensors := sums.outputs.metrics():
        metrics |= {"kl": sums.kl / len(found), **tensors}
    return metrics | sums.own.metrics("@layer")
