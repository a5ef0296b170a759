"""Results as Markdown: ``docs/explanation/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.results import CaseResult, Entry, Spread, common_size, further, ratio

HEAD = """# Speed beside the peers

Made by `python -m benchmarks table benchmarks/results --out docs/explanation/benchmarks.md` of what `python -m
benchmarks run --out benchmarks/results` measured; `python -m benchmarks list` names the cases. `pip install
'.[mmyolo,bench]'` brings the peers.

All contestants of a case do the same work in one process, in turns, A B C A B C ... A ratio is taken turn by turn, at
the largest size that both were measured at: its median, and in brackets its quartiles. *Ours ÷ it* below 1 means that
ours costs less. *Further* is the same ratio of what the largest size costs more than the smallest, so that of loading,
and of all else that is done once, nothing is left. Processor seconds are of all threads, and say more than the clock on
a machine that others use too. *Growth* is b of seconds = a × size^b. Memory is what the work adds to a fresh process
that has prepared for it, at the smallest and the largest size. A *floor* is what the work cannot cost less than.

Where quartiles are far apart, or a cost falls as the work grows, the machine was too busy to tell.
"""


def table(results: Sequence[CaseResult]) -> str:
    """All cases, by name, as one page."""
    ordered = sorted(results, key=lambda result: (bool(result.skipped), result.request.case, result.request.variant))
    parts = [HEAD, _worst(ordered), *map(_case, ordered)]
    return "\n".join(part for part in parts if part)


def _worst(results: Sequence[CaseResult]) -> str:
    """The worst ratio to a peer, and to the floor, of each case."""
    rows = []
    for result in results:
        for kind in ("peer", "floor"):
            found = [
                (spread.median, entry.name, spread)
                for entry in result.entries
                if entry.kind == kind and (spread := ratio(result.ours, entry, "cpu_s"))
            ]
            if found:
                _, name, spread = max(found)
                rows.append((spread.median, f"| {_name(result)} | {_cell(name)} | {kind} | {_spread(spread)} |"))
    if not rows:
        return ""
    lines = "\n".join(text for _, text in sorted(rows, reverse=True))
    return f"## The worst of each case\n\n| case | against | | ours ÷ it, processor |\n|-|-|-|-|\n{lines}\n"


def _name(result: CaseResult) -> str:
    variant = result.request.variant
    return f"{result.request.case}, {variant}" if variant else result.request.case


def _case(result: CaseResult) -> str:
    lines = [f"## {_name(result)}", "", f"{result.title}.", ""]
    if result.skipped:
        return "\n".join([*lines, f"Not measured: {result.skipped}.", ""])
    sizes = " / ".join(map(str, result.request.sizes))
    packages = {name: version for entry in result.entries for name, version in entry.versions.items()}
    facts = ", ".join(f"{key} {value}" for key, value in (result.machine | packages).items())
    lines += [f"{sizes} {result.axis}, {result.request.repeat} turns; {result.created[:10]}; {facts}.", ""]
    scores = list(dict.fromkeys(name for entry in result.entries for name in entry.scores))
    heads = ["contestant", result.axis, "s", "processor s", "ours ÷ it, processor", "ours ÷ it, clock"]
    heads += ["further, processor"] if len(result.request.sizes) > 1 else []
    heads += ["it ÷ floor, processor"] if result.floor else []
    heads += ["growth", "memory, MB", *scores]
    lines += [f"| {' | '.join(heads)} |", f"|{'-|' * len(heads)}"]
    lines += [_row(result, entry, scores, len(heads)) for entry in result.entries]
    notes = [f"- {entry.name}: {entry.fault}." for entry in result.entries if entry.fault and _last(entry)]
    return "\n".join([*lines, "", *notes, *([""] if notes else [])])


def _last(entry: Entry) -> int | None:
    """The largest size that a contestant was measured at."""
    return common_size(entry, entry)


def _row(result: CaseResult, entry: Entry, scores: list[str], width: int) -> str:
    name = f"**{_cell(entry.name)}**" if entry is result.ours else _cell(entry.name)
    size = _last(entry)
    if size is None:
        return f"| {name} | {_cell(entry.fault or 'not measured')} |{' |' * (width - 2)}"
    measured = entry.at(size)
    assert measured is not None
    cells = [name, str(size), *(f"{np.median(measured.seconds(clock)):.3g}" for clock in ("wall_s", "cpu_s"))]
    if entry is result.ours:
        cells += ["1", "1"]
    else:
        cells += [_spread(ratio(result.ours, entry, clock)) for clock in ("cpu_s", "wall_s")]
    if len(result.request.sizes) > 1:
        cells.append("1" if entry is result.ours else _spread(further(result.ours, entry, "cpu_s")))
    if result.floor:
        cells.append("1" if entry is result.floor else _spread(ratio(entry, result.floor, "cpu_s")))
    cells.append("-" if entry.growth is None else f"{entry.growth:.2f}")
    memory = [one.memory.peak_mb - one.memory.before_mb for one in entry.sizes if one.memory]
    cells.append(" / ".join(f"{value:.0f}" for value in memory) or "-")
    cells += [_number(entry.scores[score]) if score in entry.scores else "-" for score in scores]
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _cell(text: str) -> str:
    """Text that leaves a table whole."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
