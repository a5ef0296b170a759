"""The post-processing that deployments meet, each as the `Semantics` it has; a test holds each to the real thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignment.nms.semantics import Semantics
from alignment.variant import Nms

#: EfficientNMS_TRT below this score threshold sorts all pairs, and drops none: those under the threshold, and those of
#: the background, only get `FLOOR` as score (efficientNMSInference.cu, `kernelSelectThreshold`).
DENSE_BELOW, FLOOR = 0.007, -32768.0
#: mmcv's batched_nms keeps classes apart by offsets up to so many boxes, and one by one from there on.
SPLIT = 10000


#: EfficientNMSRotated_TRT compares the float32 that is nearest to an IoU computed in float64; where that is rounded in
#: another way, on another machine, the next float32 may come out.
ROTATED_IOU_ROUNDING = 2.0**-23


def mmyolo(nms: Nms, rotated: bool = False) -> Semantics:
    """mmyolo 0.6's ``predict_by_feat`` with mmdet's ``filter_scores_and_topk`` and mmcv 2.0's ``batched_nms``: a score
    must exceed the threshold, `nms_pre` counts (row, class) pairs, boxes are those of the original image, classes are
    kept apart by offsets; clipping comes last.

    Rotated boxes, as mmrotate has them, go when their IoU with a kept one *reaches* the threshold: so it is on the CPU
    (mmcv 2.0.1, nms_rotated.cpp), while on CUDA it has to exceed it (nms_rotated_cuda.cuh).

    YOLOX's ``yolox_style`` lifts max_per_img: give `nms` a `max_per_image` as large as `nms_pre` then.
    """
    return Semantics(
        score_threshold=nms.score_threshold,
        iou_threshold=nms.iou_threshold,
        multi_label=nms.multi_label,
        topk=nms.nms_pre,
        frame="original",
        classes="offset",
        split=SPLIT,
        iou_inclusive=rotated,
        max_output=nms.max_per_image,
    )


def torchvision_nms(score_threshold: float, iou_threshold: float, max_output: int) -> Semantics:
    """torchvision's ``batched_nms`` on the CPU, over the pairs that exceed a score threshold, as its own detectors use
    it: classes are kept apart by offsets up to 1000 boxes, by taking them one by one above; the IoU threshold is a
    double (torchvision/csrc/ops/cpu/nms_kernel.cpp, torchvision/ops/boxes.py; held to 0.14)."""
    return Semantics(
        score_threshold,
        _float32_below(iou_threshold),
        classes="offset_or_apart",
        split=1001,
        max_output=max_output,
    )


def _float32_below(value: float) -> float:
    """The largest float32 that is not above `value`: a float32 exceeds the one just when it exceeds the other."""
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf)))


def onnx_nms(score_threshold: float, iou_threshold: float, max_per_class: int) -> Semantics:
    """ONNX's ``NonMaxSuppression`` (opset 11), as ONNX Runtime does it."""
    return Semantics(score_threshold, iou_threshold, reorder=True, max_per_class=max_per_class)


def inms_layer(
    score_threshold: float, iou_threshold: float, max_per_class: int, candidate_cap: int = 5000
) -> Semantics:
    """TensorRT's INMSLayer, which it makes of ONNX's ``NonMaxSuppression`` from 8.5 on, over boxes as `prepared` makes
    them: ONNX's semantics, of the candidates of highest score only (NvInfer.h, INMSLayer).  That a low threshold lets
    scores pass that are no number, and float16 scores are compared in float32, was seen of 8.6.1.

    Args:
        score_threshold: 0, which a score must exceed, where the node gives none; ONNX then lets every score pass.
        iou_threshold: the largest that is kept; 0 where the node gives none.
        max_per_class: how many boxes of a class; of an image, all that are left.
        candidate_cap: how many (row, class) pairs of an image; 2000 on compute capability 5.3 and 6.2.
    """
    return Semantics(
        score_threshold,
        iou_threshold,
        threshold_float32=True,
        nan_passes=score_threshold < DENSE_BELOW,
        candidate_cap=candidate_cap,
        reorder=True,
        max_per_class=max_per_class,
    )


def efficient_nms(attributes: Mapping[str, Any], candidate_cap: int = 5000) -> Semantics:
    """EfficientNMS_TRT with these attributes, over corners and scores as `prepared` makes them.

    Args:
        attributes: of the node.
        candidate_cap: 4096 up to TensorRT 8.4, 5000 from 8.5 on, 2000 on GPUs of few registers.
    """
    threshold, logits = float(attributes["score_threshold"]), bool(attributes.get("score_activation", 0))
    background = int(attributes.get("background_class", -1))
    dense = threshold < DENSE_BELOW
    if logits:
        threshold = FLOOR if threshold <= 0 else float(_logit(threshold))
    return Semantics(
        score_threshold=threshold,
        iou_threshold=float(attributes["iou_threshold"]),
        score_inclusive=True,
        nan_passes=dense,
        background=background if background >= 0 else None,
        floor=FLOOR if dense else None,
        candidate_cap=candidate_cap,
        classes="together" if attributes.get("class_agnostic", 0) else "apart",
        iou_inclusive=True,
        reorder=True,
        max_output=int(attributes["max_output_boxes"]),
    )


def efficient_nms_rotated(attributes: Mapping[str, Any]) -> Semantics:
    """EfficientNMSRotated_TRT, this project's plugin, with these attributes, over rotated boxes and scores in float32
    (``score_activation``: after their sigmoid): a score must exceed the threshold and an IoU too, ties go by box and
    class, ``pre_nms_topk`` counts (box, class) pairs that passed, and no other cap is there.

    Boxes that are not finite, or whose area is below 1e-14, overlap nothing.

    Args:
        attributes: of the node.
    """
    background, topk = int(attributes.get("background_class", -1)), int(attributes.get("pre_nms_topk", 0))
    return Semantics(
        score_threshold=float(attributes["score_threshold"]),
        iou_threshold=float(attributes["iou_threshold"]),
        threshold_float32=True,
        background=background if background >= 0 else None,
        topk=topk if topk > 0 else None,
        classes="together" if attributes.get("class_agnostic", 0) else "apart",
        iou_rounding=ROTATED_IOU_ROUNDING,
        max_output=int(attributes["max_output_boxes"]),
    )


def prepared(boxes: np.ndarray, box_coding: int) -> np.ndarray:
    """Boxes as EfficientNMS_TRT and INMSLayer compare them, and the former returns them: corners, whatever the coding
    (ONNX: ``center_point_box``), in their own type."""
    if box_coding == 0:
        return boxes
    half = boxes[..., 2:] * boxes.dtype.type(0.5)
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def _logit(score: float) -> np.float32:
    one = np.float32(1)
    return np.log(np.float32(score) / (one - np.float32(score)))
