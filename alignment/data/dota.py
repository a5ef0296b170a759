"""DOTA tiles with their quadrilaterals: ``dota8.json`` (COCO's fields and ``poly``) and ``images/``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from alignment.data.coco import CocoDataset
from alignment.errors import AlignError

FILE = "dota8.json"


def holds_dota(root: Path) -> bool:
    """Whether a folder holds DOTA's tiles."""
    return (root / FILE).is_file()


def open_dota(root: Path, limit: int | None = None) -> CocoDataset:
    """Reads the tiles; every annotation gets ``rbox``, the smallest rectangle around its ``poly``.

    Args:
        root: the folder that holds ``dota8.json`` and ``images``.
        limit: take the first so many images only.

    Raises:
        AlignError: naming the file that is missing, unreadable or does not fit.
    """
    path, layout = root / FILE, "give a folder with dota8.json and images/ as ALIGN_DATA/dota8"
    dataset = CocoDataset.read(path, root / "images", root, "dota8", layout, limit)
    for entry in dataset.truth["annotations"]:
        try:
            with np.errstate(over="ignore"):
                points = np.array(entry["poly"], np.float32).reshape(4, 2)
        except (KeyError, TypeError, ValueError, OverflowError):
            points = np.full((4, 2), np.nan)
        if not np.isfinite(points).all():
            what = f"{path}: annotation {entry.get('id')}: poly is not x and y of four corners"
            raise AlignError(what, layout)
        entry["rbox"] = smallest_rectangle(points)
    return dataset


def without_truth(dataset: CocoDataset, classes: int) -> CocoDataset:
    """The images alone, for a detector of other classes: real input on which its backends are held to each other."""
    names = [f"class {label}" for label in range(classes)]
    truth = {**dataset.truth, "annotations": []}
    return replace(dataset, category_ids=list(range(1, classes + 1)), class_names=names, truth=truth)


def smallest_rectangle(points: np.ndarray) -> list[float]:
    """The rotated box of least area around points ``[n, 2] float32``, as mmrotate's ``qbox2rbox`` and ``le90``.

    cx, cy, w, h and the angle in radians: w >= h, the angle in [-pi/2, pi/2).
    """
    (x, y), (w, h), degrees = cv2.minAreaRect(points)
    angle = np.deg2rad(degrees)
    if w <= h:
        w, h, angle = h, w, angle + np.pi / 2
    return [x, y, w, h, float((angle + np.pi / 2) % np.pi - np.pi / 2)]
