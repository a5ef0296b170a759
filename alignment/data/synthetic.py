"""A deterministic detection set of drawn shapes, in COCO layout.

It gives mAP a meaning on a machine without real images.  Shapes are rasterized in NumPy and stored as PNG, so the
bytes depend on the seed alone, not on a drawing or JPEG library.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from alignment.cache import Key, kept
from alignment.data.coco import annotation_file

# COCO's category ids have gaps and class indices do not: the gaps here keep that mapping honest.
CATEGORIES = {1: "disc", 2: "square", 3: "triangle", 5: "ring", 8: "cross", 13: "star"}
VERSION = 1
SEED = 2023
SPLITS = {"val2017": 64, "train2017": 128}
# So many images are worth the start of further processes.
_POOL_FROM = 512


def synthetic_root() -> Path:
    """The COCO-layout root of the embedded set; drawn on first use (about 3 s) into the cache folder."""
    return cached_splits(f"synthetic-v{VERSION}-seed{SEED}", SPLITS, write_split)


def cached_splits(name: str, counts: dict[str, int], write: Callable[[Path, str, int], None]) -> Path:
    """A folder `name` in the cache, into which `write` has drawn so many images of each split."""

    def draw_all(folder: Path) -> None:
        for split, count in counts.items():
            write(folder / name, split, count)

    return kept(Key("images", name, {"images": counts}), draw_all) / name


def write_split(root: Path, split: str, count: int) -> None:
    """Draws `count` images of `split` into ``root/split`` with ``root/annotations/instances_<split>.json``."""
    write_images(root, split, count, _annotated, CATEGORIES, f"synthetic shapes v{VERSION}, seed {SEED}")


def _annotated(split: str, index: int) -> tuple[np.ndarray, list[dict]]:
    image, boxes, classes = draw(split, index)
    objects = []
    for box, category in zip(boxes, classes, strict=True):
        x1, y1, x2, y2 = (float(v) for v in box)
        area = (x2 - x1) * (y2 - y1)
        objects.append({"category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area})
    return image, objects


def write_images(
    root: Path,
    split: str,
    count: int,
    annotated: Callable[[str, int], tuple[np.ndarray, list[dict]]],
    categories: dict[int, str],
    description: str,
) -> None:
    """Writes ``root/split/*.png`` and ``root/annotations/instances_<split>.json``.

    Args:
        annotated: split and index → BGR image and its annotations, without ``id``, ``image_id`` and ``iscrowd``.
    """
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    draw_one = functools.partial(_write_image, annotated, root / split, split)
    if count > _POOL_FROM:
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            drawn = list(pool.map(draw_one, range(count), chunksize=16))
    else:
        drawn = [draw_one(index) for index in range(count)]
    images: list[dict] = []
    annotations: list[dict] = []
    for index, (entry, objects) in enumerate(drawn):
        images.append({"id": index + 1, **entry})
        for fields in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **fields, "iscrowd": 0})
    truth = {
        "info": {"description": f"alignment {description}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }
    annotation_file(root, split).write_text(json.dumps(truth))


def _write_image(
    annotated: Callable[[str, int], tuple[np.ndarray, list[dict]]], folder: Path, split: str, index: int
) -> tuple[dict, list[dict]]:
    image, objects = annotated(split, index)
    name = f"{index + 1:012d}.png"
    cv2.imwrite(str(folder / name), image)
    return {"file_name": name, "height": image.shape[0], "width": image.shape[1]}, objects


def draw(split: str, index: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One image and its truth.

    Args:
        split: ``val2017`` or ``train2017``; the two never share a random stream.
        index: which image; any number, the same arguments give the same bytes.

    Returns:
        BGR image ``[H, W, 3] uint8``, boxes ``[n, 4] float64`` (x1, y1, x2, y2 in pixels), category ids.
    """
    rng = np.random.default_rng([SEED, VERSION, list(SPLITS).index(split), index])
    height, width = (int(v) for v in rng.integers(200, 421, size=2))
    image = background(rng, height, width)
    boxes: list[np.ndarray] = []
    classes: list[int] = []
    for _ in range(int(rng.integers(2, 11))):
        category = int(rng.choice(list(CATEGORIES)))
        radius = float(np.exp(rng.uniform(np.log(8), np.log(min(height, width) / 3))))
        centre = rng.uniform((0, 0), (width, height))
        angle = float(rng.uniform(0, 2 * np.pi))
        colour = rng.integers(0, 256, size=3)
        mask = _mask(CATEGORIES[category], centre, radius, angle, height, width)
        ys, xs = np.nonzero(mask)
        if len(xs) < 60:
            continue
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], float)
        if any(_iou(box, other) > 0.25 for other in boxes):
            continue
        image[mask] = 0.8 * colour + 0.2 * image[mask]
        boxes.append(box)
        classes.append(category)
    noise = rng.integers(-12, 13, size=image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8), np.array(boxes).reshape(-1, 4), classes


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two-way colour gradient with a few thin bars as distractors, ``[H, W, 3] float64``."""
    corners = rng.uniform(0, 255, size=(2, 2, 3))
    v = np.linspace(0, 1, height)[:, None, None]
    u = np.linspace(0, 1, width)[None, :, None]
    top = corners[0, 0] * (1 - u) + corners[0, 1] * u
    bottom = corners[1, 0] * (1 - u) + corners[1, 1] * u
    image = top * (1 - v) + bottom * v
    y, x = np.mgrid[:height, :width] + 0.5
    for _ in range(int(rng.integers(0, 4))):
        angle, thickness = rng.uniform(0, np.pi), rng.uniform(1, 4)
        px, py = rng.uniform(0, width), rng.uniform(0, height)
        distance = np.abs((x - px) * np.sin(angle) - (y - py) * np.cos(angle))
        image[distance < thickness] = rng.uniform(0, 255, size=3)
    return image


def _mask(shape: str, centre: np.ndarray, radius: float, angle: float, height: int, width: int) -> np.ndarray:
    """Pixels whose centre lies in the shape, ``[H, W] bool``."""
    y, x = np.mgrid[:height, :width] + 0.5
    x, y = x - centre[0], y - centre[1]
    u = (x * np.cos(angle) + y * np.sin(angle)) / radius
    v = (y * np.cos(angle) - x * np.sin(angle)) / radius
    if shape == "disc":
        return u * u + v * v <= 1
    if shape == "ring":
        return (u * u + v * v <= 1) & (u * u + v * v >= 0.36)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.8
    if shape == "cross":
        return (np.minimum(np.abs(u), np.abs(v)) <= 0.28) & (np.maximum(np.abs(u), np.abs(v)) <= 1)
    if shape == "triangle":
        return inside_polygon(u, v, [(np.sin(a), -np.cos(a)) for a in np.arange(3) * 2 * np.pi / 3])
    spikes = [(np.sin(a) * r, -np.cos(a) * r) for a, r in zip(np.arange(10) * np.pi / 5, [1, 0.42] * 5, strict=True)]
    return inside_polygon(u, v, spikes)


def inside_polygon(u: np.ndarray, v: np.ndarray, polygon: list[tuple[float, float]]) -> np.ndarray:
    """Points (u, v) within a polygon, by the even-odd rule."""
    inside = np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        crosses = (ay > v) != (by > v)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (u < (bx - ax) * (v - ay) / (by - ay) + ax)
    return inside


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    w, h = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inter = max(w, 0) * max(h, 0)
    return float(inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter))
