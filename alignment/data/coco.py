"""Datasets in COCO layout: ``annotations/instances_<split>.json`` and ``<split>/``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from alignment.errors import AlignError


@dataclass(frozen=True)
class ImageEntry:
    """One image of a dataset."""

    id: int
    file_name: str
    path: Path


@dataclass
class CocoDataset:
    """Images and truth of one split.

    Attributes:
        root: the COCO-layout folder.
        split: ``val2017`` or ``train2017``.
        images: in the order of the annotation file, at most as many as were asked for.
        category_ids: COCO category id of each class index (sorted ids: class k is the k-th category).
        class_names: one a class.
        truth: the annotation file as it was read.  Annotations of rotated objects also have ``rbox``: cx, cy, w, h in
            pixels and the angle in radians.
        fingerprint: 16 hex digits over image names and annotations; equal data, equal fingerprint.
    """

    root: Path
    split: str
    images: list[ImageEntry]
    category_ids: list[int]
    class_names: list[str]
    truth: dict[str, Any] = field(repr=False)
    fingerprint: str = ""

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
        return cls.read(root / "annotations" / f"instances_{split}.json", root / split, root, split, layout, limit)

    @classmethod
    def read(
        cls, path: Path, folder: Path, root: Path, split: str, layout: str, limit: int | None = None
    ) -> CocoDataset:
        """The same with the annotation file and the image folder named; `layout` says what errors advise."""
        try:
            truth = json.loads(path.read_text(encoding="utf-8"))
            entries = [ImageEntry(i["id"], i["file_name"], folder / i["file_name"]) for i in truth["images"]]
            categories = sorted(truth["categories"], key=lambda c: c["id"])
            known = {entry.id for entry in entries}
            strays = sorted({a["image_id"] for a in truth["annotations"]} - known)
        except OSError as error:
            raise AlignError(f"{path}: {error.strerror}", layout) from None
        except ValueError as error:
            raise AlignError(f"{path}: not JSON: {error}", "give the file again, whole") from None
        except (KeyError, TypeError) as error:
            raise AlignError(f"{path}: not in COCO layout: {error} is missing or of another type", layout) from None
        if strays:
            raise AlignError(f"{path}: annotations name image id {strays[0]}, which is not among its images", layout)
        if not entries:
            raise AlignError(f"{path}: lists no images", layout)
        digest = hashlib.sha256(json.dumps([truth["images"], truth["annotations"]], sort_keys=True).encode())
        entries = entries[:limit]
        for entry in entries:
            if not entry.path.is_file():
                raise AlignError(f"{entry.path}: no such image, but {path.name} lists it", layout)
        ids, names = [c["id"] for c in categories], [c.get("name", str(c["id"])) for c in categories]
        return cls(root, split, entries, ids, names, truth, digest.hexdigest()[:16])

    def require_classes(self, count: int, variant: str) -> None:
        """Raises AlignError when a model with `count` classes cannot be scored on this dataset."""
        if count != len(self.category_ids):
            raise AlignError(
                f"{self.root}: {len(self.category_ids)} categories, but {variant} has {count} classes",
                "give the data that the variant was trained for, or mend `classes` in its YAML",
            )

    def require_rotated(self, variant: str) -> None:
        """Raises AlignError when a model with rotated boxes cannot be scored on this dataset."""
        for entry in self.truth["annotations"]:
            if np.shape(entry.get("rbox")) != (5,):
                raise AlignError(
                    f"{self.root}: annotation {entry.get('id')} has no rbox (cx, cy, w, h, angle), but {variant} has "
                    "rotated boxes",
                    "set `dataset` in its YAML to dota or synthetic_rotated, or add rbox to the annotations",
                )


def read_image(path: Path) -> np.ndarray:
    """Reads an image as mmcv does: ``[H, W, 3] uint8`` BGR, EXIF orientation applied.

    Raises:
        AlignError: when the file is missing, empty or no image.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise AlignError(f"{path}: {error.strerror}", "give the image, or take it out of the annotations") from None
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        what = "not an image, or a damaged one" if len(data) else "an empty file"
        raise AlignError(f"{path}: {what}", "give the image again, or take it out of the annotations")
    return image
