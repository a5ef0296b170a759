"""Datasets in COCO layout: ``annotations/instances_<split>.json`` and ``<split>/``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alignment.data.decoder import decode
from alignment.errors import AlignError
from alignment.reading import cut, read_json

#: No coordinate or area is larger; NaN is not smaller either.
MOST_NUMBER = 1e18
#: Bytes of an annotation file: those of COCO's training images have 450 MB.
MOST_TRUTH = 2**30
IMAGE_MEND = "give the image, or take it out of the annotations"


@dataclass(frozen=True)
class ImageEntry:
    """One image of a dataset."""

    id: int
    file_name: str
    path: Path


def annotation_file(root: Path, split: str) -> Path:
    """Where the annotations of a split lie below a COCO-layout folder."""
    return root / "annotations" / f"instances_{split}.json"


@dataclass
class CocoDataset:
    """Images and truth of one split.

    Attributes:
        root: the COCO-layout folder.
        split: ``val2017`` or ``train2017``.
        images: in the order of the annotation file, at most as many as were asked for.
        category_ids: COCO category id of each class index (sorted ids: class k is the k-th category).
        class_names: one a class.
        truth: the annotation file; annotations without `iscrowd` and `area` got them.  Annotations of rotated
            objects also have ``rbox``: cx, cy, w, h in pixels and the angle in radians.
        fingerprint: 16 hex digits over image names and annotations, not over the images; see `content_fingerprint`.
        file: the annotations, as errors name them.
    """

    root: Path
    split: str
    images: list[ImageEntry]
    category_ids: list[int]
    class_names: list[str]
    truth: dict[str, Any] = field(repr=False)
    fingerprint: str = ""
    file: Path = Path()

    @classmethod
    def open(cls, root: Path, split: str = "val2017", limit: int | None = None) -> CocoDataset:
        """Reads the annotations and checks that every image is there.

        Args:
            root: COCO-layout folder.
            split: which split.
            limit: take the first so many images only.

        Raises:
            AlignError: naming the file that is missing, unreadable or does not fit.
        """
        layout = f"--data takes a folder with annotations/instances_{split}.json and {split}/"
        return cls.read(annotation_file(root, split), root / split, root, split, layout, limit)

    @classmethod
    def read(
        cls, path: Path, folder: Path, root: Path, split: str, layout: str, limit: int | None = None
    ) -> CocoDataset:
        """The same with the annotation file and the image folder named; `layout` says what errors advise."""
        truth = read_json(path, layout, "give the file again, whole", most=MOST_TRUTH)
        try:
            for name in ("images", "annotations", "categories"):
                if not isinstance(truth[name], list):
                    raise TypeError(name)
            if not all(isinstance(image["file_name"], str) for image in truth["images"]):
                raise TypeError("file_name")
            entries = [ImageEntry(i["id"], i["file_name"], folder / i["file_name"]) for i in truth["images"]]
            _require_ids([entry.id for entry in entries], "image", path, layout)
            _require_ids([c["id"] for c in truth["categories"]], "category", path, layout)
            categories = sorted(truth["categories"], key=lambda c: c["id"])
            known = {entry.id for entry in entries}
            strays = sorted({a["image_id"] for a in truth["annotations"]} - known)
            # Of the file as it is, whatever it leaves out.
            digest = hashlib.sha256(json.dumps([truth["images"], truth["annotations"]], sort_keys=True).encode())
        except (KeyError, TypeError, RecursionError) as error:
            what = f"{path}: not in COCO layout: {cut(error, 60)} is missing or of another type"
            raise AlignError(what, layout) from None
        if strays:
            raise AlignError(
                f"{path}: annotations name image id {cut(strays[0], 60)}, which is not among its images", layout
            )
        if not entries:
            raise AlignError(f"{path}: lists no images", layout)
        entries = entries[:limit]
        for entry in entries:
            if not entry.path.is_file():
                raise AlignError(f"{entry.path}: no such image, but {path.name} lists it", layout)
        ids, names = [c["id"] for c in categories], [str(c.get("name", c["id"])) for c in categories]
        truth["annotations"] = _completed(truth["annotations"], set(ids), path, layout)
        return cls(root, split, entries, ids, names, truth, digest.hexdigest()[:16], path)

    @cached_property
    def content_fingerprint(self) -> str:
        """16 hex digits over the bytes of the image files of `images`, in their order; they are read the first time.

        Raises:
            AlignError: for an image that cannot be read.
        """
        digest = hashlib.sha256()
        for entry in self.images:
            try:
                with entry.path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise AlignError(f"{entry.path}: {error.strerror}", IMAGE_MEND) from None
        return digest.hexdigest()[:16]

    def require_classes(self, count: int, variant: str) -> None:
        """Raises AlignError when a model with `count` classes cannot be scored on this dataset."""
        if count != len(self.category_ids):
            raise AlignError(
                f"{self.file}: {len(self.category_ids)} categories, but {variant} has {count} classes",
                "give the data that the variant was trained for, or mend `classes` in its YAML",
            )

    def require_rotated(self, variant: str) -> None:
        """Raises AlignError when a model with rotated boxes cannot be scored on this dataset."""
        for entry in self.truth["annotations"]:
            box = entry.get("rbox")
            if not (isinstance(box, list) and len(box) == 5 and all(map(_is_number, box))):
                raise AlignError(
                    f"{self.file}: annotation {entry.get('id')} has no rbox (cx, cy, w, h, angle), but {variant} has "
                    "rotated boxes",
                    "set `dataset` in its YAML to dota or synthetic_rotated, or add rbox to the annotations",
                )


def _require_ids(ids: list[Any], kind: str, path: Path, layout: str) -> None:
    """Ids are whole numbers, each of one `kind` given once."""
    seen: set[int] = set()
    for number in ids:
        if not isinstance(number, int) or abs(number) >= 2**63:
            raise AlignError(f"{path}: {kind} id {cut(repr(number), 60)} is not a whole number", layout)
        if number in seen:
            raise AlignError(f"{path}: {kind} id {number} is given twice", "give each its own")
        seen.add(number)


def _completed(annotations: list[Any], categories: set[int], path: Path, layout: str) -> list[dict[str, Any]]:
    """The annotations with what many files leave out: that they are no crowd, and the area of their box.

    Raises:
        AlignError: for a box that is not four numbers, a category that is not there, and the like.
    """
    completed = []
    for index, entry in enumerate(annotations):
        where = f"{path}: annotation {cut(entry['id'], 60) if 'id' in entry else f'number {index + 1}'}"
        box, category = entry.get("bbox"), entry.get("category_id")
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise AlignError(f"{where}: bbox is {str(box)[:60]}, not x, y, width and height in pixels", layout)
        if not isinstance(category, int) or category not in categories:
            raise AlignError(f"{where}: category_id {str(category)[:60]} is not among the categories", layout)
        crowd, area = entry.get("iscrowd"), entry.get("area")
        crowd, area = 0 if crowd is None else crowd, box[2] * box[3] if area is None else area
        if crowd not in (0, 1) or not _is_number(area):
            what = f"iscrowd is {str(crowd)[:60]} and area {str(area)[:60]}, not 0 or 1 and a number"
            raise AlignError(f"{where}: {what}", f"mend them, or leave them out; {layout}")
        completed.append({**entry, "iscrowd": crowd, "area": area})
    return completed


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < MOST_NUMBER


def read_image(path: Path) -> np.ndarray:
    """Reads an image as mmcv does: ``[H, W, 3] uint8`` BGR, EXIF orientation applied.

    Raises:
        AlignError: when the file is missing, empty, no image, or one of which a part is lost.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise AlignError(f"{path}: {error.strerror}", IMAGE_MEND) from None
    image, damage = decode(data) if len(data) else (None, "")
    if image is None or damage:
        what = "not an image, or a damaged one" if len(data) else "an empty file"
        what += f" ({damage})" if damage else ""
        raise AlignError(f"{path}: {what}", "give the image again, or take it out of the annotations")
    return image
