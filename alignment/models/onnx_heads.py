"""From the outputs of a bare ONNX file to boxes and scores: one function a head layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from alignment.errors import AlignError
from alignment.onnx_head import DecodedHead, OnnxHead, YoloHead, Yolov5RawHead, YoloxHead
from alignment.variant import OnnxSource, Variant

Named = dict[str, np.ndarray]


class Decoded(NamedTuple):
    """Raw head outputs by name, boxes ``[B, N, 4]`` (x1, y1, x2, y2) or ``[B, N, 5]`` (rotated), in pixels of the
    network input, and scores ``[B, N, C]``."""

    raw: Named
    boxes: np.ndarray
    scores: np.ndarray


def head_of(variant: Variant) -> OnnxHead:
    """The head of a variant that is a bare ONNX file."""
    assert isinstance(variant.source, OnnxSource)
    return variant.source.head


def decode(named: Named, variant: Variant) -> Decoded:
    """Decodes the outputs of a graph that does not end in NMS.

    Raises:
        AlignError: when they are not what the head's layout says.
    """
    head = head_of(variant)
    if isinstance(head, DecodedHead):
        return _decoded(named, head, variant)
    if isinstance(head, YoloHead):
        return _yolo(named, head, variant)
    if isinstance(head, YoloxHead):
        return _yolox(named, head, variant)
    assert isinstance(head, Yolov5RawHead)
    return _yolov5_raw(named, head, variant)


def require_plausible(boxes: np.ndarray, scores: np.ndarray, variant: Variant) -> None:
    """Looks at what a YAML can get wrong without a shape that tells; meant for the reference, which is not at fault.

    Args:
        boxes, scores: of one batch, see `Decoded`.

    Raises:
        AlignError: for scores that are no probabilities, and boxes of another format or unit than the head says.
    """
    low, high = float(scores.min()), float(scores.max())
    far = float(np.abs(boxes[..., :4]).max())
    crossed = not variant.rotated and bool(np.mean(boxes[..., 2] < boxes[..., 0]) > 0.5)
    complaints = (
        (
            low < -1e-3 or high > 1 + 1e-3,
            f"scores from {low:.3g} to {high:.3g} are no probabilities",
            "if they are logits, say source.head.scores_activation: sigmoid",
        ),
        (
            low >= 0.25,  # the product of two sigmoids of something positive
            f"no score is below {low:.3g}, so the graph has a sigmoid of its own",
            "say source.head.scores_activation: none; the maps of yolov5_raw must be logits",
        ),
        (
            crossed,
            "the right edge of most boxes is left of their left edge",
            "if they are centre and size, say source.head.box_format: cxcywh",
        ),
        (
            far <= 2,
            f"no box reaches beyond {far:.3g} pixels",
            "scale boxes to pixels of the network input in the graph",
        ),
    )
    for wrong, what, mend in complaints:
        if wrong:
            raise AlignError(f"{variant.weights}: {what}", mend)


def output_named(named: Named, name: str, field: str, variant: Variant) -> np.ndarray:
    """The output `name`, which `field` of the head asks for."""
    if name not in named:
        raise AlignError(
            f"{variant.weights}: has no output {name!r} but {', '.join(named)}", f"mend source.head.{field} in the YAML"
        )
    return named[name]


def shapes_of(named: Named) -> str:
    """``boxes [1, 2100, 4], scores [1, 2100, 6]``."""
    return ", ".join(f"{name} {list(value.shape)}" for name, value in named.items())


def _decoded(named: Named, head: DecodedHead, variant: Variant) -> Decoded:
    boxes = output_named(named, head.boxes, "boxes", variant)
    scores = output_named(named, head.scores, "scores", variant)
    width = 5 if variant.rotated else 4
    if boxes.ndim != 3 or boxes.shape[2] != width:
        raise AlignError(
            f"{variant.weights}: boxes are {shapes_of({head.boxes: boxes})}, but layout decoded has [B, N, {width}]",
            "mend source.head.boxes or source.head.layout in the YAML",
        )
    scores = _rows({head.scores: scores}, variant.classes, 0, head, variant)
    if scores.shape[:2] != boxes.shape[:2]:
        raise AlignError(
            f"{variant.weights}: {boxes.shape[1]} boxes but {scores.shape[1]} rows of scores: "
            f"{shapes_of({head.boxes: boxes, head.scores: named[head.scores]})}",
            "mend source.head.boxes, scores or transposed in the YAML",
        )
    if head.box_format == "cxcywh" and not variant.rotated:
        boxes = corners(boxes)
    return Decoded({}, boxes, _activated(scores, head.scores_activation))


def _yolo(named: Named, head: YoloHead, variant: Variant) -> Decoded:
    before = 5 if head.layout == "yolov5" else 4
    width = before + variant.classes + variant.rotated
    name = _chosen(named, head.output, lambda shape: len(shape) == 3 and width in shape[1:], variant)
    rows = _rows({name: named[name]}, width, before + variant.rotated, head, variant)
    boxes = rows[..., :4]
    if variant.rotated:
        boxes = np.concatenate([boxes, rows[..., -1:]], -1)
    elif head.box_format == "cxcywh":
        boxes = corners(boxes)
    scores = _activated(rows[..., before : before + variant.classes], head.scores_activation)
    if head.layout == "yolov5":
        scores = scores * _activated(rows[..., 4:5], head.scores_activation)
    return Decoded({}, boxes, scores)


def _yolox(named: Named, head: YoloxHead, variant: Variant) -> Decoded:
    """Formula of the YOLOX paper's head: centre = (offset + cell) × stride, size = exp(log size) × stride."""
    cells, strides = _grid(head.strides, variant)
    wanted = (len(cells), 5 + variant.classes)
    name = _chosen(named, head.output, lambda shape: shape[1:] == wanted, variant)
    raw = named[name]
    if raw.shape[1:] != wanted:
        raise AlignError(
            f"{variant.weights}: output {shapes_of({name: raw})}, but layout yolox with strides {head.strides} and "
            f"{variant.classes} classes is [B, {wanted[0]}, {wanted[1]}]",
            "mend input, classes or source.head in the YAML",
        )
    cells, strides = cells.astype(raw.dtype), strides.astype(raw.dtype)
    centre, size = (raw[..., :2] + cells) * strides, np.exp(raw[..., 2:4]) * strides
    boxes = corners(np.concatenate([centre, size], -1))
    scores = _activated(raw[..., 5:], head.scores_activation) * _activated(raw[..., 4:5], head.scores_activation)
    return Decoded({"output": raw}, boxes, scores)


def _yolov5_raw(named: Named, head: Yolov5RawHead, variant: Variant) -> Decoded:
    """Formula of YOLOv5's Detect: centre = (2σ − 0.5 + cell) × stride, size = (2σ)² × anchor.

    Rows are counted stride by stride, anchor by anchor, line by line.
    """
    raw: Named = {}
    boxes, scores = [], []
    for stride, pairs in zip(head.strides, head.anchors, strict=True):
        name = _level(named, stride, len(pairs), variant)
        level = raw[name] = named[name]
        height, width = variant.input.height // stride, variant.input.width // stride
        if level.ndim == 4:
            level = level.reshape(len(level), len(pairs), -1, height, width).transpose(0, 1, 3, 4, 2)
        y, x = np.mgrid[:height, :width]
        cells, anchors = np.stack([x, y], -1).astype(level.dtype), np.array(pairs, level.dtype)
        values = sigmoid(level)
        centre = (2 * values[..., :2] - 0.5 + cells) * stride
        size = (2 * values[..., 2:4]) ** 2 * anchors[:, None, None]
        boxes.append(corners(np.concatenate([centre, size], -1)).reshape(len(level), -1, 4))
        scores.append((values[..., 5:] * values[..., 4:5]).reshape(len(level), -1, variant.classes))
    return Decoded(raw, np.concatenate(boxes, 1), np.concatenate(scores, 1))


def _level(named: Named, stride: int, anchors: int, variant: Variant) -> str:
    """The output that is the map of one stride; the first where a graph has it in both shapes."""
    height, width = variant.input.height // stride, variant.input.width // stride
    depth = 5 + variant.classes
    wanted = (anchors, height, width, depth), (anchors * depth, height, width)
    for name, value in named.items():
        if value.shape[1:] in wanted:
            return name
    shapes = " or ".join(f"[B, {', '.join(map(str, shape))}]" for shape in wanted)
    raise AlignError(
        f"{variant.weights}: no map for stride {stride}, which with {anchors} anchors and {variant.classes} classes is "
        f"{shapes}; outputs are {shapes_of(named)}",
        "mend source.head.anchors, source.head.strides, classes or input in the YAML",
    )


def _chosen(named: Named, name: str | None, fits: Callable[[tuple[int, ...]], bool], variant: Variant) -> str:
    """The name of the output that holds everything: the one that is named, the only one, the only one that fits."""
    if name is not None:
        output_named(named, name, "output", variant)
        return name
    fitting = [one for one, value in named.items() if len(named) == 1 or fits(value.shape)]
    if len(fitting) == 1:
        return fitting[0]
    many = f"{len(fitting)} outputs have" if fitting else "no output has"
    raise AlignError(
        f"{variant.weights}: {many} the shape of layout {head_of(variant).layout} with {variant.classes} classes: "
        f"{shapes_of(named)}",
        "name the one in source.head.output, or mend classes or source.head.layout in the YAML",
    )


def _rows(output: Named, width: int, extra: int, head: DecodedHead | YoloHead, variant: Variant) -> np.ndarray:
    """The one array of `output`, ``[B, N, width]`` or transposed ``[B, width, N]``, as ``[B, N, width]``.

    Args:
        extra: how many of the `width` columns are not classes.
    """
    ((_, array),) = output.items()
    axes = {None: (1, 2), True: (1,), False: (2,)}[head.transposed]
    fits = [axis for axis in axes if array.ndim == 3 and array.shape[axis] == width]
    if len(fits) == 2:
        raise AlignError(
            f"{variant.weights}: {shapes_of(output)} is [B, N, {width}] as well as [B, {width}, N]",
            "say source.head.transposed: false or true",
        )
    if not fits:
        shapes = " or ".join(f"[B, {width}, N]" if axis == 1 else f"[B, N, {width}]" for axis in axes)
        mend = "mend classes or source.head in the YAML"
        if array.ndim == 3:
            # There are more priors than columns: the shorter axis is likely to be that of the classes.
            likely = min(array.shape[axis] for axis in axes) - extra
            mend += f" ({likely} classes?)" if likely > 0 else ""
        raise AlignError(
            f"{variant.weights}: {shapes_of(output)}, but layout {head.layout} with {variant.classes} classes is "
            f"{shapes}",
            mend,
        )
    return array if fits == [2] else np.ascontiguousarray(array.transpose(0, 2, 1))


def _grid(strides: list[int], variant: Variant) -> tuple[np.ndarray, np.ndarray]:
    """Cells (x, y) ``[N, 2]`` row by row, level by level, and the stride of each ``[N, 1]``."""
    cells, steps = [], []
    for stride in strides:
        y, x = np.mgrid[: variant.input.height // stride, : variant.input.width // stride]
        cells.append(np.stack([x, y], -1).reshape(-1, 2))
        steps.append(np.full((x.size, 1), stride))
    return np.concatenate(cells), np.concatenate(steps)


def corners(boxes: np.ndarray) -> np.ndarray:
    """cx, cy, w, h to x1, y1, x2, y2, along the last axis."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([centre - size / 2, centre + size / 2], -1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(−x)) in the dtype of `x`."""
    with np.errstate(over="ignore"):  # of exp, where the sigmoid is 0
        return 1 / (1 + np.exp(-x))


def _activated(scores: np.ndarray, activation: str) -> np.ndarray:
    return sigmoid(scores) if activation == "sigmoid" else np.ascontiguousarray(scores)
