"""A reference that finds next to nothing agrees with every subject: that is said, as no stage can show it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from command_line import align, dataset, edit_truth

from alignment.compare.verdict import doubts
from alignment.export.onnx_export import ExportOptions, exported
from alignment.report.run_folder import read_run
from alignment.results import Scores
from alignment.variant import ZOO, load_variant

SAID = ": preprocess, class order or head layout is likely wrong"


@pytest.fixture
def bare(tmp_path):
    """Writes an ONNX file of decoded outputs, with a description of it."""
    pytest.importorskip("mmyolo")
    model = exported(load_variant("yolov8_embedded"), ExportOptions(outputs="decoded")).onnx
    shutil.copy(model, tmp_path / "bare.onnx")

    def write(std: float = 255.0, box_format: str = "xyxy", dataset: str = "synthetic") -> Path:
        fields = yaml.safe_load((ZOO / "yolov8_embedded.yaml").read_text())
        fields["preprocess"]["std"] = [std] * 3
        head = {"layout": "decoded", "box_format": box_format}
        fields |= {"name": "bare", "source": {"kind": "onnx", "file": "bare.onnx", "head": head}, "dataset": dataset}
        path = tmp_path / "bare.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


@pytest.mark.parametrize(
    ("wrong", "warned"),
    [({}, False), ({"std": 255.0 * 255.0}, True), ({"box_format": "cxcywh"}, True)],
    ids=["right", "preprocess", "head"],
)
def test_a_wrong_description_of_a_bare_file_passes_with_a_warning(bare, tmp_path, wrong, warned):
    options = ["--backend", "onnxruntime", "--precision", "fp32,fp16", "--images", "4"]
    options += ["--golden", tmp_path / "golden", "--out", tmp_path / "run"]
    done = align("run", bare(**wrong), *options)
    assert done.exit_code == 0, done.output
    cases = read_run(tmp_path / "run").cases
    assert [bool(case.doubts) for case in cases] == [warned] * 2
    places = done.stdout, (tmp_path / "run" / "report.html").read_text(), align("table", tmp_path / "run").stdout
    assert [place.count(SAID) for place in places] == ([1, 2, 1] if warned else [0, 0, 0])


def test_nothing_is_said_of_images_without_truth(bare, tmp_path):
    root = dataset(tmp_path)
    edit_truth(lambda truth: truth["annotations"].clear())(root)
    options = ["--backend", "onnxruntime", "--golden", tmp_path / "golden", "--data", root]
    done = align("run", bare(std=255.0 * 255.0, dataset="coco"), *options)
    assert done.exit_code == 0, done.output
    assert SAID not in done.stdout


def test_the_reference_is_doubted_and_never_the_subject():
    def told(reference: float | None, subject: float) -> list[str]:
        return doubts(Scores(reference_ap=reference, subject_ap=subject, subject_ap50=subject))

    assert told(0.0099, 0.5) == told(None, 0.0099) == [f"reference AP 0.0099{SAID}"]
    assert told(0.01, 0.0) == told(None, -1.0) == told(-1.0, 0.0) == doubts(None) == []
