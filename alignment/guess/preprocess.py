"""How a bare ONNX file wants its input: by its family, its papers, and what it detects under each hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from alignment.guess.findings import Asked, Finding, Sure, given
from alignment.guess.jury import Confirmation, Jury, choose
from alignment.guess.maps import ANCHORS
from alignment.guess.onnx_facts import OnnxFacts
from alignment.variant import Preprocess, Variant

#: What becomes of pixels 0..255: mean and std in the order RGB.
RANGES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "0..1": ((0, 0, 0), (255, 255, 255)),
    "0..255": ((0, 0, 0), (1, 1, 1)),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "-1..1": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
}
ORDERS = ("rgb", "bgr")
RESIZES = ("letterbox", "letterbox_top_left", "stretch")
#: Pictures for a first look at all hypotheses, and for those that it leaves.
FIRST, MORE, MOST = 8, 32, 128
_PAPERS = "alignment.preprocess"
#: The worth of one reading on so many pictures.
Worth = Callable[[str, int, Confirmation], np.ndarray]


@dataclass(frozen=True)
class Usual:
    """What the authors' own code of a family does; `name` for people."""

    name: str
    range: str
    channels: str
    resize: str
    interpolation: str = "auto"


_YOLOV5 = ("0..1", "rgb", "letterbox")
FAMILIES: dict[str, Usual] = {
    "yolov5": Usual("YOLOv5 and v7", *_YOLOV5),
    "yolov6": Usual("YOLOv6", *_YOLOV5),
    "yolov7": Usual("YOLOv7", *_YOLOV5),
    "yolov8": Usual("YOLOv8 and later", *_YOLOV5),
    "yolov10": Usual("YOLOv10", *_YOLOV5),
    "ultralytics": Usual("models that Ultralytics exports", *_YOLOV5),
    "yolox": Usual("YOLOX", "0..255", "bgr", "letterbox_top_left", "bilinear"),
}


def hypothesis(kind: str, channels: str, resize: str = "letterbox", interpolation: str = "auto") -> Preprocess:
    """One way to prepare an image; `kind` is one of `RANGES`."""
    mean, std = RANGES[kind]
    if channels == "bgr":
        mean, std = mean[::-1], std[::-1]
    fields = {"resize": resize, "interpolation": interpolation, "channels": channels, "mean": mean, "std": std}
    return Preprocess.model_validate(fields)


def hypotheses(asked: Asked) -> Iterator[tuple[str, str]]:
    """Range and order of all hypotheses that the command line leaves."""
    for kind in (asked.range,) if asked.range else RANGES:
        for order in (asked.channels,) if asked.channels else ORDERS:
            yield kind, order


def usual_of(facts: OnnxFacts, family: str) -> Usual | None:
    """What is usual for a file, None where its family is unknown."""
    exporter = facts.metadata.get("author") == "Ultralytics" or {"names", "stride"} <= set(facts.metadata)
    return FAMILIES["ultralytics"] if exporter else FAMILIES.get(family)


def find_preprocess(facts: OnnxFacts, variant: Variant, jury: Jury, usual: Usual | None, asked: Asked) -> list[Finding]:
    """``preprocess.*``.

    Args:
        facts: the file.
        variant: all else that is known of it; its anchors are taken as they are.
        jury: with the pictures.
        usual: see `usual_of`.
        asked: what the command line says.
    """
    if (papers := _papers(facts, asked)) is not None:
        return papers
    trial = _Trial(variant, jury, usual, asked)
    kind, kind_found = trial.range()
    order, order_found = trial.channels(kind)
    resize, resize_found = trial.resize(kind, order)
    chosen = hypothesis(kind or "0..1", order or "rgb", resize)
    interpolation = usual.interpolation if usual and usual.resize == resize else "auto"
    family = f"as usual for {usual.name}" if usual else "as YOLOv5 has it, not measured"
    return [
        resize_found,
        Finding("preprocess.interpolation", interpolation, "likely", family),
        Finding("preprocess.pad_value", 114, "likely", family),
        order_found,
        *_mean_and_std(chosen, kind_found),
    ]


def _mean_and_std(chosen: Preprocess, found: Finding) -> list[Finding]:
    if found.sure == "open":
        return [found]
    values = {"mean": list(chosen.mean), "std": list(chosen.std)}
    return [Finding(f"preprocess.{name}", value, found.sure, found.evidence) for name, value in values.items()]


class _Trial:
    """One field after the other, each with those before it settled."""

    def __init__(self, variant: Variant, jury: Jury, usual: Usual | None, asked: Asked) -> None:
        self.variant, self.jury, self.usual, self.asked = variant, jury, usual, asked

    def range(self) -> tuple[str | None, Finding]:
        """Of the input, with the better of the two orders of channels for each."""
        field, option = "preprocess.mean and std", " or ".join(f"--range {name}" for name in RANGES)
        if self.asked.range is not None:
            return self.asked.range, given(field, None, "--range")
        orders = (self.asked.channels,) if self.asked.channels else ORDERS

        def worth(name: str, count: int, by: Confirmation) -> np.ndarray:
            found = [self._worth(name, order, None, count, by) for order in orders]
            return max(found, key=lambda values: float(values.mean()))

        return self._settled(field, tuple(RANGES), (FIRST, MORE), worth, "range", option)

    def channels(self, kind: str | None) -> tuple[str | None, Finding]:
        """Their order."""
        field, option = "preprocess.channels", "--channels rgb or --channels bgr"
        if self.asked.channels is not None:
            return self.asked.channels, given(field, self.asked.channels, "--channels")

        def worth(name: str, count: int, by: Confirmation) -> np.ndarray:
            return self._worth(kind, name, None, count, by)

        return self._settled(field, ORDERS, (MORE, 2 * MORE, MOST), worth, "channels", option)

    def resize(self, kind: str | None, order: str | None) -> tuple[str, Finding]:
        """How an image is fitted; never open, as it hardly changes what is found where the padding is."""
        field = "preprocess.resize"
        if self.asked.resize is not None:
            return self.asked.resize, given(field, self.asked.resize, "--resize")

        def worth(name: str, count: int, by: Confirmation) -> np.ndarray:
            return self._worth(kind, order, name, count, by)

        best, found = self._settled(field, RESIZES, (MORE,), worth, "resize", "")
        if best is None:
            best = "letterbox"
            found = replace(found, value=best, sure="likely", evidence=f"{found.evidence}; the commonest")
        return best, found

    def _worth(
        self, kind: str | None, order: str | None, resize: str | None, count: int, by: Confirmation
    ) -> np.ndarray:
        resize = resize or self.asked.resize or (self.usual.resize if self.usual else "letterbox")
        way = hypothesis(kind or "0..1", order or "rgb", resize)
        return self.jury.worth(self.variant.model_copy(update={"preprocess": way}), count, by)

    def _settled(
        self, field: str, names: tuple[str, ...], counts: tuple[int, ...], worth: Worth, trait: str, option: str
    ) -> tuple[str | None, Finding]:
        """Shows more and more pictures for what is left, until it is clear."""
        usual = getattr(self.usual, trait) if self.usual else None
        for count in counts:
            for by in self.jury.confirmations:
                choice = choose({name: worth(name, count, by) for name in names}, usual, by)
                if choice.clear:
                    break
                names = choice.left
            if choice.clear:
                break
        evidence = choice.evidence
        if self.usual:
            evidence += f"; {usual} is usual for {self.usual.name}"
        sure: Sure = "open" if choice.best is None else "certain" if choice.clear else "likely"
        return choice.best, Finding(field, choice.best, sure, evidence, option)


def _papers(facts: OnnxFacts, asked: Asked) -> list[Finding] | None:
    """What `align export` wrote into the file."""
    if _PAPERS not in facts.metadata or any((asked.range, asked.channels, asked.resize)):
        return None
    try:
        found = Preprocess.model_validate_json(facts.metadata[_PAPERS])
    except ValidationError:
        return None
    said = "`align export` wrote it into the file's metadata"
    return [
        Finding(f"preprocess.{name}", value, "certain", said) for name, value in found.model_dump(mode="json").items()
    ]


def find_anchors(variant: Variant, jury: Jury, unsettled: Finding) -> Finding:
    """``source.head.anchors`` of a graph that does not hold them: those of a known model that fit the labels best.

    Without labels, and where none fits clearly better, it stays open.
    """
    if "labels" not in jury.confirmations:
        return unsettled
    # A box of the wrong size overlaps all the same.
    worth = {
        name: jury.worth(with_anchors(variant, sizes), MORE, "labels", iou=0.75) for name, sizes in ANCHORS.items()
    }
    choice = choose(worth, None, "labels")
    if choice.best is None:
        return replace(unsettled, evidence=f"{unsettled.evidence}; {choice.evidence}")
    return Finding(unsettled.field, ANCHORS[choice.best], "likely", f"those of {choice.best}; {choice.evidence}")


def with_anchors(variant: Variant, sizes: Any) -> Variant:
    """The variant with other anchors."""
    fields = variant.model_dump()
    fields["source"]["head"]["anchors"] = sizes
    return Variant.model_validate(fields)
