"""The templates of the pages, their filters, and the hashes that their content security policies name."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2

from alignment.report import gate_markdown, shown
from alignment.report.boxes import drawn, tag_size

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> jinja2.Environment:
    """Templates whose output is escaped, and the filters that they use."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        shown.number,
        shown.precise,
        shown.cosine,
        shown.decibel,
        shown.score,
        shown.scores_line,
        shown.change,
        shown.signed,
        shown.milliseconds,
        shown.checked,
        shown.worst_checks,
        shown.key,
        shown.share,
        shown.megabytes,
        shown.plural,
        drawn,
        tag_size,
        gate_markdown.behind,
        gate_markdown.cells,
        gate_markdown.mild,
        gate_markdown.some,
    )
    made.filters.update({function.__name__: function for function in filters})
    made.filters.update(policy_hash=_policy_hash, value=gate_markdown.shown)
    return made


def _policy_hash(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
