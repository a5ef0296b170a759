"""What tests of the command line share: running it, small datasets, and input that it must refuse."""

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
    """The line that is all of `stderr`."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    return lines[0]
