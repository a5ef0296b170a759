"""The page of post-processings: what each one does, one column an implementation, read off its `Semantics`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from alignment.nms import implementations
from alignment.nms.semantics import Semantics
from alignment.reference.markdown import prose, table
from alignment.variant import Nms

INTRODUCTION = """# Semantics of every NMS

What the post-processings that deployments meet do with the same boxes and scores, read off
`alignment/nms/implementations.py`, which is held to the real ones by tests (`pytest -m nms`). Names in `typewriter` are
parameters of the implementation or attributes of its node. IoUs are compared in float32. Equal scores that an
implementation takes in no certain order are taken as it was seen to take them. What follows from the differences is
told in [Why boxes differ after NMS](../explanation/nms.md).
"""
#: What stands for a parameter, so that it is found again in the semantics: no implementation has these of its own.
_SCORE, _IOU, _TOPK, _OUTPUT, _PER_CLASS, _BACKGROUND = 0.40625, 0.59375, 31337, 4243, 4241, 1009
#: A threshold at which TensorRT's implementations do otherwise.
_LOW, _LOW_WORDS = implementations.DENSE_BELOW / 2, f"threshold below {implementations.DENSE_BELOW:g}"
_PLUGIN = {
    "score_threshold": _SCORE,
    "iou_threshold": _IOU,
    "max_output_boxes": _OUTPUT,
    "background_class": _BACKGROUND,
    "pre_nms_topk": _TOPK,
}


@dataclass(frozen=True)
class Column:
    """One implementation with its parameters left open.

    Attributes:
        title: of the column.
        function: of `implementations`; its docstring stands below the table.
        semantics: at parameters that stand for themselves.
        names: what those parameters are called there.
        switches: what changes it, as it is written, and the semantics then.
    """

    title: str
    function: Callable[..., Semantics]
    semantics: Semantics
    names: dict[Any, str]
    switches: tuple[tuple[str, Semantics], ...] = ()


def columns() -> list[Column]:
    """Every implementation."""
    return [_mmyolo(), _torchvision(), *_onnx(), *_plugins()]


def _mmyolo() -> Column:
    mmyolo, names = implementations.mmyolo, {_TOPK: "nms_pre", _OUTPUT: "max_per_image"}
    nms = Nms(score_threshold=_SCORE, iou_threshold=_IOU, nms_pre=_TOPK, max_per_image=_OUTPUT)
    best = nms.model_copy(update={"multi_label": False})
    switches = ("`multi_label: false`", mmyolo(best)), ("rotated boxes, on the CPU", mmyolo(nms, rotated=True))
    return Column("mmyolo, mmrotate", mmyolo, mmyolo(nms), names, switches)


def _torchvision() -> Column:
    torchvision = implementations.torchvision_nms
    return Column("torchvision", torchvision, torchvision(_SCORE, _IOU, _OUTPUT), {_OUTPUT: "max_output"})


def _onnx() -> list[Column]:
    onnx, inms, names = implementations.onnx_nms, implementations.inms_layer, {_PER_CLASS: "max_per_class"}
    low = (_LOW_WORDS, inms(_LOW, _IOU, _PER_CLASS))
    return [
        Column("ONNX NonMaxSuppression", onnx, onnx(_SCORE, _IOU, _PER_CLASS), names),
        Column("INMSLayer", inms, inms(_SCORE, _IOU, _PER_CLASS), names, (low,)),
    ]


def _plugins() -> list[Column]:
    efficient, rotated = implementations.efficient_nms, implementations.efficient_nms_rotated
    names = {_TOPK: "pre_nms_topk", _OUTPUT: "max_output_boxes", _BACKGROUND: "background_class"}
    low, agnostic = {**_PLUGIN, "score_threshold": _LOW}, {**_PLUGIN, "class_agnostic": 1}
    switches = (_LOW_WORDS, efficient(low)), ("`class_agnostic: 1`", efficient(agnostic))
    together = ("`class_agnostic: 1`", rotated(agnostic))
    return [
        Column("EfficientNMS_TRT", efficient, efficient(_PLUGIN), names, switches),
        Column("EfficientNMSRotated_TRT", rotated, rotated(_PLUGIN), names, (together,)),
    ]


Names = dict[Any, str]
Answer = Callable[[Semantics, Names], str]


@dataclass(frozen=True)
class Row:
    """One question, the fields of `Semantics` that its answer tells, and the answer."""

    question: str
    fields: tuple[str, ...]
    answer: Answer

    def cell(self, column: Column) -> str:
        """The answer, and the other one for each switch that changes it."""
        said = self.answer(column.semantics, column.names)
        others = ((switch, self.answer(semantics, column.names)) for switch, semantics in column.switches)
        return "; ".join([said, *(f"{switch}: {other}" for switch, other in others if other != said)])


def _passes(found: Semantics, _: Names) -> str:
    sign = "≥" if found.score_inclusive else ">"
    return f"score {sign} threshold" + (", in float32" if found.threshold_float32 else "")


def _fails(found: Semantics, _: Names) -> str:
    return "is dropped" if found.floor is None else f"stays a candidate, of score {found.floor:g}"


def _topk(found: Semantics, names: Names) -> str:
    if found.topk is None:
        return "all"
    unit = {"pairs": "(row, class) pairs", "anchors": "rows"}[found.topk_unit]
    return f"the best `{names.get(found.topk, found.topk)}` {unit}"


def _classes(found: Semantics, _: Names) -> str:
    if found.classes in ("apart", "together"):
        return found.classes
    said = "by offsets that round"
    if found.split:
        said = f"up to {found.split - 1} boxes {said}, one by one from there on"
    return said + (", boxes left where they are" if found.classes == "offset_or_apart" else "")


def _suppressed(found: Semantics, _: Names) -> str:
    near = f", or within {found.iou_rounding:.2g} of it" if found.iou_rounding else ""
    return f"IoU {'≥' if found.iou_inclusive else '>'} threshold{near}"


def _named(field: str, none: str) -> Answer:
    def answer(found: Semantics, names: Names) -> str:
        value = getattr(found, field)
        return none if value is None else f"`{names[value]}`" if value in names else f"{value}"

    return answer


def _yes(field: str, yes: str, no: str) -> Answer:
    return lambda found, _: yes if getattr(found, field) else no


ROWS = (
    Row("passes", ("score_threshold", "score_inclusive", "threshold_float32"), _passes),
    Row("a score that is no number", ("nan_passes",), _yes("nan_passes", "passes", "does not pass")),
    Row("what does not pass", ("floor",), _fails),
    Row("classes of one row", ("multi_label",), _yes("multi_label", "each on its own", "the best alone")),
    Row("class that is no detection", ("background",), _named("background", "none")),
    Row("go on to NMS", ("topk", "topk_unit"), _topk),
    Row("at most, whatever is asked for", ("candidate_cap",), _named("candidate_cap", "no cap")),
    Row("equal scores", ("ties",), lambda found, _: f"by row and class, {found.ties}"),
    Row("IoU in pixels of the", ("frame",), lambda found, _: found.frame),
    Row("classes are kept", ("classes", "split"), _classes),
    Row("goes, of two boxes the lower", ("iou_threshold", "iou_inclusive", "iou_rounding"), _suppressed),
    Row("x1 > x2 or y1 > y2", ("reorder",), _yes("reorder", "is mended first", "is left")),
    Row("detections of a class", ("max_per_class",), _named("max_per_class", "any number")),
    Row("detections of an image", ("max_output",), _named("max_output", "any number")),
)


def page() -> str:
    """The page as Markdown."""
    found = columns()
    rows = [[f"**{row.question}**", *(row.cell(column) for column in found)] for row in ROWS]
    text = [INTRODUCTION, table(["", *(column.title for column in found)], rows)]
    for column in found:
        docstring = prose(inspect.cleandoc(column.function.__doc__ or ""))
        text.append(f"## {column.title}\n\n`{column.function.__name__}`: {docstring}\n")
    text.append(f"## Every choice\n\n{prose(inspect.cleandoc(Semantics.__doc__ or ''))}\n")
    return "\n".join(text)


def untold() -> list[str]:
    """The fields of `Semantics` that no row tells."""
    told = {name for row in ROWS for name in row.fields}
    return [field.name for field in fields(Semantics) if field.name not in told]
