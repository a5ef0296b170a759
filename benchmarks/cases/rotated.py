"""IoU of pairs of rotated boxes."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.harness import Case, Contestant, Setting, Work


def pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of 1024 px, each with one much like it."""
    from benchmarks.rotated_iou import near

    return near((4, 400), 512, 8, 512)(np.random.default_rng(0), count)


def ours(setting: Setting) -> Work:
    """NumPy in float64, the oracle."""
    from alignment.nms.rotated import rotated_iou

    a, b = pairs(setting.size)
    return lambda: rotated_iou(a, b)


def kernels(setting: Setting) -> Work:
    """The GPU's code in float32, compiled for the CPU; near the threshold in float64."""
    from alignment.engine.plugins import Kernels, build_for_cpu

    found = Kernels(build_for_cpu())
    a, b = pairs(setting.size)
    return lambda: found.ious(a, b).iou


def shapely(setting: Setting) -> Work:
    """Polygons by GEOS."""
    import shapely  # noqa: F401

    from benchmarks.rotated_iou import by_shapely

    a, b = pairs(setting.size)
    return lambda: by_shapely(a, b)


def opencv(setting: Setting) -> Work:
    """``cv2.rotatedRectangleIntersection`` in float32, pair by pair."""
    import cv2

    a, b = pairs(setting.size)
    one, other = ([((x, y), (w, h), np.degrees(t)) for x, y, w, h, t in boxes.tolist()] for boxes in (a, b))
    areas = a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3]

    def common(first: Any, second: Any) -> float:
        points = cv2.rotatedRectangleIntersection(first, second)[1]
        return 0.0 if points is None else cv2.contourArea(cv2.convexHull(points))

    def work() -> np.ndarray:
        found = np.array([common(first, second) for first, second in zip(one, other, strict=True)])
        return found / (areas - found)

    return work


def judge(setting: Setting, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The largest distance from ours."""
    if "ours, NumPy" not in results:
        return {}
    truth = results["ours, NumPy"]
    return {name: {"largest difference": float(np.abs(found - truth).max())} for name, found in results.items()}


CASE = Case(
    name="rotated-iou",
    title="IoU of pairs of rotated boxes that are much alike; `python -m benchmarks.rotated_iou` has the errors of "
    "every kind of pair",
    axis="pairs",
    sizes=(10_000, 20_000, 40_000),
    contestants=(
        Contestant("ours, NumPy", "ours", ours),
        Contestant("ours, the plugin's kernel on the CPU", "ours", kernels),
        Contestant("shapely", "peer", shapely, ("shapely",)),
        Contestant("OpenCV, rotatedRectangleIntersection", "peer", opencv, ("opencv-python",)),
    ),
    judge=judge,
)
