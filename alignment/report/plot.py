"""Charts as SVG that stands in the page: its colours are the page's, light and dark, and its text is text.

A chart has a mark with a tooltip for each value; what it shows is in a table beside it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

from markupsafe import Markup

WIDTH = 480
MARGIN = 14
LABELS = 176  # width of the labels on the left of a dot plot
ROW = 21  # height of a row of a dot plot
APART = 4  # by so much the series of a dot plot are moved against each other
HEIGHT = 250  # of the plane of a scatter plot
LEFT = 48  # of a scatter plot, for the ticks of y
_FAR = 1e100  # of numbers, beyond which none is drawn
CHARACTER = 7.2  # pixels of a character of the labels, about, where they are largest
#: Marks by name, of about the same area, around 0, 0.
MARKS = {
    "circle": '<circle r="4.2"/>',
    "square": '<rect x="-3.8" y="-3.8" width="7.6" height="7.6"/>',
    "triangle": '<path d="M0 -5L4.8 3.8H-4.8Z"/>',
    "diamond": '<path d="M0 -5.4L5.4 0L0 5.4L-5.4 0Z"/>',
    "dot": '<circle r="2.2"/>',
    "star": '<path d="M0 -8L2.1 -2.6L7.6 -2.5L3.3 1L4.7 6.5L0 3.4L-4.7 6.5L-3.3 1L-7.6 -2.5L-2.1 -2.6Z"/>',
}


@dataclass(frozen=True)
class Mark:
    """One value: where, what its tooltip says, and a letter beside it."""

    x: float
    y: float
    text: str
    letter: str = ""


@dataclass(frozen=True)
class Series:
    """Marks that look alike.

    Attributes:
        name: in the legend; empty for none.
        style: CSS class that gives the colour.
        mark: one of `MARKS`.
        values: in the order of the line, where there is one.
        line: whether they are joined.
    """

    name: str
    style: str
    mark: str
    values: Sequence[Mark] = field(default_factory=list)
    line: bool = False


def dots(title: str, rows: Sequence[str], series: Sequence[Series]) -> Markup:
    """A dot plot: a labelled row for each step, a mark for each series at its value; `Mark.y` is the row's place."""
    series = list(map(_finite, series))
    values = [mark.x for one in series for mark in one.values]
    across = _Scale(values, LABELS, WIDTH - MARGIN)
    top, bottom = 24, 24 + ROW * len(rows)
    parts = [_text(LABELS, 13, title, "title")]
    for place, name in enumerate(rows):
        middle = top + ROW * (place + 0.5)
        parts.append(_line(LABELS, middle, WIDTH - MARGIN, middle, "row"))
        parts.append(_text(LABELS - 8, middle + 4, _cut(name), "label end", name))
    for tick in across.ticks:
        parts.append(_line(across(tick), top, across(tick), bottom, "grid"))
        parts.append(_text(across(tick), bottom + 14, across.name(tick), "middle"))
    for place, one in enumerate(series):
        aside = APART * (place - (len(series) - 1) / 2)  # equal values are both seen
        at = [(across(mark.x), top + ROW * (mark.y + 0.5) + aside, mark) for mark in one.values]
        parts.append(_series(one, at))
    return _svg(title, bottom + 22, parts)


def scatter(title: str, x: str, y: str, series: Sequence[Series]) -> Markup:
    """A scatter plot with named axes."""
    series = list(map(_finite, series))
    values = [mark for one in series for mark in one.values]
    across = _Scale([mark.x for mark in values], LEFT, WIDTH - MARGIN)
    up = _Scale([mark.y for mark in values], 24 + HEIGHT, 24)
    parts = [_text(LEFT, 13, y, "title")]
    for tick in across.ticks:
        parts.append(_line(across(tick), 24, across(tick), 24 + HEIGHT, "grid"))
        parts.append(_text(across(tick), 24 + HEIGHT + 14, across.name(tick), "middle"))
    for tick in up.ticks:
        parts.append(_line(LEFT, up(tick), WIDTH - MARGIN, up(tick), "grid"))
        parts.append(_text(LEFT - 6, up(tick) + 4, up.name(tick), "end"))
    for one in series:
        parts.append(_series(one, [(across(mark.x), up(mark.y), mark) for mark in one.values]))
    parts.append(_text(WIDTH - MARGIN, 24 + HEIGHT + 30, x, "end title"))
    return _svg(title, 24 + HEIGHT + 38, parts)


def key(series: Sequence[Series]) -> Markup:
    """The legend of charts with these series."""
    shown = (one for one in series if one.name and one.values)
    parts = (
        f'<span><svg class="chart-key" viewBox="-9 -9 18 18" aria-hidden="true"><g class="{escape(one.style)}">'
        f"{MARKS[one.mark]}</g></svg>{escape(one.name)}</span>"
        for one in shown
    )
    return Markup(f'<p class="legend">{"".join(parts)}</p>')


def _finite(one: Series) -> Series:
    return replace(one, values=[mark for mark in one.values if abs(mark.x) <= _FAR and abs(mark.y) <= _FAR])


class _Scale:
    """Values to pixels, with ticks at round numbers; a little wider than what it holds."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        within = [min(max(value, -_FAR), _FAR) for value in values]
        low, high = min(within, default=0.0), max(within, default=1.0)
        spread = max(high - low, 1e-9 * abs(high)) or 1.0
        spread = max(spread, 1 / _FAR)
        low, high = low - 0.05 * spread, high + 0.05 * spread
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
        first = math.ceil(low / step)
        self.ticks = [step * place for place in range(first, math.floor(high / step) + 1)]
        self._decimals = max(0, -math.floor(math.log10(step)))
        self._low, self._high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self._start + (self._end - self._start) * (value - self._low) / (self._high - self._low)

    def name(self, tick: float) -> str:
        """A tick as text; no negative zero."""
        return f"{round(tick, 12) + 0.0:.{self._decimals}f}"


def _series(one: Series, at: Sequence[tuple[float, float, Mark]]) -> str:
    parts = []
    if one.line and len(at) > 1:
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)}"/>')
    for x, y, mark in at:
        letter = _text(7, -5, mark.letter, "letter") if mark.letter else ""
        tooltip = f"<title>{escape(mark.text)}</title>"
        parts.append(f'<g transform="translate({x:.1f} {y:.1f})">{tooltip}{MARKS[one.mark]}{letter}</g>')
    return f'<g class="{escape(one.style)}">{"".join(parts)}</g>'


def _svg(title: str, height: float, parts: Sequence[str]) -> Markup:
    label = f"{title}; the numbers are in the table"
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, style: str, full: str = "") -> str:
    tooltip = f"<title>{escape(full)}</title>" if full and full != text else ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{tooltip}{escape(text)}</text>'


def _cut(text: str) -> str:
    most = int((LABELS - 10) / CHARACTER)
    return text if len(text) <= most else f"{text[: most - 1]}…"
