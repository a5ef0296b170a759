"""What a graph that ends in NMS gave of one image: its detections, held to the rows that they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from alignment.engine.capabilities import Capabilities
from alignment.export.nms_head import ROWS, Kind, NmsHead
from alignment.nms.implementations import FLOOR, efficient_nms, efficient_nms_rotated, onnx_nms
from alignment.nms.multiclass import Detections
from alignment.nms.semantics import Semantics


@dataclass(frozen=True)
class Seen:
    """What was seen of one image.

    Attributes:
        detections: as the graph gave them, boxes in pixels of the network input; `rows` -1 where they are of none.
        pairs: ``[n]``, of each detection the row × C + class that it comes from, -1 where it comes from none.
        faults: pair → how its detection differs from what the graph says of that row before NMS.
    """

    detections: Detections
    pairs: np.ndarray
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def kept(self) -> np.ndarray:
        """The pairs that NMS kept, by falling score."""
        return self.pairs[self.pairs >= 0]


def deployed_semantics(head: NmsHead, version: str | None) -> Semantics:
    """What the NMS of a graph does; `version` is TensorRT's."""
    if head.kind == "onnx_nms":
        found = onnx_nms(head.nms.score_threshold, head.nms.iou_threshold, head.nms.max_per_image)
    elif head.kind == "efficient_nms_rotated":
        found = efficient_nms_rotated(head.attributes)
    else:
        ability = Capabilities.of(version) if version else Capabilities.current()
        found = efficient_nms(head.attributes, ability.nms_candidates)
    return found if head.topk is None else replace(found, topk=head.topk, topk_unit="anchors")


def seen_pairs(named: dict[str, np.ndarray], kind: Kind) -> Seen:
    """What the graph's NMS kept of one image, of the graph's outputs by name."""
    all_boxes, scores = named["boxes"][0], named["scores"][0]
    classes = scores.shape[1]
    if kind != "onnx_nms":
        count = int(named["num_dets"][0, 0])
        boxes, labels, values = (named[name][0][:count] for name in ("det_boxes", "det_labels", "det_scores"))
        pairs = _matched(boxes, labels, values, all_boxes, scores)
    else:
        _, kept, index = named["selected"].T
        rows = named[ROWS][0][index] if ROWS in named else index
        boxes, labels, values = named["detections"][:, 1:5], named["detections"][:, 5], named["detections"][:, 6]
        pairs = np.full(len(values), -1, np.int64)
        shared = min(len(pairs), len(kept))
        pairs[:shared] = (rows * classes + kept)[:shared]
        # By what the rows say: those of the detections may be wrong.
        order = np.argsort(-scores.reshape(-1)[pairs], kind="stable")
        boxes, labels, values, pairs = boxes[order], labels[order], values[order], pairs[order]
    faults = _faults(pairs, boxes, labels, values, all_boxes, scores)
    if kind == "onnx_nms" and len(kept) > len(values):
        for pair in (rows * classes + kept)[len(values) :].tolist():
            faults[pair] = "selected by NMS, and not among the detections"
    rows_of = np.where(pairs < 0, -1, pairs // classes).astype(np.int32)
    return Seen(Detections(boxes, values, labels.astype(np.int32), rows_of), pairs, faults)


def _matched(
    boxes: np.ndarray, labels: np.ndarray, values: np.ndarray, all_boxes: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """The pair that each detection is a copy of: in full or, of those that are left, in two of box, class and score.

    Each pair serves once.  A score of `FLOOR` stands for any.
    """
    rows_of: dict[bytes, list[int]] = {}
    for row, box in enumerate(all_boxes):
        rows_of.setdefault(box.tobytes(), []).append(row)
    found, used = np.full(len(values), -1, np.int64), set[int]()
    for exact in (True, False):
        for index in np.flatnonzero(found < 0).tolist():
            at_box = rows_of.get(boxes[index].tobytes(), [])
            candidates = _copies(at_box, int(labels[index]), values[index], scores, exact)
            pair = next((one for one in candidates if one not in used), -1)
            found[index] = pair
            used.add(pair)
    return found


def _copies(at_box: list[int], label: int, value: np.floating, scores: np.ndarray, exact: bool) -> Iterator[int]:
    """Pairs with this class and score among the rows with the same box; unless `exact`, those that lack one of three"""
    classes = scores.shape[1]
    known = 0 <= label < classes
    if exact:
        yield from (row * classes + label for row in at_box if known and value in (scores[row, label], FLOOR))
        return
    for row in at_box:
        yield from (row * classes + np.flatnonzero(scores[row] == value)).tolist()
    if known:
        yield from (np.flatnonzero(scores[:, label] == value) * classes + label).tolist()
        yield from (row * classes + label for row in at_box)


def _faults(
    pairs: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    values: np.ndarray,
    all_boxes: np.ndarray,
    scores: np.ndarray,
) -> dict[int, str]:
    """Pair → what its detection says otherwise; one that is of no row counts against the row with the nearest box."""
    rows, own = np.divmod(pairs, scores.shape[1])
    right_score = (values == scores[rows, own]) | (values == FLOOR) | (np.isnan(values) & np.isnan(scores[rows, own]))
    right_box = ((boxes == all_boxes[rows]) | (np.isnan(boxes) & np.isnan(all_boxes[rows]))).all(1)
    faults: dict[int, str] = {}
    for index in np.flatnonzero((pairs < 0) | ~right_box | (labels != own) | ~right_score).tolist():
        pair, row = int(pairs[index]), int(rows[index])
        box, label, value = boxes[index].tolist(), int(labels[index]), float(values[index])
        if pair < 0:
            row = int(np.nan_to_num(np.abs(all_boxes - boxes[index]).sum(1), nan=np.inf).argmin())
            pair = row * scores.shape[1] + min(max(label, 0), scores.shape[1] - 1)
            said = [f"class {label} with score {value:.6g} and box {_shown(box)}, as no row is"]
        else:
            said = [] if right_box[index] else [f"box {_shown(box)} for {_shown(all_boxes[row].tolist())}"]
            said += [] if label == own[index] else [f"class {label} for {own[index]}"]
            said += [] if right_score[index] else [f"score {value:.6g} for {float(scores[row, own[index]]):.6g}"]
        faults[pair] = "; ".join(filter(None, (faults.get(pair), f"the graph gives {', '.join(said)}")))
    return faults


def _shown(box: list[float]) -> str:
    return f"[{', '.join(f'{value:.2f}' for value in box)}]"
