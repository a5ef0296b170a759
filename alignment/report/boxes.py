"""Worst images: their pictures, and the boxes of both sides over them."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignment.results import Box, WorstImage

_SHOWN_WIDTH = 420  # CSS pixels a picture is about wide on the page; sizes the tags of its boxes
_FAR = 1e6  # pixels; SVG has no use for coordinates beyond
_MIME = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}


@dataclass(frozen=True)
class DrawnBox:
    """One box of the overlay, in pixels of the original image; `tag` names boxes the other side lacks.

    `points` are the corners of a rotated one, as SVG has them; the rectangle is then the upright one around it.
    """

    side: Literal["reference", "subject"]
    x: float
    y: float
    width: float
    height: float
    matched: bool
    text: str
    tag: str
    points: str = ""


def drawn(image: WorstImage) -> list[DrawnBox]:
    """Boxes of both sides, those that the other side lacks last and so on top; none that is not finite."""
    boxes: list[DrawnBox] = []
    sides: tuple[tuple[Literal["reference", "subject"], list[Box]], ...] = (
        ("reference", image.reference),
        ("subject", image.subject),
    )
    for side, detections in sides:
        lonely = 0
        for box in detections:
            lonely += not box.matched
            around = [value for corner in box.corners or () for value in corner]
            if not all(map(math.isfinite, (*box.xyxy, *around))):
                continue
            x1, y1, x2, y2 = map(_near, box.xyxy)
            points = " ".join(f"{_near(x)},{_near(y)}" for x, y in box.corners or ())
            tag = "" if box.matched else f"{side[0].upper()}{lonely}"
            text = f"{box.label_name or f'class {box.label}'} {box.score:.3f}"
            rectangle = (min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1))
            boxes.append(DrawnBox(side, *rectangle, box.matched, text, tag, points))
    return sorted(boxes, key=lambda box: not box.matched)


def _near(value: float) -> float:
    return min(max(value, -_FAR), _FAR)


def tag_size(image: WorstImage) -> float:
    """Height of a tag in pixels of the original image."""
    return max(1.0, image.width * 13 / _SHOWN_WIDTH)


class Pictures:
    """The pictures of one page, each embedded once however many cases show it.

    Args:
        folder_of: the RUN folder that a case or explanation of this id comes from.
    """

    def __init__(self, folder_of: Callable[[str], Path]) -> None:
        self._folder_of = folder_of
        self._known: dict[tuple[str, int, int], str] = {}

    def name(self, image: WorstImage, of: str) -> str | None:
        """Element id of the picture, None when there is no JPEG or PNG of that name inside the RUN folder.

        Args:
            image: with the picture.
            of: id of the case or explanation that it belongs to.
        """
        uri = _uri(self._folder_of(of).resolve(), image.picture) if image.picture else None
        if uri is None:
            return None
        return self._known.setdefault((uri, image.width, image.height), f"report-picture-{len(self._known) + 1}")

    def embedded(self) -> list[tuple[str, str, int, int]]:
        """Id, data URI, width and height of all that `name` has given out."""
        return [(name, uri, width, height) for (uri, width, height), name in self._known.items()]


def _uri(folder: Path, picture: str) -> str | None:
    try:
        path = (folder / picture).resolve()
        content = path.read_bytes() if path.is_relative_to(folder) else b""
    except (OSError, ValueError):
        return None
    mime = next((mime for magic, mime in _MIME.items() if content.startswith(magic)), None)
    return f"data:{mime};base64,{base64.b64encode(content).decode()}" if mime else None
