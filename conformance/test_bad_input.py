"""Bad input to ``align``: one line that names the file and the mend, exit 2, nothing half-written, nothing executed."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import BAD, CHECKPOINT, RUN, Malicious, align, checkpoint, dataset, one_line, python, truncated

from alignment.results import Alignment


@pytest.fixture
def needs_mmyolo() -> None:
    pytest.importorskip("mmyolo")


@pytest.mark.usefixtures("needs_mmyolo")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_2_with_one_line_and_leaves_nothing(tmp_path, name):
    arguments, named = BAD[name]
    out = tmp_path / "run"
    command = arguments(tmp_path, dataset(tmp_path))
    if "--backend" not in command:
        command += ["--backend", "torch"]
    result = align(*command, "--out", out)
    assert result.exit_code == 2, result.output
    assert named in result.stderr
    assert one_line(result.stderr).startswith("align: ")
    assert "Traceback" not in result.output
    assert not out.exists() or list(out.iterdir()) == []
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("needs_mmyolo")
def test_what_a_checkpoint_has_beside_its_weights_is_not_executed(tmp_path):
    torch = pytest.importorskip("torch")

    def beside(path: Path) -> None:
        torch.save({"state_dict": torch.load(CHECKPOINT, weights_only=True), "meta": Malicious(path)}, path)

    command = checkpoint(beside)(tmp_path, dataset(tmp_path))
    result = align(*command, "--backend", "torch", "--golden", tmp_path)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("needs_mmyolo")
def test_weights_that_are_not_finite_fail_though_both_sides_agree_on_nothing(tmp_path):
    torch = pytest.importorskip("torch")

    def spoilt(path: Path) -> None:
        state = torch.load(CHECKPOINT, weights_only=True)
        first = next(iter(state))
        torch.save({"state_dict": state | {first: torch.full_like(state[first], float("nan"))}}, path)

    command = checkpoint(spoilt)(tmp_path, dataset(tmp_path))
    result = align(*command, "--backend", "torch,onnxruntime", "--golden", tmp_path, "--out", tmp_path / "run")
    assert result.exit_code == 1, result.output
    run = Alignment.model_validate_json((tmp_path / "run" / "alignment.json").read_text())
    assert [(c.status, c.first_difference) for c in run.cases] == [("fail", "raw")] * 2
    for case in run.cases:
        assert case.reason.startswith("differs first at raw: NaN or infinite ")
        assert case.reason.endswith("allowed = 0 values of cls_s8")


@pytest.mark.usefixtures("needs_mmyolo")
def test_a_process_of_its_own_says_no_more_than_that_line(tmp_path):
    # In the test above nobody hears libpng, which says something of its own, in C.
    command = [str(a) for a in BAD["corrupt image"][0](tmp_path, dataset(tmp_path))]
    done = python("-m", "alignment.cli", *command, "--backend", "torch")
    assert done.returncode == 2
    assert one_line(done.stderr).startswith("align: ")


@pytest.mark.usefixtures("needs_mmyolo")
def test_a_bad_variant_after_a_good_one_leaves_nothing_either(tmp_path):
    command = checkpoint(truncated)(tmp_path, dataset(tmp_path))
    result = align(*RUN, command[1], "--data", command[-1], "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--opset", "9"], "13 to 17"),
        (["--opset", "18"], "13 to 17"),
        (["--batch", "0"], "batch 0"),
        (["--outputs", "masks"], "decoded, raw, both"),
    ],
)
def test_bad_options_of_export_exit_2_and_write_nothing(tmp_path, options, named):
    result = align("export", "yolov8_embedded", "--out", tmp_path / "onnx", *options)
    assert result.exit_code == 2, result.output
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "arguments", [["run", "--images", "0"], ["run", "--images", "six"], ["fly"], ["run", "--fast"]]
)
def test_wrong_usage_exits_2(arguments):
    result = align(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "torch", "--precision", "fp16", "--strict"],
        ["yolox_nano_onnx", "--backend", "torch"],
        ["yolov8_embedded", "--backend", "onnxruntime", "--precision", "tf32"],
        ["--backend", ""],
        ["--precision", ","],
        ["--precision", "int8", "--route", ""],
    ],
)
def test_a_run_without_a_case_is_wrong_usage(options):
    result = align("run", *options)
    assert result.exit_code == 2, result.output
    assert one_line(result.stderr).startswith("align: ")
    assert result.stdout == ""


@pytest.mark.usefixtures("needs_mmyolo")
def test_of_the_variants_that_are_named_each_must_have_a_case(tmp_path):
    result = align("run", "yolov8_embedded", "yolox_nano_onnx", "--backend", "torch", "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert one_line(result.stderr).startswith("align: yolox_nano_onnx: none of its cases")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
@pytest.mark.parametrize(
    "command",
    [
        ["run", "yolov8_embedded", "--out"],
        ["run", "yolov8_embedded", "--records"],
        ["run", "yolov8_embedded", "--update-golden", "why", "--golden"],
        ["export", "yolov8_embedded", "--out"],
        ["quantize", "yolov8_embedded", "--out"],
        ["explain", "yolov8_embedded", "--out"],
    ],
    ids=lambda command: " ".join(command[::2]),
)
def test_what_cannot_be_written_is_found_before_anything_is_run(tmp_path, monkeypatch, command, place):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr("alignment.cli.load_variant", lambda name: pytest.fail("it began"))
    result = align(*command, tmp_path / place)
    assert result.exit_code == 2, result.output
    assert one_line(result.stderr).startswith(f"align: {command[-1]} {tmp_path / place}: ")
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / place))
    result = align("run", "yolov8_embedded", "--backend", "torch")
    assert result.exit_code == 2, result.output
    assert str(tmp_path / place) in one_line(result.stderr)
    assert "set ALIGN_CACHE" in result.stderr


def test_what_the_file_system_refuses_later_is_one_line(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "run/alignment.json")

    monkeypatch.setattr("alignment.report.run_folder.write_run", full)
    monkeypatch.setattr("alignment.session.run_cases", lambda *_: ([], {}, {}))
    result = align(*RUN, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert one_line(result.stderr) == "align: run/alignment.json: No space left on device"
