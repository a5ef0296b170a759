"""What a graph gives after NMS is held to its own rows; what that costs is counted with each side's own boxes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from nms_scenes import scenes
from onnx import helper, numpy_helper
from test_nms_causes import agrees
from typer.testing import CliRunner

from alignment import divergence
from alignment.cli import app
from alignment.data.samples import Samples, open_samples
from alignment.deployed import Seen, deployed_semantics, seen_pairs
from alignment.divergence import Explained, explain_records, explain_variant, explanation
from alignment.engine.capabilities import missing
from alignment.errors import AlignError
from alignment.export.nms_head import NmsHead, with_nms
from alignment.export.onnx_export import ExportOptions, exported
from alignment.models.outputs import Outputs
from alignment.nms.causes import Divergence, Limits, Outcome, Side
from alignment.nms.explain import explain, kept
from alignment.nms.implementations import FLOOR, efficient_nms, mmyolo
from alignment.nms.multiclass import Detections
from alignment.nms.semantics import Semantics, run
from alignment.referee import with_truth
from alignment.results import Alignment
from alignment.risk import Risk
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.record import Record
from alignment.variant import Variant, golden_dir, load_variant

pytestmark = pytest.mark.nms
IMAGES = 3


@pytest.fixture(scope="module")
def variant() -> Variant:
    pytest.importorskip("mmyolo")
    return load_variant("yolov8_embedded")


@pytest.fixture(scope="module")
def samples(variant) -> Samples:
    return open_samples(variant, None, IMAGES)


def efficient(threshold: float = 0.25) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What EfficientNMS_TRT at the end of a graph gives of a scene, as its semantics say; and the pairs it keeps."""
    scene = scenes()["scattered"]
    attributes = {**scene.settings, "score_threshold": threshold}
    boxes, scores = scene.boxes[0], scene.scores[0].copy()
    scores[::3] *= np.float32(1e-3)
    fates = run(efficient_nms(attributes), boxes, scores)
    rows, labels, count = fates.rows[fates.kept], fates.labels[fates.kept], len(fates.kept)
    named = {
        "boxes": boxes[None],
        "scores": scores[None],
        "num_dets": np.array([[count]], np.int32),
        "det_boxes": np.zeros((1, 300, 4), np.float32),
        "det_scores": np.zeros((1, 300), np.float32),
        "det_labels": np.zeros((1, 300), np.int32),
    }
    named["det_boxes"][0, :count] = boxes[rows]
    named["det_scores"][0, :count] = fates.scores[fates.kept]
    named["det_labels"][0, :count] = labels
    return named, rows * scores.shape[1] + labels


@pytest.mark.parametrize("threshold", [0.25, 0.001])
def test_detections_of_efficient_nms_are_copies_of_rows(threshold):
    named, pairs = efficient(threshold)
    assert ((named["det_scores"] == FLOOR).any()) == (threshold < 0.007)
    seen = seen_pairs(named, "efficient_nms")
    np.testing.assert_array_equal(seen.kept, pairs)
    np.testing.assert_array_equal(seen.detections.rows, pairs // 3)
    assert not seen.faults


def test_equal_rows_serve_once_each():
    named, _ = efficient()
    named["boxes"][0, :2], named["scores"][0, :2] = [0, 0, 9, 9], [0.9, 0, 0]
    named["num_dets"][0, 0] = 2
    named["det_boxes"][0, :3], named["det_scores"][0, :3], named["det_labels"][0, :3] = [0, 0, 9, 9], 0.9, 0
    assert seen_pairs(named, "efficient_nms").pairs.tolist() == [0, 3]
    named["num_dets"][0, 0] = 3
    seen = seen_pairs(named, "efficient_nms")
    assert seen.pairs[2] in (1, 2, 4, 5, -1)
    assert len(seen.faults) == 1


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("det_labels", lambda a: a + 1, "class 1 for 0"),
        ("det_boxes", lambda a: a[..., [1, 0, 3, 2]], "the graph gives box ["),
        ("det_boxes", lambda a: a * 2, "the graph gives box ["),
        ("det_scores", lambda a: a * np.float32(0.5), "the graph gives score 0."),
    ],
)
def test_a_detection_that_is_no_copy_is_a_fault_of_its_row(name, change, said):
    named, pairs = efficient()
    named[name] = change(named[name])
    seen = seen_pairs(named, "efficient_nms")
    assert set(seen.faults) == set(pairs.tolist())
    assert set(seen.kept.tolist()) == set(pairs.tolist())
    assert any(said in text for text in seen.faults.values())


def test_a_detection_of_nowhere_counts_against_the_nearest_row():
    named, _ = efficient()
    named["num_dets"][0, 0] = 1
    named["det_boxes"][0, 0], named["det_scores"][0, 0], named["det_labels"][0, 0] = -1000, 0.12345, 7
    seen = seen_pairs(named, "efficient_nms")
    assert seen.pairs.tolist() == [-1]
    ((pair, text),) = seen.faults.items()
    assert pair // 3 == np.abs(named["boxes"][0] + 1000).sum(1).argmin()
    assert "class 7 with score 0.12345" in text


def after(output: str, node: onnx.NodeProto, *constants: Any) -> Callable[[onnx.ModelProto, NmsHead], onnx.ModelProto]:
    """NMS at the end of a graph, and one more node between what makes `output` and what takes it."""

    def ended(model: onnx.ModelProto, head: NmsHead) -> onnx.ModelProto:
        made = with_nms(model, head)
        place = next(i for i, n in enumerate(made.graph.node) if output in n.output)
        for other in made.graph.node:
            for names in (other.input, other.output):
                for index, name in enumerate(names):
                    if name == output and (names is other.output or output != "detections"):
                        names[index] = f"{output}_right" if names is other.output else f"{output}_wrong"
        wrong = onnx.NodeProto()
        wrong.CopyFrom(node)
        wrong.input[0], wrong.output[0] = f"{output}_right", output if output == "detections" else f"{output}_wrong"
        made.graph.node.insert(place + 1, wrong)
        made.graph.initializer.extend(constants)
        return made

    return ended


SWAPPED = after(
    "detections",
    helper.make_node("Gather", ["", "wrong_order"], [""], "wrong", axis=1),
    numpy_helper.from_array(np.array([0, 2, 1, 4, 3, 5, 6]), "wrong_order"),
)
NEXT_LABEL = after(
    "nms_label_f",
    helper.make_node("Add", ["", "wrong_one"], [""], "wrong"),
    numpy_helper.from_array(np.float32(1), "wrong_one"),
)


@pytest.mark.parametrize(
    ("wrong", "said"), [(SWAPPED, "the graph gives box ["), (NEXT_LABEL, "the graph gives class ")]
)
def test_a_graph_that_spoils_what_its_nms_selected_is_found_out(variant, samples, monkeypatch, wrong, said):
    changes = {"score_threshold": 0.05}
    right = explain_variant(variant, "onnxruntime", samples, golden_dir(), changes)
    monkeypatch.setattr(divergence, "with_nms", wrong)
    found = explain_variant(variant, "onnxruntime", samples, golden_dir(), changes)
    assert right.causes["unexplained"] == 0
    assert found.causes["unexplained"] >= found.detections[1]
    assert all(said in d.replay for each in found.divergences.values() for d in each if d.cause == "unexplained")
    # AP of what the graph gave, and of what the reference itself keeps.
    assert found.ap["subject"] < 0.5 * right.ap["subject"]
    assert found.ap["reference"] == right.ap["reference"]
    assert found.ap["unexplained"] == pytest.approx(right.ap["subject"], abs=1e-6)


def test_the_references_ap_is_of_its_own_boxes(variant, samples, monkeypatch):
    """Boxes that the graph spoils before NMS spoil one side only."""
    right = explain_variant(variant, "onnxruntime", samples, golden_dir(), {"score_threshold": 0.05})

    def doubled(model: onnx.ModelProto, head: NmsHead) -> onnx.ModelProto:
        double = helper.make_node("Mul", ["", "wrong_two"], [""], "wrong")
        spoilt = after("boxes", double, numpy_helper.from_array(np.float32(1.5), "wrong_two"))(model, head)
        for output in spoilt.graph.output:
            output.name = output.name.replace("boxes", "boxes_wrong") if output.name == "boxes" else output.name
        for node in spoilt.graph.node:
            for names in (node.input, node.output):
                names[:] = [name.replace("boxes_wrong", "boxes") for name in names]
        for output in spoilt.graph.output:
            output.name = output.name.replace("boxes_wrong", "boxes")
        return spoilt

    monkeypatch.setattr(divergence, "with_nms", doubled)
    found = explain_variant(variant, "onnxruntime", samples, golden_dir(), {"score_threshold": 0.05})
    assert found.ap["reference"] == right.ap["reference"] > 0.1
    assert found.ap["subject"] < 0.5 * right.ap["subject"]
    assert set(found.causes) == {"unexplained"}


def test_a_cause_is_undone_with_all_that_follows_from_it(variant, samples):
    """The subject's TopK loses the first box, so that the second, which it suppressed, comes up."""
    boxes = np.array([[0, 0, 100, 100], [0, 0, 100, 90], [200, 200, 300, 300]], np.float32)
    scores = np.zeros((3, variant.classes), np.float32)
    scores[:, 0] = 0.9, 0.8, 0.7
    reference = Side(Semantics(0.25, 0.5), boxes, scores)
    rows = kept(reference) // variant.classes
    seen = Seen(
        Detections(boxes[1:2], scores[1:2, 0], np.zeros(1, np.int32), np.ones(1, np.int32)), np.array([variant.classes])
    )
    outcome = Outcome(False, ""), Outcome(True, "kept")
    differing = [
        Divergence(0, 0, 0.9, *outcome[::-1], "topk_limit", "", "topk_limit"),
        Divergence(1, 0, 0.8, *outcome, "cascade", "", "topk_limit", (0, 0)),
        Divergence(2, 0, 0.7, *outcome[::-1], "max_output", "", "max_output"),
    ]
    risk, sample = Risk(), next(iter(samples))
    risk.add(sample, reference, seen, differing)
    shown = {name: sides[sample.entry.id].rows.tolist() for name, sides in risk.sides.items()}
    assert rows.tolist() == [0, 2]
    assert shown == {"reference": [0, 2], "subject": [1], "topk_limit": [0], "max_output": [1, 2]}
    assert risk.counts == [2, 1]
    told = explanation(Explained(1, (2, 1), {1: differing}), "x", ("a", "b"), [])
    assert {c.cause: (c.boxes, c.followers) for c in told.causes} == {
        "topk_limit": (1, 1),
        "max_output": (1, 0),
        "cascade": (1, 0),
    }


def test_a_threshold_that_nobody_asked_for_is_wrong_however_well_explained(variant, samples):
    changes = {"score_threshold": 0.05}
    found = explain_variant(variant, "onnxruntime", samples, golden_dir(), changes, deployed={"score_threshold": 0.3})
    assert set(found.causes) <= {"score_threshold", "cascade"}
    assert found.causes["score_threshold"] > 0
    assert found.wrong_settings == 0
    found.asked = frozenset()
    assert found.wrong_settings == found.causes.total()
    told = explanation(found, "x", ("a", "b"), [])
    assert told.unexplained == 0
    assert not Alignment(created="", command="", explanations=[told]).aligned


@pytest.mark.parametrize(("asked", "status"), [(True, 0), (False, 1)])
def test_the_command_fails_for_a_wrong_threshold(monkeypatch, tmp_path, asked, status):
    pytest.importorskip("mmyolo")
    command = ["explain", "yolov8_embedded", "--images", "2", "--score-threshold", "0.001", "--show", "1"]
    command += ["--deployed-score-threshold", "0.3", "--out", str(tmp_path)]
    if not asked:
        of = property(lambda _: frozenset(), lambda *_: None)
        monkeypatch.setattr(divergence.Explained, "asked", of, raising=False)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == status, done.output
    last = done.stdout.splitlines()[-1]
    assert ("by a wrong setting: " in last) != asked
    assert "unexplained: 0" in last
    assert " more: --show " in done.stdout
    assert ("by a wrong setting" in (tmp_path / "report.html").read_text()) != asked


def test_a_threshold_that_is_none_is_one_line():
    pytest.importorskip("mmyolo")
    done = CliRunner().invoke(app, ["explain", "yolov8_embedded", "--images", "1", "--score-threshold", "2"])
    assert done.exit_code == 2
    assert done.stderr.startswith("align: score_threshold 2.0: ")
    assert len(done.stderr.splitlines()) == 1


RECORDS = golden_dir() / "records"


def test_records_are_explained_in_either_order():
    """The wider of the limits of both; what moved in half precision did so whichever side it is."""
    paths = [RECORDS / f"yolov8_embedded-{name}.json" for name in ("torch-fp32", "tensorrt-fp16")]
    ways = [explain_records(*order, golden_dir()) for order in (paths, paths[::-1])]
    for found in ways:
        assert set(found.causes) <= {"precision", "cascade"}
        assert found.causes["precision"] > 0
    assert ways[0].causes.total() == ways[1].causes.total()


@pytest.mark.parametrize("name", ["labels", "scores"])
def test_recorded_detections_are_held_to_their_candidates(tmp_path, name):
    reference, subject = (RECORDS / f"yolov8_embedded-{name}-fp32.json" for name in ("torch", "tensorrt"))
    record = Record.load(subject)
    image = next(i for i, found in record.detections.items() if len(found) > 2)
    found = record.detections[image]
    change = {"labels": (found.labels + 1) % 3, "scores": found.scores + np.float32(0.01)}[name]
    record.detections[image] = dataclasses.replace(found, **{name: change})
    told = explain_records(reference, record.save(tmp_path), golden_dir())
    assert told.causes["unexplained"] == len(told.divergences[image]) > 0
    assert all("has a detection of score" in d.replay for d in told.divergences[image])


def test_float64_says_which_side_is_nearer():
    boxes, scores = np.array([[0, 0, 10, 10]], np.float32), np.array([[0.25002]], np.float32)
    reference = Side(Semantics(0.25, 0.5), boxes, scores)
    subject = dataclasses.replace(reference, scores=np.array([[0.24998]], np.float32))
    (found,) = explain(reference, subject, Limits(0.02, 1e-4))
    truth = Outputs({}, boxes[None].astype(float), np.array([[[0.25001]]]))
    told = with_truth(found, truth, reference, subject)
    assert told.replay.startswith(found.replay)
    assert "float64 of the scores is nearer to the reference: the reference is 1e-05 from it" in told.replay
    assert with_truth(dataclasses.replace(found, root="topk_limit"), truth, reference, subject).replay == found.replay


@pytest.mark.topk
@pytest.mark.parametrize("topk", [None, 40])
@pytest.mark.parametrize("threshold", [0.001, 0.25])
def test_every_difference_of_efficient_nms_on_real_outputs_is_explained(variant, samples, threshold, topk):
    """Its semantics in place of the plugin, which runs on a GPU only; inputs that moved as an engine's do."""
    rng = np.random.default_rng(0)
    nms = variant.nms.model_copy(update={"score_threshold": threshold})
    semantics = deployed_semantics(NmsHead("efficient_nms", nms, topk), "8.6.1")
    causes: Counter[str] = Counter()
    with OnnxRuntimeRunner(exported(variant, ExportOptions(outputs="decoded")).onnx) as runner:
        for sample in samples:
            named = runner.run(sample.tensor[None])
            boxes, scores = named["boxes"][0], named["scores"][0]
            moved = (boxes + rng.uniform(-0.01, 0.01, boxes.shape)).astype(np.float32)
            drifted = (scores * rng.uniform(1 - 1e-4, 1 + 1e-4, scores.shape)).astype(np.float32)
            reference, subject = Side(mmyolo(nms), boxes, scores), Side(semantics, moved, drifted)
            rows = np.argsort(-drifted.max(1), kind="stable")[:topk] if topk else None
            subject = dataclasses.replace(subject, seen=kept(subject), seen_rows=rows)
            found = explain(reference, subject, Limits(0.011, 1.1e-4), sample.transform)
            assert all(agrees(d, reference, subject, sample.transform) for d in found)
            causes.update(d.root for d in found)
    assert causes["unexplained"] == 0
    assert bool(causes["padding"]) == (threshold == 0.001)
    assert bool(causes["topk_limit"]) == (topk is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [None, 40])
@pytest.mark.parametrize("threshold", [0.001, 0.25])
def test_every_difference_of_efficient_nms_on_a_gpu_is_explained(variant, samples, threshold, topk):
    if reason := missing():
        pytest.skip(reason)
    found = explain_variant(variant, "tensorrt", samples, golden_dir(), {"score_threshold": threshold}, topk)
    assert found.images == IMAGES
    assert found.causes["unexplained"] == 0
    assert found.wrong_settings == 0
    assert found.ap["subject"] > 0.1


def test_a_bad_change_of_settings_is_refused(variant, samples):
    with pytest.raises(AlignError, match="iou_threshold 3"):
        explain_variant(variant, "onnxruntime", samples, golden_dir(), deployed={"iou_threshold": 3})
