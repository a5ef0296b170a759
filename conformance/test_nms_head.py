"""Graphs that end in NMS, and what `align explain` says about them, on real images through ONNX Runtime."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from alignment import divergence
from alignment.cli import app
from alignment.data.samples import Samples, open_samples
from alignment.divergence import explain_records, explain_variant, seen_pairs
from alignment.errors import AlignError
from alignment.export.nms_head import NmsHead, lint, with_nms
from alignment.export.onnx_export import ExportOptions, exported
from alignment.nms.implementations import onnx_nms
from alignment.nms.semantics import run
from alignment.report.html import headline
from alignment.report.run_folder import merge, read_run
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.record import Record
from alignment.variant import Nms, Variant, golden_dir, load_variant

pytestmark = pytest.mark.nms
IMAGES = 4


@pytest.fixture(scope="module")
def variant() -> Variant:
    pytest.importorskip("mmyolo")
    return load_variant("yolov8_embedded")


@pytest.fixture(scope="module")
def samples(variant) -> Samples:
    return open_samples(variant, None, IMAGES)


@pytest.fixture(scope="module")
def decoded(variant) -> onnx.ModelProto:
    return onnx.load(exported(variant, ExportOptions(outputs="decoded")).onnx)


def runner(model: onnx.ModelProto, path: Path) -> OnnxRuntimeRunner:
    onnx.save(model, path)
    return OnnxRuntimeRunner(path)


@pytest.mark.parametrize("topk", [None, 40])
def test_onnx_nms_in_a_graph_keeps_what_its_semantics_say(decoded, samples, tmp_path, topk):
    nms = Nms(score_threshold=0.01, iou_threshold=0.5, max_per_image=20)
    ended = with_nms(decoded, NmsHead("onnx_nms", nms, topk, keep=True))
    onnx.checker.check_model(ended, full_check=True)
    with runner(ended, tmp_path / "ended.onnx") as deployed, runner(decoded, tmp_path / "decoded.onnx") as plain:
        for sample in samples:
            named, before = deployed.run(sample.tensor[None]), plain.run(sample.tensor[None])
            boxes, scores = named["boxes"][0], named["scores"][0]
            np.testing.assert_array_equal(boxes, before["boxes"][0])
            semantics = onnx_nms(0.01, 0.5, 20)
            if topk:
                semantics = dataclasses.replace(semantics, topk=topk, topk_unit="anchors")
            fates = run(semantics, boxes, scores)
            pairs = (fates.rows * scores.shape[1] + fates.labels)[fates.kept]
            assert len(pairs) > 3
            seen = seen_pairs(named, "onnx_nms")
            np.testing.assert_array_equal(seen.kept, pairs)
            assert not seen.faults
            image, x1, y1, x2, y2, labels, values = named["detections"].T
            order = np.argsort(-values, kind="stable")
            np.testing.assert_array_equal(values[order], fates.scores[fates.kept])
            np.testing.assert_array_equal(np.stack([x1, y1, x2, y2], 1)[order], boxes[fates.rows[fates.kept]])
            np.testing.assert_array_equal(labels[order], fates.labels[fates.kept])
            assert not image.any()


def test_efficient_nms_in_a_graph(decoded):
    nms = Nms(score_threshold=0.01, iou_threshold=0.5, max_per_image=20)
    ended = with_nms(decoded, NmsHead("efficient_nms", nms, topk=100))
    assert [o.name for o in ended.graph.output] == ["num_dets", "det_boxes", "det_scores", "det_labels"]
    (node,) = [n for n in ended.graph.node if n.op_type == "EfficientNMS_TRT"]
    assert list(node.input) == ["topk_boxes", "topk_scores"]
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert values["max_output_boxes"] == 20
    assert values["score_threshold"] == pytest.approx(0.01)
    assert values["iou_threshold"] == pytest.approx(0.5)


def test_a_graph_without_boxes_is_refused(decoded):
    ended = with_nms(decoded, NmsHead("efficient_nms", Nms()))
    with pytest.raises(AlignError, match="no boxes and scores to run NMS on"):
        with_nms(ended, NmsHead("efficient_nms", Nms()))
    with pytest.raises(AlignError, match="choose from efficient_nms, onnx_nms"):
        NmsHead("nms", Nms())  # type: ignore[arg-type]


@pytest.mark.topk
@pytest.mark.parametrize(
    ("asked", "rows", "kind", "given", "said"),
    [
        (None, 8400, "efficient_nms", None, ""),
        (
            30000,
            8400,
            "efficient_nms",
            3840,
            "TopK: 30000 asked for, 3840 given, the most that TensorRT takes: of 8400",
        ),
        (30000, 8400, "onnx_nms", None, ""),
        (30000, 2100, "efficient_nms", None, ""),
        (1000, 8400, "efficient_nms", 1000, "TopK: of 8400 rows the 7400 of lowest best score never reach NMS"),
    ],
)
def test_k_is_clipped_to_what_tensorrt_takes_and_that_is_said(asked, rows, kind, given, said):
    boxes = onnx.helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, ["batch", rows, 4])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [boxes]))
    count, notes = lint(asked, model, NmsHead(kind, Nms(score_threshold=0.25)))
    assert count == given
    assert notes[0].startswith(said) if said else not notes


@pytest.mark.topk
@pytest.mark.parametrize(("asked", "rows"), [(0, 8400), (-1, 8400), (100, "rows"), (100, None)])
@pytest.mark.parametrize("kind", ["efficient_nms", "onnx_nms"])
def test_a_k_that_cannot_be_is_refused(asked, rows, kind):
    boxes = onnx.helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, ["batch", rows, 4])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [boxes]))
    with pytest.raises(AlignError, match=f"^--topk {asked}: "):
        lint(asked, model, NmsHead(kind, Nms()))
    with pytest.raises(AlignError, match="TopK of 0 rows"):
        NmsHead(kind, Nms(), topk=0)


@pytest.mark.topk
@pytest.mark.parametrize("command", [["explain"], ["export", "--nms", "efficient_nms", "--out", "none"]])
def test_the_command_refuses_a_k_of_0(command, tmp_path, monkeypatch):
    pytest.importorskip("mmyolo")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*command, "yolov8_embedded", "--topk", "0"])
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        "align: --topk 0: no row would go on to NMS: give 1 or more, or leave it out for all rows"
    ]


@pytest.mark.topk
@pytest.mark.parametrize(("asked", "said"), [(3840, False), (3841, True)])
def test_a_k_that_only_onnx_runtime_takes_is_announced(asked, said):
    boxes = onnx.helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, ["batch", 8400, 4])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [boxes]))
    count, notes = lint(asked, model, NmsHead("onnx_nms", Nms()))
    assert count == asked
    assert any("for ONNX Runtime, not for TensorRT, which takes no K above 3840" in note for note in notes) == said


@pytest.mark.parametrize(
    ("kind", "threshold", "said"),
    [
        ("efficient_nms", 0.001, True),
        ("efficient_nms", 0.007, False),
        ("onnx_nms", 0.001, False),
    ],
)
def test_places_that_hold_boxes_below_the_threshold_are_announced(kind, threshold, said):
    _, notes = lint(None, onnx.ModelProto(), NmsHead(kind, Nms(score_threshold=threshold)))
    assert any("with score -32768" in note for note in notes) == said


@pytest.mark.topk
@pytest.mark.parametrize("topk", [None, 60])
def test_every_difference_on_real_outputs_is_explained(variant, samples, topk):
    changes = {"score_threshold": 0.001, "max_per_image": 10}
    found = explain_variant(variant, "onnxruntime", samples, golden_dir(), changes, topk)
    assert found.images == IMAGES
    assert found.causes["unexplained"] == 0
    assert found.causes["max_output"] > 0
    assert bool(found.causes["topk_limit"] + found.causes["topk_unit"]) == (topk is not None)
    ours, theirs = found.detections
    kept = [d.subject.kept for each in found.divergences.values() for d in each]
    assert theirs - ours == sum(kept) - (len(kept) - sum(kept))


def test_one_label_a_row_against_all_that_pass(variant, samples, decoded):
    found = explain_variant(
        variant, "onnxruntime", samples, golden_dir(), {"multi_label": False, "score_threshold": 0.001}
    )
    assert set(found.causes) <= {"multi_label", "cascade", "max_output"}
    assert found.causes["multi_label"] > 0
    assert found.notes == ["labels: the variant's NMS takes one a row, the deployed one every label that passes"]


def test_a_graph_with_another_threshold_than_it_says_is_not_explained(variant, samples, monkeypatch):
    def wrong(model: onnx.ModelProto, head: NmsHead) -> onnx.ModelProto:
        return with_nms(model, dataclasses.replace(head, nms=Nms(score_threshold=0.3, iou_threshold=0.5)))

    monkeypatch.setattr(divergence, "with_nms", wrong)
    found = explain_variant(variant, "onnxruntime", samples, golden_dir(), {"score_threshold": 0.01})
    assert found.causes["unexplained"] > 0


def test_the_command_writes_a_run(tmp_path):
    pytest.importorskip("mmyolo")
    command = ["explain", "yolov8_embedded", "--images", "2", "--topk", "20", "--score-threshold", "0.001"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    last = done.stdout.splitlines()[-1]
    assert last.startswith("2 images, ")
    assert last.endswith("unexplained: 0")
    run_folder = read_run(tmp_path)
    (found,) = run_folder.explanations
    assert found.differing == len(found.boxes) == sum(cause.boxes for cause in found.causes) > 0
    assert f"{found.differing} differ, " in last
    assert found.worst
    for crop in found.worst:
        assert (tmp_path / crop.picture).is_file()
        lonely = [box for box in (*crop.reference, *crop.subject) if not box.matched]
        assert len(lonely) == 1
        assert lonely[0].label_name in crop.file_name
    page = (tmp_path / "report.html").read_text()
    assert "Explained" in page
    assert all(cause.cause in page for cause in found.causes)
    assert page.count("<figure>") == len(found.worst)
    assert not merge([run_folder, run_folder]).explanations[1:]
    damaged = found.model_copy(update={"unexplained": 1})
    assert headline(run_folder.model_copy(update={"explanations": [damaged]}))[0] == "Not explained"


@pytest.mark.topk
def test_the_command_prints_boxes_that_are_alike_in_one_line_and_stores_each(tmp_path):
    pytest.importorskip("mmyolo")
    command = ["explain", "yolov8_embedded", "--images", "3", "--topk", "20", "--score-threshold", "0.001"]
    done = CliRunner().invoke(app, [*command, "--show", "1000", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (found,) = read_run(tmp_path).explanations
    lines = [line for line in done.stdout.splitlines() if line.startswith("image ")]
    counts = [int(match.group(1)) if (match := re.match(r"image \d+, (\d+) boxes of ", line)) else 1 for line in lines]
    assert sum(counts) == found.differing == len(found.boxes)
    # What is cut by TopK is cut in one line an image, and the first of them is named.
    cut = [line for line in lines if "subject cut by topk" in line]
    assert len(cut) == len({box.image_id for box in found.boxes if box.cause == "topk_limit"})
    assert max(counts) > 10
    first = found.boxes[0]
    assert f"the first row {first.row}, {first.label_name} {first.score:.4f}: " in lines[0]
    assert lines[0].endswith("topk_limit: the subject with topk 30000 instead of 20")
    # One that is alone is told whole.
    alone = next(box for box in found.boxes if box.cause == "cascade")
    assert f"image {alone.image_id}, row {alone.row}, {alone.label_name} {alone.score:.4f}: " in done.stdout
    less = CliRunner().invoke(app, [*command, "--show", "2"])
    assert f"{len(lines) - 2} more: --show {len(lines)}, or --out for every box" in less.stdout.splitlines()


def test_export_ends_in_nms(samples, tmp_path):
    done = CliRunner().invoke(
        app, ["export", "yolov8_embedded", "--nms", "onnx_nms", "--topk", "100", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "TopK: of 2100 rows the 2000 of lowest best score never reach NMS" in done.stdout
    with OnnxRuntimeRunner(tmp_path / "yolov8_embedded.onnx_nms.onnx") as deployed:
        named = deployed.run(next(iter(samples)).tensor[None])
    assert set(named) == {"detections", "selected"}
    assert named["detections"].shape[1] == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["yolov8_embedded", "--backend", "torch"], "choose from onnxruntime, tensorrt"),
        (["rtmdet_r_embedded", "--topk", "5"], "EfficientNMSRotated_TRT takes the best pairs by itself"),
        (["nothing"], "no variant is named"),
    ],
)
def test_bad_input_of_the_command(arguments, said):
    done = CliRunner().invoke(app, ["explain", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


TENSORRT = (golden_dir() / "records").glob("*-tensorrt-*.json")
RECORDS = sorted(p for p in TENSORRT if "-int8-" not in p.name)


def reference_record(subject: Path) -> Path:
    """The record of the same variant's reference."""
    variant = subject.name.split("-")[0]
    return next(
        path
        for name in ("torch", "onnxruntime")
        if (path := subject.with_name(f"{variant}-{name}-fp32.json")).is_file()
    )


@pytest.mark.parametrize("subject", RECORDS, ids=lambda path: path.stem)
def test_what_tensorrt_keeps_otherwise_is_explained(subject):
    """Engines of a real GPU: in FP32 nothing, in FP16 and TF32 all of it by values that moved within their limits."""
    found = explain_records(reference_record(subject), subject, golden_dir())
    assert found.images >= 64
    assert set(found.causes) <= ({"numeric", "cascade"} if "fp32" in subject.name else {"precision", "cascade"})
    assert found.causes.total() <= (4 if "fp32" in subject.name else 0.15 * sum(found.detections))


def test_a_value_that_moved_too_far_is_not_explained(tmp_path):
    subject = golden_dir() / "records" / "yolov8_embedded-tensorrt-fp32.json"
    record = Record.load(subject)
    image = next(iter(record.candidates))
    scores = record.candidates[image].scores
    record.candidates[image] = dataclasses.replace(record.candidates[image], scores=scores[::-1].copy())
    found = explain_records(reference_record(subject), record.save(tmp_path), golden_dir())
    assert found.causes["unexplained"] > 0
    assert {i for i, each in found.divergences.items() if each} == {image}


def test_the_command_explains_records(tmp_path):
    subject = golden_dir() / "records" / "yolov8_embedded-tensorrt-fp16.json"
    done = CliRunner().invoke(app, ["explain", str(reference_record(subject)), str(subject)])
    assert done.exit_code == 0, done.output
    assert "unexplained: 0" in done.stdout
    other = golden_dir() / "records" / "yolov5_embedded-tensorrt-fp32.json"
    done = CliRunner().invoke(app, ["explain", str(other), str(subject)])
    assert done.exit_code == 2
    assert "give two records of one variant" in done.stderr
    done = CliRunner().invoke(app, ["explain", str(tmp_path / "none.json"), str(subject)])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
