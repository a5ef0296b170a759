"""TensorRT's NMS plugins in NumPy: from boxes and scores of a batch to the four outputs of a node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignment.nms.implementations import efficient_nms, efficient_nms_rotated, prepared
from alignment.nms.semantics import run

UPRIGHT, ROTATED = "EfficientNMS_TRT", "EfficientNMSRotated_TRT"
#: Numbers of a box.
WIDTH = {UPRIGHT: 4, ROTATED: 5}
#: The label of places that are left over.
UNUSED = {UPRIGHT: 0, ROTATED: -1}

#: Count ``[B, 1] int32``, boxes ``[B, K, 4 or 5]`` and scores ``[B, K]`` in the inputs' type, labels ``[B, K] int32``.
Outputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_Kept = tuple[np.ndarray, np.ndarray, np.ndarray]


def plugin_outputs(plugin: str, boxes: np.ndarray, scores: np.ndarray, attributes: Mapping[str, Any]) -> Outputs:
    """What a plugin gives, K being its ``max_output_boxes``; boxes and scores of places left over are 0.

    Args:
        plugin: `UPRIGHT` or `ROTATED`; ties go by index in both, and of `UPRIGHT` ``class_agnostic`` counts, which
            TensorRT 8.6 passes over.
        boxes: ``[B, N, 4]`` as ``box_coding`` says; rotated ``[B, N, 5]``: cx, cy, w, h, angle in radians.
        scores: ``[B, N, C]``, of the same type, float32 or float16.
        attributes: of the node.
    """
    one = _rotated if plugin == ROTATED else _upright
    places = int(attributes["max_output_boxes"])
    images = [_placed(one(*image, attributes), places, UNUSED[plugin]) for image in zip(boxes, scores, strict=True)]
    count, found, values, labels = map(np.stack, zip(*images, strict=True))
    return count, found, values, labels


def _upright(boxes: np.ndarray, scores: np.ndarray, attributes: Mapping[str, Any]) -> _Kept:
    """Boxes, scores and labels that are kept of one image."""
    corners = prepared(boxes, int(attributes.get("box_coding", 0)))
    fates = run(efficient_nms(attributes), corners, scores)
    values = fates.scores[fates.kept]
    if attributes.get("score_activation", 0):
        values = sigmoid(values)
    return corners[fates.rows[fates.kept]], values, fates.labels[fates.kept]


def _rotated(boxes: np.ndarray, scores: np.ndarray, attributes: Mapping[str, Any]) -> _Kept:
    """The same of rotated boxes: float16 is computed in float32, sigmoids in float64."""
    values = scores.astype(np.float32)
    if attributes.get("score_activation", 0):
        values = sigmoid(values.astype(np.float64)).astype(np.float32)
    fates = run(efficient_nms_rotated(attributes), boxes.astype(np.float32), values)
    kept = fates.kept
    return boxes[fates.rows[kept]], fates.scores[kept].astype(scores.dtype), fates.labels[kept]


def sigmoid(values: np.ndarray) -> np.ndarray:
    """``1 / (1 + exp(-x))`` in the type of `values`."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-values))


def _placed(kept: _Kept, places: int, unused: int) -> Outputs:
    boxes, scores, labels = kept
    padded = (
        np.zeros((places, boxes.shape[1]), boxes.dtype),
        np.zeros(places, scores.dtype),
        np.full(places, unused, np.int32),
    )
    for place, part in zip(padded, kept, strict=True):
        place[: len(part)] = part
    return np.array([len(labels)], np.int32), *padded
