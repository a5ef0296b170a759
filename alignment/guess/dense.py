"""Graphs that give a row for each prior: in one output, or boxes and scores in two."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from alignment.guess.columns import BoxCoding, Grid, activation, box_coding, grid_of, is_angle, objectness
from alignment.guess.findings import Finding, Sure, given
from alignment.guess.head import HeadFound, Look

LAYOUT, FORMAT, ACTIVATION = "source.head.layout", "source.head.box_format", "source.head.scores_activation"
#: A detector has more rows than this.
FEWEST_ROWS = 20
RELATIVE = "scale boxes to pixels of the network input in the graph"


class _Dense(NamedTuple):
    """One output that may hold everything: ``[B, N, width]``, or transposed in the file, on all images."""

    name: str
    shape: tuple[int, ...]
    rows: np.ndarray
    turned: bool
    grid: Grid | None
    coding: BoxCoding


def read_dense(look: Look) -> HeadFound | None:
    """``yolov8``, ``yolov5`` and ``yolox``: see `alignment.guess.head.find_head`."""
    candidates = [dense for name in look.first if (dense := _dense(look, name)) and _fits(dense)]
    if look.asked.output is not None:
        candidates = [dense for dense in candidates if dense.name == look.asked.output]
    if len(candidates) > 1:
        names = " or ".join(f"--output {dense.name}" for dense in candidates)
        raise look.wrong("several outputs may be the detector's", f"give {names}")
    if not candidates:
        return None
    dense = candidates[0]
    if dense.coding.unit == "relative":
        raise look.wrong(f"the boxes of output {dense.name} are in 0 to 1", RELATIVE)
    return _described(look, dense)


def _dense(look: Look, name: str) -> _Dense | None:
    shape = look.first[name].shape
    if len(shape) != 3 or shape[1] == shape[2]:
        return None
    turned = shape[2] > shape[1]
    count, width = (shape[2], shape[1]) if turned else (shape[1], shape[2])
    if width < 5 or count < FEWEST_ROWS:
        return None
    rows = look.all(name)
    rows = rows.transpose(0, 2, 1) if turned else rows
    grid = grid_of(count, look.size)
    return _Dense(name, shape, rows, turned, grid, box_coding(rows[..., :4], grid, look.size))


def _fits(dense: _Dense) -> bool:
    return bool(dense.coding.unit) and bool(_scores(dense)[0])


def _scores(dense: _Dense) -> tuple[str, str, bool]:
    """Activation of the columns after the box, evidence, and whether the last one is an angle."""
    flat = dense.rows.reshape(-1, dense.rows.shape[2])[:, 4:]
    kind, evidence = activation(flat)
    if kind != "none" and flat.shape[1] > 1 and is_angle(flat[:, -1]):
        without, said = activation(flat[:, :-1])
        if without == "none":
            return (
                without,
                f"{said}; the last column, {flat[:, -1].min():.3g} to {flat[:, -1].max():.3g}, is none",
                True,
            )
    return kind, evidence, False


def _described(look: Look, dense: _Dense) -> HeadFound:
    kind, said, rotated = _scores(dense)
    shown = f"output {dense.name} {list(dense.shape)}"
    if dense.coding.unit == "offsets":
        has_objectness = Finding(LAYOUT, "yolox", "certain", f"{shown}; {dense.coding.evidence}")
    elif rotated:
        has_objectness = Finding(LAYOUT, "yolov8", "certain", f"{shown}; its last column is an angle in radians")
    else:
        has_objectness = _layout(look, dense, kind == "sigmoid", shown)
    layout = str(has_objectness.value)
    if look.asked.layout is not None and layout != look.asked.layout:
        raise look.wrong(
            f"not of layout {look.asked.layout}: {has_objectness.evidence}", f"leave out --layout: {layout}"
        )
    findings = [has_objectness, Finding(ACTIVATION, kind, "certain", said)]
    if len(look.first) > 1:
        findings.append(Finding("source.head.output", dense.name, "certain", "the only output of such a shape"))
    if layout == "yolox":
        assert dense.grid is not None
        strides = f"{dense.rows.shape[1]} rows are the cells of these"
        findings.append(Finding("source.head.strides", list(dense.grid.strides), "certain", strides))
    else:
        findings.append(Finding(FORMAT, dense.coding.format, dense.coding.sure, dense.coding.evidence))
    if rotated:
        findings.append(Finding("boxes", "rotated", "certain", "an angle in the last column"))
    before = (4 if layout == "yolov8" else 5) + rotated
    count = dense.rows.shape[2] - before
    told = look.asked.classes or len(look.facts.class_names or [])
    # An objectness too many is a class too few.
    sure: Sure = "certain" if count == told or has_objectness.sure == "certain" else "likely"
    classes = Finding("classes", count, sure, f"{shown} without {before} other columns")
    if look.asked.classes not in (None, classes.value):
        raise look.wrong(f"{classes.value} classes, not {look.asked.classes}", "leave out --classes")
    return HeadFound([*findings, classes], _family(layout, dense))


def _family(layout: str, dense: _Dense) -> str:
    if layout != "yolov5" or (dense.grid is not None and dense.grid.anchors > 1):
        return layout
    first = dense.rows[..., 4]
    # Without anchors there are several, which want their input in different ways; YOLOv6 alone has this one at 1.
    return "yolov6" if bool((first > 0.999).all()) else ""


def _layout(look: Look, dense: _Dense, logits: bool, shown: str) -> Finding:
    """``yolov5`` or ``yolov8``: whether an objectness stands before the classes."""
    if look.asked.layout in ("yolov5", "yolov8"):
        return given(LAYOUT, look.asked.layout, "--layout")
    votes = _votes(look, dense, logits)
    said = "; ".join(evidence for _, evidence in votes)
    sides = {has for has, _ in votes}
    if len(sides) == 1:
        layout = "yolov5" if sides.pop() else "yolov8"
        return Finding(LAYOUT, layout, "certain" if len(votes) > 1 else "likely", f"{shown}; {said}")
    width = dense.rows.shape[2]
    open_ = f"{shown} is {width - 4} classes (yolov8) or objectness and {width - 5} (yolov5), {said or 'nothing tells'}"
    return Finding(LAYOUT, None, "open", open_, "--layout yolov8 or --layout yolov5")


def _votes(look: Look, dense: _Dense, logits: bool) -> list[tuple[bool, str]]:
    """Who says whether there is an objectness, and why."""
    width, votes = dense.rows.shape[2], []
    if width == 5:
        return [(False, "one column is no objectness and class")]
    counts = (
        (look.asked.classes, "given as --classes"),
        (len(look.facts.class_names or []) or None, "the graph's metadata name so many classes"),
        (look.categories, "the data have so many categories"),
    )
    for count, origin in counts:
        if count in (width - 5, width - 4):
            votes.append((count == width - 5, f"{count}: {origin}"))
            if count != look.categories:
                return votes
    for parts in look.facts.concatenated(width):
        after = int(np.searchsorted(np.cumsum(parts), 4)) + 1
        # YOLOv5 and v7 put together xy, wh, and objectness with classes in one: of 2 + 2 + 85 nothing can be told.
        if sum(parts[:after]) == 4 and (parts[after] == 1 or parts == [4, width - 4]):
            votes.append((parts[after] == 1, f"a Concat puts {' + '.join(map(str, parts))} columns together"))
            break
    if dense.grid is not None and dense.grid.anchors > 1:
        votes.append((True, f"{dense.grid.anchors} rows a cell, as anchors with objectness have"))
    has, said = objectness([image[:, 4:] for image in dense.rows], logits)
    return votes if has is None else [*votes, (has, said)]


def read_pair(look: Look) -> HeadFound | None:
    """``decoded``: boxes and scores in two outputs."""
    arrays = {name: value for name, value in look.first.items() if value.ndim == 3}
    pairs = []
    for boxes, table in arrays.items():
        if table.shape[2] not in (4, 5) or table.shape[1] < FEWEST_ROWS:
            continue
        for scores, other in arrays.items():
            if scores == boxes or table.shape[1] not in other.shape[1:]:
                continue
            turned = other.shape[1] != table.shape[1]
            kind, said = activation(_by_row(look.all(scores), turned))
            coding = box_coding(look.all(boxes)[..., :4], grid_of(table.shape[1], look.size), look.size)
            if kind and coding.unit in ("pixels", "relative") and not _is_scores(look.all(boxes)):
                pairs.append((boxes, scores, turned, kind, said, coding))
    if not pairs:
        return None
    if len(pairs) > 1:
        raise look.wrong("several of its outputs may be boxes and scores", "leave one of each in the graph")
    boxes, scores, turned, kind, said, coding = pairs[0]
    if coding.unit == "relative":
        raise look.wrong(f"the boxes of output {boxes} are in 0 to 1", RELATIVE)
    table, other = look.first[boxes], look.first[scores]
    rotated = table.shape[2] == 5
    if rotated and not is_angle(look.all(boxes)[..., 4]):
        return None
    shown = f"outputs {boxes} {list(table.shape)} and {scores} {list(other.shape)}"
    findings = [Finding(LAYOUT, "decoded", "certain", shown)]
    findings += [
        Finding(f"source.head.{role}", name, "certain", "by shape and values")
        for role, name in (("boxes", boxes), ("scores", scores))
        if name != role
    ]
    if not rotated:
        findings.append(Finding(FORMAT, coding.format, coding.sure, coding.evidence))
    findings.append(Finding(ACTIVATION, kind, "certain", said))
    if rotated:
        findings.append(Finding("boxes", "rotated", "certain", f"{boxes} has a fifth column, an angle in radians"))
    count = other.shape[1] if turned else other.shape[2]
    classes = Finding("classes", count, "certain", f"{scores} is {list(other.shape)}")
    if look.asked.classes not in (None, count):
        raise look.wrong(f"{count} classes, not {look.asked.classes}", "leave out --classes")
    return HeadFound([*findings, classes])


def _by_row(scores: np.ndarray, turned: bool) -> np.ndarray:
    rows = scores.transpose(0, 2, 1) if turned else scores
    return rows.reshape(-1, rows.shape[2])


def _is_scores(values: np.ndarray) -> bool:
    return activation(values.reshape(-1, values.shape[2]))[0] == "none"
