"""Pieces of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars in its cells are escaped, and a cell is one line."""
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def code(text: object) -> str:
    """Text in a typewriter's letters, empty where there is none."""
    return f"`{text}`" if str(text) else ""


def prose(docstring: str) -> str:
    """A docstring as Markdown: its double backticks are single ones, its quotes of code stay; ``Attributes:`` and
    ``Args:`` become lists."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(line.strip() for line in docstring.replace("``", "`").splitlines()))
    return "\n\n".join(_list(p) if re.match(r"(Attributes|Args):\n", p) else p for p in paragraphs).strip()


def _list(paragraph: str) -> str:
    """``Args:`` and what follows, an item for each ``name: text``."""
    lines: list[str] = []
    for line in paragraph.splitlines()[1:]:
        named = re.match(r"([a-z_]+(?:, [a-z_]+)*): (.*)", line)
        if named:
            lines.append(f"- `{named[1]}`: {named[2]}")
        else:
            lines[-1] += " " + line
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
