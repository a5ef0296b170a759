"""The report as one HTML file that needs nothing else: no network, no server, no second file."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

from alignment.report.ladder import figures, plot_uri
from alignment.results import Alignment, Box, CaseResult, WorstImage

TEMPLATES = Path(__file__).parent / "templates"
STATUSES = ("fail", "pass", "skip")
ABSENT = "-"
_SHOWN_WIDTH = 420  # CSS pixels a picture is about wide on the page; sizes the tags of its boxes
_FAR = 1e6  # pixels; SVG has no use for coordinates beyond
_MIME = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}


def render(alignment: Alignment, folder: Path) -> str:
    """The whole page.

    All text from the results is escaped, and a content security policy lets only the page's own script and style run.

    Args:
        alignment: the results, shown with failing cases first.
        folder: the RUN folder, where the pictures are; one that is missing is named in its place.
    """
    cases = sorted(alignment.cases, key=lambda case: STATUSES.index(case.status))
    verdict, summary = headline(alignment)
    template = environment().get_template("report.html.j2")
    page = template.render(run=alignment, cases=cases, verdict=verdict, summary=summary, pictures=_Pictures(folder))
    return page.lstrip()


def headline(alignment: Alignment) -> tuple[str, str]:
    """The verdict in two words and in one line; a run in which no case ran is not called aligned."""
    counts = Counter(case.status for case in alignment.cases)
    total = len(alignment.cases)
    if counts["fail"]:
        return "Not aligned", f"{counts['fail']} of {_plural(total, 'case')} {_verb(counts['fail'], 'fail')}"
    if alignment.explanations:
        unexplained = sum(one.unexplained for one in alignment.explanations)
        differing = sum(one.differing for one in alignment.explanations)
        wrong = sum(one.wrong_settings for one in alignment.explanations)
        found = f"{unexplained} of {_plural(differing, 'difference')} after NMS unexplained"
        if wrong:
            found += f", {wrong} by a wrong setting"
        if unexplained or wrong or not total:
            return ("Not explained" if unexplained else "Wrong setting" if wrong else "Explained"), found
    if alignment.ladders and not total:
        rungs = sum(len(ladder.rungs) for ladder in alignment.ladders)
        return "Measured", f"{_plural(rungs, 'rung')} from float to int8"
    if counts["pass"]:
        return "Aligned", f"{counts['pass']} of {_plural(total, 'case')} {_verb(counts['pass'], 'pass')}"
    return "Nothing checked", "every case was skipped" if total else "the run holds no case"


def number(value: float | None) -> str:
    """Three significant digits, as ``0.0123``, ``12.3`` or ``2.1e-05``."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def precise(value: float | None) -> str:
    """Four significant digits without trailing zeros, for numbers that stand beside their limit."""
    return ABSENT if value is None else f"{value:.4g}"


def cosine(value: float | None) -> str:
    """Six decimals, or the distance from 1 where they would hide it."""
    if value is None:
        return ABSENT
    if 0 < 1 - value < 5e-7:
        return f"1 - {1 - value:.1e}"
    return f"{value:.6f}"


def decibel(value: float | None) -> str:
    """One decimal."""
    return ABSENT if value is None else f"{value:.1f}"


def score(value: float | None) -> str:
    """An AP, four decimals; one below 0 is that of images without truth."""
    return ABSENT if value is None or value < 0 else f"{value:.4f}"


def scores_line(case: CaseResult) -> str:
    """AP of both sides, ``0.3712 → 0.3698``; of the subject alone where there is no reference."""
    if case.scores is None:
        return ABSENT
    both = (case.scores.reference_ap, case.scores.subject_ap)
    return " → ".join(score(ap) for ap in both if ap is not None)


def change(case: CaseResult) -> float | None:
    """Subject AP less reference AP."""
    if case.scores is None or case.scores.reference_ap is None or case.scores.reference_ap < 0:
        return None
    return case.scores.subject_ap - case.scores.reference_ap


def signed(value: float | None) -> str:
    """A difference of AP, always with its sign."""
    if value is None:
        return ABSENT
    return "0" if value == 0 else f"{value:+.1e}" if abs(value) < 1e-4 else f"{value:+.4f}"


def milliseconds(case: CaseResult) -> float | None:
    """Time of one image in the backend alone."""
    return 1000 * case.timing.inference_s / case.timing.images if case.timing and case.timing.images else None


def checked(case: CaseResult, name: Literal["boxes", "scores"]) -> float | None:
    """The largest difference of decoded boxes (pixels) or scores, as the check of that name has it."""
    return next((check.value for stage in case.stages for check in stage.checks if check.name == name), None)


def key(value: float | None) -> str:
    """What the table sorts a number by; empty sorts last."""
    return "" if value is None or math.isnan(value) else repr(float(value))


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


class _Pictures:
    """The pictures of one page, each embedded once however many cases show it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._known: dict[tuple[str, int, int], str] = {}

    def name(self, image: WorstImage) -> str | None:
        """Element id of the picture, None when there is no JPEG or PNG of that name inside the RUN folder."""
        uri = self._uri(image.picture) if image.picture else None
        if uri is None:
            return None
        return self._known.setdefault((uri, image.width, image.height), f"report-picture-{len(self._known) + 1}")

    def embedded(self) -> list[tuple[str, str, int, int]]:
        """Id, data URI, width and height of all that `name` has given out."""
        return [(name, uri, width, height) for (uri, width, height), name in self._known.items()]

    def _uri(self, picture: str) -> str | None:
        try:
            path = (self._folder / picture).resolve()
            content = path.read_bytes() if path.is_relative_to(self._folder) else b""
        except (OSError, ValueError):
            return None
        mime = next((mime for magic, mime in _MIME.items() if content.startswith(magic)), None)
        return f"data:{mime};base64,{base64.b64encode(content).decode()}" if mime else None


def environment() -> jinja2.Environment:
    """Templates whose output is escaped, and the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        number,
        precise,
        cosine,
        decibel,
        score,
        scores_line,
        change,
        signed,
        milliseconds,
        checked,
        key,
        drawn,
        tag_size,
        figures,
        plot_uri,
    )
    environment.filters.update({function.__name__: function for function in filters})
    environment.filters.update(policy_hash=_policy_hash, plural=_plural)
    return environment


def _policy_hash(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {_add_s(noun)}"


def _verb(count: int, verb: str) -> str:
    """Third person: one case fails, two cases fail; one passes, two pass."""
    return _add_s(verb) if count == 1 else verb


def _add_s(word: str) -> str:
    return word + ("es" if word.endswith(("s", "x")) else "s")
