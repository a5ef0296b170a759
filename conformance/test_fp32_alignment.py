"""``pytest -m fp32_alignment``: torch, ONNX Runtime and TensorRT give the same answers, case by case."""

import pytest

from alignment.results import CaseResult

pytestmark = pytest.mark.fp32_alignment


def test_case(aligned_case: CaseResult) -> None:
    failed = [check for stage in aligned_case.stages for check in stage.checks if not check.ok]
    assert aligned_case.status == "pass", f"{aligned_case.case.id} {aligned_case.reason}; failed: {failed}"
    assert any(stage.status == "pass" for stage in aligned_case.stages)
