"""``align report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignment.commands.console import out, require_folders
from alignment.errors import AlignError


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="RUN folders and folders of other results, or single files: alignment.json, *.sensitivity.json, "
            "partial.json, *.engine.json, gate.json",
        ),
    ],
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="default: report.html in DIR, where there is but one")
    ] = None,
) -> None:
    """Write one HTML report of what RUN folders hold: cases, ladders, explanations, sweeps, searches and engines.

    The file needs nothing else. It has what `align run`, `explain` and `ladder` left in the folders, and beside that
    what `align sensitivity --out`, `partial`, `inspect` and `gate --json` wrote there, or in their folder `partial`.
    """
    from alignment.report.gather import gather
    from alignment.report.html import render
    from alignment.report.run_folder import REPORT
    from alignment.storage import write_text

    found = gather(paths)
    if out_file is None:
        if len(paths) > 1 or not paths[0].is_dir():
            raise AlignError("several results make one report", "say where it goes: --out FILE")
        out_file = paths[0] / REPORT
    require_folders({"--out": out_file.parent})
    page = render(found)
    write_text(out_file, page)
    for note in found.notes:
        out.print(f"note: {note}", markup=False)
    out.print(f"wrote {out_file}: {out_file.stat().st_size / 1e6:.1f} MB", markup=False)
