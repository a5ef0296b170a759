"""TensorRT's committed records, judged on any machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignment.case import PRECISIONS, Case, cases_of, reference_of, twin_of
from alignment.pipeline import explain_tf32
from alignment.replay import has_record, replay
from alignment.results import CaseResult
from alignment.variant import golden_dir, load_variant, zoo

VARIANTS = [load_variant(path.stem) for path in zoo()]
CASES = [
    case
    for variant in VARIANTS
    for case in cases_of(variant, ("tensorrt",), PRECISIONS)
    if has_record(golden_dir(), case)
]
FP32, TF32 = ([case for case in CASES if case.precision == precision] for precision in ("fp32", "tf32"))


def replayed(case: Case) -> CaseResult:
    return replay(load_variant(case.variant), case, golden_dir(), None)


def error(result: CaseResult, unit: str) -> float:
    return max(t.difference.max_abs for stage in result.stages for t in stage.tensors if t.unit == unit)


def test_every_committed_record_is_replayed_here_or_is_a_reference() -> None:
    committed = {path.stem for path in (golden_dir() / "records").glob("*.json")}
    read_beside = {reference_of(variant).id for variant in VARIANTS} | {t.id for t in map(twin_of, CASES) if t}
    assert {case.id for case in CASES} == committed - read_beside
    assert {case.id for case in CASES} >= {f"yolov8_embedded-tensorrt-{p}" for p in ("fp32", "tf32", "fp16")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_record_meets_its_limits_without_data(case: Case) -> None:
    result = replayed(case)
    assert result.status == "pass", result.reason
    assert {s.name: s.status for s in result.stages}["map"] == "not_checked"


@pytest.mark.fp32_alignment
@pytest.mark.parametrize("case", FP32, ids=lambda case: case.id)
def test_fp32_meets_the_bounds(case: Case) -> None:
    result = replayed(case)
    assert error(result, "px") <= 0.02
    assert error(result, "probability") <= 1e-4


@pytest.mark.parametrize("case", TF32, ids=lambda case: case.id)
def test_tf32_is_far_from_float64_and_named_as_the_reason(case: Case) -> None:
    exact, loose = replayed(replace(case, precision="fp32")), replayed(case)
    assert error(loose, "px") > 20 * error(exact, "px")
    assert loose.wrong_side == "subject"
    explain_tf32([exact, loose])
    assert "TF32 is on" in loose.reason
    assert "with TF32 off" in loose.reason
