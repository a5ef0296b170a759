"""Golden limits are no looser than what the project promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignment.case import Case, reference_of
from alignment.golden import PROMISED, Golden, GoldenCase, Tolerance, golden_path, limits, read_golden, update
from alignment.results import CaseResult, Check, StageResult
from alignment.variant import golden_dir, load_variant

FILES = sorted(golden_dir().glob("*.yaml"))
CASES = [
    pytest.param(golden, Case(golden.variant, *name.split("-")[1:3]), overlay, id=" ".join([name, *overlay.values()]))
    for golden in (read_golden(golden_dir(), path.stem) for path in FILES)
    for overlay, cases in [({}, golden.cases), *((o.when, o.cases) for o in golden.overlays)]
    for name in cases
    if name.split("-")[2] in PROMISED
]


@pytest.mark.parametrize(("golden", "case", "place"), CASES)
def test_a_committed_limit_is_within_what_is_promised(golden: Golden, case: Case, place: dict[str, str]):
    held = limits(golden, case, place).tolerances
    for name, most in PROMISED[case.precision].items():
        measured = re.match(r"measured (\S+)", held[name].origin)
        # What the reference is held to, float64, has no AP.
        assert measured is not None or case == reference_of(load_variant(case.variant))
        assert measured is None or float(measured[1]) <= most
        assert held[name].value <= most


def test_every_family_and_both_precisions_are_among_them():
    assert {case.values[1].variant for case in CASES} == {path.stem for path in FILES} >= {"yolov8_n", "yolox_nano"}
    assert {case.values[1].precision for case in CASES} == {"fp32", "fp16"}


@pytest.mark.parametrize(
    ("precision", "value", "origin", "held"),
    [
        ("fp32 boxes", 0.037, "measured 0.0124 × 3", 0.02),
        ("fp32 scores", 2.9e-4, "measured 9.7e-5 × 3", 1e-4),
        ("fp32 boxes", 0.063, "measured 0.021 × 3", 0.063),
        ("fp32 raw", 0.2, "measured 0.07 × 3", 0.2),
        ("fp16 boxes", 0.037, "measured 0.0124 × 3", 0.037),
        ("fp16", 0.0064, "measured 0.0021 × 3, >= 0.0005", 0.003),
        ("fp32", 0.0018, "measured 0.0006 × 3", 0.001),
        ("fp16", 0.0018, "measured 0.0006 × 3", 0.0018),
        # A promise that is not kept is no limit: the case could never pass.
        ("fp16", 0.012, "measured 0.004 × 3", 0.012),
        ("fp16", 0.02, "agreed with those who deploy it", 0.02),
        ("tf32", 0.0064, "measured 0.0021 × 3", 0.0064),
        ("int8", 0.0064, "measured 0.0021 × 3", 0.0064),
    ],
)
def test_a_limit_is_capped_when_it_is_read(precision: str, value: float, origin: str, held: float):
    precision, _, quantity = precision.partition(" ")
    name = quantity or "delta_ap"
    case = Case("v", "tensorrt", precision, "qdq" if precision == "int8" else None)
    entry = GoldenCase(tolerances={name: Tolerance(value=value, origin=origin)})
    found = limits(Golden(variant="v", cases={case.id: entry}), case, {}).tolerances[name]
    assert found.value == held
    assert found.origin == (origin if held == value else f"{origin}; promised {held:g}")


@pytest.mark.parametrize(("measured", "written"), [(0.0004, 0.0012), (0.0021, 0.003), (0.004, 0.012)])
def test_a_limit_is_capped_when_it_is_written(tmp_path: Path, measured: float, written: float):
    case = Case("v", "onnxruntime", "fp16")
    check = Check(name="delta_ap", value=measured, limit="<= 1", ok=True)
    stages = [StageResult(name="map", status="pass", checks=[check])]
    result = CaseResult(case=case.result_id(), status="pass", reason="", stages=stages, images=8)
    update(tmp_path, result, {"fingerprint": "f"}, "a test")
    assert golden_path(tmp_path, "v").is_file()
    entry = read_golden(tmp_path, "v").cases[case.id].tolerances["delta_ap"]
    assert entry.value == written
    assert entry.origin.endswith("a test; promised 0.003") is (written == 0.003)
