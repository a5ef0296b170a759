"""The outputs of a model in one form, whatever backend and head they come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignment.errors import AlignError
from alignment.variant import OnnxHead, OnnxSource, Variant


@dataclass(frozen=True)
class Outputs:
    """What a model said about one batch.

    Attributes:
        raw: head outputs by name, first axis B.
        boxes: ``[B, N, 4]``, x1, y1, x2, y2 in pixels of the network input.
        scores: ``[B, N, C]``, probabilities.
    """

    raw: dict[str, np.ndarray]
    boxes: np.ndarray
    scores: np.ndarray


def to_outputs(named: dict[str, np.ndarray], variant: Variant) -> Outputs:
    """Sorts a runner's outputs, and decodes them where the graph does not.

    Raises:
        AlignError: when the graph of a bare ONNX file does not have the outputs that its head layout asks for.
    """
    if not isinstance(variant.source, OnnxSource):
        raw = {name: value for name, value in named.items() if name not in ("boxes", "scores")}
        return Outputs(raw, named["boxes"], named["scores"])
    head = variant.source.head
    decoded = _yolox(named, head, variant) if head.layout == "yolox" else _decoded(named, head, variant)
    if decoded.scores.shape[-1] != variant.classes:
        raise AlignError(
            f"{variant.source.file}: scores of {decoded.scores.shape[-1]} classes, but {variant.name} says "
            f"{variant.classes}",
            "mend `classes` or `source.head` in the variant's YAML",
        )
    return decoded


def _output(named: dict[str, np.ndarray], name: str, variant: Variant) -> np.ndarray:
    if name not in named:
        raise AlignError(
            f"{variant.weights}: has no output {name!r} but {', '.join(named)}",
            "name its outputs in source.head of the variant's YAML",
        )
    return named[name]


def _decoded(named: dict[str, np.ndarray], head: OnnxHead, variant: Variant) -> Outputs:
    boxes, scores = _output(named, head.boxes, variant), _output(named, head.scores, variant)
    if boxes.ndim != 3 or boxes.shape[-1] != 4 or scores.shape[:2] != boxes.shape[:2]:
        raise AlignError(
            f"{variant.weights}: outputs {head.boxes} {boxes.shape} and {head.scores} {scores.shape} are not "
            "[B, N, 4] and [B, N, C]",
            "name others in source.head of the variant's YAML",
        )
    return Outputs({}, _corners(boxes) if head.box_format == "cxcywh" else boxes, scores)


def _yolox(named: dict[str, np.ndarray], head: OnnxHead, variant: Variant) -> Outputs:
    """Formula of the YOLOX paper's head: centre = (offset + cell) × stride, size = exp(log size) × stride."""
    raw = _output(named, head.output or next(iter(named)), variant)
    cells, strides = _grid(head.strides, variant)
    if raw.ndim != 3 or raw.shape[1] != len(cells) or raw.shape[2] != 5 + variant.classes:
        raise AlignError(
            f"{variant.weights}: output of shape {raw.shape}, but layout yolox with strides {head.strides} and "
            f"{variant.classes} classes is [B, {len(cells)}, {5 + variant.classes}]",
            "mend input, classes or source.head in the variant's YAML",
        )
    cells, strides = cells.astype(raw.dtype), strides.astype(raw.dtype)
    centre, size = (raw[..., :2] + cells) * strides, np.exp(raw[..., 2:4]) * strides
    boxes = np.concatenate([centre - size / 2, centre + size / 2], -1)
    return Outputs({"output": raw}, boxes, raw[..., 5:] * raw[..., 4:5])


def _grid(strides: list[int], variant: Variant) -> tuple[np.ndarray, np.ndarray]:
    """Cells (x, y) ``[N, 2]`` row by row, level by level, and the stride of each ``[N, 1]``."""
    cells, steps = [], []
    for stride in strides:
        y, x = np.mgrid[: variant.input.height // stride, : variant.input.width // stride]
        cells.append(np.stack([x, y], -1).reshape(-1, 2))
        steps.append(np.full((x.size, 1), stride))
    return np.concatenate(cells), np.concatenate(steps)


def _corners(boxes: np.ndarray) -> np.ndarray:
    centre, size = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([centre - size / 2, centre + size / 2], -1)
