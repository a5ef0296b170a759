"""Words for the difference of two post-processings: sides, causes, what was undone, and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from alignment.nms.semantics import Semantics

Cause = Literal[
    "topk_limit",
    "topk_tie",
    "topk_unit",
    "candidate_cap",
    "score_threshold",
    "score_threshold_edge",
    "iou_threshold",
    "iou_threshold_edge",
    "iou_comparison",
    "iou_rounding",
    "degenerate_box",
    "class_agnostic",
    "class_offset_rounding",
    "class_offset_overlap",
    "coordinate_frame",
    "multi_label",
    "background",
    "max_output",
    "padding",
    "nms_order_tie",
    "numeric",
    "precision",
    "cascade",
    "unexplained",
]
#: Settings that both sides were given alike; where they differ, one of them is wrong, however well that is explained.
WRONG_SETTINGS: tuple[Cause, ...] = ("score_threshold", "iou_threshold")
#: The parameters in the order in which one side is turned into the other, each with the cause that it stands for.
PATH: tuple[tuple[str, Cause], ...] = (
    ("score_threshold", "score_threshold"),
    ("score_inclusive", "score_threshold_edge"),
    ("threshold_float32", "score_threshold_edge"),
    ("nan_passes", "score_threshold_edge"),
    ("multi_label", "multi_label"),
    ("background", "background"),
    ("topk_unit", "topk_unit"),
    ("topk", "topk_limit"),
    ("candidate_cap", "candidate_cap"),
    ("classes", "class_offset_rounding"),
    ("split", "class_offset_rounding"),
    ("frame", "coordinate_frame"),
    ("reorder", "degenerate_box"),
    ("iou_inclusive", "iou_comparison"),
    ("iou_rounding", "iou_rounding"),
    ("iou_threshold", "iou_threshold"),
    ("max_per_class", "max_output"),
    ("max_output", "max_output"),
    ("floor", "padding"),
    ("ties", "nms_order_tie"),
)
#: What comes after them: the order in which equal scores were seen to be taken, and the boxes and scores themselves.
ORDER, INPUTS = "order", "inputs"
End = Literal["reference", "subject"]
Moved = Literal["numeric", "precision"]


@dataclass(frozen=True)
class Side:
    """One side: how it post-processes, and what.

    Attributes:
        semantics: how.
        boxes: ``[N, 4]`` or ``[N, 5]``, see `run`.
        scores: ``[N, C]``.
        seen: the pairs (row × C + class) that the real implementation kept, in its order, where it was run.
        seen_rows: the rows that its TopK handed on, in its order, where it has one.
        faults: pair → how what the real implementation gave differs from that row.
    """

    semantics: Semantics
    boxes: np.ndarray
    scores: np.ndarray
    seen: np.ndarray | None = None
    seen_rows: np.ndarray | None = None
    faults: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """How far inputs may have moved for that to be an explanation: `boxes` in pixels of the input, `scores`, and of
    rotated boxes `angles` in radians."""

    boxes: float
    scores: float
    angles: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of one pair on one side, in words: `kept`, and `why` not."""

    kept: bool
    why: str


@dataclass(frozen=True)
class Proof:
    """What one side took over from the other, after which both say the same of a pair.

    Attributes:
        side: that was changed.
        fields: of its semantics.
        order: whether equal scores were taken in the other side's order.
        scores: pairs whose score it took over.
        boxes: rows whose box it took over.
    """

    side: End
    fields: tuple[str, ...] = ()
    order: bool = False
    scores: tuple[int, ...] = ()
    boxes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Divergence:
    """A (row, class) pair that only one side keeps, or that both keep with another box or score.

    Attributes:
        row, label: the pair.
        score: on the side that keeps it.
        reference, subject: what became of it.
        cause: see `Cause`; ``unexplained`` where no replay proves one.
        replay: in words, what was undone, after which both sides say the same of this pair.
        root: of a ``cascade``, the cause at its root; else `cause`.
        follows: of a ``cascade``, the pair that it follows from.
        proof: what was undone; None where it is unexplained.
    """

    row: int
    label: int
    score: float
    reference: Outcome
    subject: Outcome
    cause: Cause
    replay: str
    root: Cause
    follows: tuple[int, int] | None = None
    proof: Proof | None = None
