"""Tensors that hold no values but those of others: what these are like follows from what those are like.

A Concat's values are those of its inputs, a Split's input has those of its outputs, and a Reshape or Transpose changes
nothing but places.  A histogram of theirs costs as much as any other, and there are many in a detector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from alignment.quantize.graph import attribute
from alignment.quantize.statistics import Statistics

#: Operators that have all values of their first input, image by image.
MOVING = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
Channels = Literal["after", "each", "all"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Joined:
    """A tensor that holds the values of `parts`, each once.

    Attributes:
        parts: names of tensors.
        channels: what becomes of the parts' channels: one after the other, the largest of each, or of all.
    """

    parts: tuple[str, ...]
    channels: Channels

    def ranges(self, seen: Mapping[str, list[tuple[float, float]]]) -> list[tuple[float, float]]:
        """The least and the largest value, image by image."""
        images = zip(*(seen[part] for part in self.parts), strict=True)
        return [(min(low for low, _ in image), max(high for _, high in image)) for image in images]

    def join(self, statistics: Statistics, tensors: Mapping[str, Statistics]) -> None:
        """Makes `statistics` those of the values of all parts, but for the average."""
        parts = [tensors[name] for name in self.parts]
        channels = [part.channels for part in parts if part.channels is not None]
        if self.channels == "after":
            joined = np.concatenate(channels)
        else:
            joined = np.max(channels, axis=0) if self.channels == "each" else np.max(np.concatenate(channels))[None]
        statistics.join(parts, joined)


def shared(model: onnx.ModelProto, names: list[str], shapes: Shapes, batch: int) -> dict[str, Joined]:
    """The tensors whose values are those of others, those that others of them need first.

    Args:
        model: the graph.
        names: of the tensors in question; the first is the image, which is at hand anyway.
        shapes: of those whose shape is known; only these are looked at.
        batch: the first axis of those that hold an image each.
    """
    known = {name for name in names if name in shapes and shapes[name][:1] == (batch,) and len(shapes[name]) > 1}
    found: dict[str, Joined] = {}
    for node in model.graph.node:
        sources = tuple(node.input)
        if node.op_type == "Split":
            whole = node.input[0]
            if whole in found or whole == names[0] or not known.issuperset([whole, *node.output]):
                continue
            name, sources = whole, tuple(node.output)
        else:
            name = node.output[0]
            sources = sources[:1] if node.op_type in MOVING else sources
        if not known.issuperset([name, *sources]):
            continue
        if node.op_type in MOVING:
            kept = _moved(node, shapes[sources[0]], shapes[name])
        else:
            kept = _joined(node, len(shapes[name])) if node.op_type in ("Concat", "Split") else None
        if kept:
            found[name] = Joined(sources, kept)
    return _in_order(found)


def followed(names: Iterable[str], joined: dict[str, Joined]) -> set[str]:
    """These tensors and all that their statistics follow from, by what `shared` gave."""
    found = set(names)
    for name, whole in reversed(joined.items()):
        if name in found:
            found.update(whole.parts)
    return found


def _moved(node: onnx.NodeProto, before: tuple[int, ...], after: tuple[int, ...]) -> Channels | None:
    order = attribute(node, "perm", list(reversed(range(len(before))))) if node.op_type == "Transpose" else None
    if order and order[0] != 0:
        return None
    if len(after) != 4:
        return "all"
    same = before[1] == after[1] and len(before) == 4 and (not order or order[1] == 1)
    return "each" if same else None


def _joined(node: onnx.NodeProto, rank: int) -> Channels | None:
    axis = attribute(node, "axis", 0) % rank
    if axis == 0:
        return None
    if rank != 4:
        return "all"
    return "after" if axis == 1 else "each"


def _in_order(found: dict[str, Joined]) -> dict[str, Joined]:
    ordered: dict[str, Joined] = {}

    def visit(name: str) -> None:
        if name in found and name not in ordered:
            for part in found[name].parts:
                visit(part)
            ordered[name] = found[name]

    for name in found:
        visit(name)
    return ordered
