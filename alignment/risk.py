"""What differences after NMS cost: AP of both sides, and of the subject without one cause."""

from __future__ import annotations

import numpy as np

from alignment.data.samples import Sample
from alignment.deployed import Seen
from alignment.nms.causes import Divergence, Side
from alignment.nms.explain import kept
from alignment.nms.multiclass import Detections


class Risk:
    """The detections of both sides, and of the subject with one cause and all that follows from it undone.

    Attributes:
        sides: ``reference``, ``subject`` or a cause → image id → detections in pixels of the original image.
        counts: how many detections the reference kept and the subject gave.
    """

    def __init__(self) -> None:
        self.counts = [0, 0]
        self.sides: dict[str, dict[int, Detections]] = {"reference": {}, "subject": {}}

    def add(self, sample: Sample, reference: Side, seen: Seen, differing: list[Divergence]) -> None:
        """One image.  A cause that first shows up here leaves the subject's earlier images as they are."""
        image, classes = sample.entry.id, reference.scores.shape[1]
        ours = kept(reference, sample.transform)
        one = _of_pairs(reference, ours)
        self.counts = [self.counts[0] + len(one), self.counts[1] + len(seen.detections)]
        for cause in {d.root for d in differing} - self.sides.keys():
            self.sides[cause] = dict(self.sides["subject"])
        self.sides["reference"][image] = _placed([one], sample, classes)
        self.sides["subject"][image] = _placed([seen.detections], sample, classes)
        for name in self.sides.keys() - {"reference", "subject"}:
            undone = np.array([d.row * classes + d.label for d in differing if d.root == name], np.int64)
            # A detection that comes from no row is a fault.
            stays = ~np.isin(seen.pairs, undone) & ((seen.pairs >= 0) | (name != "unexplained"))
            parts = [_some(seen.detections, stays), _some(one, np.isin(ours, undone))]
            self.sides[name][image] = _placed(parts, sample, classes)


def _of_pairs(side: Side, pairs: np.ndarray) -> Detections:
    rows, labels = np.divmod(pairs, side.scores.shape[1])
    return Detections(side.boxes[rows], side.scores[rows, labels], labels.astype(np.int32), rows.astype(np.int32))


def _some(found: Detections, which: np.ndarray) -> Detections:
    return Detections(found.boxes[which], found.scores[which], found.labels[which], found.rows[which])


def _placed(parts: list[Detections], sample: Sample, classes: int) -> Detections:
    """All of them in the original image, by falling score; those of a class that does not exist are left out."""
    boxes, scores, labels, rows = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels", "rows")
    )
    order = np.argsort(-scores, kind="stable")
    order = order[(labels[order] >= 0) & (labels[order] < classes)]
    placed = sample.transform.clip(sample.transform.to_original(boxes[order]))
    return Detections(placed, scores[order], labels[order], rows[order])
