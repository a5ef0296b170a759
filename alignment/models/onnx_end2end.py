"""Detections of a bare ONNX file that ends in NMS."""

from __future__ import annotations

import numpy as np

from alignment.errors import AlignError
from alignment.models.onnx_heads import Named, head_of, output_named, shapes_of
from alignment.nms.multiclass import Detections
from alignment.onnx_head import End2EndHead
from alignment.variant import Variant

#: One image: boxes ``[K, 4 or 5]``, scores ``[K]``, labels ``[K]`` and which of them are no padding ``[K]``.
_Table = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def kept_by_graph(named: Named, variant: Variant, images: int) -> tuple[Detections, ...]:
    """What the graph's own NMS kept, image by image, without padding; boxes are in pixels of the network input.

    A score that is NaN is no padding.

    Args:
        images: how many went in; a graph whose rows carry a batch index does not say it.

    Raises:
        AlignError: when the outputs are not what layout end2end says, or a label is none of the variant's classes.
    """
    head = head_of(variant)
    assert isinstance(head, End2EndHead)
    if not variant.rotated and (head.output is not None or len(named) == 1):
        tables = _from_rows(named, head.output or next(iter(named)), variant, images)
    else:
        tables = _from_four(named, head, variant)
    return tuple(_detections(table, variant) for table in tables[:images])


def _from_rows(named: Named, name: str, variant: Variant, images: int) -> list[_Table]:
    """``[B, K, 6]`` as YOLOv10 ends, or ``[n, 7]`` as YOLOv7's end2end export does."""
    rows = output_named(named, name, "output", variant)
    if rows.ndim == 3 and rows.shape[2] == 6:
        return [(image[:, :4], image[:, 4], image[:, 5], ~(image[:, 4] <= 0)) for image in rows]
    if rows.ndim == 2 and rows.shape[1] == 7 and (rows[:, 0] == np.rint(rows[:, 0])).all():
        parts = [rows[rows[:, 0] == index] for index in range(images)]
        return [(part[:, 1:5], part[:, 6], part[:, 5], ~(part[:, 6] <= 0)) for part in parts]
    raise AlignError(
        f"{variant.weights}: output {shapes_of({name: rows})}, but layout end2end is [B, K, 6] (box, score, label), "
        "[n, 7] (batch index, box, label, score) or four outputs",
        "mend source.head.output or source.head.layout in the YAML",
    )


def _from_four(named: Named, head: End2EndHead, variant: Variant) -> list[_Table]:
    """As EfficientNMS_TRT ends; the count is absent where the graph does not count, scores where boxes hold them."""
    boxes = output_named(named, head.boxes, "boxes", variant)
    labels = output_named(named, head.labels, "labels", variant)
    used = {head.boxes: boxes, head.labels: labels}
    width = 5 if variant.rotated else 4
    if boxes.ndim == 3 and boxes.shape[2] == width + 1:
        boxes, scores = boxes[..., :width], boxes[..., width]
    else:
        scores = used[head.scores] = output_named(named, head.scores, "scores", variant)
    fits = boxes.ndim == 3 and boxes.shape[2] == width and scores.shape == labels.shape == boxes.shape[:2]
    valid = ~(scores <= 0)
    if head.count is not None:
        count = used[head.count] = output_named(named, head.count, "count", variant)
        fits = fits and count.size == len(boxes)
        if fits:
            valid &= np.arange(boxes.shape[1]) < count.reshape(-1, 1)
    if not fits:
        raise AlignError(
            f"{variant.weights}: outputs {shapes_of(used)}, but layout end2end is count [B, 1], boxes [B, K, {width}], "
            "scores [B, K] and labels [B, K]",
            "name the right ones in source.head of the YAML",
        )
    return list(zip(boxes, scores, labels, valid, strict=True))


def _detections(table: _Table, variant: Variant) -> Detections:
    """One image's, by falling score."""
    boxes, scores, labels, valid = table
    rows = np.flatnonzero(valid)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    known = (labels[rows] >= 0) & (labels[rows] < variant.classes) & (labels[rows] == np.rint(labels[rows]))
    if not known.all():
        raise AlignError(
            f"{variant.weights}: a detection has label {labels[rows][~known][0]:g}, but {variant.name} has "
            f"{variant.classes} classes, which count from 0",
            "mend classes or source.head in the YAML, or the labels in the graph",
        )
    return Detections(
        boxes[rows].astype(np.float32),
        scores[rows].astype(np.float32),
        labels[rows].astype(np.int32),
        rows.astype(np.int32),
    )
