"""Verdicts and golden values: planted faults in results made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.case import Case
from alignment.compare.measure import Measured
from alignment.compare.verdict import first_difference, judge, wrong_side
from alignment.errors import AlignError
from alignment.golden import (
    DEFAULTS,
    FACTOR,
    Golden,
    GoldenAp,
    GoldenCase,
    Overlay,
    Tolerance,
    golden_path,
    limits,
    read_golden,
    update,
)
from alignment.results import STAGES, CaseResult, ErrorStats, Scores, StageName, StageResult, TensorResult

ORT = Case("net", "onnxruntime", "fp32")
TRT = Case("net", "tensorrt", "fp32")
HERE = {"tensorrt": "8.6.1", "gpu": "NVIDIA H200"}


def stats(max_abs: float, nonfinite: int = 0) -> ErrorStats:
    return ErrorStats(
        count=100, max_abs=max_abs, mean_abs=max_abs / 2, p99_abs=max_abs, cosine=1.0, sqnr_db=80.0, nonfinite=nonfinite
    )


def tensor(name: str, error: float, ours: float = 1e-6, theirs: float = 1e-6, **nonfinite: int) -> TensorResult:
    return TensorResult(
        name=name,
        unit={"boxes": "px", "scores": "probability"}.get(name, "raw"),
        difference=stats(error, nonfinite.get("difference", 0)),
        subject_error=stats(ours, nonfinite.get("subject", 0)),
        reference_error=stats(theirs, nonfinite.get("reference", 0)),
    )


def measured(raw: float = 1e-5, boxes: float = 1e-4, **changes: Any) -> Measured:
    fields: dict[str, Any] = {
        "inputs": (6, 6),
        "tensors": [
            tensor("cls_s8", raw / 2),
            tensor("bbox_s8", raw),
            tensor("boxes", boxes),
            tensor("scores", 1e-6),
        ],
        "matched": 100,
        "total": 100,
        "scores": Scores(reference_ap=0.5, subject_ap=0.5, subject_ap50=0.7),
    }
    return Measured(**{**fields, **changes})


def judged(
    found: Measured, ap: GoldenAp | None = None, images: int = 6, dataset: str | None = "d"
) -> list[StageResult]:
    held_to = limits(Golden(variant="net"), ORT, {})
    return judge(found, held_to.model_copy(update={"ap": ap}), images, dataset)


def stage(stages: list[StageResult], name: StageName) -> StageResult:
    return next(s for s in stages if s.name == name)


def scored(subject: float, reference: float | None = None) -> Measured:
    reference = subject if reference is None else reference
    return measured(scores=Scores(reference_ap=reference, subject_ap=subject, subject_ap50=0.7))


FAULTS: dict[str, dict[str, Any]] = {
    "input": {"inputs": (5, 6)},
    "raw": {"raw": 0.02},
    "decoded": {"boxes": 0.03},
    "detections": {"matched": 99},
    "map": {"scores": Scores(reference_ap=0.5, subject_ap=0.499, subject_ap50=0.7)},
}


def test_within_its_limits_every_stage_passes():
    stages = judged(measured())
    assert tuple(s.name for s in stages) == STAGES
    assert {s.status for s in stages} == {"pass"}
    assert first_difference(stages) is None
    assert [t.name for t in stage(stages, "raw").tensors] == ["cls_s8", "bbox_s8"]


@pytest.mark.parametrize("name", STAGES)
def test_a_fault_fails_its_own_stage(name):
    stages = judged(measured(**FAULTS[name]))
    assert [s.name for s in stages if s.status == "fail"] == [name]
    assert first_difference(stages) == name


@pytest.mark.parametrize("first", range(len(STAGES)))
def test_of_faults_in_several_stages_the_first_is_named(first):
    faults = [FAULTS[name] for name in STAGES[first:] if name != "decoded"]
    changes = {key: value for fault in faults for key, value in fault.items()}
    if first <= STAGES.index("decoded"):
        changes["boxes"] = 0.03
    assert first_difference(judged(measured(**changes))) == STAGES[first]


def test_a_difference_of_scores_fails_as_one_of_boxes_does():
    checks = stage(judged(measured(tensors=[tensor("boxes", 1e-4), tensor("scores", 2e-4)])), "decoded").checks
    assert [(c.name, c.ok) for c in checks] == [("boxes", True), ("scores", False)]


@pytest.mark.parametrize(("name", "where"), [("bbox_s8", "raw"), ("boxes", "decoded"), ("scores", "decoded")])
def test_one_value_that_is_finite_on_one_side_only_fails(name, where):
    tensors = [tensor("cls_s8", 1e-3), tensor("bbox_s8", 1e-5), tensor("boxes", 1e-4), tensor("scores", 1e-6)]
    tensors = [t if t.name != name else tensor(name, 0.0, difference=1) for t in tensors]
    stages = judged(measured(tensors=tensors))
    assert first_difference(stages) == where
    assert "1 values are finite on one side only" in next(c for c in stage(stages, where).checks if not c.ok).limit


def test_a_stage_without_numbers_is_not_checked_and_says_why():
    notes: dict[StageName, str] = {"input": "no images", "map": "no truth", "detections": "this is the reference"}
    stages = judged(Measured(tensors=[tensor("boxes", 1e-4)], notes=notes))
    assert {s.name: s.status for s in stages} == {name: "not_checked" for name in STAGES} | {"decoded": "pass"}
    assert all(s.note for s in stages if s.status == "not_checked")
    assert first_difference(stages) is None


def test_with_nothing_found_on_either_side_the_agreement_is_1():
    assert stage(judged(measured(matched=0, total=0)), "detections").checks[0].value == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "side"),
    [(1e-3, 1e-6, "subject"), (1e-6, 1e-3, "reference"), (2e-6, 1e-6, "neither"), (0.0, 0.0, "neither")],
)
def test_the_wrong_side_is_the_one_further_from_float64(ours, theirs, side):
    assert wrong_side([tensor("cls_s8", 1e-6), tensor("boxes", 1e-3, ours, theirs)]) == side


@pytest.mark.parametrize("side", ["subject", "reference"])
def test_the_side_with_values_that_are_not_finite_is_the_wrong_one(side):
    assert wrong_side([tensor("boxes", 0.0, **{side: 3})]) == side


def test_without_float64_nobody_knows_the_wrong_side():
    bare = TensorResult(name="boxes", unit="px", difference=stats(1.0))
    assert wrong_side([bare]) == wrong_side([]) == "unknown"


GOLDEN_AP = GoldenAp(value=0.5, margin=0.002, images=6, dataset="d", origin="measured")


@pytest.mark.parametrize(
    ("ap", "status", "hint"),
    [(0.4985, "pass", False), (0.5015, "pass", False), (0.497, "fail", False), (0.503, "fail", True)],
)
def test_an_ap_outside_its_margin_fails_and_a_better_one_with_a_hint(ap, status, hint):
    found = stage(judged(scored(ap), GOLDEN_AP), "map")
    assert found.status == status
    assert ("--update-golden" in found.checks[-1].limit) is hint


@pytest.mark.parametrize(("images", "dataset"), [(7, "d"), (6, "other"), (6, None)])
def test_an_ap_of_other_images_does_not_bind(images, dataset):
    found = stage(judged(scored(0.9), GOLDEN_AP, images, dataset), "map")
    assert found.status == "pass"
    assert [c.name for c in found.checks] == ["delta_ap"]


def golden_with_overlay(when: dict[str, str]) -> Golden:
    plain = GoldenCase(tolerances={"boxes": Tolerance(value=1.0, origin="plain")}, ap=GOLDEN_AP)
    overlay = GoldenCase(tolerances={"boxes": Tolerance(value=2.0, origin="overlay")})
    return Golden(variant="net", cases={TRT.id: plain}, overlays=[Overlay(when=when, cases={TRT.id: overlay})])


@pytest.mark.parametrize(
    ("when", "value"),
    [
        ({"tensorrt": "8.6"}, 2.0),
        ({"tensorrt": "8.6.1", "gpu": "NVIDIA H200"}, 2.0),
        ({"tensorrt": "10"}, 1.0),
        ({"tensorrt": "8.6", "gpu": "Tesla T4"}, 1.0),
        ({"driver": "535"}, 1.0),
    ],
)
def test_an_overlay_holds_at_its_place_only(when, value):
    found = limits(golden_with_overlay(when), TRT, HERE)
    assert found.tolerances["boxes"].value == value
    assert found.tolerances["raw"].value == DEFAULTS["fp32"]["raw"]
    assert found.ap == GOLDEN_AP


def test_values_of_one_case_do_not_hold_for_another_and_limits_change_no_golden():
    golden = golden_with_overlay({"tensorrt": "8.6"})
    before = golden.model_dump()
    limits(golden, TRT, HERE)
    assert limits(golden, ORT, HERE).tolerances["boxes"].value == DEFAULTS["fp32"]["boxes"]
    assert limits(golden, ORT, HERE).ap is None
    assert golden.model_dump() == before


@pytest.mark.parametrize(
    ("images", "given", "expected"),
    [
        # GOLDEN_AP is of 6 images; the defaults of fp32 are 0.999 and 0.0005.
        (6, {"agreement": 0.9995, "delta_ap": 0.0001}, {"agreement": 0.9995, "delta_ap": 0.0001}),
        (None, {"agreement": 0.9995, "delta_ap": 0.0001}, {"agreement": 0.9995, "delta_ap": 0.0001}),
        (5, {"agreement": 0.9995, "delta_ap": 0.0001}, {"agreement": 0.999, "delta_ap": 0.0005}),
        (5, {"agreement": 0.9, "delta_ap": 0.1}, {"agreement": 0.88, "delta_ap": 0.12}),
        (1, {"agreement": 0.8, "delta_ap": 0.1}, {"agreement": 0.0, "delta_ap": 0.6}),
    ],
)
def test_rates_of_many_images_do_not_bind_a_run_of_fewer(images, given, expected):
    given = {**given, "boxes": 1e-6}
    tolerances = {name: Tolerance(value=value, origin="measured") for name, value in given.items()}
    golden = Golden(variant="net", cases={TRT.id: GoldenCase(tolerances=tolerances, ap=GOLDEN_AP)})
    found = limits(golden, TRT, HERE, images).tolerances
    assert {name: found[name].value for name in given} == pytest.approx({**expected, "boxes": 1e-6})
    widened = f"measured; widened: {images} of the 6 measured images"
    for name in ("agreement", "delta_ap"):
        assert found[name].origin == ("measured" if images in (6, None) else widened)


def result_of(case: Case, found: Measured, provenance: dict[str, str] | None = None) -> CaseResult:
    return CaseResult(
        case=case.result_id(),
        status="pass",
        reason="",
        images=6,
        stages=judged(found),
        scores=found.scores,
        provenance=provenance or {"onnxruntime": "1.32"},
    )


def test_update_writes_what_was_measured_times_the_factor_with_its_origin(tmp_path):
    found = measured(raw=1e-3, boxes=0.0034, matched=98)
    path = update(tmp_path, result_of(ORT, found), {"fingerprint": "d"}, "first light")
    entry = read_golden(tmp_path, "net").cases[ORT.id]
    values = {name: tolerance.value for name, tolerance in entry.tolerances.items()}
    expected = {"raw": FACTOR * 1e-3, "boxes": FACTOR * 0.0034, "scores": FACTOR * 1e-6, "agreement": 1 - FACTOR * 0.02}
    # Limits have two digits.
    assert values == pytest.approx({**expected, "delta_ap": 0.0005}, rel=0.05)
    assert values["agreement"] == pytest.approx(expected["agreement"], abs=1e-5)
    assert path == golden_path(tmp_path, "net")
    assert entry.ap
    assert (entry.ap.value, entry.ap.images, entry.ap.dataset) == (0.5, 6, "d")
    for text in (*(t.origin for t in entry.tolerances.values()), entry.ap.origin):
        assert "first light" in text
        assert "onnxruntime 1.32" in text
    assert first_difference(judge(found, limits(read_golden(tmp_path, "net"), ORT, {}), 6, "d")) is None


def test_update_of_tensorrt_goes_into_the_overlay_of_its_place_and_keeps_the_rest(tmp_path):
    update(tmp_path, result_of(ORT, measured()), {}, "one")
    for boxes in (0.001, 0.002):
        update(tmp_path, result_of(TRT, measured(boxes=boxes), HERE), {}, "two")
    update(tmp_path, result_of(TRT, measured(boxes=0.004), {**HERE, "tensorrt": "10.16"}), {}, "three")
    golden = read_golden(tmp_path, "net")
    assert list(golden.cases) == [ORT.id]
    assert [o.when for o in golden.overlays] == [HERE, {**HERE, "tensorrt": "10.16"}]
    assert limits(golden, TRT, HERE).tolerances["boxes"].value == pytest.approx(FACTOR * 0.002)
    assert limits(golden, TRT, {}).tolerances["boxes"].value == DEFAULTS["fp32"]["boxes"]


@pytest.mark.parametrize(("matched", "least"), [(0, 0.0), (30, 0.25), (50, 0.45), (97, 0.92), (98, 0.94)])
def test_a_bad_agreement_may_be_little_worse(tmp_path, matched, least):
    update(tmp_path, result_of(ORT, measured(matched=matched)), {}, "why")
    held = read_golden(tmp_path, "net").cases[ORT.id].tolerances["agreement"].value
    assert held == pytest.approx(least)


def test_a_replayed_result_measured_nothing_and_is_refused(tmp_path):
    replayed = result_of(TRT, measured(), HERE).model_copy(update={"replayed": True})
    with pytest.raises(AlignError, match="replayed from a record"):
        update(tmp_path, replayed, {}, "why")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"variant: [",
        b"",
        b"\xff\xfe\x00",
        b"- a list",
        b"variant: net\nschema_version: 2",
        b"variant: net\nspeed: 3",
        yaml.safe_dump({"variant": "net", "cases": {"x": {"tolerances": {"boxes": {"value": 1}}}}}).encode(),
        yaml.safe_dump(
            {"variant": "net", "cases": {"x": {"tolerances": {"boxes": {"value": -1, "origin": ""}}}}}
        ).encode(),
    ],
    ids=["no YAML", "empty", "no text", "list", "version", "field", "no origin", "negative"],
)
def test_a_bad_golden_file_is_named_with_its_mend(tmp_path: Path, content: bytes):
    path = golden_path(tmp_path, "net")
    path.write_bytes(content)
    with pytest.raises(AlignError) as caught:
        read_golden(tmp_path, "net")
    assert str(path) in caught.value.what
    assert "--update-golden" in caught.value.mend
    assert "\n" not in str(caught.value)


def test_no_golden_file_means_the_defaults(tmp_path):
    found = limits(read_golden(tmp_path, "net"), Case("net", "tensorrt", "tf32"), HERE)
    assert {name: t.value for name, t in found.tolerances.items()} == DEFAULTS["tf32"]
    assert all("nothing measured" in t.origin for t in found.tolerances.values())
