"""Graphs that end in NMS: one table of detections, or count, boxes, scores and labels."""

from __future__ import annotations

import numpy as np

from alignment.export.plugin_nms import plugin_of
from alignment.guess.findings import Finding
from alignment.guess.head import HeadFound, Look
from alignment.guess.onnx_facts import find_classes_of_nms

#: A graph that keeps more rows than this of an image is likely not to end in NMS.
MOST_KEPT = 2000
LAYOUT = "source.head.layout"


def read_end2end(look: Look) -> HeadFound | None:
    """See `alignment.guess.head.find_head`."""
    return _plugin(look) or _table(look) or _four(look)


def _plugin(look: Look) -> HeadFound | None:
    node = plugin_of(look.facts.model)
    if node is None:
        return None
    evidence = "the graph ends in EfficientNMS_TRT"
    return _found(look, "", evidence, dict(zip(("count", "boxes", "scores", "labels"), node.output, strict=True)))


def _table(look: Look) -> HeadFound | None:
    """``[B, K, 6]`` or ``[n, 7]``."""
    candidates = [look.asked.output] if look.asked.output in look.first else list(look.first)
    for name in candidates:
        answers = [answer[name] for answer in look.answers]
        shape = answers[0].shape
        if len(shape) == 3 and shape[2] == 6 and shape[1] <= MOST_KEPT:
            rows = np.concatenate([answer.reshape(-1, 6) for answer in answers])
            boxes, scores, labels, family = rows[:, :4], rows[:, 4], rows[:, 5], "yolov10"
        elif len(shape) == 2 and shape[1] == 7:
            rows = np.concatenate(answers)
            boxes, scores, labels, family = rows[:, 1:5], rows[:, 6], rows[:, 5], "yolov7"
            if not _whole(rows[:, 0]):
                continue
        else:
            continue
        if _whole(labels[scores > 0]) and _probabilities(scores):
            evidence = f"output {name} {list(shape)} holds boxes, whole labels and scores of 0 to 1"
            _refuse_relative(look, boxes[scores > 0])
            names = {} if len(look.first) == 1 else {"output": name}
            return _found(look, family, evidence, names, labels[scores > 0])
    return None


def _four(look: Look) -> HeadFound | None:
    """Boxes ``[B, K, 4]`` with scores and labels ``[B, K]`` and a count, or ``[B, K, 5]`` with labels."""
    tables = {name: value for name, value in look.first.items() if value.ndim == 3 and value.shape[2] in (4, 5)}
    if len(tables) != 1 or look.asked.output:
        return None
    ((boxes, table),) = tables.items()
    lists = [name for name, value in look.first.items() if value.shape == table.shape[:2]]
    counts = [n for n, v in look.first.items() if n not in lists and v.size == len(table) and v.dtype.kind in "iu"]
    labels = [name for name in lists if look.first[name].dtype.kind in "iu" or _whole(look.all(name).ravel())]
    if len(labels) > 1:  # of scores that are all 0 nothing can be told but that they are floats
        labels = [name for name in labels if look.first[name].dtype.kind in "iu"]
    scores = [name for name in lists if name not in labels and _probabilities(look.all(name))]
    if len(labels) != 1 or (len(scores) != 1 and table.shape[2] == 4):
        return None
    names: dict[str, str | None] = {"count": counts[0] if counts else None, "boxes": boxes, "labels": labels[0]}
    if table.shape[2] == 4:
        names["scores"] = scores[0]
    _refuse_relative(look, look.all(boxes)[..., :4].reshape(-1, 4))
    evidence = f"output {boxes} {list(table.shape)} has whole labels {labels[0]} beside it"
    return _found(look, "", evidence, names, look.all(labels[0]).ravel())


def _found(look: Look, family: str, evidence: str, names: dict, labels: np.ndarray | None = None) -> HeadFound:
    """The findings, of which those at their default are left out."""
    defaults = {"count": "num_dets", "boxes": "boxes", "scores": "scores", "labels": "labels", "output": None}
    findings = [Finding(LAYOUT, "end2end", "certain", evidence)]
    by_shape = "by its shape and type"
    for role, name in names.items():
        if name != defaults[role]:
            say = by_shape if name is not None else "no output counts"
            findings.append(Finding(f"source.head.{role}", name, "certain", say))
    classes = find_classes_of_nms(look.facts, look.asked, look.categories)
    highest = int(labels.max()) if labels is not None and labels.size else -1
    if classes.value is not None and highest >= classes.value:
        raise look.wrong(
            f"a detection has label {highest}, but there are {classes.value} classes ({classes.evidence})",
            "give --classes N, or labels that count from 0 in the graph",
        )
    return HeadFound([*findings, classes], family)


def _refuse_relative(look: Look, boxes: np.ndarray) -> None:
    if boxes.size and float(np.abs(boxes).max()) <= 2:
        raise look.wrong("its boxes are in 0 to 1", "scale boxes to pixels of the network input in the graph")


def _whole(values: np.ndarray) -> bool:
    return bool((values == np.rint(values)).all()) and not bool((values < -1).any())


def _probabilities(values: np.ndarray) -> bool:
    return not values.size or (float(values.min()) >= -1 and float(values.max()) <= 1.001)
