"""COCO AP of synthetic detections."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, Contestant, Setting, Work

CLASSES, TRUTH, FOUND = 80, 7, 20


@functools.cache
def scene(count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Truth in COCO's layout, and rows of image id, x1, y1, x2, y2, score, class of some `FOUND` detections an image.

    Three detections of four are near some truth, most of them of its class.
    """
    rng = np.random.default_rng(0)
    images = [{"id": i + 1, "width": 640, "height": 480, "file_name": f"{i + 1}.jpg"} for i in range(count)]
    annotations: list[dict[str, Any]] = []
    rows = []
    for image in range(1, count + 1):
        number = int(rng.integers(1, 2 * TRUTH))
        corner, size = rng.uniform(0, 400, (number, 2)), rng.uniform(8, 200, (number, 2))
        labels = rng.integers(0, CLASSES, number)
        for (x, y), (w, h), label in zip(corner, size, labels, strict=True):
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label) + 1, "iscrowd": 0}
            annotations.append(entry | {"bbox": [x, y, w, h], "area": w * h})
        of = rng.integers(0, number, FOUND)
        near = rng.random(FOUND) < 0.75
        x1y1 = np.where(
            near[:, None], corner[of] + rng.normal(0, 0.06, (FOUND, 2)) * size[of], rng.uniform(0, 400, (FOUND, 2))
        )
        wh = size[of] * np.exp(rng.normal(0, 0.08, (FOUND, 2)))
        label = np.where(rng.random(FOUND) < 0.8, labels[of], rng.integers(0, CLASSES, FOUND))
        score = rng.uniform(0.001, 1, FOUND).astype(np.float32)
        rows.append(np.column_stack([np.full(FOUND, image), x1y1, x1y1 + wh, score, label]))
    categories = [{"id": i + 1, "name": str(i)} for i in range(CLASSES)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, np.concatenate(rows)


def ours(setting: Setting) -> Work:
    """From arrays, as a runner's detections are."""
    from alignment.compare.coco_map import coco_ap
    from alignment.data.coco import CocoDataset
    from alignment.nms.multiclass import Detections

    truth, rows = scene(setting.size)
    ids = [category["id"] for category in truth["categories"]]
    dataset = CocoDataset(Path(), "val2017", [], ids, list(map(str, ids)), truth)
    found = {}
    for image in np.split(rows, setting.size):
        order = np.argsort(-image[:, 5], kind="stable")
        boxes, scores, labels = np.split(image[order, 1:].astype(np.float32), (4, 5), 1)
        rank = np.arange(len(order), dtype=np.int32)
        found[int(image[0, 0])] = Detections(boxes, scores[:, 0], labels[:, 0].astype(np.int32), rank)
    return lambda: coco_ap(dataset, found)[0]


def coco(package: str) -> Callable[[Setting], Work]:
    """pycocotools' protocol from its own array of detections: load, evaluate, accumulate, summarize."""

    def prepare(setting: Setting) -> Work:
        if package == "pycocotools":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        else:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval

        truth, rows = scene(setting.size)
        with contextlib.redirect_stdout(io.StringIO()):
            data = COCO()
            data.dataset = truth
            data.createIndex()
        given = rows.copy()
        given[:, 1:5] = given[:, 1:5].astype(np.float32)
        given[:, 3:5] -= given[:, 1:3]
        given[:, 6] += 1

        def work() -> float:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = COCOeval(data, data.loadRes(given.copy()), "bbox")
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            return float(evaluation.stats[0])

        return work

    return prepare


def judge(setting: Setting, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """AP."""
    return {name: {"AP": ap} for name, ap in results.items()}


CASE = Case(
    name="map",
    title=f"COCO AP of {FOUND} detections an image in {CLASSES} classes; ours takes two of the twelve numbers, the "
    "peers all, and all of them start from arrays",
    axis="images",
    sizes=(1250, 2500, 5000),
    repeat=3,
    contestants=(
        Contestant("ours", "ours", ours, ("pycocotools",)),
        Contestant("pycocotools", "peer", coco("pycocotools"), ("pycocotools",)),
        Contestant("faster-coco-eval", "peer", coco("faster_coco_eval"), ("faster-coco-eval",)),
    ),
    judge=judge,
)
