"""Which of several readings of a model is right: by what it then detects, on the same pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from alignment.data.coco import CocoDataset, ImageEntry, read_image
from alignment.data.preprocess import preprocess
from alignment.models.outputs import detections_of, to_outputs
from alignment.nms.multiclass import Detections, iou_matrix
from alignment.nms.rotated import rotated_iou_matrix
from alignment.runners.base import Runner
from alignment.variant import Nms, Variant

#: Detections that count.  Far below it every reading finds much that is nothing.
SCORE = 0.25
#: Two readings differ where the mean difference is so many times its standard error.
CLEAR = 3.0
#: A model that is read rightly finds more than this, in scores a picture.
LEAST = 0.25
#: Bytes of pictures that are kept in memory.
HELD = 2**28
Confirmation = Literal["labels", "mirror"]


@dataclass
class Jury:
    """Shows pictures to a model.

    A reading is worth, on a picture, the scores of detections that are confirmed less those that are not: by a label
    of the same class, or by the same detection in the mirrored picture, which needs no labels.  On an input of the
    wrong range a network finds nothing, or things everywhere that its mirror does not have.

    Attributes:
        runner: of the model.
        entries: pictures.
        dataset: with their labels, None where there are none of such a model.
        moved: called after each run of the model.
    """

    runner: Runner
    entries: list[ImageEntry]
    dataset: CocoDataset | None
    moved: Callable[[], None] = lambda: None
    _known: dict[tuple[str, int, bool], Detections] = field(default_factory=dict)
    _pictures: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def confirmations(self) -> tuple[Confirmation, ...]:
        """What there is to confirm detections."""
        return ("labels", "mirror") if self.dataset is not None else ("mirror",)

    def worth(self, variant: Variant, count: int, confirmation: Confirmation, iou: float = 0.5) -> np.ndarray:
        """The worth of a reading on each of the first `count` pictures; a counterpart has that IoU at least."""
        if not variant.ends_in_nms:
            nms = Nms(score_threshold=SCORE, iou_threshold=0.65, multi_label=False)
            variant = variant.model_copy(update={"nms": nms})
        values = []
        for index, entry in enumerate(self.entries[:count]):
            found = self._detect(variant, index, False)
            if confirmation == "labels":
                others = self._labelled(entry)
            else:
                others = _mirrored(self._detect(variant, index, True), self._picture(index).shape[1])
            values.append(net(found, others, iou))
        return np.array(values)

    def _detect(self, variant: Variant, index: int, mirror: bool) -> Detections:
        key = variant.model_dump_json(), index, mirror
        if key not in self._known:
            image = self._picture(index)
            image = np.ascontiguousarray(image[:, ::-1]) if mirror else image
            tensor, transform = preprocess(image, variant.input, variant.preprocess)
            with np.errstate(over="ignore", invalid="ignore"):  # of readings that are wrong
                outputs = to_outputs(self.runner.run(tensor[None]), variant, 1)
                self._known[key] = detections_of(outputs, transform, variant)
            self.moved()
        return self._known[key]

    def _picture(self, index: int) -> np.ndarray:
        """``[H, W, 3] uint8``; read once as a rule, as each is shown in many ways."""
        if (known := self._pictures.get(index)) is not None:
            return known
        image = read_image(self.entries[index].path)
        if sum(one.nbytes for one in self._pictures.values()) + image.nbytes <= HELD:
            self._pictures[index] = image
        return image

    def _labelled(self, entry: ImageEntry) -> Detections:
        assert self.dataset is not None
        truth = [a for a in self.dataset.truth["annotations"] if a["image_id"] == entry.id]
        labels = np.array([self.dataset.category_ids.index(a["category_id"]) for a in truth], np.int32)
        if truth and "rbox" in truth[0]:
            boxes = np.array([a["rbox"] for a in truth], np.float32)
        else:
            boxes = np.array([a["bbox"] for a in truth], np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
        return Detections(boxes, np.ones(len(truth), np.float32), labels, np.arange(len(truth), dtype=np.int32))


def net(found: Detections, others: Detections, iou: float) -> float:
    """Scores of the detections that have a counterpart among the others, less the scores of those that have none.

    One to one, the best scores first; a counterpart has the same label and IoU ≥ `iou`.
    """
    strong = np.flatnonzero(found.scores >= SCORE)
    if not len(strong):
        return 0.0
    overlap = rotated_iou_matrix if found.boxes.shape[1] == 5 else iou_matrix
    free = np.ones(len(others), bool)
    total = 0.0
    near = np.zeros((len(strong), 0))
    if len(others):
        near = overlap(found.boxes[strong], others.boxes) * (found.labels[strong, None] == others.labels[None])
    for row, score in zip(near, found.scores[strong], strict=True):
        best = int(np.argmax(np.where(free, row, -1))) if len(row) else -1
        confirmed = best >= 0 and free[best] and row[best] >= iou
        if confirmed:
            free[best] = False
        total += float(score) if confirmed else -float(score)
    return total


def _mirrored(found: Detections, width: int) -> Detections:
    """Detections of a mirrored picture where they are in the picture itself."""
    boxes = found.boxes.copy()
    if boxes.shape[1] == 5:
        boxes[:, 0], boxes[:, 4] = width - boxes[:, 0], -boxes[:, 4]
    else:
        boxes[:, 0], boxes[:, 2] = width - found.boxes[:, 2], width - found.boxes[:, 0]
    return Detections(boxes, found.scores, found.labels, found.rows)


@dataclass(frozen=True)
class Choice:
    """What pictures say of several readings.

    Attributes:
        best: the one of greatest worth; where that is not clear, the usual one among those as good; None where nothing
            decides.
        clear: whether the pictures alone say so.
        left: those that are as good as the best.
        evidence: for people.
    """

    best: str | None
    clear: bool
    left: tuple[str, ...]
    evidence: str


def choose(worth: dict[str, np.ndarray], usual: str | None, confirmation: Confirmation) -> Choice:
    """Decides between readings, by paired differences over the same pictures.

    Args:
        worth: of each reading, ``[pictures]``.
        usual: what models of this family take, None where no family is known.
        confirmation: how it was measured.
    """
    means = {name: float(values.mean()) for name, values in worth.items()}
    best = max(means, key=lambda name: means[name])
    by = "labels confirm" if confirmation == "labels" else "the mirrored picture confirms"
    order = ", ".join(f"{name} {means[name]:.2f}" for name in sorted(means, key=lambda name: -means[name]))
    said = f"score that {by}, less what it does not, a picture ({len(worth[best])} of them): {order}"
    if means[best] < LEAST:
        return Choice(usual, False, tuple(worth), f"{said}: it finds nothing here")
    left = tuple(name for name in worth if not clearly_better(worth[best], worth[name]))
    if left == (best,):
        return Choice(best, True, left, said)
    near = f"{said}, too near to tell {_named(left)} apart"
    return Choice(usual if usual in left else None, False, left, near)


def clearly_better(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the mean of paired differences is `CLEAR` times its standard error or more."""
    differences = one - other
    if len(differences) < 2 or not differences.any():
        return False
    error = float(differences.std(ddof=1)) / len(differences) ** 0.5
    return float(differences.mean()) >= CLEAR * error


def _named(names: tuple[str, ...]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} and {last}" if others else last
