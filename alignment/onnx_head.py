"""How the outputs of a bare ONNX file become boxes and scores: `source.head` of a variant's YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[float, Field(gt=0)]


class Strict(BaseModel):
    """Fields that a YAML file may have, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _ScoredHead(Strict):
    """`scores_activation` says what is left to do: ``sigmoid`` where the graph gives logits, objectness included."""

    scores_activation: Literal["none", "sigmoid"] = "none"


class DecodedHead(_ScoredHead):
    """Two outputs: `boxes` [B, N, 4] in pixels of the network input, or [B, N, 5] (cx, cy, w, h, angle) where the
    variant is rotated, and `scores` [B, N, C].

    `transposed`: the scores are [B, C, N]; without it their shape tells.
    """

    layout: Literal["decoded"]
    boxes: str = "boxes"
    scores: str = "scores"
    box_format: Literal["xyxy", "cxcywh"] = "xyxy"
    transposed: bool | None = None


class YoloxHead(_ScoredHead):
    """One undecoded output [B, N, 5 + C] (cx, cy, w, h, objectness, classes): the centre as offset from the cell, the
    size as logarithm, both in units of the stride."""

    layout: Literal["yolox"]
    output: str | None = None
    strides: list[Annotated[int, Field(gt=0)]] = [8, 16, 32]


class YoloHead(_ScoredHead):
    """One output with decoded boxes in pixels of the network input.

    ``yolov5``: [B, N, 5 + C] (box, objectness, classes).  ``yolov8``: [B, 4 + C, N] (box, classes); where the variant
    is rotated [B, 4 + C + 1, N], the angle last.  `transposed`: the rows lie along the last axis, as YOLOv8 has them;
    without it the shape tells.
    """

    layout: Literal["yolov5", "yolov8"]
    output: str | None = None
    box_format: Literal["xyxy", "cxcywh"] = "cxcywh"
    transposed: bool | None = None


class Yolov5RawHead(Strict):
    """A logit map for each stride: [B, A, H, W, 5 + C] or [B, A * (5 + C), H, W].

    `anchors`: a list for each stride, of (width, height) in pixels; the flat lists of Ultralytics' YAML will do.
    """

    layout: Literal["yolov5_raw"]
    strides: list[Annotated[int, Field(gt=0)]] = [8, 16, 32]
    anchors: list[Annotated[list[tuple[Positive, Positive]], Field(min_length=1)]]

    @field_validator("anchors", mode="before")
    @classmethod
    def _pair(cls, anchors: Any) -> Any:
        def pairs(level: Any) -> Any:
            flat = isinstance(level, list) and all(isinstance(size, int | float) for size in level)
            return [level[i : i + 2] for i in range(0, len(level), 2)] if flat else level

        return [pairs(level) for level in anchors] if isinstance(anchors, list) else anchors

    @field_validator("anchors")
    @classmethod
    def _a_list_for_each_stride(cls, anchors: list[Any], info: ValidationInfo) -> list[Any]:
        strides = info.data.get("strides")
        if strides and len(anchors) != len(strides):
            raise ValueError(f"anchors of {len(anchors)} levels, but strides {strides}")
        return anchors


class End2EndHead(Strict):
    """The graph ends in NMS; boxes are x1, y1, x2, y2 in pixels of the network input.  Rotated ones are one wider, cx,
    cy, w, h, angle, and the second form is the only one for them.

    Either one `output`: [B, K, 6] (box, score, label), or [n, 7] (batch index, box, label, score).  Or, as
    EfficientNMS_TRT has them, `count` [B, 1], `boxes` [B, K, 4], `scores` and `labels` [B, K].  A graph that does not
    count has ``count: null``; one whose boxes are [B, K, 5], the score last, needs no `scores`.  Rows beyond the count
    and rows of score 0 are padding.
    """

    layout: Literal["end2end"]
    output: str | None = None
    count: str | None = "num_dets"
    boxes: str = "boxes"
    scores: str = "scores"
    labels: str = "labels"


OnnxHead = DecodedHead | YoloxHead | YoloHead | Yolov5RawHead | End2EndHead


def settled(head: OnnxHead) -> dict[str, Any]:
    """The fields of a head that its fingerprint is of.

    A field counts where it is not at its default: a record outlives a field that is added.  Those of `common` count
    always, with these values where a layout lacks them.
    """
    common = {"boxes": "boxes", "scores": "scores", "box_format": "xyxy", "output": None, "strides": [8, 16, 32]}
    present = head.model_dump(mode="json", include=set(common))
    return {**common, **present, **head.model_dump(mode="json", exclude_defaults=True)}
