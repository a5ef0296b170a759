"""How numbers and counts read in the report."""

from __future__ import annotations

import math
from typing import Literal

from alignment.results import CaseResult, Check, StageResult

ABSENT = "-"


def number(value: float | None) -> str:
    """Three significant digits, as ``0.0123``, ``12.3`` or ``2.1e-05``."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def precise(value: float | None) -> str:
    """Four significant digits without trailing zeros, for numbers that stand beside their limit."""
    return ABSENT if value is None else f"{value:.4g}"


def cosine(value: float | None) -> str:
    """Six decimals, or the distance from 1 where they would hide it."""
    if value is None:
        return ABSENT
    if 0 < 1 - value < 5e-7:
        return f"1 - {1 - value:.1e}"
    return f"{value:.6f}"


def decibel(value: float | None) -> str:
    """One decimal."""
    return ABSENT if value is None else f"{value:.1f}"


def score(value: float | None) -> str:
    """An AP, four decimals; one below 0 is that of images without truth."""
    return ABSENT if value is None or value < 0 else f"{value:.4f}"


def scores_line(case: CaseResult) -> str:
    """AP of both sides, ``0.3712 → 0.3698``; of the subject alone where there is no reference."""
    if case.scores is None:
        return ABSENT
    both = (case.scores.reference_ap, case.scores.subject_ap)
    return " → ".join(score(ap) for ap in both if ap is not None)


def change(case: CaseResult) -> float | None:
    """Subject AP less reference AP."""
    if case.scores is None or case.scores.reference_ap is None or case.scores.reference_ap < 0:
        return None
    return case.scores.subject_ap - case.scores.reference_ap


def signed(value: float | None) -> str:
    """A difference of AP, four decimals and always its sign; no negative zero."""
    return ABSENT if value is None else f"{round(value, 4) + 0.0:+.4f}"


def milliseconds(case: CaseResult) -> float | None:
    """Time of one image in the backend alone."""
    return 1000 * case.timing.inference_s / case.timing.images if case.timing and case.timing.images else None


def checked(case: CaseResult, name: Literal["boxes", "scores"]) -> float | None:
    """The largest difference of decoded boxes (pixels) or scores, as the check of that name has it."""
    return next((check.value for stage in case.stages for check in stage.checks if check.name == name), None)


def worst_checks(stage: StageResult) -> list[Check]:
    """Of checks that have one name, as a record's on all candidates and on its full tensors, the worst."""
    found: dict[str, Check] = {}
    for check in stage.checks:
        known = found.setdefault(check.name, check)
        if (known.ok, -known.value) > (check.ok, -check.value):
            found[check.name] = check
    return list(found.values())


def key(value: float | None) -> str:
    """What the table sorts a number by; empty sorts last."""
    return "" if value is None or math.isnan(value) else repr(float(value))


def share(value: float | None) -> str:
    """Per cent with one decimal, of 0..1."""
    return ABSENT if value is None else f"{100 * value:.1f} %"


def megabytes(size: int | None) -> str:
    """A size in bytes, as ``12.3 MB`` of 10^6."""
    return ABSENT if size is None else f"{size / 1e6:.3g} MB"


def plural(count: int, noun: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{count} {noun}" if count == 1 else f"{count} {_add_s(noun)}"


def verb(count: int, verb: str) -> str:
    """Third person: one case fails, two cases fail; one passes, two pass."""
    return _add_s(verb) if count == 1 else verb


def _add_s(word: str) -> str:
    return word + ("es" if word.endswith(("s", "x")) else "s")
