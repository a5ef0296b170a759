"""The numbers of a case that the gate looks at, and whether those of two runs may be compared."""

from __future__ import annotations

from typing import Any

from alignment.gate.results import Numbers
from alignment.results import Alignment, CaseResult


def numbers_of(case: CaseResult, reformats: int | None = None) -> Numbers:
    """What a case came to.

    Args:
        reformats: of its engine, where the case itself does not tell.
    """
    checks = {check.name: check.value for stage in case.stages for check in stage.checks}
    found = Numbers(agreement=checks.get("agreement"), reformats=reformats)
    if case.engine:
        found.reformats = case.engine.reformats
    if case.timing:
        found.latency_ms = case.timing.latency_ms
    if scores := case.scores:
        found.ap, found.agreement_ap = known(scores.subject_ap), known(scores.agreement_ap)
        reference = known(scores.reference_ap)
        if found.ap is not None and reference is not None:
            found.delta_ap = found.ap - reference
    return found


def known(ap: float | None) -> float | None:
    """An AP; None where it is below 0, which is that of images without truth."""
    return None if ap is None or ap < 0 else ap


def comparable_images(case: CaseResult, run: Alignment, before: CaseResult, baseline: Alignment) -> str:
    """Why rates of two runs cannot be compared; empty where they stand on the same images, as far as both tell."""
    if case.images != before.images:
        return f"{case.images} images, {before.images} in the baseline"
    prints = [one.dataset_of(case.case.variant).get("fingerprint") for one in (run, baseline)]
    if None not in prints and prints[0] != prints[1]:
        return f"images {prints[0]}, in the baseline {prints[1]}"
    return ""


def place_of(case: CaseResult, run: Alignment) -> str:
    """Where and how a latency was taken: those of two places say nothing about each other."""
    timing, papers = case.timing, case.provenance
    if timing is None:
        return ""
    build: dict[str, Any] = papers.get("build", {})
    if timing.clock == "gpu":
        where = [papers.get("gpu"), f"level {build.get('optimization_level')}"]
    else:
        machine = run.machine
        where = [machine.get("system"), f"{machine.get('cpus')} CPUs", papers.get("cpu_capability"), papers.get("gpu")]
        where.append(f"{papers['threads']} threads" if "threads" in papers else None)
    clock = {"gpu": "GPU's clock", "wall": "wall clock"}.get(timing.clock or "", "no clock")
    return ", ".join(str(part) for part in [*where, f"batch {timing.batch}", clock] if part)
