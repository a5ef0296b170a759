"""Inspected engines as one HTML file: what they are made of, what keeps them from int8, and the drawing."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from alignment.inspection.draw import STYLE, draw
from alignment.inspection.findings import KINDS, find
from alignment.inspection.saved import Inspection
from alignment.inspection.summary import by_finding, by_precision, otherwise
from alignment.report.html import environment


def render_engines(engines: Sequence[Inspection]) -> str:
    """The whole page, which needs nothing else; of two engines also the nodes that they compute otherwise."""
    parts = []
    for engine in engines:
        found = sorted(
            find(engine), key=lambda finding: (list(KINDS).index(finding.kind), -(finding.milliseconds or 0))
        )
        parts.append((engine, by_precision(engine), by_finding(engine, found), found))
    return (
        environment()
        .get_template("engine.html.j2")
        .render(
            parts=parts,
            kinds=KINDS,
            otherwise=otherwise(*engines) if len(engines) == 2 else [],
            drawing=Markup(draw(engines)),
            drawing_style=STYLE,
        )
    )
