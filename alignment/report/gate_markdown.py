"""The gate's verdict as Markdown, for the comment on a pull request."""

from __future__ import annotations

import json
from typing import Any

from alignment.gate.results import Finding, GatedCase, GateResult, Numbers

#: A comment is read on a phone: of equal findings so many cases are named.
NAMED = 3


def headline(result: GateResult) -> str:
    """``stopped: 2 findings in 1 of 4 cases``."""
    stopping = result.stopping
    run = [case for case in result.cases if case.verdict != "skip"]
    cases = {finding.case for finding in stopping} & {case.id for case in run}  # of an explanation there is no case
    if not stopping:
        return f"passed: {len(run)} case{'s' * (len(run) != 1)}"
    count = f"{len(stopping)} finding{'s' * (len(stopping) != 1)}"
    return f"stopped: {count} in {len(cases)} of {len(run)} cases" if cases else f"stopped: {count}"


def to_markdown(result: GateResult) -> str:
    """Verdict, what stops it, the cases, what changed since the baseline, and notes."""
    lines = [f"## Release gate {headline(result)}", ""]
    lines.append(f"Run `{result.run.path}` of {result.run.created}" + _against(result))
    if stopping := result.stopping:
        lines += ["", "### What stops it", "", *(f"- {_line(finding)}" for finding in stopping)]
    lines += ["", "### Cases", "", *_cases(result)]
    if result.layers:
        lines += ["", "### First layers that answer otherwise than in the baseline", ""]
        lines += [f"- {c.variant}: {c.stage}{f', `{c.layer}`' if c.layer else ''}: {c.reason}" for c in result.layers]
    if result.changes:
        lines += ["", "<details><summary>What changed since the baseline, causes first</summary>", ""]
        lines += ["| field | before | after | cases |", "|-|-|-|-|"]
        for change in result.changes:
            cells = [change.field, shown(change.before), shown(change.after), some(change.cases) or "all"]
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        lines += ["", "</details>"]
    if notes := [*result.notes, *mild(result)]:
        lines += ["", "<details><summary>Notes</summary>", "", *(f"- {note}" for note in notes), "", "</details>"]
    return "\n".join(lines) + "\n"


def mild(result: GateResult) -> list[str]:
    """The findings that do not stop, those that say the same in one line."""
    alike: dict[str, list[str]] = {}
    for finding in result.findings:
        if not finding.stops:
            alike.setdefault(finding.what, []).append(finding.case)
    return [f"{some(cases)}: {what}" for what, cases in alike.items()]


def behind(finding: Finding) -> str:
    """Where it differs first, and since what changed; empty where nothing is known."""
    parts = []
    if finding.stage:
        parts.append(f"first at {finding.stage}" + (f", {finding.layer}" if finding.layer else ""))
    if finding.since:
        parts.append(f"since {finding.since} changed")
    return "; ".join(parts)


def some(cases: list[str]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(cases) - NAMED} more" if len(cases) > NAMED else ""
    return ", ".join(cases[:NAMED]) + more


def shown(value: Any) -> str:
    """A value of the provenance in a cell; hashes cut to 12 digits."""
    text = value if isinstance(value, str) else "-" if value is None else json.dumps(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def cells(case: GatedCase) -> tuple[str, str, str]:
    """AP, agreement and latency, with what they were before where that is another."""
    return (
        _moved(case, "ap", "{:.4f}"),
        _moved(case, "agreement_ap" if case.now.agreement_ap is not None else "agreement", "{:.4f}"),
        _moved(case, "latency_ms", "{:.3g} ms"),
    )


def _moved(case: GatedCase, name: str, form: str) -> str:
    def told(numbers: Numbers | None) -> str:
        value = getattr(numbers, name) if numbers else None
        return "-" if value is None else form.format(value)

    before, now = told(case.before), told(case.now)
    return now if before in ("-", now) else f"{before} -> {now}"


def _against(result: GateResult) -> str:
    if result.baseline is None:
        return ", without a baseline: regressions were not looked at."
    return f", against `{result.baseline.path}` of {result.baseline.created}."


def _line(finding: Finding) -> str:
    reason = behind(finding)
    name = f"**{finding.case}** " if finding.case else ""
    return f"{name}{finding.kind}: {finding.what}" + (f" ({reason})" if reason else "")


def _cases(result: GateResult) -> list[str]:
    lines = ["| case | verdict | AP | agreement | latency |", "|-|-|-|-|-|"]
    order = {"stop": 0, "missing": 1, "pass": 2, "skip": 3}
    for case in sorted(result.cases, key=lambda case: order[case.verdict]):
        verdict = "**stop**" if case.verdict == "stop" else case.verdict + (", new" if case.new else "")
        lines.append("| " + " | ".join(_cell(cell) for cell in (case.id, verdict, *cells(case))) + " |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
