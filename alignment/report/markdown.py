"""A RUN as a Markdown table: one row a variant, one column a backend and precision."""

from __future__ import annotations

from alignment.results import Alignment, CaseResult

HEADING = "largest error of boxes, px / of scores / change of AP"


def to_markdown(alignment: Alignment) -> str:
    """The accuracy of every case against its reference, with a line that says what the cells hold."""
    by_variant: dict[str, dict[str, CaseResult]] = {}
    for case in alignment.cases:
        by_variant.setdefault(case.case.variant, {})[_column(case)] = case
    subjects = sorted({_column(case) for case in alignment.cases if not _is_reference(case)})
    lines = [
        f"Cells: {HEADING}.",
        "",
        "| " + " | ".join(["variant", "images", "AP", *subjects]) + " |",
        "|" + "-|" * (3 + len(subjects)),
    ]
    for variant, cases in by_variant.items():
        shown = next((c for c in cases.values() if c.scores), None)
        ap, images = (f"{_reference_ap(shown):.4f}", str(shown.images)) if shown else ("-", "-")
        cells = [_cell(cases[column]) if column in cases else "-" for column in subjects]
        lines.append("| " + " | ".join([variant, images, ap, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _reference_ap(case: CaseResult) -> float:
    assert case.scores
    return case.scores.subject_ap if case.scores.reference_ap is None else case.scores.reference_ap


def _column(case: CaseResult) -> str:
    return " ".join(part for part in (case.case.backend, case.case.precision, case.case.route) if part)


def _is_reference(case: CaseResult) -> bool:
    return case.reference == "float64"


def _cell(case: CaseResult) -> str:
    if case.status == "skip":
        return "skipped"
    if _is_reference(case):
        return "reference"
    values: dict[str, float] = {}
    for check in (check for stage in case.stages for check in stage.checks):
        values[check.name] = max(check.value, values.get(check.name, 0.0))
    parts = [f"{values[name]:.2g}" if name in values else "-" for name in ("boxes", "scores")]
    parts.append(f"{case.scores.subject_ap - _reference_ap(case):+.4f}" if case.scores else "-")
    return " / ".join(parts) + ("" if case.status == "pass" else " **fails**")
