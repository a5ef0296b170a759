"""Rotated boxes in NumPy: their corners and their IoU.

A rotated box is cx, cy, w, h and an angle in radians, which turns the x axis towards the y axis: clockwise on a screen.
"""

from __future__ import annotations

import numpy as np

# Boxes with a smaller area overlap nothing (mmcv's box_iou_rotated_utils.hpp).
MIN_AREA = 1e-14
# Pairs computed at a time: intermediate arrays stay in the CPU's cache.
_PAIRS = 1 << 13


def corners(boxes: np.ndarray) -> np.ndarray:
    """Corners ``[..., 4, 2]`` of rotated boxes ``[..., 5]``, in order around each; the first is (-w/2, -h/2)."""
    centre, size, angle = boxes[..., None, :2], boxes[..., 2:4] / 2, boxes[..., 4]
    cos, sin = np.cos(angle), np.sin(angle)
    along = size[..., :1] * np.stack([cos, sin], -1)
    across = size[..., 1:] * np.stack([-sin, cos], -1)
    return centre + np.stack([-along - across, along - across, along + across, across - along], -2)


def upright(boxes: np.ndarray) -> np.ndarray:
    """The upright boxes ``[n, 4]`` (x1, y1, x2, y2) around rotated ones ``[n, 5]``; others as they are."""
    if boxes.shape[1] == 4:
        return boxes
    around = corners(boxes)
    return np.concatenate([around.min(1), around.max(1)], 1)


def rotated_iou_matrix(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """IoU of every rotated box of `a` ``[n, 5]`` with every one of `b` ``[m, 5]``: ``[n, m] float64``.

    0 for a box without area, and outside of `where` ``[n, m] bool``.
    """
    a, b = a[:, :5].astype(np.float64), b[:, :5].astype(np.float64)
    matrix = np.zeros((len(a), len(b)))
    with np.errstate(invalid="ignore"):
        reach_a, reach_b = _reach(a), _reach(b)
        near = np.abs(a[:, None, 0] - b[None, :, 0]) <= reach_a[:, None, 0] + reach_b[None, :, 0]
        near &= np.abs(a[:, None, 1] - b[None, :, 1]) <= reach_a[:, None, 1] + reach_b[None, :, 1]
    if where is not None:
        near &= where
    rows, columns = np.nonzero(near)
    for start in range(0, len(rows), _PAIRS):
        i, j = rows[start : start + _PAIRS], columns[start : start + _PAIRS]
        matrix[i, j] = rotated_iou(a[i], b[j])
    return matrix


def rotated_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of paired rotated boxes ``[n, 5]``, ``[n, 5]``: ``[n] float64``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        area_a, area_b = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
        common = np.clip(_intersection(a, b), 0, np.minimum(area_a, area_b))
        return np.where((area_a < MIN_AREA) | (area_b < MIN_AREA), 0.0, common / (area_a + area_b - common))


def _reach(boxes: np.ndarray) -> np.ndarray:
    """Half the width and height ``[n, 2]`` of the upright boxes around rotated ones."""
    cos, sin = np.abs(np.cos(boxes[:, 4])), np.abs(np.sin(boxes[:, 4]))
    w, h = np.abs(boxes[:, 2:4].T) / 2
    return np.stack([w * cos + h * sin, w * sin + h * cos], -1)


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area common to paired boxes ``[n, 5] float64``: ``[n]``.

    In the frame of `b`, which is |x| <= w/2, |y| <= h/2, the common area is by Green's theorem the integral of
    -clamp(y) dx along the outline of `a`, as far as it lies within |x| <= w/2.  That sum over four edges is continuous
    in all arguments, so that touching, equal and parallel boxes are no special cases.
    """
    half_w, half_h = np.abs(b[:, 2:4].T) / 2
    x, y = _corners_in_frame(a, b)
    step_x, step_y = np.roll(x, -1, 0) - x, np.roll(y, -1, 0) - y
    # What lies beyond |x| = w/2 is pushed onto it, where it encloses nothing.
    inside = np.clip(x, -half_w, half_w)
    following = np.roll(inside, -1, 0)
    start = y + step_y * _fraction(inside - x, step_x)
    end = y + step_y * _fraction(following - x, step_x)
    # Along an edge clamp(y) is level, then linear, then level: a mean of its ends, whose weight is that of the levels.
    weight = (_fraction(-half_h - start, end - start) + _fraction(half_h - start, end - start)) / 2
    mean = np.clip(start, -half_h, half_h) * weight + np.clip(end, -half_h, half_h) * (1 - weight)
    return ((inside - following) * mean).sum(0)


def _corners_in_frame(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of `a` about the centre and along the axes of `b`: x and y ``[4, n]``, in order around."""
    dx, dy = a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]
    cos, sin = np.cos(b[:, 4]), np.sin(b[:, 4])
    cos_turn, sin_turn = np.cos(a[:, 4] - b[:, 4]), np.sin(a[:, 4] - b[:, 4])
    w, h = np.abs(a[:, 2:4].T) / 2
    u, v = np.stack([-w, w, w, -w]), np.stack([-h, -h, h, h])
    return dx * cos + dy * sin + u * cos_turn - v * sin_turn, dy * cos - dx * sin + u * sin_turn + v * cos_turn


def _fraction(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole within [0, 1]; something in there where `whole` is 0."""
    return np.clip(part / np.where(whole == 0, 1.0, whole), 0.0, 1.0)
