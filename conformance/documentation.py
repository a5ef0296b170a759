"""The documentation as tests read it: every command of a page, where it stands, and what the page says it prints."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = ("align", "pytest", "python", "tox", "pip", "cmake")
#: The languages of fenced blocks: every line of `sh` is a command, in `console` those behind ``$``.
LANGUAGES = ("sh", "console", "yaml", "text")
_FENCE = re.compile(r"^\s*(`{3,})([^`]*)$")


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        place: ``docs/tutorial.md:12``.
        text: of the command, without a comment.
        inline: whether it stands in running text, where it may be a mention: without what it needs.
        prints: the lines that the page shows of its output; None where it shows none.
        status: that it ends with.
    """

    place: str
    text: str
    inline: bool = False
    prints: tuple[str, ...] | None = None
    status: int = 0

    @property
    def words(self) -> list[str]:
        """As a shell splits it; the brackets of a synopsis are left out."""
        text = re.sub(r"(?<!\S)\[|\](?!\S)", "", self.text) if self.inline else self.text
        return shlex.split(text)

    @property
    def synopsis(self) -> bool:
        """Whether names stand for what is to be given: ``align qat VARIANT [--from FILE]``, ``align A|B``."""
        return self.inline and bool(re.search(r"(?<![\w.])[A-Z]{2,}(?![a-z])|[|\[]|\.\.\.", self.text))


@dataclass(frozen=True)
class Shown:
    """A file of which a page shows all, by a fenced block with a title."""

    name: str
    text: str


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    line: int
    language: str
    title: str | None
    lines: list[str]


def pages() -> list[Path]:
    """README and what is written by hand below ``docs/``; the pages that are made of code have no commands."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    """A page as messages name it."""
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def steps(page: Path) -> list[Command | Shown]:
    """The commands of a page and the files that it shows, in order."""
    found: list[tuple[int, Command | Shown]] = []
    for block in blocks(page):
        if block.title:
            found.append((block.line, Shown(block.title, "\n".join(block.lines) + "\n")))
        elif block.language == "sh":
            found += [(block.line, command) for command in _script(block, name(page))]
        elif block.language == "console":
            found += [(block.line, command) for command in _console(block, name(page))]
    for line, text in inline(page):
        if text.split()[0] in PROGRAMS:
            found.append((line, Command(f"{name(page)}:{line}", text, inline=True)))
    return [step for _, step in sorted(found, key=lambda pair: pair[0])]


def commands(page: Path) -> list[Command]:
    """The commands of a page."""
    return [step for step in steps(page) if isinstance(step, Command)]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    open_fence, block = "", Block(0, "", None, [])
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if open_fence:
            if fence and fence[1] == open_fence and not fence[2].strip():
                yield block
                open_fence = ""
            else:
                block.lines.append(line)
        elif fence:
            open_fence = fence[1]
            language, _, rest = fence[2].strip().partition(" ")
            titled = re.search(r'title="([^"]+)"', rest)
            block = Block(number, language, titled[1] if titled else None, [])
    assert not open_fence, f"{page}: a fenced block has no end"


def inline(page: Path) -> Iterator[tuple[int, str]]:
    """The code in running text, each with its line; one that goes on in the next line is joined."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        for number in range(block.line - 1, block.line + len(block.lines) + 1):
            lines[number] = ""
    for paragraph in re.finditer(r"(?:[^\n]+\n?)+", "\n".join(lines)):
        for span in re.finditer(r"`([^`]+)`", paragraph[0]):
            start = paragraph.start() + span.start()
            yield "\n".join(lines).count("\n", 0, start) + 1, " ".join(span[1].split())


def _script(block: Block, page: str) -> Iterator[Command]:
    number, whole = block.line, ""
    for offset, line in enumerate(block.lines, 1):
        number = number if whole else block.line + offset
        whole += line.removesuffix("\\")
        if not line.endswith("\\"):
            text = _uncommented(whole)
            if text:
                yield Command(f"{page}:{number}", text)
            whole = ""


def _console(block: Block, page: str) -> list[Command]:
    """The commands behind ``$``; what ``echo $?`` prints is the status of the one before."""
    found: list[Command] = []
    for offset, line in enumerate(block.lines, 1):
        if line.startswith("$ "):
            found.append(Command(f"{page}:{block.line + offset}", _uncommented(line[2:]), prints=()))
        elif found[-1].text == "echo $?":
            found.pop()
            found[-1] = replace(found[-1], status=int(line))
        else:
            found[-1] = replace(found[-1], prints=(*(found[-1].prints or ()), line))
    return found


def _uncommented(line: str) -> str:
    return re.sub(r"(^|\s)#\s.*$", "", line).strip()
