"""The head layout of a bare ONNX file, by the shapes of its outputs and by what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from alignment.errors import AlignError
from alignment.guess.findings import Asked, Finding
from alignment.guess.onnx_facts import OnnxFacts
from alignment.models.onnx_heads import Named, shapes_of
from alignment.variant import InputSize

#: What a graph may end in, for people.
KNOWN = (
    "decoded (boxes [B, N, 4] and scores [B, N, C], two outputs), yolov8 [B, 4 + C, N], yolov5 [B, N, 5 + C], "
    "yolox (the same, undecoded), yolov5_raw (a map of logits for each stride), end2end ([B, K, 6], [n, 7], or count, "
    "boxes, scores and labels)"
)


@dataclass(frozen=True)
class Look:
    """All that is known when the head is guessed.

    Attributes:
        facts: the file.
        size: of its input.
        answers: its outputs on some images, each prepared in several ways, the right one among them.
        asked: what the command line says.
        categories: of the data, None without any.
    """

    facts: OnnxFacts
    size: InputSize
    answers: list[Named]
    asked: Asked
    categories: int | None

    @property
    def first(self) -> Named:
        """One answer, for its shapes."""
        return self.answers[0]

    def all(self, name: str) -> np.ndarray:
        """An output on all images, along the first axis."""
        return np.concatenate([answer[name] for answer in self.answers])

    def wrong(self, what: str, mend: str) -> AlignError:
        """An error that shows the outputs."""
        return AlignError(f"{self.facts.path}: {what}; its outputs are {shapes_of(self.first)}", mend)


@dataclass(frozen=True)
class HeadFound:
    """A head.

    Attributes:
        findings: of ``source.head.*``, ``classes`` and ``boxes``.
        family: whose head it is, as `alignment.guess.preprocess` knows it; empty where that is not to be told.
    """

    findings: list[Finding] = field(default_factory=list)
    family: str = ""

    @property
    def layout(self) -> str:
        """Of the head."""
        return str(next(f.value for f in self.findings if f.field == "source.head.layout"))


Reader = Callable[[Look], HeadFound | None]


def find_head(look: Look) -> HeadFound:
    """Which layout the outputs have.

    Raises:
        AlignError: for outputs that have none of the known ones, or not the one that ``--layout`` names, and for a
            choice that only ``--output`` can make.
    """
    from alignment.guess.dense import read_dense, read_pair
    from alignment.guess.end2end import read_end2end
    from alignment.guess.maps import read_maps

    readers: dict[str, Reader] = {
        "end2end": read_end2end,
        "decoded": read_pair,
        "yolov5": read_dense,
        "yolov8": read_dense,
        "yolox": read_dense,
        "yolov5_raw": read_maps,
    }
    if look.asked.output not in (None, *look.first):
        raise look.wrong(f"no output is named {look.asked.output}", f"give --output {' or '.join(look.first)}")
    asked = look.asked.layout
    for reader in (readers[asked],) if asked else dict.fromkeys(readers.values()):
        found = reader(look)
        if found is not None:
            if look.asked.anchors is not None and found.layout != "yolov5_raw":
                raise look.wrong(f"a head of layout {found.layout} takes no anchors", "leave out --anchors")
            return found
    if asked:
        raise look.wrong(f"not of layout {asked}", f"known are {KNOWN}")
    raise look.wrong("no detector, or one whose head layout is unknown", f"end the graph in one of: {KNOWN}")
