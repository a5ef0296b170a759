"""TensorRT's committed records, judged on any machine."""

from __future__ import annotations

import pytest

from alignment.case import Case
from alignment.pipeline import explain_tf32
from alignment.replay import has_record, replay
from alignment.results import CaseResult
from alignment.variant import golden_dir, load_variant, zoo

RECORDED, RECORDED_TF32 = (
    [p.stem for p in zoo() if has_record(golden_dir(), Case(p.stem, "tensorrt", precision))]
    for precision in ("fp32", "tf32")
)


def replayed(name: str, precision: str) -> CaseResult:
    return replay(load_variant(name), Case(name, "tensorrt", precision), golden_dir(), None)  # type: ignore[arg-type]


def error(result: CaseResult, unit: str) -> float:
    return max(t.difference.max_abs for stage in result.stages for t in stage.tensors if t.unit == unit)


def test_the_embedded_variant_has_a_record() -> None:
    assert "yolov8_embedded" in RECORDED
    assert "yolov8_embedded" in RECORDED_TF32


@pytest.mark.fp32_alignment
@pytest.mark.parametrize("name", RECORDED)
def test_fp32_meets_the_bounds_without_data(name: str) -> None:
    result = replayed(name, "fp32")
    assert result.status == "pass", result.reason
    assert error(result, "px") <= 0.02
    assert error(result, "probability") <= 1e-4
    assert {s.name: s.status for s in result.stages}["map"] == "not_checked"


@pytest.mark.parametrize("name", RECORDED_TF32)
def test_tf32_is_far_from_float64_and_named_as_the_reason(name: str) -> None:
    exact, loose = replayed(name, "fp32"), replayed(name, "tf32")
    assert error(loose, "px") > 20 * error(exact, "px")
    assert loose.wrong_side == "subject"
    explain_tf32([exact, loose])
    assert "TF32 is on" in loose.reason
    assert "with TF32 off" in loose.reason
