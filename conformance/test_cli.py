"""``align``: exit status and what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import yaml
from command_line import RUN, align, checkpoint, dataset, python, truncated

from alignment.reference.command_line import commands
from alignment.results import SCHEMA_VERSION, Alignment
from alignment.variant import ZOO, golden_dir

TRT = "yolov8_embedded-tensorrt-fp32"


@pytest.fixture
def needs_mmyolo() -> None:
    pytest.importorskip("mmyolo")


@pytest.mark.usefixtures("needs_mmyolo")
def test_an_aligned_run_exits_0_and_leaves_a_whole_run_folder(tmp_path):
    result = align(*RUN, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "run" / "alignment.json").read_text())
    assert content["schema_version"] == SCHEMA_VERSION
    run = Alignment.model_validate(content)
    assert [c.case.id for c in run.cases] == ["yolov8_embedded-torch-fp32", "yolov8_embedded-onnxruntime-fp32"]
    assert [(c.status, c.images) for c in run.cases] == [("pass", 6)] * 2
    assert run.aligned
    page = (tmp_path / "run" / "report.html").read_text()
    assert "yolov8_embedded-onnxruntime-fp32" in page
    pictures = {w.picture for c in run.cases for w in c.worst}
    assert pictures
    assert all((tmp_path / "run" / name).is_file() for name in pictures if name)
    assert "bare inference" in result.stdout


@pytest.mark.usefixtures("needs_mmyolo")
def test_a_misalignment_exits_1_and_is_named(tmp_path):
    case = "yolov8_embedded-onnxruntime-fp32"
    tolerances = {"boxes": {"value": 1e-12, "origin": "absurd"}}
    golden = {"variant": "yolov8_embedded", "cases": {case: {"tolerances": tolerances}}}
    (tmp_path / "yolov8_embedded.yaml").write_text(yaml.safe_dump(golden))
    result = align(*RUN, "--golden", tmp_path, "--out", tmp_path / "run")
    assert result.exit_code == 1, result.output
    run = Alignment.model_validate_json((tmp_path / "run" / "alignment.json").read_text())
    assert {c.case.id: c.first_difference for c in run.cases} == {case: "decoded", "yolov8_embedded-torch-fp32": None}
    assert not run.aligned


@pytest.mark.usefixtures("needs_mmyolo")
def test_strict_fails_what_cannot_be_run_and_without_it_that_is_a_skip(tmp_path):
    from alignment.engine import capabilities

    if capabilities.missing() is None:
        pytest.skip("TensorRT runs here")
    command = ("run", "yolov8_embedded", "--backend", "tensorrt", "--images", "2", "--golden", tmp_path)
    said = "1 case skipped: --strict makes that a failure"
    without, strict = align(*command), align(*command, "--strict")
    assert (without.exit_code, strict.exit_code) == (0, 1)
    assert (said in without.stdout.splitlines(), strict.stdout.splitlines()[-1]) == (False, said)


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> Path:
    """A golden folder with the committed records of a variant, and no TensorRT, wherever this runs."""
    monkeypatch.setattr("alignment.engine.capabilities.missing", lambda: "no GPU in this test")
    shutil.copy(golden_dir() / "yolov8_embedded.yaml", tmp_path)
    (tmp_path / "records").mkdir()
    for path in (golden_dir() / "records").glob("yolov8_embedded-*-fp32.*"):
        shutil.copy(path, tmp_path / "records")
    return tmp_path


@pytest.mark.usefixtures("needs_mmyolo")
def test_updating_golden_leaves_what_is_replayed_and_says_so(recorded):
    before = yaml.safe_load((recorded / "yolov8_embedded.yaml").read_text())
    command = ("run", "yolov8_embedded", "--backend", "torch,tensorrt", "--images", "2", "--golden", recorded)
    result = align(*command, "--update-golden", "why")
    assert result.exit_code == 0, result.output
    assert f"{TRT}: replayed, which measures nothing" in result.stdout
    after = yaml.safe_load((recorded / "yolov8_embedded.yaml").read_text())
    assert after["overlays"] == before["overlays"]
    changed = [case for case, held in after["cases"].items() if held != before["cases"].get(case)]
    assert changed == ["yolov8_embedded-torch-fp32"]


@pytest.mark.usefixtures("needs_mmyolo")
def test_golden_stays_as_it_is_when_a_later_variant_cannot_be_run(recorded, tmp_path):
    before = (recorded / "yolov8_embedded.yaml").read_bytes()
    command = checkpoint(truncated)(tmp_path, dataset(tmp_path))
    result = align(*RUN, command[1], "--data", command[-1], "--golden", recorded, "--update-golden", "why")
    assert result.exit_code == 2, result.output
    assert (recorded / "yolov8_embedded.yaml").read_bytes() == before


@pytest.mark.usefixtures("needs_mmyolo")
def test_exports_that_end_otherwise_lie_beside_each_other(tmp_path):
    kinds = (), ("--nms", "efficient_nms"), ("--nms", "onnx_nms")
    for kind in kinds:
        result = align("export", "yolov8_embedded", "--out", tmp_path, *kind)
        assert result.exit_code == 0, result.output
        wrote = [line.removeprefix("wrote ") for line in result.stdout.splitlines() if line.startswith("wrote ")]
        assert wrote
        assert all(Path(path).is_file() for path in wrote)
    stems = [".".join(["yolov8_embedded", *kind[1:]]) for kind in kinds]
    names = [f"{stem}.{end}" for stem in stems for end in ("onnx", "node_map.json")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    ends = [{node.op_type for node in onnx.load(tmp_path / f"{stem}.onnx").graph.node} for stem in stems]
    found = [ops & {"EfficientNMS_TRT", "NonMaxSuppression"} for ops in ends]
    assert found == [set(), {"EfficientNMS_TRT"}, {"NonMaxSuppression"}]


@pytest.mark.usefixtures("needs_mmyolo")
def test_export_writes_the_graph_and_its_node_map(tmp_path):
    result = align("export", "yolov8_embedded", "--out", tmp_path / "onnx", "--opset", "13", "--batch", "1")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "onnx").iterdir()) == [
        "yolov8_embedded.node_map.json",
        "yolov8_embedded.onnx",
    ]


def test_variants_lists_the_zoo():
    result = align("variants")
    assert result.exit_code == 0
    assert all(path.stem in result.stdout for path in ZOO.glob("*.yaml"))


def test_schema_prints_the_schema_of_the_version_that_runs_have():
    result = align("schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    assert {"cases", "timing", "dataset"} <= schema["properties"].keys()


def test_doctor_says_what_is_here():
    result = align("doctor")
    assert result.exit_code == 0
    for name in ("python", "onnxruntime", "tensorrt", "records", "cache"):
        assert name in result.stdout


def test_doctor_says_which_tensorrt_was_run_and_which_only_checked_by_name():
    from alignment.doctor import examine

    (finding,) = [finding for finding in examine() if finding.what == "tensorrt versions"]
    assert finding.detail == "executed: 8.6.1; checked by API name only: 10.16.1, 11.4.0"


@pytest.mark.parametrize("command", commands().values(), ids=commands())
def test_every_command_argument_and_option_says_what_it_is(command):
    assert command.help
    assert all(parameter.help for parameter in command.params), [p.name for p in command.params if not p.help]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["variants"]])
def test_help_and_lists_import_no_framework(arguments):
    program = (
        "import sys; from alignment.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "print('imported:', *sorted({'torch', 'mmyolo', 'mmengine', 'tensorrt', 'pycuda'} & set(sys.modules)))"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported:"


def test_torch_keeps_to_the_threads_that_it_is_given(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("ALIGN_THREADS", "1")
    done = python("-c", "from alignment import cli; cli.limit_openmp(); import torch; print(torch.get_num_threads())")
    assert done.stdout.strip() == "1", done.stderr
