"""``pytest -m fp16_alignment``: ONNX Runtime and TensorRT in FP16 are held to torch in FP32, case by case."""

import pytest

from alignment.results import CaseResult

pytestmark = pytest.mark.fp16_alignment


def test_case(aligned_case: CaseResult) -> None:
    assert aligned_case.case.precision == "fp16"
    failed = [check for stage in aligned_case.stages for check in stage.checks if not check.ok]
    assert aligned_case.status == "pass", f"{aligned_case.case.id} {aligned_case.reason}; failed: {failed}"
    assert any(stage.status == "pass" for stage in aligned_case.stages)
