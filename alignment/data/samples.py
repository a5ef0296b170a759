"""Preprocessed images with their geometry: every backend gets these bytes."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from alignment.data.coco import CocoDataset, ImageEntry, annotation_file, read_image
from alignment.data.dota import holds_dota, open_dota, without_truth
from alignment.data.preprocess import Transform, preprocess
from alignment.data.synthetic import synthetic_root
from alignment.data.synthetic_rotated import synthetic_rotated_root
from alignment.errors import AlignError
from alignment.storage import data_dir
from alignment.variant import Variant

#: The split that detectors were trained on, and that int8 is calibrated on: scores are taken on the other one.
CALIBRATION_SPLIT = "train2017"
#: Images that are read while those before them are worked on.
AHEAD = 4
#: Below ``ALIGN_DATA``.
FOLDERS = {"coco": "coco", "dota": "dota8"}


@dataclass(frozen=True)
class Sample:
    """One preprocessed image.

    Attributes:
        entry: which image.
        tensor: ``[3, H, W] float32``, the bytes that every backend gets.
        transform: geometry, to bring boxes back to the original image.
    """

    entry: ImageEntry
    tensor: np.ndarray
    transform: Transform

    @cached_property
    def digest(self) -> str:
        """16 hex digits over the bytes of `tensor`, as they are when it is asked for first."""
        return hashlib.sha256(self.tensor.data).hexdigest()[:16]


class Samples:
    """The images of a dataset, preprocessed as a variant asks for; iterating reads `AHEAD` images ahead."""

    def __init__(self, variant: Variant, dataset: CocoDataset) -> None:
        dataset.require_classes(variant.classes, variant.name)
        if variant.rotated:
            dataset.require_rotated(variant.name)
        self.variant, self.dataset = variant, dataset
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.dataset.images)

    def __iter__(self) -> Iterator[Sample]:
        return self.after(0)

    def after(self, count: int, end: int | None = None) -> Iterator[Sample]:
        """The images but the first `count`, up to and without the one at `end`."""
        entries = self.dataset.images[count:end]
        if not entries:
            return
        pool = ThreadPoolExecutor(1)
        try:
            ahead = deque(pool.submit(self.load, entry) for entry in entries[:AHEAD])
            for following in [*entries[AHEAD:], *[None] * len(ahead)]:
                sample = ahead.popleft().result()
                if following is not None:
                    ahead.append(pool.submit(self.load, following))
                yield sample
        finally:
            pool.shutdown(cancel_futures=True)

    def load(self, entry: ImageEntry) -> Sample:
        """Reads and preprocesses one image.  Raises AlignError for a file that is no image."""
        tensor, transform = preprocess(read_image(entry.path), self.variant.input, self.variant.preprocess)
        return Sample(entry, tensor, transform)

    def digest(self, entry: ImageEntry) -> str:
        """That of the image's sample, for which it is read once."""
        if entry.id not in self._digests:
            self._digests[entry.id] = self.load(entry).digest
        return self._digests[entry.id]


def dataset_root(variant: Variant, data: Path | None = None) -> Path | None:
    """Where the variant's images are, None if they are not there.

    An embedded set is drawn; the others are below ``ALIGN_DATA``, and `data` stands for COCO.  A folder with DOTA's
    tiles stands for the images of any variant with rotated boxes.
    """
    if variant.rotated and data is not None and holds_dota(data):
        return data
    if variant.dataset == "synthetic":
        return synthetic_root()
    if variant.dataset == "synthetic_rotated":
        return synthetic_rotated_root()
    if variant.dataset == "coco" and data is not None:
        return data
    default = data_dir() / FOLDERS[variant.dataset]
    return default if default.is_dir() else None


def calibration_annotations(variant: Variant, data: Path | None = None) -> Path | None:
    """The annotation file of the images that int8 is calibrated on; None of a set that is drawn or has no splits."""
    root = dataset_root(variant, data) if variant.dataset == "coco" else None
    return None if root is None else annotation_file(root, CALIBRATION_SPLIT)


def images_mend(variant: Variant) -> str:
    """What helps where the variant's images are not there."""
    return "give --data DIR or set ALIGN_DATA" if variant.dataset == "coco" else "set ALIGN_DATA"


def open_samples(
    variant: Variant, data: Path | None = None, limit: int | None = None, split: str = "val2017"
) -> Samples:
    """The images of one `split` of the variant's dataset, the first `limit` of them; DOTA's tiles are of no split, and
    without truth for a variant of other classes.

    Raises AlignError when there are none.
    """
    root = dataset_root(variant, data)
    if root is None:
        raise AlignError(
            f"{variant.name}: no images: {data_dir() / FOLDERS[variant.dataset]} does not exist", images_mend(variant)
        )
    if variant.dataset == "dota" or (variant.rotated and holds_dota(root)):
        tiles = open_dota(root, limit)
        # A variant that says it is of DOTA is held to DOTA's classes.
        fits = variant.dataset == "dota" or len(tiles.category_ids) == variant.classes
        return Samples(variant, tiles if fits else without_truth(tiles, variant.classes))
    return Samples(variant, CocoDataset.open(root, split, limit))
