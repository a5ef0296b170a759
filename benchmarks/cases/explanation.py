"""Why two post-processings keep other boxes; no other tool says that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.cases.nms import IOU, SCORE, scene
from benchmarks.harness import Case, Contestant, Setting, Work

MOST = 1000


def sides(count: int) -> list[tuple[Any, Any]]:
    """For each image mmyolo's post-processing, and EfficientNMS behind a TopK of 900 rows, on boxes and scores that
    moved as in float32."""
    from alignment.nms.causes import Side
    from alignment.nms.implementations import efficient_nms, mmyolo
    from alignment.variant import Nms

    reference = mmyolo(Nms(score_threshold=SCORE, iou_threshold=IOU, max_per_image=MOST))
    attributes = {"score_threshold": SCORE, "iou_threshold": IOU, "max_output_boxes": MOST}
    deployed = replace(efficient_nms(attributes), topk=900, topk_unit="anchors")
    found = []
    for seed in range(count):
        boxes, scores = scene(seed)
        rng = np.random.default_rng(seed + 1)
        moved = (boxes + rng.normal(0, 5e-3, boxes.shape)).astype(np.float32)
        drifted = np.where(scores > 0, scores + rng.normal(0, 2e-5, scores.shape), 0).astype(np.float32)
        found.append((Side(reference, boxes, scores), Side(deployed, moved, drifted)))
    return found


def _transform() -> Any:
    from alignment.data.preprocess import Transform

    return Transform((0.5, 0.5), (0.0, 80.0), (960, 1280))


def ours(setting: Setting) -> Work:
    """Every difference with its cause and the replay that proves it."""
    from alignment.nms.causes import Limits
    from alignment.nms.explain import explain

    pairs, transform = sides(setting.size), _transform()
    return lambda: [explain(*pair, Limits(0.05, 2e-4), transform) for pair in pairs]


def both(setting: Setting) -> Work:
    """The two post-processings, and nothing about them."""
    from alignment.nms.semantics import run

    pairs, transform = sides(setting.size), _transform()

    def work() -> None:
        for pair in pairs:
            for side in pair:
                run(side.semantics, side.boxes, side.scores, transform)

    return work


def judge(setting: Setting, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many differences there are, and how many are not explained."""
    every = [one for image in results.get("ours", []) for one in image]
    scores = {"differences": float(len(every)), "unexplained": float(sum(one.cause == "unexplained" for one in every))}
    return {"ours": scores} if "ours" in results else {}


CASE = Case(
    name="explanation",
    title="Every box that mmyolo's post-processing and EfficientNMS behind a TopK keep otherwise, of images of 8400 "
    "rows and 80 classes, explained by replay; there is no peer, and two post-processings are the floor",
    axis="images",
    sizes=(2, 4, 8),
    repeat=3,
    contestants=(
        Contestant("ours", "ours", ours),
        Contestant("both post-processings alone", "floor", both),
    ),
    judge=judge,
)
