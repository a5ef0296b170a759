"""Boxes and scores that tell one NMS from another, drawn from a seed: what real plugins say about them is recorded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Scene:
    """What an NMS is given.

    Attributes:
        boxes: ``[B, N, 4] float32``; float16 where `half`.
        scores: ``[B, N, C]``, of the same type.
        attributes: of EfficientNMS_TRT, in place of those of `DEFAULTS`.  ONNX's NonMaxSuppression takes four of them:
            ``score_threshold`` (None for a node without), ``iou_threshold``, ``max_output_boxes`` (of each class) and
            ``box_coding``.
    """

    boxes: np.ndarray
    scores: np.ndarray
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """All attributes."""
        return {**DEFAULTS, **self.attributes}


DEFAULTS: dict[str, Any] = {
    "score_threshold": 0.25,
    "iou_threshold": 0.5,
    "max_output_boxes": 100,
    "background_class": -1,
    "score_activation": 0,
    "box_coding": 0,
    "class_agnostic": 0,
    "plugin_version": "1",
}


def digest(scene: Scene) -> str:
    """16 hex digits over a scene."""
    text = json.dumps(scene.settings, sort_keys=True).encode()
    return hashlib.sha256(text + scene.boxes.tobytes() + scene.scores.tobytes()).hexdigest()[:16]


def to_onnx(scene: Scene) -> onnx.ModelProto:
    """A graph of one EfficientNMS_TRT node over inputs ``boxes`` and ``scores``, shapes fixed."""
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT16 if scene.boxes.dtype == np.float16 else TensorProto.FLOAT
    batch, kept = len(scene.boxes), scene.settings["max_output_boxes"]
    inputs = [
        helper.make_tensor_value_info(name, kind, array.shape)
        for name, array in (("boxes", scene.boxes), ("scores", scene.scores))
    ]
    outputs = [
        helper.make_tensor_value_info("num_dets", TensorProto.INT32, [batch, 1]),
        helper.make_tensor_value_info("det_boxes", kind, [batch, kept, 4]),
        helper.make_tensor_value_info("det_scores", kind, [batch, kept]),
        helper.make_tensor_value_info("det_labels", TensorProto.INT32, [batch, kept]),
    ]
    names = [o.name for o in outputs]
    node = helper.make_node("EfficientNMS_TRT", ["boxes", "scores"], names, "nms", **scene.settings)
    graph = helper.make_graph([node], "nms", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def image_of(scene: Scene) -> np.ndarray:
    """Boxes and scores as one image ``[B, 1, N, 4 + C]``, which is what runners take."""
    return np.concatenate([scene.boxes, scene.scores], -1)[:, None]


def to_layer_onnx(scene: Scene) -> onnx.ModelProto:
    """A graph of one NonMaxSuppression over `image_of` the scene: ``selected`` is ``[K, 3]``, image, class and row.

    The batch is a symbol: TensorRT 8.6 makes no execution context of an engine that has no profile and an output whose
    size depends on the data.
    """
    from onnx import TensorProto, helper, numpy_helper

    kind = TensorProto.FLOAT16 if scene.boxes.dtype == np.float16 else TensorProto.FLOAT
    settings, classes = scene.settings, scene.scores.shape[2]
    constants = {
        "sizes": np.array([4, classes]),
        "axis": np.array([1]),
        "limit": np.array([settings["max_output_boxes"]]),
        "iou": np.array([settings["iou_threshold"]], np.float32),
    }
    if settings["score_threshold"] is not None:
        constants["threshold"] = np.array([settings["score_threshold"]], np.float32)
    asked = ["boxes", "scores", *(name for name in constants if name not in ("sizes", "axis"))]
    nodes = [
        helper.make_node("Split", ["image", "sizes"], ["image_boxes", "image_scores"], "split", axis=3),
        helper.make_node("Squeeze", ["image_boxes", "axis"], ["boxes"], "boxes"),
        helper.make_node("Squeeze", ["image_scores", "axis"], ["row_scores"], "row_scores"),
        helper.make_node("Transpose", ["row_scores"], ["scores"], "scores", perm=[0, 2, 1]),
        helper.make_node("NonMaxSuppression", asked, ["selected"], "nms", center_point_box=int(settings["box_coding"])),
    ]
    graph = helper.make_graph(
        nodes,
        "nms",
        [helper.make_tensor_value_info("image", kind, ["batch", *image_of(scene).shape[1:]])],
        [helper.make_tensor_value_info("selected", TensorProto.INT64, ["selected", 3])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def scenes() -> dict[str, Scene]:
    """Scenes of EfficientNMS_TRT by name; each is drawn from a seed of its own, so that adding one at the end leaves
    the others as they are."""
    return {name: draw(np.random.default_rng([7, index])) for index, (name, draw) in enumerate(_DRAW.items())}


def layer_scenes() -> dict[str, Scene]:
    """Scenes of NonMaxSuppression by name, drawn likewise."""
    return {name: draw(np.random.default_rng([8, index])) for index, (name, draw) in enumerate(_DRAW_LAYER.items())}


def torchvision_scenes() -> dict[str, Scene]:
    """Scenes of torchvision's ``batched_nms`` by name, drawn likewise."""
    return {
        name: draw(np.random.default_rng([9, index])) for index, (name, draw) in enumerate(_DRAW_TORCHVISION.items())
    }


def _clusters(rng: np.random.Generator, batch: int, count: int, groups: int = 12, size: float = 40.0) -> np.ndarray:
    """Boxes around a few centres, in a 320 px image, so that many overlap."""
    centres = rng.uniform(40, 280, (batch, groups, 2))
    which = rng.integers(0, groups, (batch, count))
    middle = np.take_along_axis(centres, which[..., None], 1) + rng.normal(0, size / 5, (batch, count, 2))
    half = rng.uniform(size / 4, size, (batch, count, 2))
    return np.concatenate([middle - half, middle + half], -1).astype(np.float32)


def _scattered(rng: np.random.Generator, batch: int, count: int, classes: int, **attributes: Any) -> Scene:
    scores = rng.uniform(0, 1, (batch, count, classes)) ** 2
    return Scene(_clusters(rng, batch, count), scores.astype(np.float32), attributes)


def _half(scene: Scene) -> Scene:
    return Scene(scene.boxes.astype(np.float16), scene.scores.astype(np.float16), scene.attributes)


def _grid(count: int) -> np.ndarray:
    """Boxes that touch no other: unit squares two apart."""
    x, y = np.arange(count) % 128 * 2.0, np.arange(count) // 128 * 2.0
    return np.stack([x, y, x + 1, y + 1], -1)[None].astype(np.float32)


def _tied(rng: np.random.Generator, **attributes: Any) -> Scene:
    corner = rng.integers(0, 12, (2, 80, 2)) * 4.0
    size = rng.integers(1, 4, (2, 80, 2)) * 8.0
    scores = rng.integers(0, 9, (2, 80, 3)) / 8
    return Scene(np.concatenate([corner, corner + size], -1).astype(np.float32), scores.astype(np.float32), attributes)


def _at_score_threshold(_: np.random.Generator) -> Scene:
    scores = np.array(
        [0.25, np.nextafter(np.float32(0.25), np.float32(0)), np.nextafter(np.float32(0.25), np.float32(1)), 0.9]
    )
    return Scene(_grid(4), scores.astype(np.float32).reshape(1, 4, 1))


def _at_iou_threshold(_: np.random.Generator) -> Scene:
    """Pairs whose IoU is exactly 1/2, a bit less and a bit more, far from each other."""
    boxes = []
    for index, width in enumerate((5.0, 4.9999, 5.0001)):
        x = 100.0 * index
        boxes += [[x, 0, x + 10, 10], [x, 0, x + width, 10]]
    scores = np.tile([0.9, 0.8], 3).astype(np.float32)
    return Scene(np.array([boxes], np.float32), scores.reshape(1, 6, 1))


def _degenerate(_: np.random.Generator) -> Scene:
    boxes = [
        [0, 0, 10, 10],
        [5, 5, 5, 5],
        [5, 5, 5, 9],
        [10, 10, 0, 0],
        [0, 10, 10, 0],
        [0, 0, 10, 10],
        [20, 20, 19, 30],
    ]
    scores = np.linspace(0.9, 0.3, len(boxes), dtype=np.float32)
    return Scene(np.array([boxes], np.float32), scores.reshape(1, -1, 1), {"iou_threshold": 0.1})


def _at_three_fifths(_: np.random.Generator) -> Scene:
    """IoU 0.6, which float32 rounds up: in float64 it is above the threshold, in float32 at it."""
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 6, 10]]], np.float32)
    return Scene(boxes, np.array([[[0.9], [0.8]]], np.float32), {"iou_threshold": 0.6})


def _below_zero(rng: np.random.Generator, count: int, classes: int) -> Scene:
    """Boxes that mostly lie below zero, so that offsets by class move them onto each other."""
    corner = rng.uniform(-2000, 20, (1, count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 60, (1, count, 2))], -1).astype(np.float32)
    scores = 0.3 + 0.6 * rng.permutation(count * classes).astype(np.float32) / (count * classes)
    return Scene(boxes, scores.reshape(1, count, classes).astype(np.float32), {"max_output_boxes": 8000})


def _far_away(rng: np.random.Generator) -> Scene:
    """Boxes and classes that make offsets large enough to round the boxes."""
    scene = _scattered(rng, 1, 12, 80)
    return Scene(scene.boxes + np.float32(5000), scene.scores, scene.attributes)


def _not_finite(_: np.random.Generator, **attributes: Any) -> Scene:
    boxes = np.repeat(_grid(8), 2, 0)
    scores = np.full((2, 8, 1), 0.5, np.float32)
    scores[0, [1, 3, 5], 0] = [np.nan, np.inf, -np.inf]
    boxes[1, 2] = np.nan
    boxes[1, 4] = [8, 0, np.inf, 1]
    return Scene(boxes, scores, attributes)


def _many(rng: np.random.Generator, count: int, classes: int, **attributes: Any) -> Scene:
    """Boxes that do not overlap and scores that all differ and pass: what is cut was cut by a cap alone."""
    pairs = count * classes
    scores = 0.3 + 0.6 * rng.permutation(pairs).astype(np.float32) / pairs
    return Scene(_grid(count), scores.reshape(1, count, classes), {"max_output_boxes": 8000, **attributes})


def _few_survivors(_: np.random.Generator, threshold: float, activation: int = 0) -> Scene:
    """Ten boxes of which three pass, and room for more."""
    scores = np.array([0.9, 0.5, threshold, threshold * 0.99, threshold * 0.5, 0, 1e-8, 1e-6, threshold * 0.9, 0.0])
    scores = np.stack([scores, np.zeros(10)], -1).astype(np.float32)
    if activation:
        with np.errstate(divide="ignore"):
            scores = np.log(scores) - np.log1p(-scores)
            scores[np.isinf(scores)] = -20
    return Scene(_grid(10), scores[None], {"score_threshold": threshold, "score_activation": activation})


def _yolo(rng: np.random.Generator, threshold: float) -> Scene:
    """As many rows and classes as a real detector at 640 px, most scores tiny."""
    count, classes = 8400, 80
    scores = np.exp(-rng.exponential(6.0, (1, count, classes))) * (rng.random((1, count, classes)) < 0.05)
    boxes = _clusters(rng, 1, count, 40, 60.0)
    return Scene(
        boxes, scores.astype(np.float32), {"score_threshold": threshold, "iou_threshold": 0.65, "max_output_boxes": 300}
    )


def _logits(rng: np.random.Generator) -> Scene:
    scene = _scattered(rng, 2, 64, 3)
    return Scene(scene.boxes, rng.normal(-1, 2, scene.scores.shape).astype(np.float32), {"score_activation": 1})


def _centres(rng: np.random.Generator, **attributes: Any) -> Scene:
    scene = _scattered(rng, 2, 64, 3)
    low, high = scene.boxes[..., :2], scene.boxes[..., 2:]
    return Scene(np.concatenate([(low + high) / 2, high - low], -1), scene.scores, {"box_coding": 1, **attributes})


def _all_equal(_: np.random.Generator, count: int = 300, kept: int = 1000) -> Scene:
    return Scene(_grid(count), np.full((1, count, 2), 0.5, np.float32), {"max_output_boxes": kept})


def _empty_image(rng: np.random.Generator) -> Scene:
    """The middle one of three images has nothing to keep."""
    scene = _scattered(rng, 3, 32, 2)
    scene.scores[1] *= 0.2
    return scene


def _signed(rng: np.random.Generator, **attributes: Any) -> Scene:
    """Scores below 0 too, as of logits."""
    scores = rng.normal(-1, 2, (2, 64, 3))
    return Scene(_clusters(rng, 2, 64), scores.astype(np.float32), attributes)


def _half_at_score_threshold(_: np.random.Generator) -> Scene:
    """0.001 in float16 is above 0.001 in float32: which of the two types is compared?"""
    score = np.float16(0.001)
    scores = np.array([score, np.nextafter(score, np.float16(0)), np.nextafter(score, np.float16(1)), 0.9])
    return Scene(_grid(4).astype(np.float16), scores.astype(np.float16).reshape(1, 4, 1), {"score_threshold": 0.001})


_DRAW: dict[str, Callable[[np.random.Generator], Scene]] = {
    "scattered": lambda rng: _scattered(rng, 2, 64, 3),
    "scattered agnostic": lambda rng: _scattered(rng, 2, 64, 3, class_agnostic=1),
    "scattered background 0": lambda rng: _scattered(rng, 2, 64, 3, background_class=0),
    "scattered background last": lambda rng: _scattered(rng, 2, 64, 3, background_class=2),
    "scattered few outputs": lambda rng: _scattered(rng, 2, 64, 3, max_output_boxes=5),
    "scattered threshold 0": lambda rng: _scattered(rng, 2, 64, 3, score_threshold=0.0),
    "scattered iou 1": lambda rng: _scattered(rng, 2, 64, 3, iou_threshold=1.0),
    "scattered large": lambda rng: _scattered(rng, 2, 3000, 4, score_threshold=0.05, max_output_boxes=1000),
    "scattered large agnostic": lambda rng: _scattered(rng, 1, 3000, 4, score_threshold=0.05, class_agnostic=1),
    "batch 5": lambda rng: _scattered(rng, 5, 40, 2),
    "one box": lambda rng: _scattered(rng, 1, 1, 1, score_threshold=0.0),
    "nothing passes": lambda rng: _scattered(rng, 2, 32, 2, score_threshold=1.5),
    "tied": lambda rng: _tied(rng),
    "tied agnostic": lambda rng: _tied(rng, class_agnostic=1),
    "tied few outputs": lambda rng: _tied(rng, max_output_boxes=7),
    "all equal": _all_equal,
    "at score threshold": _at_score_threshold,
    "at iou threshold": _at_iou_threshold,
    "degenerate": _degenerate,
    "not finite": lambda rng: _not_finite(rng),
    "not finite low threshold": lambda rng: _not_finite(rng, score_threshold=0.001),
    "candidates 4096": lambda rng: _many(rng, 4096, 1),
    "candidates 4097": lambda rng: _many(rng, 4097, 1),
    "candidates 5000": lambda rng: _many(rng, 2500, 2),
    "candidates 5001": lambda rng: _many(rng, 5001, 1),
    "candidates 9000": lambda rng: _many(rng, 3000, 3),
    "candidates 9000 agnostic": lambda rng: _many(rng, 3000, 3, class_agnostic=1),
    "few survivors 0.25": lambda rng: _few_survivors(rng, 0.25),
    "few survivors 0.007": lambda rng: _few_survivors(rng, 0.007),
    "few survivors 0.0069": lambda rng: _few_survivors(rng, 0.0069),
    "few survivors 0.001": lambda rng: _few_survivors(rng, 0.001),
    "few survivors 0.25 logits": lambda rng: _few_survivors(rng, 0.25, 1),
    "few survivors 0.001 logits": lambda rng: _few_survivors(rng, 0.001, 1),
    "low threshold background 0": lambda rng: _scattered(rng, 1, 40, 3, score_threshold=0.001, background_class=0),
    "yolo 0.25": lambda rng: _yolo(rng, 0.25),
    "yolo 0.01": lambda rng: _yolo(rng, 0.01),
    "yolo 0.001": lambda rng: _yolo(rng, 0.001),
    "logits": _logits,
    "centres": lambda rng: _centres(rng),
    "centres agnostic": lambda rng: _centres(rng, class_agnostic=1),
    "half scattered": lambda rng: _half(_scattered(rng, 2, 64, 3)),
    "half centres": lambda rng: _half(_centres(rng)),
    "half logits": lambda rng: _half(_logits(rng)),
    "half low threshold": lambda rng: _half(_few_survivors(rng, 0.001)),
    "half yolo 0.001": lambda rng: _half(_yolo(rng, 0.001)),
}

# What both have is drawn anew: nothing of one must hang on the order of the other.
_DRAW_LAYER: dict[str, Callable[[np.random.Generator], Scene]] = {
    "scattered": lambda rng: _scattered(rng, 2, 64, 3),
    "scattered one a class": lambda rng: _scattered(rng, 2, 64, 3, max_output_boxes=1),
    "scattered five a class": lambda rng: _scattered(rng, 2, 64, 3, max_output_boxes=5, iou_threshold=0.9),
    "scattered threshold 0": lambda rng: _scattered(rng, 2, 64, 3, score_threshold=0.0),
    "scattered iou 0": lambda rng: _scattered(rng, 2, 64, 3, iou_threshold=0.0),
    "scattered iou 1": lambda rng: _scattered(rng, 2, 64, 3, iou_threshold=1.0),
    "scattered large": lambda rng: _scattered(rng, 2, 3000, 4, score_threshold=0.05, max_output_boxes=1000),
    "batch 5": lambda rng: _scattered(rng, 5, 40, 2),
    "one box": lambda rng: _scattered(rng, 1, 1, 1, score_threshold=0.0),
    "nothing passes": lambda rng: _scattered(rng, 2, 32, 2, score_threshold=1.5),
    "nothing passes in one image": lambda rng: _empty_image(rng),
    "tied": lambda rng: _tied(rng),
    "tied three a class": lambda rng: _tied(rng, max_output_boxes=3),
    "all equal": _all_equal,
    "all equal 6000": lambda rng: _all_equal(rng, 3000, 8000),
    "at score threshold": _at_score_threshold,
    "at iou threshold": _at_iou_threshold,
    "degenerate": _degenerate,
    "not finite": lambda rng: _not_finite(rng),
    "not finite low threshold": lambda rng: _not_finite(rng, score_threshold=0.001),
    "candidates 2001": lambda rng: _many(rng, 2001, 1),
    "candidates 4097": lambda rng: _many(rng, 4097, 1),
    "candidates 5000": lambda rng: _many(rng, 2500, 2),
    "candidates 5001": lambda rng: _many(rng, 5001, 1),
    "candidates 9000": lambda rng: _many(rng, 3000, 3),
    "few survivors 0.25": lambda rng: _few_survivors(rng, 0.25),
    "few survivors 0.007": lambda rng: _few_survivors(rng, 0.007),
    "few survivors 0.0069": lambda rng: _few_survivors(rng, 0.0069),
    "few survivors 0.001": lambda rng: _few_survivors(rng, 0.001),
    "negative scores": lambda rng: _signed(rng, score_threshold=-1.0),
    "negative scores no threshold": lambda rng: _signed(rng, score_threshold=None),
    "yolo 0.25": lambda rng: _yolo(rng, 0.25),
    "yolo 0.001": lambda rng: _yolo(rng, 0.001),
    "centres": lambda rng: _centres(rng),
    "half scattered": lambda rng: _half(_scattered(rng, 2, 64, 3)),
    "half centres": lambda rng: _half(_centres(rng)),
    "half at score threshold": lambda rng: _half_at_score_threshold(rng),
    "half yolo 0.001": lambda rng: _half(_yolo(rng, 0.001)),
}

_DRAW_TORCHVISION: dict[str, Callable[[np.random.Generator], Scene]] = {
    "scattered": lambda rng: _scattered(rng, 1, 64, 3),
    "tied": lambda rng: _tied(rng),
    "at score threshold": _at_score_threshold,
    "at iou threshold": _at_iou_threshold,
    "at iou threshold 0.6": lambda rng: _at_three_fifths(rng),
    "degenerate": _degenerate,
    "below zero": lambda rng: _below_zero(rng, 60, 3),
    "below zero 1000": lambda rng: _below_zero(rng, 500, 2),
    "below zero 1001": lambda rng: _below_zero(rng, 143, 7),
    "far away": lambda rng: _far_away(rng),
    "yolo 0.25": lambda rng: _yolo(rng, 0.25),
}
