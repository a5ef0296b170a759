"""A RUN as a Markdown table: one row a variant, one column a backend and precision."""

from __future__ import annotations

from alignment.report import ladder
from alignment.results import Alignment, CaseResult

HEADING = "largest error of boxes, px / of scores / change of AP"


def to_markdown(alignment: Alignment) -> str:
    """The accuracy of every case against its reference, variants that were not run left out; then ladders to int8."""
    tables = [ladder.to_markdown(one) for one in alignment.ladders]
    return "\n".join([*([_cases(alignment)] if alignment.cases or not tables else []), *tables])


def _cases(alignment: Alignment) -> str:
    by_variant: dict[str, dict[str, CaseResult]] = {}
    for case in sorted(alignment.cases, key=_order):
        if case.scores:
            by_variant.setdefault(case.case.variant, {})[_column(case)] = case
    done = [case for cases in by_variant.values() for case in cases.values()]
    columns = list(dict.fromkeys(_column(case) for case in sorted(done, key=_order) if not _is_reference(case)))
    lines = [
        f"Cells: {HEADING}.",
        "",
        "| " + " | ".join(["variant", "images", "AP", *columns]) + " |",
        "|" + "-|" * (3 + len(columns)),
    ]
    for variant in sorted(by_variant):
        cases = by_variant[variant]
        first = next(iter(cases.values()))
        cells = [_cell(cases[column]) if column in cases else "-" for column in columns]
        ap = _reference_ap(first)
        lines.append(f"| {variant} | {first.images} | {'-' if ap < 0 else f'{ap:.4f}'} | {' | '.join(cells)} |")
    doubts = dict.fromkeys((case.case.variant, doubt) for case in done for doubt in case.doubts)
    if doubts:
        lines += ["", *(f"- {variant}: {doubt}" for variant, doubt in doubts)]
    return "\n".join(lines) + "\n"


def _order(case: CaseResult) -> tuple[int, str, str]:
    precisions = ("fp32", "tf32", "fp16")
    known = case.case.precision in precisions
    return (precisions.index(case.case.precision) if known else len(precisions), case.case.backend, case.case.id)


def _reference_ap(case: CaseResult) -> float:
    assert case.scores
    return case.scores.subject_ap if case.scores.reference_ap is None else case.scores.reference_ap


def _column(case: CaseResult) -> str:
    return " ".join(part for part in (case.case.backend, case.case.precision, case.case.route) if part)


def _is_reference(case: CaseResult) -> bool:
    return case.reference == "float64"


def _cell(case: CaseResult) -> str:
    if _is_reference(case):
        return "reference"
    values: dict[str, float] = {}
    for check in (check for stage in case.stages for check in stage.checks):
        values[check.name] = max(check.value, values.get(check.name, 0.0))
    parts = [f"{values[name]:.2g}" if name in values else "-" for name in ("boxes", "scores")]
    change = round(case.scores.subject_ap - _reference_ap(case), 4) if case.scores else 0.0
    parts.append("-" if case.scores and case.scores.subject_ap < 0 else f"{change + 0.0:+.4f}")  # no negative zero
    return " / ".join(parts) + ("" if case.status == "pass" else " **fails**")
