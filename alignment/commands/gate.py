"""``align gate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from alignment.commands.console import out, print_table
from alignment.errors import AlignError

if TYPE_CHECKING:
    from alignment.gate.results import GateResult

COLOURS = {"pass": "green", "stop": "red", "missing": "red", "skip": "yellow"}


def gate(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN...", help="folders or alignment.json of the run to be released, as one"),
    ] = None,
    baseline: Annotated[Path | None, typer.Option(metavar="RUN", help="of the last release")] = None,
    policy: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="laid over the packaged policy")] = None,
    summary: Annotated[Path | None, typer.Option(metavar="FILE", help="Markdown, for a pull request")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="the typed result")] = None,
    engines: Annotated[
        list[Path] | None,
        typer.Option(help="folder of *.engine.json of `align inspect`, beside those in RUN; repeatable"),
    ] = None,
    print_policy: Annotated[bool, typer.Option("--print-policy", help="print the packaged policy and end")] = False,
) -> None:
    """Stop a release that fails golden values or the policy, or is worse than the last one. Exit status 0, 1 or 2."""
    from alignment.gate.judge import gate as judge
    from alignment.gate.judge import inspected_reformats
    from alignment.gate.policy import PACKAGED, load_policy
    from alignment.gate.runs import read_runs
    from alignment.report.gate_markdown import to_markdown
    from alignment.report.run_folder import read_run, to_json
    from alignment.storage import write_text

    if print_policy:
        out.print(PACKAGED.read_text(encoding="utf-8"), markup=False, end="")
        return
    if not runs:
        raise AlignError("no RUN", "name the folder that `align run --out` or `pytest --report` wrote")
    held_to = load_policy(policy)
    run = read_runs(runs)
    before = read_run(baseline) if baseline else None
    folders = [path if path.is_dir() else path.parent for path in runs]
    reformats = inspected_reformats([*folders, *(engines or ())], run)
    result = judge(run, held_to, before, (" ".join(map(str, runs)), str(baseline or "")), reformats)
    for path, text in (
        (summary, to_markdown(result)),
        (json_file, to_json(result)),
    ):
        if path:
            write_text(path, text)
    _print(result)
    raise typer.Exit(0 if result.verdict == "passed" else 1)


def _print(result: GateResult) -> None:
    from alignment.report.gate_markdown import behind, cells, headline, mild, shown, some

    table = Table(Column("case", no_wrap=True), "verdict", "AP", "agreement", "latency")
    for case in result.cases:
        table.add_row(case.id, f"[{COLOURS[case.verdict]}]{case.verdict}[/]" + ", new" * case.new, *cells(case))
    print_table(table, least=max((len(case.id) for case in result.cases), default=0) + 40)
    for finding in result.stopping:
        reason = behind(finding)
        name = f"{finding.case}: " if finding.case else ""
        told = f"{name}{finding.kind}: {finding.what}" + (f"; {reason}" if reason else "")
        out.print(f"[red]{escape(told)}[/]")
    for layer in result.layers:
        out.print(f"{layer.variant}: {layer.stage} {layer.layer}: {layer.reason}", markup=False)
    for change in result.changes:
        which = some(change.cases) or "the whole run"
        out.print(f"changed: {change.field}: {shown(change.before)} -> {shown(change.after)} ({which})", markup=False)
    for note in [*result.notes, *mild(result)]:
        out.print(f"note: {note}", markup=False)
    out.print(headline(result), markup=False)
