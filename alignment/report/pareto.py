"""The plot of partial quantization: what is lost, against how much is int8."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from alignment.errors import AlignError
from alignment.quantize.partial_result import PartialResult, Point, frontier
from alignment.report.plot import Mark, Series, key, scatter


class _Panel(NamedTuple):
    """One plot: what is on its axes, and whether more of x costs more."""

    x: str
    of_x: Callable[[Point], Any]
    y: str
    of_y: Callable[[Point], float]
    dear: int
    good: int


MACS = "multiplications in int8, %"
PANELS = (
    _Panel(MACS, lambda p: 100 * p.int8_macs, "AP lost, points", lambda p: 100 * p.ap_lost, -1, -1),
    _Panel(MACS, lambda p: 100 * p.int8_macs, "agreement with FP32", lambda p: p.agreement, -1, 1),
)
#: Of the spread of what is shown: nearer than this, letters lie over each other.
NEAR = 0.06
MARKERS = "sDv^<>pPXhd8"
TIMED = _Panel("latency, ms", lambda p: p.latency_ms, "agreement with FP32", lambda p: p.agreement, 1, 1)


def draw_pareto(path: Path, title: str, points: Sequence[Point], chosen: Point, ways: Mapping[str, Point]) -> None:
    """Writes an SVG: every set that was scored as a dot, the Pareto front as a line, the chosen set as a star.

    Args:
        path: of the SVG.
        title: above it.
        points: all that were scored.
        chosen: one of them.
        ways: others of them that get a name in the plot.

    Raises:
        AlignError: matplotlib is not there.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    timed = [point for point in points if point.latency_ms is not None]
    panels = [*((panel, points) for panel in PANELS), *([(TIMED, timed)] if timed else [])]
    # One file for one result: no date in it, no names drawn by lot, and none read as a formula.
    with matplotlib.rc_context({"svg.hashsalt": "alignment", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(5.5 * len(panels), 5), layout="constrained")
        figure.suptitle(title)
        for place, (panel, shown) in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), place)
            _draw(axes, panel, shown, chosen, ways)
            if place == 1:
                figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def letters(found: PartialResult) -> dict[str, str]:
    """Way → the letter that stands for it in `charts`."""
    return dict(zip(found.ways, string.ascii_lowercase, strict=False))


def charts(found: PartialResult) -> list[Markup]:
    """The same as a legend and SVGs for a page of its own colours, ways by their letters."""
    panels = [panel for panel in PANELS if found.reference.ap >= 0 or "AP" not in panel.y]
    panels += [TIMED] if any(point.latency_ms is not None for point in found.points) else []
    made = [(panel, _series(panel, found)) for panel in panels]
    drawn = [scatter(f"{panel.y} against {panel.x}", panel.x, panel.y, series) for panel, series in made]
    return [key(made[0][1]), *drawn]


def _series(panel: _Panel, found: PartialResult) -> list[Series]:
    def marks(points: Sequence[Point], named: str = "") -> list[Mark]:
        return [
            Mark(panel.of_x(p), panel.of_y(p), f"{named}{len(p.kept)} in float, {panel.y} {panel.of_y(p):.4g}")
            for p in points
        ]

    points = [point for point in found.points if panel.of_x(point) is not None]
    front = frontier(points, lambda p: panel.dear * panel.of_x(p), lambda p: -panel.good * panel.of_y(p))
    ways = [(way, point) for way, point in found.ways.items() if panel.of_x(point) is not None]
    chosen = [found.chosen] if panel.of_x(found.chosen) is not None else []
    return [
        Series(f"{len(points)} sets", "faint", "dot", marks(points)),
        Series("Pareto front", "front", "circle", marks(front), line=True),
        Series("compared, by letter", "ways", "diamond", _lettered(panel, ways, letters(found))),
        Series(f"chosen: {len(found.chosen.kept)} in float", "chosen", "star", marks(chosen, "chosen: ")),
    ]


def _lettered(panel: _Panel, ways: Sequence[tuple[str, Point]], of: Mapping[str, str]) -> list[Mark]:
    """A mark a way; the letters of those that lie too near each other to be read stand beside the first of them."""
    at = [(panel.of_x(point), panel.of_y(point)) for _, point in ways]
    apart = [NEAR * (max(axis) - min(axis)) or 1.0 for axis in zip(*at, strict=True)] if at else []
    texts: dict[int, str] = {}
    for place, (way, _) in enumerate(ways):
        near = (k for k in texts if all(abs(at[k][axis] - at[place][axis]) <= apart[axis] for axis in (0, 1)))
        first = next(near, place)
        texts[first] = texts.get(first, "") + of.get(way, "")
    return [
        Mark(x, y, f"{way}: {panel.y} {y:.4g}", texts.get(place, ""))
        for place, ((way, _), (x, y)) in enumerate(zip(ways, at, strict=True))
    ]


def require_matplotlib() -> None:
    """Raises AlignError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise AlignError("matplotlib is not installed", "pip install matplotlib")


def _draw(axes: Any, panel: _Panel, points: Sequence[Point], chosen: Point, ways: Mapping[str, Point]) -> None:
    def place(shown: Sequence[Point]) -> tuple[list[float], list[float]]:
        return [panel.of_x(point) for point in shown], [panel.of_y(point) for point in shown]

    front = frontier(points, lambda p: panel.dear * panel.of_x(p), lambda p: -panel.good * panel.of_y(p))
    axes.plot(*place(points), "o", color="#9aa5b1", markersize=3, label=f"{len(points)} sets")
    axes.plot(*place(front), "-o", color="#1f6feb", markersize=4, linewidth=1.2, label="Pareto front")
    for (name, point), marker in zip(ways.items(), itertools.cycle(MARKERS), strict=False):
        if point in points:
            axes.plot(*place([point]), marker, color="#b45309", markersize=7, fillstyle="none", zorder=4, label=name)
    if chosen in points:
        label = f"chosen: {len(chosen.kept)} in float"
        axes.plot(*place([chosen]), "*", color="#d1242f", markersize=13, label=label)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.grid(alpha=0.3)
