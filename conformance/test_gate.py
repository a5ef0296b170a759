"""The release gate on typed results made by hand: each limit, each verdict, and what it says about the cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import align, one_line

from alignment.errors import AlignError
from alignment.gate.judge import gate
from alignment.gate.policy import LIMITS, PACKAGED, Policy, Rule, load_policy
from alignment.gate.results import GateResult
from alignment.report.gate_markdown import to_markdown
from alignment.report.run_folder import write_run
from alignment.results import (
    Alignment,
    CaseResult,
    Check,
    EngineFacts,
    Explanation,
    GraphSignature,
    LayerSignature,
    Scores,
    StageResult,
    Timing,
)

ORT, TRT, INT8 = "v-onnxruntime-fp32", "v-tensorrt-fp16", "v-tensorrt-int8-qdq"


def case(identity: str, ap: float = 0.5, agreement: float = 1.0, status: str = "pass", **more: object) -> CaseResult:
    variant, backend, precision, *route = identity.split("-")
    named = {"variant": variant, "backend": backend, "precision": precision, "route": route[0] if route else None}
    fields: dict[str, object] = {
        "case": {"id": identity, **named},
        "status": status,
        "reason": f"why {identity}",
        "reference": "v-torch-fp32",
        "images": 64,
        "stages": [
            StageResult(
                name="detections",
                status="pass",
                checks=[Check(name="agreement", value=agreement, limit=">= 0.5", ok=True)],
            )
        ],
        "scores": Scores(
            reference_ap=0.5, subject_ap=ap, subject_ap50=0.7, agreement_ap=agreement if precision == "int8" else None
        ),
        "provenance": {"onnx_sha256": "a" * 64},
    }
    return CaseResult.model_validate({**fields, **more})


def run(*cases: CaseResult, **more: object) -> Alignment:
    fields = {"created": "2026-01-01", "command": "align run", "cases": cases, **more}
    return Alignment.model_validate(fields)


def timed(milliseconds: float | None, gpu: str = "H100") -> dict[str, object]:
    timing = Timing(inference_s=1, images=64, latency_ms=milliseconds, clock="gpu", batch=1)
    return {"timing": timing, "provenance": {"gpu": gpu, "build": {"optimization_level": 3}}}


def judged(one: Alignment, baseline: Alignment | None = None, **policy: object) -> GateResult:
    packaged = load_policy()
    rules = [*packaged.rules, *(Rule.model_validate(rule) for rule in policy.pop("rules", []))]  # type: ignore[attr-defined]
    return gate(one, packaged.model_copy(update={**policy, "rules": rules}), baseline)


def stopping(result: GateResult) -> list[tuple[str, str]]:
    assert result.verdict == ("stopped" if result.stopping else "passed")
    return [(finding.kind, finding.case) for finding in result.stopping]


def test_a_run_that_keeps_everything_passes_with_and_without_a_baseline():
    one = run(case(ORT), case(TRT, 0.499, 0.99), case(INT8, 0.495, 0.95))
    assert stopping(judged(one)) == []
    result = judged(one, one)
    assert stopping(result) == []
    assert result.changes == []
    assert [c.verdict for c in result.cases] == ["pass"] * 3


def test_a_golden_failure_stops_and_tells_its_stage():
    result = judged(run(case(ORT, status="fail", first_difference="raw"), case(TRT)))
    assert stopping(result) == [("golden", ORT)]
    assert (result.stopping[0].stage, result.stopping[0].what) == ("raw", f"why {ORT}")
    assert {c.id: c.verdict for c in result.cases} == {ORT: "stop", TRT: "pass"}


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (case(ORT, ap=0.4985), "delta_ap 0.0015, allowed <= 0.001"),
        (case(ORT, ap=0.5015), "delta_ap 0.0015, allowed <= 0.001"),
        (case(ORT, agreement=0.998), "agreement 0.998, allowed >= 0.999"),
        (case(TRT, ap=0.496), "delta_ap 0.004, allowed <= 0.003"),
        (case(INT8, agreement=0.89), "agreement_ap 0.89, allowed >= 0.9"),
        (case(INT8, ap=0.489), "delta_ap 0.011, allowed <= 0.01"),
    ],
)
def test_each_packaged_limit_stops(broken: CaseResult, what: str):
    result = judged(run(broken))
    assert [finding.what for finding in result.stopping] == [what]
    assert stopping(result) == [("policy", broken.case.id)]


def test_a_value_on_the_limit_passes_in_spite_of_rounding():
    assert stopping(judged(run(case(ORT, ap=0.5 - 0.001), case(TRT, ap=0.5 - 0.003)))) == []
    assert stopping(judged(run(case(TRT, ap=0.4985 - 0.002)), run(case(TRT, ap=0.4985)))) == [("policy", TRT)]


def test_a_later_rule_has_the_last_word_by_its_pattern_and_null_lifts_a_limit():
    one = run(case(INT8, ap=0.48, agreement=0.8), case("w-tensorrt-int8-qdq", ap=0.48, agreement=0.8))
    loose = {"variant": "v*", "precision": "int8", "route": "qdq", "max_delta_ap": 0.03, "min_agreement_ap": None}
    assert {name for _, name in stopping(judged(one))} == {INT8, "w-tensorrt-int8-qdq"}
    assert {name for _, name in stopping(judged(one, rules=[loose]))} == {"w-tensorrt-int8-qdq"}
    assert {name for _, name in stopping(judged(one, rules=[{**loose, "route": "implicit"}]))} == {
        INT8,
        "w-tensorrt-int8-qdq",
    }


def test_a_rule_that_fits_no_case_is_said():
    rules = [{"variant": "yolov9*", "max_delta_ap": 1}, {"precision": "fp23", "max_delta_ap": 0}]
    said = [note for note in judged(run(case(ORT)), rules=rules).notes if "fits no case" in note]
    assert [note.partition("of the run: ")[2] for note in said] == ["variant: yolov9*", "precision: fp23"]


def test_a_regression_stops_though_golden_values_hold():
    result = judged(run(case(TRT, ap=0.4985)), run(case(TRT, ap=0.501)))
    assert stopping(result) == [("regression", TRT)]
    assert result.stopping[0].what == "AP 0.5010 -> 0.4985 (-0.0025), allowed -0.002"
    assert result.cases[0].before is not None


def test_agreement_is_held_to_the_baseline_by_the_measure_of_its_precision():
    assert stopping(judged(run(case(TRT, agreement=0.985)), run(case(TRT)))) == [("regression", TRT)]
    assert stopping(judged(run(case(INT8, agreement=0.94)), run(case(INT8, agreement=0.97)))) == [("regression", INT8)]
    assert stopping(judged(run(case(INT8, agreement=0.96)), run(case(INT8, agreement=0.97)))) == []


def test_an_improvement_that_nobody_expected_stops_unless_it_is_allowed():
    better, before = run(case(TRT, ap=0.5025)), run(case(TRT, ap=0.499))
    assert stopping(judged(better, before)) == [("improvement", TRT)]
    allowed = judged(better, before, improvements="allow")
    assert stopping(allowed) == []
    assert "improvement" in {finding.kind for finding in allowed.findings}


def test_a_case_of_the_baseline_that_is_gone_or_skipped_stops_and_one_that_is_new_does_not():
    skipped = case(INT8, status="skip", reference=None, scores=None)
    result = judged(run(case(ORT), skipped), run(case(TRT), case(INT8)))
    assert sorted(stopping(result)) == [("missing", TRT), ("missing", INT8)]
    assert {c.id: (c.verdict, c.new) for c in result.cases} == {
        ORT: ("pass", True),
        INT8: ("stop", False),
        TRT: ("missing", False),
    }
    assert stopping(judged(run(case(ORT), skipped), run(case(TRT), case(INT8)), missing="allow")) == []


def test_what_was_skipped_in_both_is_not_missing_but_a_run_of_nothing_stops():
    skipped = case(TRT, status="skip")
    assert stopping(judged(run(case(ORT), skipped), run(case(ORT), skipped))) == []
    assert stopping(judged(run(skipped))) == [("unchecked", "")]


def test_a_required_case_that_was_not_run_stops():
    required = Policy.model_validate({"require": [{"backend": "tensorrt", "precision": "int8"}]}).require
    assert stopping(judged(run(case(INT8)), require=required)) == []
    skipped = run(case(ORT), case(INT8, status="skip"))
    result = judged(skipped, require=required)
    assert stopping(result) == [("missing", "")]
    assert "backend: tensorrt, precision: int8" in result.stopping[0].what


def test_runs_on_other_images_cannot_be_compared_and_that_stops():
    fewer = run(case(TRT, images=16))
    assert "16 images, 64 in the baseline" in judged(fewer, run(case(TRT))).stopping[0].what
    one, other = (run(case(TRT), dataset={"v": {"fingerprint": name}}) for name in "ab")
    assert stopping(judged(one, other)) == [("unchecked", TRT)]
    assert stopping(judged(one, one)) == []


def test_an_ap_of_images_without_truth_is_none_and_that_is_said():
    blind = Scores(reference_ap=-1, subject_ap=-1, subject_ap50=-1)
    result = judged(run(case(TRT, scores=blind)), run(case(TRT, scores=blind)))
    assert stopping(result) == []
    assert (result.cases[0].now.ap, result.cases[0].now.delta_ap) == (None, None)
    assert any("max_delta_ap not applied" in finding.what for finding in result.findings)


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        (case(TRT, scores=None), "AP 0.5000 -> unknown"),
        (case(TRT, scores=Scores(reference_ap=-1, subject_ap=-1, subject_ap50=-1)), "AP 0.5000 -> unknown"),
        (case(TRT, stages=[]), "agreement 1.0000 -> unknown"),
        (case(INT8, scores=Scores(reference_ap=0.5, subject_ap=0.5, subject_ap50=0.7)), "agreement_ap 1.0000 -> unkn"),
    ],
)
def test_a_rate_that_only_the_baseline_has_is_lost(lost: CaseResult, what: str):
    result = judged(run(lost), run(case(lost.case.id)))
    assert stopping(result) == [("regression", lost.case.id)]
    assert result.stopping[0].what.startswith(what)
    assert stopping(judged(run(case(lost.case.id)), run(lost))) == []


NAN = float("nan")


@pytest.mark.parametrize(
    "broken",
    [case(TRT, ap=NAN), case(TRT, agreement=NAN), case(INT8, agreement=NAN), case(TRT, **timed(NAN))],
    ids=["ap", "agreement", "agreement_ap", "latency"],
)
def test_nan_keeps_no_limit(broken: CaseResult):
    before = case(broken.case.id, **(timed(1.0) if broken.timing else {}))
    assert ("regression", broken.case.id) in stopping(judged(run(broken), run(before)))
    if not broken.timing:
        assert stopping(judged(run(broken))) == [("policy", broken.case.id)]


def test_a_latency_of_nothing_is_none():
    result = judged(run(case(TRT, **timed(1.0))), run(case(TRT, **timed(0.0))))
    assert stopping(result) == []
    assert any("the baseline has no latency" in finding.what for finding in result.findings)


def signature(output: float, image: int = 1) -> GraphSignature:
    layer = LayerSignature(node="/conv/Conv", op="Conv", weights=[1.0], output=[output, output])
    return GraphSignature(image_id=image, input_digest="d", layers=[layer])


def test_where_layers_have_to_be_the_same_those_that_change_or_cannot_be_compared_stop():
    before = run(case(ORT, signature=signature(1)))
    same, other = run(case(ORT, signature=signature(1))), run(case(ORT, signature=signature(2)))
    assert stopping(judged(same, before, layers="stop")) == []
    (finding,) = judged(other, before, layers="stop").stopping
    assert (finding.kind, finding.case, finding.stage, finding.layer) == ("regression", ORT, "raw", "/conv/Conv (Conv)")
    assert stopping(judged(other, before)) == []
    unlike = {"this run has no signature": run(case(ORT)), "image 2": run(case(ORT, signature=signature(1, image=2)))}
    for why, blind in unlike.items():
        assert why in judged(blind, before, layers="stop").stopping[0].what
        allowed = judged(blind, before)
        assert stopping(allowed) == []
        assert any(why in note for note in allowed.notes)


def test_latency_is_held_where_both_were_taken_in_one_place():
    fast, slow = (run(case(TRT, **timed(ms))) for ms in (1.0, 1.2))
    result = judged(slow, fast)
    assert stopping(result) == [("regression", TRT)]
    assert result.stopping[0].what == "latency 1 -> 1.2 ms, 1.20 x, allowed 1.1 x"
    assert stopping(judged(fast, slow)) == []
    for other, why in ((timed(1.0, "H200"), "taken on H100, level 3"), (timed(None), "the baseline has no latency")):
        result = judged(slow, run(case(TRT, **other)))
        assert stopping(result) == []
        assert [f.what for f in result.findings if why in f.what], result.findings


def test_reformats_come_from_the_run_or_an_inspected_engine_and_are_said_to_be_unknown_otherwise():
    budget = [{"precision": "int8", "max_reformats": 5}]
    heavy = case(INT8, engine=EngineFacts(layers=90, reformats=9, size_bytes=1))
    assert stopping(judged(run(heavy), rules=budget)) == [("policy", INT8)]
    packaged = load_policy()
    policy = packaged.model_copy(update={"rules": [*packaged.rules, Rule.model_validate(budget[0])]})
    assert stopping(gate(run(case(INT8)), policy, reformats={INT8: 6})) == [("policy", INT8)]
    assert stopping(gate(run(case(INT8)), policy, reformats={INT8: 5})) == []
    unknown = judged(run(case(INT8)), rules=budget)
    assert stopping(unknown) == []
    assert any("max_reformats not applied" in finding.what for finding in unknown.findings)


def test_a_difference_without_a_cause_stops():
    def explained(unexplained: int, wrong: int = 0) -> Alignment:
        one = Explanation(
            id="v-efficient_nms",
            reference="a",
            subject="b",
            images=1,
            reference_detections=9,
            subject_detections=9,
            differing=4,
            unexplained=unexplained,
            wrong_settings=wrong,
        )
        return run(case(ORT), explanations=[one])

    assert stopping(judged(explained(0))) == []
    assert stopping(judged(explained(1))) == [("policy", "v-efficient_nms")]
    assert stopping(judged(explained(0, wrong=2))) == [("policy", "v-efficient_nms")]
    assert stopping(judged(explained(1), rules=[{"variant": "v", "max_unexplained": 1}])) == []
    assert stopping(judged(run(case(ORT)), explained(0))) == [("missing", "v-efficient_nms")]
    assert stopping(judged(run(case(ORT)), explained(0), missing="allow")) == []
    assert to_markdown(judged(explained(1))).startswith("## Release gate stopped: 1 finding\n")


def test_changes_come_in_the_order_of_cause_and_effect_and_a_regression_names_the_first():
    def made(weights: str, graph: str, version: str, python: str, ap: float) -> Alignment:
        papers = {"onnx_sha256": graph, "tensorrt": version, "build": {"fp16": True}, "engine_sha256": graph + version}
        one = case(TRT, ap=ap, provenance=papers, reference_provenance={"weights_sha256": weights})
        return run(one, machine={"python": python})

    before = made("w", "g", "8.6.1", "3.11", 0.5)
    everything = judged(made("x", "h", "10.3", "3.12", 0.49), before)
    assert [c.field for c in everything.changes] == ["weights_sha256", "onnx_sha256", "tensorrt", "python"]
    assert {f.since for f in everything.stopping} == {"weights_sha256"}
    upgraded = judged(made("w", "g", "10.3", "3.12", 0.4975), before)
    (finding,) = upgraded.stopping
    assert (finding.kind, finding.since) == ("regression", "tensorrt")
    assert (upgraded.changes[0].before, upgraded.changes[0].after) == ("8.6.1", "10.3")
    assert upgraded.changes[0].cases == [TRT]
    assert {f.since for f in judged(made("w", "g", "8.6.1", "3.12", 0.49), before).stopping} == {"python"}


def test_the_summary_tells_verdict_cases_and_changes_and_no_cell_breaks_the_table():
    bad = case(TRT, ap=0.49, provenance={"onnx_sha256": "b" * 64, "flag": "a|b"})
    text = to_markdown(judged(run(bad, case(ORT)), run(case(TRT), case(ORT))))
    assert text.startswith("## Release gate stopped: 2 findings in 1 of 2 cases\n")
    assert f"| {TRT} | **stop** | 0.5000 -> 0.4900 | 1.0000 | - |" in text
    assert f"| onnx_sha256 | aaaaaaaaaaaa | bbbbbbbbbbbb | {TRT} |" in text
    assert "a\\|b" in text
    assert "without a baseline" in to_markdown(judged(run(case(ORT))))


def test_the_packaged_policy_sets_every_limit_or_leaves_it_on_purpose():
    policy = load_policy()
    named = {name for rule in policy.rules for name in LIMITS if name in rule.model_fields_set}
    assert set(LIMITS) - named == {"max_reformats"}
    assert "max_reformats" in PACKAGED.read_text()


def test_a_policy_file_is_laid_over_the_packaged_one(tmp_path: Path):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"rules": [{"max_delta_ap": 0.5}], "improvements": "allow"}))
    policy = load_policy(path)
    assert policy.limits(case(ORT).case).max_delta_ap == 0.5
    assert policy.limits(case(ORT).case).min_agreement == 0.999
    assert (policy.improvements, policy.missing) == ("allow", "stop")
    path.write_text("")
    assert load_policy(path) == load_policy()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("rules: [{max_dap: 1}]", "rules.0.max_dap: Extra inputs are not permitted"),
        ("rules: [{min_agreement: 2}]", "rules.0.min_agreement: Input should be less than or equal to 1"),
        ("missing: perhaps", "missing: Input should be 'stop' or 'allow'"),
        ("schema_version: 2", "schema_version: Input should be 1"),
        ("rules: [", "not YAML"),
        ("- a", "policy: Input should be"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_line(tmp_path: Path, content: str, complaint: str):
    path = tmp_path / "policy.yaml"
    path.write_text(content)
    with pytest.raises(AlignError) as caught:
        load_policy(path)
    assert str(path) in caught.value.what
    assert complaint in caught.value.what
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(run(case(ORT)), tmp_path / "run")
    return tmp_path / "run"


def test_the_command_takes_folders_or_files_and_writes_summary_and_json(folder: Path, tmp_path: Path):
    worse = tmp_path / "worse"
    write_run(run(case(ORT, ap=0.4)), worse)
    passed = align("gate", folder, "--baseline", folder / "alignment.json")
    assert (passed.exit_code, passed.stdout.splitlines()[-1]) == (0, "passed: 1 case")
    written = ("--summary", tmp_path / "new" / "summary.md", "--json", tmp_path / "gate.json")
    stopped = align("gate", worse, "--baseline", folder, *written)
    assert stopped.exit_code == 1
    assert "regression: AP 0.5000 -> 0.4000" in stopped.stdout
    assert (tmp_path / "new" / "summary.md").read_text().startswith("## Release gate stopped")
    result = GateResult.model_validate_json((tmp_path / "gate.json").read_text())
    assert stopping(result) == [("policy", ORT), ("regression", ORT)]


def test_several_runs_are_gated_as_one(folder: Path, tmp_path: Path):
    write_run(run(case(TRT)), tmp_path / "other")
    write_run(run(case(ORT), case(TRT)), tmp_path / "before")
    assert align("gate", folder, "--baseline", tmp_path / "before").exit_code == 1
    assert align("gate", folder, tmp_path / "other", "--baseline", tmp_path / "before").exit_code == 0
    write_run(run(case(TRT, status="skip")), tmp_path / "skipped")
    several = (folder, tmp_path / "other", tmp_path / "skipped")
    assert align("gate", *several, "--baseline", tmp_path / "before").exit_code == 0


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (run(case(ORT, status="fail")), run(case(ORT)), f"case {ORT} is in "),
        (
            run(case(ORT), dataset={"v": {"fingerprint": "a"}}),
            run(case(TRT), dataset={"v": {"fingerprint": "b"}}),
            "v was run on images b, in ",
        ),
    ],
    ids=["case", "images"],
)
def test_of_several_runs_none_hides_what_another_found(tmp_path: Path, first: Alignment, second: Alignment, said: str):
    write_run(first, tmp_path / "first")
    write_run(second, tmp_path / "second")
    done = align("gate", tmp_path / "first", tmp_path / "second")
    assert done.exit_code == 2
    assert said in one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no RUN"),
        (["{folder}/none"], "alignment.json does not exist"),
        (["{folder}", "--baseline", "{folder}/none"], "alignment.json does not exist"),
        (["{folder}", "--policy", "{folder}/none.yaml"], "none.yaml: No such file or directory"),
        (["{folder}", "--policy", "{folder}/alignment.json"], "alignment.json: "),
    ],
)
def test_wrong_usage_exits_2_with_one_line(folder: Path, arguments: list[str], complaint: str):
    result = align("gate", *(text.format(folder=folder) for text in arguments))
    assert result.exit_code == 2
    assert complaint in one_line(result.stderr)


@pytest.mark.parametrize("version", [0, 2])
def test_a_run_of_another_schema_version_is_refused_in_one_line(folder: Path, version: int):
    path = folder / "alignment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    result = align("gate", folder)
    assert result.exit_code == 2
    assert f"has schema_version {version}, this version of alignment reads 1" in one_line(result.stderr)


def test_the_packaged_policy_can_be_printed():
    result = align("gate", "--print-policy")
    assert (result.exit_code, result.stdout) == (0, PACKAGED.read_text())


def test_the_reformats_of_engines_that_a_gpu_built_are_read_where_the_graph_is_the_same():
    from alignment.gate.judge import inspected_reformats
    from alignment.inspection.saved import load_inspection
    from alignment.variant import golden_dir

    (path,) = (golden_dir() / "engines").glob("yolov8_n-tensorrt-int8-qdq-*.engine.json")
    digest = load_inspection(path).provenance["onnx_sha256"]
    name = "yolov8_n-tensorrt-int8-qdq"
    same, other = (case(name, provenance={"onnx_sha256": sha}) for sha in (digest, "0" * 64))
    assert inspected_reformats([path.parent], run(same))[name] > 0
    assert inspected_reformats([path.parent], run(other)) == {}
