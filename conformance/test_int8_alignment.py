"""``pytest -m int8_alignment``: INT8 by every route is held to torch in FP32, QDQ also to its graph node by node."""

import pytest

from alignment.results import CaseResult

pytestmark = pytest.mark.int8_alignment


def test_case(aligned_case: CaseResult) -> None:
    assert aligned_case.case.precision == "int8"
    failed = [check for stage in aligned_case.stages for check in stage.checks if not check.ok]
    assert aligned_case.status == "pass", f"{aligned_case.case.id} {aligned_case.reason}; failed: {failed}"
    assert any(stage.status == "pass" for stage in aligned_case.stages)
