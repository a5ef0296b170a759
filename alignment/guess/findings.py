"""Guesses: a field of a variant's YAML, its value, how sure it is, and the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignment.errors import AlignError
from alignment.variant import LARGEST_SIDE

#: ``certain``: read in the file, or measured and clear.  ``likely``: as models of this family are.  ``open``: several
#: values fit equally well, and a wrong one would go unnoticed.
Sure = Literal["certain", "likely", "open"]
LAYOUTS = ("decoded", "yolov5", "yolov8", "yolox", "yolov5_raw", "end2end")


@dataclass(frozen=True)
class Finding:
    """One field.

    Attributes:
        field: its dotted path in the variant's YAML, ``source.head.layout``.
        value: as the YAML has it.
        evidence: one sentence for people.
        option: what settles it on the command line, needed where it is open.
    """

    field: str
    value: Any
    sure: Sure
    evidence: str
    option: str = ""


@dataclass(frozen=True)
class Asked:
    """What the command line settles; None where it is to be guessed.

    Attributes:
        size: (height, width) of the input.
        anchors: ``yolov5``, ``yolov7``, or a list for each stride of width and height in turn.
    """

    size: tuple[int, int] | None = None
    classes: int | None = None
    layout: str | None = None
    output: str | None = None
    anchors: str | list[list[float]] | None = None
    range: str | None = None
    channels: str | None = None
    resize: str | None = None


def given(field: str, value: Any, option: str) -> Finding:
    """What the command line says."""
    return Finding(field, value, "certain", f"given as {option}")


def found_size(path: str | Path, size: Sequence[int], evidence: str, mend: str) -> list[Finding]:
    """``input.height`` and ``input.width`` of a size (height, width).

    Raises AlignError where no variant can have it.
    """
    if any(side % 32 or not 32 <= side <= LARGEST_SIDE for side in size):
        what = f"{path}: an input of {size[0]} x {size[1]}, which are no multiples of 32 from 32 to {LARGEST_SIDE}"
        raise AlignError(what, mend)
    named = zip(("input.height", "input.width"), size, strict=True)
    return [Finding(field, int(side), "certain", evidence) for field, side in named]


def require_settled(path: Path, findings: Iterable[Finding]) -> None:
    """Raises AlignError for findings that are open, all in one line, with the options that settle them."""
    unsettled = [finding for finding in findings if finding.sure == "open"]
    if unsettled:
        what = "; ".join(f"cannot tell {finding.field}: {finding.evidence}" for finding in unsettled)
        raise AlignError(f"{path}: {what}", "give " + ", and ".join(finding.option for finding in unsettled))


def as_fields(findings: Iterable[Finding]) -> dict[str, Any]:
    """The nested mapping that dotted paths stand for."""
    fields: dict[str, Any] = {}
    for finding in findings:
        *parents, last = finding.field.split(".")
        node = fields
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = finding.value
    return fields
