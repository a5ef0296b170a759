"""``align cache``."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from alignment.commands.console import out, print_table, stage_bars
from alignment.errors import AlignError

if TYPE_CHECKING:
    from alignment.cache.room import Item

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
Kind = Annotated[str | None, typer.Option(help="entries of one kind alone, such as onnx, engine or score")]


def ls(
    kind: Kind = None,
    as_json: Annotated[bool, typer.Option("--json", help="all that is known of each, its key included")] = False,
) -> None:
    """List what is kept in ALIGN_CACHE: exports, engines, calibrations, scores, drawn images."""
    from alignment.cache.room import age, allowed, contents, human
    from alignment.storage import cache_dir

    items = [item for item in contents() if kind in (None, item.kind)]
    if as_json:
        out.print(json.dumps([_fields(item) for item in items], indent=1), markup=False)
        return
    right = {"justify": "right", "no_wrap": True}
    columns = (Column(name, **right) for name in ("size", "age", "last used"))  # type: ignore[arg-type]
    table = Table("kind", "name", *columns, "state")
    for item in items:
        made = age(item.entry.made) if item.entry else ""
        state = item.state + (f": {item.reason}" if item.reason else "")
        table.add_row(item.kind, escape(item.name), human(item.size), made, age(item.used), escape(state))
    table.add_section()
    counts, sizes = Counter(item.kind for item in items), Counter[str]()
    for item in items:
        sizes[item.kind] += item.size
    for name, size in sizes.most_common():
        table.add_row(name, f"{counts[name]} in all", human(size), "", "", "")
    print_table(table)
    taken = f"{human(sum(sizes.values()))} of {human(allowed())}"
    out.print(f"{len(items)} entries, {taken}, in {cache_dir()}", markup=False)


def prune(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="entries not used for so long: 12h, 30d, 8w")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="those not used for longest, until the rest takes so much: 500MB, 5GB"),
    ] = None,
    kind: Kind = None,
    everything: Annotated[bool, typer.Option("--all", help="every entry")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and remove nothing")] = False,
) -> None:
    """Remove broken entries, what killed processes have left, unused locks, and what the options name.

    What another process works with stays.
    """
    from alignment.cache import room

    seconds = None if older_than is None else _seconds(older_than)
    size = None if max_size is None else room.parse_size(max_size, "--max-size")
    with stage_bars("cache") as bars:
        pruned = room.prune(seconds, size, kind, everything, dry_run, partial(bars, "entries"))
    for item, reason in pruned.removed:
        out.print(f"{item.kind}/{item.path.name}: {room.human(item.size)}: {reason}", markup=False)
    for item in pruned.held:
        out.print(f"{item.kind}/{item.path.name}: {room.human(item.size)}: stays, it is in use", markup=False)
    for path, taken in pruned.scratch.items():
        out.print(f"{path.name}: {room.human(taken)}: left by a process that ended early", markup=False)
    said = "would free" if dry_run else "freed"
    out.print(
        f"{said} {room.human(pruned.freed)}: {len(pruned.removed)} entries, {pruned.locks} unused locks; "
        f"{room.human(pruned.left)} stay",
        markup=False,
    )


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhdw])", text.strip().lower())
    if match is None:
        raise AlignError(f"--older-than {text!r}: not a time", "give one such as 12h, 30d or 8w")
    return float(match[1]) * _SECONDS[match[2]]


def _fields(item: Item) -> dict[str, Any]:
    entry = item.entry.model_dump(mode="json", include={"inputs", "versions", "made"}) if item.entry else {}
    return {
        "kind": item.kind,
        "name": item.name,
        "size": item.size,
        "last_used": item.used.isoformat(timespec="seconds"),
        "state": item.state,
        "reason": item.reason,
        "path": str(item.path),
        **entry,
    }
