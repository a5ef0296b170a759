"""NMS at the end of a decoded graph: what a deployed engine gives are then detections.

Boxes stay in pixels of the network input, as deployed engines have them; mmyolo's own NMS is on the original image's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from alignment.errors import AlignError
from alignment.nms.implementations import DENSE_BELOW, FLOOR
from alignment.nms.plugins import ROTATED, UPRIGHT, WIDTH
from alignment.storage import writing
from alignment.variant import Nms, Variant

Kind = Literal["efficient_nms", "onnx_nms", "efficient_nms_rotated"]
KINDS: tuple[Kind, ...] = ("efficient_nms", "onnx_nms", "efficient_nms_rotated")
#: The plugin that each kind is, but for ONNX's own.
PLUGIN: dict[Kind, str] = {"efficient_nms": UPRIGHT, "efficient_nms_rotated": ROTATED}
#: Outputs by kind; see `with_nms`.
OUTPUTS: dict[Kind, tuple[str, ...]] = {
    **dict.fromkeys(PLUGIN, ("num_dets", "det_boxes", "det_scores", "det_labels")),
    "onnx_nms": ("detections", "selected"),
}
ROWS = "topk_rows"
#: Largest K of TensorRT's TopK (NvInfer.h), see `Capabilities.topk_limit`.
TOPK_LIMIT = 3840


@dataclass(frozen=True)
class NmsHead:
    """What to put at the end of a graph.

    Attributes:
        kind: ``efficient_nms``: TensorRT's plugin EfficientNMS_TRT.  ``onnx_nms``: ONNX's NonMaxSuppression, whose
            detections have no fixed number.  ``efficient_nms_rotated``: EfficientNMSRotated_TRT, this project's plugin
            for rotated boxes.
        nms: thresholds and the largest number of detections, of each class with ``onnx_nms``.
        topk: only so many rows of the highest best score go on to NMS, 1 or more; None for all.  The plugin for
            rotated boxes takes the best (row, class) pairs by itself, `Nms.nms_pre` of them.
        keep: whether what NMS is given, ``boxes`` and ``scores``, stays an output.
    """

    kind: Kind
    nms: Nms
    topk: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AlignError(f"NMS {self.kind!r} is unknown", f"choose from {', '.join(KINDS)}")
        if self.topk is not None and self.topk < 1:
            raise AlignError(f"TopK of {self.topk} rows before NMS", "give 1 or more, or None for all rows")
        if self.topk is not None and self.kind == "efficient_nms_rotated":
            raise AlignError(f"--topk {self.topk}: {ROTATED} takes the best pairs by itself", "set nms.nms_pre instead")

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of the plugin's node."""
        own = {"pre_nms_topk": self.nms.nms_pre} if self.kind == "efficient_nms_rotated" else {"box_coding": 0}
        return {
            "score_threshold": self.nms.score_threshold,
            "iou_threshold": self.nms.iou_threshold,
            "max_output_boxes": self.nms.max_per_image,
            "background_class": -1,
            "score_activation": 0,
            "class_agnostic": 0,
            "plugin_version": "1",
            **own,
        }


def with_nms(model: onnx.ModelProto, head: NmsHead) -> onnx.ModelProto:
    """A copy of a graph with outputs ``boxes`` ``[B, N, 4]`` and ``scores`` ``[B, N, C]`` that ends in NMS.

    Outputs of plugins: ``num_dets`` ``[B, 1] int32``, ``det_boxes`` ``[B, K, 4]`` (rotated: boxes are 5 wide),
    ``det_scores`` and ``det_labels`` ``[B, K]``.  Of ``onnx_nms``: ``detections`` ``[n, 7]`` (image, x1, y1, x2, y2,
    label, score) and ``selected`` ``[n, 3] int64`` (image, label, row).  With `NmsHead.topk` and `NmsHead.keep` also
    ``topk_rows`` ``[B, K] int64``, the rows that went on.

    Raises:
        AlignError: for a graph without these outputs.
    """
    ended = onnx.ModelProto()
    ended.CopyFrom(model)
    graph = ended.graph
    outputs = {output.name: output for output in graph.output}
    if not {"boxes", "scores"} <= outputs.keys():
        raise AlignError(f"outputs {', '.join(outputs)}: no boxes and scores to run NMS on", "export them decoded")
    boxes, scores = "boxes", "scores"
    del graph.output[:]
    if head.keep:
        graph.output.extend([outputs["boxes"], outputs["scores"]])
    batch = _batch(outputs["boxes"])
    if head.topk is not None:
        boxes, scores = _add_topk(graph, head.topk)
        if head.keep:
            graph.output.append(helper.make_tensor_value_info(ROWS, TensorProto.INT64, [batch, head.topk]))
    add = _add_plugin if head.kind in PLUGIN else _add_onnx_nms
    add(graph, head, boxes, scores, batch)
    return ended


def require_boxes(variant: Variant, kind: Kind | None = None) -> None:
    """Raises AlignError for a variant that has no boxes before an NMS, or whose boxes `kind` does not take."""
    if variant.ends_in_nms:
        raise AlignError(f"{variant.name}: no boxes before NMS", "choose a variant that has them")
    if kind is not None and (kind == "efficient_nms_rotated") != variant.rotated:
        fitting = "efficient_nms_rotated" if variant.rotated else "efficient_nms or onnx_nms"
        raise AlignError(f"{variant.name}: NMS {kind} takes no {variant.boxes} boxes", f"choose {fitting}")


def end_in_nms(path: Path, head: NmsHead, topk: int | None) -> list[str]:
    """Puts NMS at the end of an ONNX file, in place.

    Args:
        path: a file of decoded outputs.
        head: with any `topk`.
        topk: the K that is asked for; it is clipped to what the NMS takes.

    Returns:
        What there is to know about it: boxes that K can cost, labels that mmyolo would not give.
    """
    model = onnx.load(path)
    count, notes = lint(topk, model, head)
    with writing(path) as temporary:
        onnx.save(with_nms(model, replace(head, topk=count)), temporary)
    return notes


def lint(topk: int | None, model: onnx.ModelProto, head: NmsHead) -> tuple[int | None, list[str]]:
    """The K that a graph gets for one that is asked for, None where all rows go on; and what its NMS does otherwise
    than the variant's own.

    Raises:
        AlignError: for a K below 1, or one for a graph that does not fix the number of its rows.
    """
    count, notes = _clipped(topk, model, head.kind)
    if not head.nms.multi_label:
        notes = [*notes, "labels: the variant's NMS takes one a row, the deployed one every label that passes"]
    if head.kind == "efficient_nms" and head.nms.score_threshold < DENSE_BELOW:
        over = f"places left over hold boxes below it, with score {FLOOR:g}"
        notes = [*notes, f"scores: at a threshold under {DENSE_BELOW} {over}"]
    return count, notes


def _clipped(topk: int | None, model: onnx.ModelProto, kind: Kind) -> tuple[int | None, list[str]]:
    if topk is None or kind == "efficient_nms_rotated":
        return topk, []  # `NmsHead` refuses one
    if topk < 1:
        raise AlignError(f"--topk {topk}: no row would go on to NMS", "give 1 or more, or leave it out for all rows")
    (boxes,) = (output for output in model.graph.output if output.name == "boxes")
    rows = boxes.type.tensor_type.shape.dim[1].dim_value
    if rows < 1:
        raise AlignError(
            f"--topk {topk}: the graph does not say how many rows its boxes have, so that K cannot be held to them",
            "export it with a fixed input size",
        )
    count = min(topk, rows, rows if kind == "onnx_nms" else TOPK_LIMIT)
    if count == rows:
        return None, []
    cut = f"of {rows} rows the {rows - count} of lowest best score never reach NMS, with all their classes"
    if count < topk:
        return count, [f"TopK: {topk} asked for, {count} given, the most that TensorRT takes: {cut}"]
    notes = [f"TopK: {cut}"]
    if count > TOPK_LIMIT:
        notes.append(f"TopK: for ONNX Runtime, not for TensorRT, which takes no K above {TOPK_LIMIT}: {count} given")
    return count, notes


def _batch(value: onnx.ValueInfoProto) -> str | int:
    size = value.type.tensor_type.shape.dim[0]
    return size.dim_param or size.dim_value


def _constant(graph: onnx.GraphProto, name: str, value: Any, kind: type) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(value, kind), name))
    return name


def _add_topk(graph: onnx.GraphProto, count: int) -> tuple[str, str]:
    """TopK over the rows by their best score; names of the boxes and scores that go on."""
    k = _constant(graph, "topk_k", [count], np.int64)
    axis = _constant(graph, "topk_axis", [2], np.int64)
    graph.node.extend(
        [
            helper.make_node("ReduceMax", ["scores"], ["topk_best"], "topk_best", axes=[2], keepdims=0),
            helper.make_node("TopK", ["topk_best", k], ["topk_values", ROWS], "topk", axis=1),
            helper.make_node("Unsqueeze", [ROWS, axis], ["topk_index"], "topk_index"),
            helper.make_node("GatherND", ["boxes", "topk_index"], ["topk_boxes"], "topk_boxes", batch_dims=1),
            helper.make_node("GatherND", ["scores", "topk_index"], ["topk_scores"], "topk_scores", batch_dims=1),
        ]
    )
    return "topk_boxes", "topk_scores"


def _add_plugin(graph: onnx.GraphProto, head: NmsHead, boxes: str, scores: str, batch: str | int) -> None:
    names, kept, plugin = OUTPUTS[head.kind], head.nms.max_per_image, PLUGIN[head.kind]
    graph.node.append(helper.make_node(plugin, [boxes, scores], names, "nms", **head.attributes))
    kinds = TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32
    shapes = [batch, 1], [batch, kept, WIDTH[plugin]], [batch, kept], [batch, kept]
    graph.output.extend(map(helper.make_tensor_value_info, names, kinds, shapes))


def _add_onnx_nms(graph: onnx.GraphProto, head: NmsHead, boxes: str, scores: str, batch: str | int) -> None:
    detections, selected = OUTPUTS["onnx_nms"]
    limit = _constant(graph, "nms_limit", [head.nms.max_per_image], np.int64)
    iou = _constant(graph, "nms_iou", [head.nms.iou_threshold], np.float32)
    least = _constant(graph, "nms_score", [head.nms.score_threshold], np.float32)
    images, labels, rows = (_constant(graph, f"nms_column_{i}", [i], np.int64) for i in range(3))
    columns = {"nms_image": images, "nms_label": labels, "nms_row": rows}
    cast = TensorProto.FLOAT
    graph.node.extend(
        [
            helper.make_node("Transpose", [scores], ["nms_scores"], "nms_scores", perm=[0, 2, 1]),
            helper.make_node("NonMaxSuppression", [boxes, "nms_scores", limit, iou, least], [selected], "nms"),
            *(helper.make_node("Gather", [selected, i], [name], name, axis=1) for name, i in columns.items()),
            helper.make_node("Concat", ["nms_image", "nms_row"], ["nms_at_box"], "nms_at_box", axis=1),
            helper.make_node("Concat", ["nms_at_box", "nms_label"], ["nms_at_score"], "nms_at_score", axis=1),
            helper.make_node("GatherND", [boxes, "nms_at_box"], ["nms_boxes"], "nms_boxes"),
            helper.make_node("GatherND", [scores, "nms_at_score"], ["nms_values"], "nms_values"),
            helper.make_node("Unsqueeze", ["nms_values", labels], ["nms_value"], "nms_value"),
            helper.make_node("Cast", ["nms_image"], ["nms_image_f"], "nms_image_f", to=cast),
            helper.make_node("Cast", ["nms_label"], ["nms_label_f"], "nms_label_f", to=cast),
            helper.make_node(
                "Concat", ["nms_image_f", "nms_boxes", "nms_label_f", "nms_value"], [detections], "detections", axis=1
            ),
        ]
    )
    graph.output.append(helper.make_tensor_value_info(detections, TensorProto.FLOAT, ["detections", 7]))
    graph.output.append(helper.make_tensor_value_info(selected, TensorProto.INT64, ["detections", 3]))
