"""Graphs that give a map of logits for each stride, as YOLOv5 and YOLOv7 do without their decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper

from alignment.guess.findings import Finding
from alignment.guess.head import HeadFound, Look

#: Width and height in pixels, in turn, for strides 8, 16 and 32, as the YAML files of the models have them.
ANCHORS = {
    "yolov5": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]],
    "yolov7": [[12, 16, 19, 36, 40, 28], [36, 75, 76, 55, 72, 146], [142, 110, 192, 243, 459, 401]],
}
FIELD = "source.head.anchors"
OPTION = '--anchors yolov5, yolov7, or numbers such as "10,13,16,30,33,23 30,61,62,45,59,119 116,90,156,198,373,326"'


def read_maps(look: Look) -> HeadFound | None:
    """``yolov5_raw``: see `alignment.guess.head.find_head`.  Anchors that nothing tells are left open."""
    found: dict[int, tuple[str, int, int]] = {}
    for name, value in look.first.items():
        stride = _stride(value.shape, look)
        anchors = value.shape[1] if value.ndim == 5 else _anchors(look)
        depth = value.shape[4] if value.ndim == 5 else value.shape[1] // anchors if value.ndim == 4 else 0
        if stride is None or depth < 6 or (value.ndim == 4 and value.shape[1] % anchors):
            continue
        if stride in found:  # a head of separate maps for boxes, objectness and classes
            return None
        found[stride] = name, anchors, depth
    strides = sorted(found)
    if len(strides) < 2 or len({(anchors, depth) for _, anchors, depth in found.values()}) > 1:
        return None
    logits = [_logits(look, *found[stride]) for stride in strides]
    if not all(low < -1 for low, _ in logits):
        said = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in logits)
        raise look.wrong(f"maps for strides {strides} that are no logits ({said})", "end the graph before its sigmoid")
    _, anchors, depth = found[strides[0]]
    shapes = " and ".join(str(list(look.first[found[stride][0]].shape)) for stride in strides)
    findings = [
        Finding(
            "source.head.layout", "yolov5_raw", "certain", f"maps {shapes}, the least objectness {logits[0][0]:.3g}"
        ),
        Finding("source.head.strides", strides, "certain", "the input's size by those of the maps"),
        _find_anchors(look, strides, anchors),
        Finding("classes", depth - 5, "certain", f"{depth} values an anchor without box and objectness"),
    ]
    return HeadFound(findings, "yolov5")


def _stride(shape: tuple[int, ...], look: Look) -> int | None:
    """By how much a map ``[B, A, H, W, D]`` or ``[B, A * D, H, W]`` is smaller than the input."""
    if len(shape) not in (4, 5):
        return None
    height, width = shape[-3:-1] if len(shape) == 5 else shape[-2:]
    stride = look.size.height // height
    fits = (height * stride, width * stride) == (look.size.height, look.size.width)
    return stride if fits and stride in (4, 8, 16, 32, 64, 128) else None


def _anchors(look: Look) -> int:
    """Anchors a cell where the maps have them folded into their channels."""
    unfolded = {value.shape[1] for value in look.first.values() if value.ndim == 5}
    if len(unfolded) == 1:
        return int(unfolded.pop())
    asked = look.asked.anchors
    return len(asked[0]) // 2 if isinstance(asked, list) else 3


def _logits(look: Look, name: str, anchors: int, depth: int) -> tuple[float, float]:
    """The least and the greatest objectness."""
    value = look.all(name)
    objectness = value[..., 4] if value.ndim == 5 else value.reshape(len(value), anchors, depth, -1)[:, :, 4]
    finite = objectness[np.isfinite(objectness)]
    return float(finite.min()), float(finite.max())


def _find_anchors(look: Look, strides: list[int], anchors: int) -> Finding:
    asked = look.asked.anchors
    if asked is not None:
        return Finding(FIELD, ANCHORS[asked] if isinstance(asked, str) else asked, "certain", "given as --anchors")
    for name, tensor in look.facts.constants().items():
        values = numpy_helper.to_array(tensor)
        if values.size == len(strides) * anchors * 2 and values.dtype.kind == "f" and (values > 0).all():
            sizes = values.reshape(len(strides), -1).astype(float)
            in_strides = sizes.max() < 2 * max(look.size.height, look.size.width) / min(strides) and sizes[0].min() < 4
            pixels = sizes * np.array(strides)[:, None] if in_strides else sizes
            if (np.diff(pixels.mean(1)) > 0).all():
                return Finding(FIELD, _plain(pixels), "certain", f"constant {name} of the graph")
    evidence = "the graph does not decode, so that it need not hold them"
    return Finding(FIELD, None, "open", evidence, OPTION)


def _plain(sizes: np.ndarray) -> list[list[Any]]:
    return [[round(float(v), 3) for v in level] for level in sizes]
