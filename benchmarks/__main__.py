"""``python -m benchmarks run|list|table``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from alignment.commands.console import names_in, out, reported, require_folders, stage_bars
from alignment.errors import AlignError
from alignment.storage import writing
from alignment.variant import load_variant
from benchmarks.cases import CASES
from benchmarks.harness import Case, Probe, measure
from benchmarks.memory import probe
from benchmarks.results import CaseResult, Request
from benchmarks.table import table

app = typer.Typer(add_completion=False, help=__doc__)
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="gets one JSON file a case")]


@app.command()
@reported
def run(
    case: Annotated[str, typer.Option("--case", help="names with commas; default: all")] = "",
    variant: Annotated[str, typer.Option(help="in place of the case's own; name or YAML file")] = "",
    repeat: Annotated[int | None, typer.Option(min=1, help="turns; default: the case's own")] = None,
    sizes: Annotated[str, typer.Option(metavar="N,N,N", help="default: the case's own")] = "",
    only: Annotated[
        str, typer.Option(help="contestants whose names hold one of these words, and the first of ours")
    ] = "",
    timeout: Annotated[float, typer.Option(help="seconds that one contestant's work may take")] = 300,
    again: Annotated[bool, typer.Option("--again", help="also what is there already")] = False,
    folder: Out = Path("benchmarks/results"),
) -> None:
    """Measure cases; what is there, and answers the same request, is left as it is, so that a run can go on."""
    require_folders({"--out": folder})
    names = names_in(case) or tuple(CASES)
    for name in names:
        if name not in CASES:
            raise AlignError(f"no case is named {name}", f"give one of {', '.join(CASES)}")
    if variant:
        load_variant(variant)
    asked_sizes = _sizes(sizes)
    if len(names) > 1:
        raise typer.Exit(max([_in_own_process(name) for name in names]))
    chosen = CASES[names[0]]
    request = Request(
        case=chosen.name,
        variant=(variant or chosen.variant) if chosen.variant else "",
        repeat=repeat or chosen.repeat,
        sizes=asked_sizes or list(chosen.sizes),
        only=list(names_in(only)),
    )
    if not run_one(chosen, request, folder, probe(timeout), again):
        raise typer.Exit(1)


def _in_own_process(name: str) -> int:
    """This command for one case, which then meets nothing that another left; its exit status."""
    return subprocess.run([sys.executable, "-m", "benchmarks", *sys.argv[1:], "--case", name], check=False).returncode


def run_one(case: Case, request: Request, folder: Path, memory: Probe, again: bool = False) -> bool:
    """Measures one case unless it is there; whether ours was measured, or the case cannot run here."""
    path = folder / f"{'-'.join(filter(None, (case.name, Path(request.variant).stem)))}.json"
    found = CaseResult.load(path) if path.is_file() and not again else None
    if found is None or found.request != request:
        with stage_bars("") as show:
            found = measure(case, request, memory, progress=show)
        found.save(path)
    out.print(f"{path}: {found.skipped or _told(found)}", markup=False)
    return bool(found.skipped) or _measured(found)


def _measured(found: CaseResult) -> bool:
    return found.ours is not None and any(one.turns for one in found.ours.sizes)


def _told(found: CaseResult) -> str:
    """Ratios of processor time, and what failed."""
    said = [f"{name} {spread['cpu_s'].median:.2f}" for name, spread in found.ratios.items() if "cpu_s" in spread]
    faults = [f"{entry.name}: {entry.fault}" for entry in found.entries if entry.fault]
    return "; ".join([f"ours ÷ {', '.join(said)}" if said else "ours alone", *faults])


def _sizes(text: str) -> list[int]:
    """Rising; none of an empty text."""
    found = names_in(text)
    if not all(size.isdecimal() and int(size) for size in found):
        raise AlignError(f"--sizes {text}: not whole numbers", "give some such as 16,32,64")
    return sorted(map(int, found))


@app.command("list")
def list_cases() -> None:
    """Name the cases, their sizes and contestants, and what keeps one from running here."""
    for case in CASES.values():
        out.print(f"{case.name}: {case.title}; {case.axis} {', '.join(map(str, case.sizes))}", markup=False)
        for contestant in case.contestants:
            out.print(f"  {contestant.kind:5}  {contestant.name}", markup=False)
        if reason := case.missing():
            out.print(f"  not here: {reason}", markup=False)


@app.command("table")
@reported
def write_table(
    folder: Path, file: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="default: prints it")] = None
) -> None:
    """Write what was measured as Markdown."""
    results = [CaseResult.load(path) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise AlignError(f"{folder}: holds no results", "python -m benchmarks run --out DIR")
    text = table(results)
    if file is None:
        out.print(text, markup=False)
        return
    require_folders({"--out": file.parent})
    with writing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    out.print(f"wrote {file}", markup=False)


if __name__ == "__main__":
    app()
