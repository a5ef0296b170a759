"""The rotated counterpart of `synthetic`: elongated shapes at any angle, with the box that follows their axes.

Annotations are COCO's with one more field, ``rbox``: cx, cy, w, h in pixels and the angle in radians, w >= h and the
angle in [-pi/2, pi/2) (``le90``); ``bbox`` is the upright box around it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alignment.data.synthetic import background, cached_splits, inside_polygon, write_images

CATEGORIES = {1: "bar", 2: "ellipse", 4: "wedge", 7: "arrow", 8: "frame", 11: "bone"}
VERSION = 1
SEED = 2024
SPLITS = {"val2017": 64, "train2017": 128}

_WEDGE = [(-1.0, -1.0), (1.0, 0.0), (-1.0, 1.0)]
_ARROW = [(-1.0, -0.4), (0.1, -0.4), (0.1, -1.0), (1.0, 0.0), (0.1, 1.0), (0.1, 0.4), (-1.0, 0.4)]


def synthetic_rotated_root() -> Path:
    """The COCO-layout root of the rotated set; drawn on first use into the cache folder."""
    return cached_splits(f"synthetic-rotated-v{VERSION}-seed{SEED}", SPLITS, write_split)


def write_split(root: Path, split: str, count: int) -> None:
    """Draws `count` images of `split` into ``root/split`` with ``root/annotations/instances_<split>.json``."""
    write_images(root, split, count, _annotated, CATEGORIES, f"rotated synthetic shapes v{VERSION}, seed {SEED}")


def _annotated(split: str, index: int) -> tuple[np.ndarray, list[dict]]:
    image, boxes, classes = draw(split, index)
    objects = []
    for box, category in zip(boxes, classes, strict=True):
        corner = corners(box)
        x1, y1 = corner.min(0)
        x2, y2 = corner.max(0)
        objects.append(
            {
                "category_id": category,
                "rbox": [float(v) for v in box],
                "bbox": [float(v) for v in (x1, y1, x2 - x1, y2 - y1)],
                "area": float(box[2] * box[3]),
            }
        )
    return image, objects


def draw(split: str, index: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One image and its truth.

    Args:
        split: ``val2017`` or ``train2017``; the two never share a random stream.
        index: which image; the same arguments give the same bytes.

    Returns:
        BGR image ``[H, W, 3] uint8``, boxes ``[n, 5] float64`` (cx, cy, w, h, angle; le90), category ids.
    """
    rng = np.random.default_rng([SEED, VERSION, list(SPLITS).index(split), index])
    height, width = (int(v) for v in rng.integers(240, 421, size=2))
    image = background(rng, height, width)
    boxes: list[np.ndarray] = []
    classes: list[int] = []
    taken = np.zeros((height, width), bool)
    for _ in range(int(rng.integers(3, 11))):
        category = int(rng.choice(list(CATEGORIES)))
        long = float(np.exp(rng.uniform(np.log(28), np.log(min(height, width) * 0.6))))
        short = max(10.0, long / rng.uniform(1.6, 4.0))
        angle = float(rng.uniform(-np.pi / 2, np.pi / 2))
        # Whole objects only: a box that is cut off has another shape than the object's own.
        reach = np.hypot(long, short) / 2 + 1
        centre = rng.uniform((reach, reach), (max(width - reach, reach), max(height - reach, reach)))
        # Pointed shapes also come the other way round; their box is the same.
        flip = 1.0 if rng.random() < 0.5 else -1.0
        colour = rng.integers(0, 256, size=3)
        u, v = _local(centre, long, short, angle, height, width)
        whole = np.maximum(np.abs(u), np.abs(v)) <= 1
        if (taken & whole).any():
            continue
        taken |= whole
        mask = _mask(CATEGORIES[category], u * flip, v)
        image[mask] = 0.8 * colour + 0.2 * image[mask]
        boxes.append(np.array([*centre, long, short, angle]))
        classes.append(category)
    noise = rng.integers(-12, 13, size=image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8), np.array(boxes).reshape(-1, 5), classes


def corners(box: np.ndarray) -> np.ndarray:
    """Corners ``[4, 2]`` of one rotated box ``[5]``, in order around it."""
    cx, cy, w, h, angle = (float(v) for v in box)
    along = np.array([np.cos(angle), np.sin(angle)]) * w / 2
    across = np.array([-np.sin(angle), np.cos(angle)]) * h / 2
    return np.array([cx, cy]) + np.stack([-along - across, along - across, along + across, across - along])


def _local(
    centre: np.ndarray, long: float, short: float, angle: float, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of every pixel centre in the box's frame: the box itself is [-1, 1] x [-1, 1]."""
    y, x = np.mgrid[:height, :width] + 0.5
    x, y = x - centre[0], y - centre[1]
    u = (x * np.cos(angle) + y * np.sin(angle)) / (long / 2)
    v = (y * np.cos(angle) - x * np.sin(angle)) / (short / 2)
    return u, v


def _mask(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Pixels that lie in the shape; every shape touches all four sides of its box."""
    box = np.maximum(np.abs(u), np.abs(v)) <= 1
    if shape == "bar":
        return box
    if shape == "ellipse":
        return u * u + v * v <= 1
    if shape == "frame":
        return box & (np.maximum(np.abs(u) / 0.75, np.abs(v) / 0.5) > 1)
    if shape == "bone":
        return box & ((np.abs(u) > 0.6) | (np.abs(v) <= 0.4))
    return inside_polygon(u, v, _WEDGE if shape == "wedge" else _ARROW)
