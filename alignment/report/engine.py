"""Inspected engines as HTML: what they are made of, what keeps them from int8, and the drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from alignment.inspection.draw import STYLE, draw
from alignment.inspection.findings import KINDS, Finding, find
from alignment.inspection.saved import Inspection
from alignment.inspection.summary import Sum, by_finding, by_precision, otherwise
from alignment.report.page import environment


class EnginePart(NamedTuple):
    """One engine, its layers by precision and by finding, and the findings, those of one kind from the slowest down."""

    engine: Inspection
    precisions: list[Sum]
    sums: list[Sum]
    found: list[Finding]


def engine_part(engine: Inspection) -> EnginePart:
    """What a page says of an engine."""
    kinds = list(KINDS)
    found = sorted(find(engine), key=lambda finding: (kinds.index(finding.kind), -(finding.milliseconds or 0)))
    return EnginePart(engine, by_precision(engine), by_finding(engine, found), found)


def drawing(engines: Sequence[Inspection]) -> Markup:
    """The SVG, whose ``<style>`` is `STYLE`."""
    return Markup(draw(engines))


def render_engines(engines: Sequence[Inspection]) -> str:
    """The whole page, which needs nothing else; of two engines also the nodes that they compute otherwise."""
    return (
        environment()
        .get_template("engine.html.j2")
        .render(
            parts=[engine_part(engine) for engine in engines],
            kinds=KINDS,
            otherwise=otherwise(*engines) if len(engines) == 2 else [],
            drawing=drawing(engines),
            drawing_style=STYLE,
        )
    )
