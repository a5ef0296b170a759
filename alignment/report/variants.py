"""A report's content by variant: its cases and all else that is known of it, and its way from FP32 to int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from alignment.case import BACKENDS, PRECISIONS, ROUTES
from alignment.gate.numbers import known, numbers_of
from alignment.inspection.saved import Inspection
from alignment.quantize.partial_result import PartialResult
from alignment.quantize.sensitivity import Sensitivity
from alignment.report.gather import Gathered
from alignment.report.plot import Mark, Series, dots, key
from alignment.results import CaseResult, Explanation, Ladder, Rung, RungScore

MARKS = {"torch": "square", "onnxruntime": "circle", "tensorrt": "triangle"}


@dataclass(frozen=True)
class Row:
    """One backend at one step from FP32 to int8: a case, or a rung of a ladder.  What is not known is None.

    Attributes:
        step: ``FP32``, ``FP16``, ``INT8 qdq``, or the rung's name.
        backend: where.
        case: the case, where it is one.
        ap, change, agreement_ap: 0..1; the change is against the reference, of a rung against FP32 on its backend.
        agreement: the rate of detections that both sides have, 0..1.
        int8_macs, float_nodes: of a rung.
        latency_ms, batch, clock: see `alignment.results.Timing`.
        size_bytes, layers, reformats: of the engine.
    """

    step: str
    backend: str
    case: CaseResult | None = None
    ap: float | None = None
    change: float | None = None
    agreement: float | None = None
    agreement_ap: float | None = None
    int8_macs: float | None = None
    float_nodes: int | None = None
    latency_ms: float | None = None
    batch: int | None = None
    clock: str | None = None
    size_bytes: int | None = None
    layers: int | None = None
    reformats: int | None = None


@dataclass
class VariantPart:
    """All that a report has of one variant."""

    name: str
    cases: list[CaseResult] = field(default_factory=list)
    ladder: Ladder | None = None
    explanations: list[Explanation] = field(default_factory=list)
    sensitivities: list[Sensitivity] = field(default_factory=list)
    partials: list[PartialResult] = field(default_factory=list)
    engines: list[Inspection] = field(default_factory=list)
    dataset: Any = None

    @property
    def rows(self) -> list[Row]:
        """The steps from FP32 to int8, those of one step together."""
        measured = [_of_case(case) for case in self.cases if case.status != "skip"]
        if self.ladder:
            rungs = [(rung, score) for rung in self.ladder.rungs for score in rung.scores]
            measured += [_of_rung(self.ladder, rung, score) for rung, score in rungs]
        return measured

    @property
    def plots(self) -> list[Markup]:
        """A legend, and dot plots of AP and of agreement by step, where there are values."""
        rows = self.rows
        steps = list(dict.fromkeys(row.step for row in rows))
        wanted: list[tuple[str, Callable[[Row], float | None]]] = [
            ("AP", lambda row: row.ap),
            ("AP with the reference's detections as truth", lambda row: row.agreement_ap),
        ]
        found, legend = [], Markup("")
        for title, value_of in wanted:
            series = [_series(backend, steps, rows, value_of) for backend in BACKENDS]
            shown = [steps[int(y)] for y in sorted({mark.y for one in series for mark in one.values})]
            if len(shown) > 1:
                series = [_series(backend, shown, rows, value_of) for backend in BACKENDS]
                found.append(dots(title, shown, series))
                legend = legend or key(series)
        return [legend, *found] if found else []


def parts(found: Gathered) -> list[VariantPart]:
    """By variant, those with a case that fails first, then by name."""
    alignment = found.alignment
    by_name: dict[str, VariantPart] = {}

    def part(name: str) -> VariantPart:
        return by_name.setdefault(name, VariantPart(name, dataset=alignment.dataset_of(name)))

    for case in sorted(alignment.cases, key=order):
        part(case.case.variant).cases.append(case)
    for ladder in alignment.ladders:
        part(ladder.variant).ladder = ladder
    for sweep in found.sensitivities:
        part(sweep.variant).sensitivities.append(sweep)
    for search in found.partials:
        part(search.variant).partials.append(search)
    for one in alignment.explanations:
        part(_variant_of(one.id, by_name)).explanations.append(one)
    for engine in found.engines:
        part(_variant_of(engine.name, by_name)).engines.append(engine)
    return sorted(by_name.values(), key=lambda each: (not _fails(each), each.name))


def order(case: CaseResult) -> tuple[int, int, int, str]:
    """The order of cases: by precision, route, backend."""
    one = case.case
    places = _place(one.precision, PRECISIONS), _place(one.route or "", ROUTES), _place(one.backend, BACKENDS)
    return *places, one.id


def step(case: CaseResult) -> str:
    """``FP32``, ``INT8 qdq``."""
    return " ".join(filter(None, (case.case.precision.upper(), case.case.route)))


def _of_case(case: CaseResult) -> Row:
    numbers, timing, engine = numbers_of(case), case.timing, case.engine
    return Row(
        step=step(case),
        backend=case.case.backend,
        case=case,
        ap=numbers.ap,
        change=numbers.delta_ap,
        agreement=numbers.agreement,
        agreement_ap=numbers.agreement_ap,
        latency_ms=numbers.latency_ms,
        batch=timing.batch if timing else None,
        clock=timing.clock if timing else None,
        size_bytes=engine.size_bytes if engine else None,
        layers=engine.layers if engine else None,
        reformats=numbers.reformats,
    )


def _of_rung(ladder: Ladder, rung: Rung, score: RungScore) -> Row:
    return Row(
        step=rung.name,
        backend=score.backend,
        ap=known(score.ap),
        change=ladder.ap_change(rung, score.backend),
        agreement_ap=score.agreement_ap,
        int8_macs=rung.int8_macs,
        float_nodes=rung.float_nodes,
    )


def _series(backend: str, steps: Sequence[str], rows: Sequence[Row], value_of: Callable[[Row], float | None]) -> Series:
    marks = []
    for row in rows:
        value = value_of(row)
        if row.backend == backend and row.step in steps and value is not None:
            marks.append(Mark(value, steps.index(row.step), f"{row.step}, {backend}: {value:.4f}"))
    return Series(backend, f"by-{backend}", MARKS[backend], marks)


def _variant_of(name: str, known_names: dict[str, VariantPart]) -> str:
    """Of an explanation or an engine, whose names begin with their variant's."""
    fits = [variant for variant in known_names if name == variant or name.startswith(f"{variant}-")]
    return max(fits, key=len, default=name.partition("-")[0])


def _fails(part: VariantPart) -> bool:
    return any(case.status == "fail" for case in part.cases) or any(
        one.unexplained or one.wrong_settings for one in part.explanations
    )


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)
