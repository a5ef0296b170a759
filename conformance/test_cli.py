"""``align``: exit status, what it writes, and one line for every kind of bad input."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import yaml
from typer.testing import CliRunner

from alignment.cli import app
from alignment.data.synthetic import synthetic_root
from alignment.results import SCHEMA_VERSION, Alignment
from alignment.variant import ZOO, golden_dir

FLOAT = onnx.TensorProto.FLOAT
CHECKPOINT = golden_dir() / "checkpoints" / "yolov8_embedded.pth"
RUN = ["run", "yolov8_embedded", "--backend", "torch,onnxruntime", "--images", "6"]


def align(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def python(*arguments: str) -> subprocess.CompletedProcess:
    """A Python of its own, in which this package can be imported."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
        check=False,
    )


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
    assert align(*command).exit_code == 0
    assert align(*command, "--strict").exit_code == 1


TRT = "yolov8_embedded-tensorrt-fp32"


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


def variant_file(folder: Path, edit: Callable[[dict], object] = lambda fields: None) -> Path:
    """The embedded variant, but with images given by ``--data``, changed by `edit`."""
    fields = yaml.safe_load((ZOO / "yolov8_embedded.yaml").read_text())
    fields["dataset"] = "coco"
    fields["source"]["checkpoint"] = str(CHECKPOINT)
    edit(fields)
    path = folder / "planted.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def dataset(folder: Path) -> Path:
    """A copy of the first three images of the synthetic set."""
    source, root = synthetic_root(), folder / "data"
    truth = json.loads((source / "annotations" / "instances_val2017.json").read_text())
    truth["images"] = truth["images"][:3]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] <= 3]
    for name in ("annotations", "val2017"):
        (root / name).mkdir(parents=True)
    for image in truth["images"]:
        shutil.copy(source / "val2017" / image["file_name"], root / "val2017")
    write_truth(root, truth)
    return root


def truth_path(root: Path) -> Path:
    return root / "annotations" / "instances_val2017.json"


def write_truth(root: Path, truth: dict) -> None:
    truth_path(root).write_text(json.dumps(truth))


def checkpoint(content: Callable[[Path], object]) -> Callable[[Path, Path], list[object]]:
    """A run whose checkpoint is what `content` writes."""

    def arguments(folder: Path, root: Path) -> list[object]:
        path = folder / "weights.pth"
        content(path)
        planted = variant_file(folder, lambda fields: fields["source"].update(checkpoint=str(path)))
        return ["run", planted, "--data", root]

    return arguments


def truncated(path: Path) -> None:
    path.write_bytes(CHECKPOINT.read_bytes()[:20_000])


def of_another_model(path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": torch.nn.Linear(3, 4).state_dict()}, path)


class Malicious:
    """Unpickled, it makes the file ``executed`` beside the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path.parent / 'executed'}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def malicious(path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {"weight": Malicious(path)}, "meta": Malicious(path)}, path)


def malicious_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(path)))


def onnx_file(content: Callable[[], bytes]) -> Callable[[Path, Path], list[object]]:
    """A run of a bare ONNX file."""

    def arguments(folder: Path, root: Path) -> list[object]:
        (folder / "bare.onnx").write_bytes(content())
        fields = {"name": "bare", "input": {"height": 32, "width": 32}, "classes": 6, "dataset": "coco"}
        source = {"kind": "onnx", "file": "bare.onnx", "head": {"layout": "yolov8"}}
        (folder / "bare.yaml").write_text(yaml.safe_dump({**fields, "source": source}))
        return ["run", folder / "bare.yaml", "--data", root, "--backend", "onnxruntime"]

    return arguments


def without_onnx_file(folder: Path, root: Path) -> list[object]:
    command = onnx_file(graph)(folder, root)
    (folder / "bare.onnx").unlink()
    return command


def graph(op: str = "Reshape", opset: int = 17, rows: int = 10) -> bytes:
    """A graph whose input is dynamic and whose one node reshapes it to ``[1, rows, 300]``."""
    image = onnx.helper.make_tensor_value_info("image", FLOAT, ["batch", 3, "height", "width"])
    answer = onnx.helper.make_tensor_value_info("y", FLOAT, [1, rows, 300])
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [1, rows, 300])
    nodes = [onnx.helper.make_node(op, ["image", "shape"], ["y"])]
    made = onnx.helper.make_graph(nodes, "bare", [image], [answer], [shape])
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()


def data(change: Callable[[Path], object]) -> Callable[[Path, Path], list[object]]:
    """A run on a dataset that `change` spoiled."""

    def arguments(folder: Path, root: Path) -> list[object]:
        change(root)
        return ["run", variant_file(folder), "--data", root]

    return arguments


def third_image(root: Path) -> Path:
    return sorted((root / "val2017").iterdir())[2]


def edit_truth(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        truth = json.loads(truth_path(root).read_text())
        change(truth)
        write_truth(root, truth)

    return edit


def one_category_less(truth: dict) -> None:
    gone = truth["categories"].pop()["id"]
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != gone]


def seven_classes(folder: Path, root: Path) -> list[object]:
    return ["run", variant_file(folder, lambda fields: fields.update(classes=7)), "--data", root]


def bad_golden(folder: Path, root: Path) -> list[object]:
    (folder / "golden").mkdir()
    (folder / "golden" / "yolov8_embedded.yaml").write_text("cases: [")
    return ["run", variant_file(folder), "--data", root, "--golden", folder / "golden"]


# What to run, given a folder and a dataset in it, and what the message must name.
BAD: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "unknown variant": (lambda *_: ["run", "yolov9000"], "yolov8_embedded"),
    "no YAML file": (lambda folder, _: ["run", folder / "none.yaml"], "none.yaml"),
    "unknown backend": (lambda *_: ["run", "yolov8_embedded", "--backend", "torch,tpu"], "torch, onnxruntime"),
    "unknown precision": (lambda *_: ["run", "yolov8_embedded", "--precision", "fp4"], "fp32"),
    "missing checkpoint": (checkpoint(lambda path: None), "weights.pth"),
    "empty checkpoint": (checkpoint(lambda path: path.write_bytes(b"")), "weights.pth"),
    "truncated checkpoint": (checkpoint(truncated), "weights.pth"),
    "state dict of another model": (checkpoint(of_another_model), "weights.pth"),
    "malicious checkpoint": (checkpoint(malicious), "weights.pth"),
    "malicious pickle": (checkpoint(malicious_pickle), "weights.pth"),
    "missing ONNX file": (without_onnx_file, "bare.onnx: no such file"),
    "empty ONNX file": (onnx_file(lambda: b""), "bare.onnx"),
    "truncated ONNX file": (onnx_file(lambda: graph()[:-20]), "bare.onnx"),
    "unknown op": (onnx_file(lambda: graph("Frobnicate")), "Frobnicate"),
    "old opset": (onnx_file(lambda: graph(opset=9)), "bare.onnx: opset 9, but 11 is the oldest"),
    "opset of the future": (onnx_file(lambda: graph(opset=99)), "bare.onnx: opset 99"),
    "a shape inside that does not fit": (onnx_file(graph), "bare.onnx: ONNX Runtime cannot run it on [1, 3, 32, 32]"),
    "corrupt image": (data(lambda root: third_image(root).write_bytes(b"\x89PNG\r\n\x1a\n no")), "000000000003.png"),
    "empty image": (data(lambda root: third_image(root).write_bytes(b"")), "an empty file"),
    "missing image": (data(lambda root: third_image(root).unlink()), "000000000003.png"),
    "annotations of no image": (data(edit_truth(lambda truth: truth["images"].pop())), "image id 3"),
    "no annotations": (data(lambda root: truth_path(root).unlink()), "instances_val2017.json"),
    "truncated annotations": (data(lambda root: truth_path(root).write_text('{"images": [')), "not JSON"),
    "annotation without a box": (data(edit_truth(lambda truth: truth["annotations"][1].pop("bbox"))), "annotation 2"),
    "a class too few": (data(edit_truth(one_category_less)), "5 categories"),
    "a class too many": (seven_classes, "7 classes"),
    "bad golden file": (bad_golden, "golden/yolov8_embedded.yaml"),
}


def one_line(stderr: str) -> str:
    """The line that is all of `stderr`, the cleared progress bar aside."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    return lines[0]


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


def test_doctor_says_what_is_here():
    result = align("doctor")
    assert result.exit_code == 0
    for name in ("python", "onnxruntime", "tensorrt", "records", "cache"):
        assert name in result.stdout


def test_doctor_says_which_tensorrt_was_run_and_which_only_checked_by_name():
    from alignment.doctor import examine

    (finding,) = [finding for finding in examine() if finding.what == "tensorrt versions"]
    assert finding.detail == "executed: 8.6.1; checked by API name only: 10.16.1, 11.4.0"


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
