"""Why a rotated detector's deployed NMS keeps other boxes than mmrotate's: on ONNX Runtime, TensorRT, records, DOTA."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_nms_causes import agrees
from test_nms_head import reference_record
from typer.testing import CliRunner

from alignment import divergence
from alignment.cli import app
from alignment.data.samples import Samples, open_samples
from alignment.deployed import deployed_semantics
from alignment.divergence import explain_records, explain_variant
from alignment.engine.capabilities import missing
from alignment.export.nms_head import NmsHead, with_nms
from alignment.export.onnx_export import ExportOptions, exported
from alignment.nms.causes import Limits, Side
from alignment.nms.explain import explain, kept
from alignment.nms.implementations import efficient_nms_rotated, mmyolo
from alignment.nms.moved import box_distances
from alignment.report.run_folder import read_run
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.record import Record
from alignment.storage import data_dir
from alignment.variant import Nms, Variant, golden_dir, load_variant, resized

pytest.importorskip("mmyolo")
pytest.importorskip("mmrotate")
pytestmark = [pytest.mark.rotated, pytest.mark.plugin, pytest.mark.nms]

NAME = "rtmdet_r_embedded"
IMAGES = 12
#: Many candidates, so that something is near to a threshold.
LOW = {"score_threshold": 0.01}
LIMITS = Limits(boxes=0.02, scores=1e-4, angles=1e-3)


@pytest.fixture(scope="module")
def variant() -> Variant:
    return load_variant(NAME)


@pytest.fixture(scope="module")
def samples(variant) -> Samples:
    return open_samples(variant, None, IMAGES)


@pytest.fixture(scope="module")
def tiles() -> Samples:
    root = data_dir() / "dota8"
    if not root.is_dir():
        pytest.skip(f"{root} is not there: set ALIGN_DATA")
    return open_samples(resized(load_variant(NAME), 1024, 1024), root)


BACKENDS = [pytest.param("onnxruntime"), pytest.param("tensorrt", marks=pytest.mark.gpu)]


def require(backend: str) -> None:
    if backend == "tensorrt" and (reason := missing()):
        pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{}, LOW, {**LOW, "nms_pre": 50}, {**LOW, "max_per_image": 20}])
def test_every_difference_on_real_outputs_is_explained(variant, samples, backend, changes):
    require(backend)
    found = explain_variant(variant, backend, samples, golden_dir(), changes)
    assert found.images == IMAGES
    assert found.causes["unexplained"] == found.wrong_settings == 0
    assert set(found.causes) <= {"coordinate_frame", "class_offset_rounding", "iou_comparison", "numeric", "cascade"}
    assert found.detections[1] > 50
    assert found.ap["subject"] == pytest.approx(found.ap["reference"], abs=1e-3)


@pytest.mark.real_data
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{}, LOW])
def test_every_difference_on_tiles_of_dota_is_explained(tiles, backend, changes):
    require(backend)
    found = explain_variant(tiles.variant, backend, tiles, golden_dir(), changes)
    assert found.images == 8
    assert found.causes["unexplained"] == found.wrong_settings == 0
    assert found.detections[1] > 1000
    assert found.ap == {}, "the tiles have no truth for classes that are not DOTA's"


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("score_threshold", 0.3, "score_threshold"),
        ("iou_threshold", 0.5, "iou_threshold"),
        ("nms_pre", 10, "topk_limit"),
        ("max_per_image", 3, "max_output"),
    ],
)
def test_a_deployed_setting_that_differs_is_named(variant, samples, name, value, cause):
    found = explain_variant(variant, "onnxruntime", samples, golden_dir(), LOW, deployed={name: value})
    assert found.causes["unexplained"] == 0
    assert found.causes[cause] > 0.5 * (found.causes.total() - found.causes["cascade"])


def test_a_graph_that_does_not_do_what_it_says_is_not_explained(variant, samples, monkeypatch):
    def wrong(model, head: NmsHead):
        return with_nms(model, dataclasses.replace(head, nms=head.nms.model_copy(update={"iou_threshold": 0.4})))

    monkeypatch.setattr(divergence, "with_nms", wrong)
    found = explain_variant(variant, "onnxruntime", samples, golden_dir(), LOW)
    assert found.causes["unexplained"] > 0


def drifted(boxes: np.ndarray, scores: np.ndarray, by: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Inputs as an engine gives them; every other box by another half turn, which is the same box."""
    scale = by * np.array([0.01, 0.01, 0.01, 0.01, 5e-4])
    moved = boxes + rng.uniform(-1, 1, boxes.shape) * scale
    moved[::2, 4] -= np.pi * np.sign(moved[::2, 4])
    gain = rng.uniform(1 - by * 1e-4, 1 + by * 1e-4, scores.shape)
    return moved.astype(np.float32), (scores * gain).astype(np.float32)


@pytest.fixture(scope="module")
def decoded(variant, samples) -> list[tuple[np.ndarray, np.ndarray]]:
    with OnnxRuntimeRunner(exported(variant, ExportOptions(outputs="decoded")).onnx) as runner:
        named = [runner.run(sample.tensor[None]) for sample in samples]
    return [(one["boxes"][0], one["scores"][0]) for one in named]


@pytest.mark.parametrize(("moved", "by", "images", "least"), [("numeric", 1, IMAGES, 1), ("precision", 50, 2, 10)])
def test_every_difference_to_an_engine_is_explained(variant, samples, decoded, moved, by, images, least):
    """The plugin's semantics in its place, which runs on a GPU only."""
    limits = Limits(*(by * value for value in (LIMITS.boxes, LIMITS.scores, LIMITS.angles)))
    rng, causes = np.random.default_rng(0), Counter[str]()
    nms = variant.nms.model_copy(update={"score_threshold": 0.005})
    semantics = deployed_semantics(NmsHead("efficient_nms_rotated", nms), None)
    for sample, image in itertools.islice(zip(samples, decoded, strict=True), images):
        reference, subject = Side(mmyolo(nms, True), *image), Side(semantics, *drifted(*image, by, rng))
        subject = dataclasses.replace(subject, seen=kept(subject))
        found = explain(reference, subject, limits, sample.transform, moved)
        assert all(agrees(d, reference, subject, sample.transform) for d in found)
        causes.update(d.root for d in found)
    assert causes["unexplained"] == 0
    assert causes[moved] >= least


def sign(boxes: np.ndarray) -> None:
    boxes[:, 4] *= -1


def quarter(boxes: np.ndarray) -> None:
    boxes[:, 4] += np.pi / 2


def degrees(boxes: np.ndarray) -> None:
    boxes[:, 4] = np.rad2deg(boxes[:, 4])


def a_little(boxes: np.ndarray) -> None:
    boxes[:, 4] += 0.01


def sides(boxes: np.ndarray) -> None:
    boxes[:, [2, 3]] = boxes[:, [3, 2]]


@pytest.mark.parametrize(
    ("fault", "said"),
    [(sign, "angles"), (quarter, "angles"), (degrees, "angles"), (a_little, "angles"), (sides, "boxes")],
)
def test_a_fault_of_decoding_is_no_explanation(variant, decoded, fault: Callable[[np.ndarray], None], said):
    boxes, scores = decoded[0]
    wrong = boxes.copy()
    fault(wrong)
    semantics = efficient_nms_rotated(NmsHead("efficient_nms_rotated", variant.nms).attributes)
    found = explain(Side(semantics, boxes, scores), Side(semantics, wrong, scores), LIMITS)
    assert found
    assert {d.cause for d in found} == {"unexplained"}
    assert any(f"{said} moved by" in d.replay for d in found)


def test_half_a_turn_is_no_movement(variant, decoded):
    boxes, scores = decoded[0]
    turned = boxes.copy()
    turned[:, 4] += np.float32(np.pi)
    semantics = efficient_nms_rotated(NmsHead("efficient_nms_rotated", variant.nms).attributes)
    assert not explain(Side(semantics, boxes, scores), Side(semantics, turned, scores), LIMITS)
    far = box_distances(boxes, turned)
    assert far["boxes"].max() == 0
    assert far["angles"].max() < 1e-6


def test_cpus_and_cudas_mmrotate_differ_at_the_threshold_alone():
    """Halves of a box have an IoU of 1/3: one reaches it, the other has to exceed it."""
    boxes = np.array([[0, 0, 4, 2, 0], [2, 0, 4, 2, 0]], np.float32)
    scores = np.array([[0.9], [0.8]], np.float32)
    nms = Nms(score_threshold=0.1, iou_threshold=1 / 3)
    cpu = mmyolo(nms, True)
    attributes = NmsHead("efficient_nms_rotated", nms).attributes
    plugin = dataclasses.replace(efficient_nms_rotated(attributes), frame="original")
    from alignment.data.preprocess import Transform

    same = Transform((1.0, 1.0), (0.0, 0.0), (10, 10))
    (found,) = explain(Side(cpu, boxes, scores), Side(plugin, boxes, scores, np.array([0, 1])), LIMITS, same)
    assert (found.cause, found.subject.kept) == ("iou_comparison", True)
    cuda = dataclasses.replace(cpu, iou_inclusive=False)
    assert not explain(Side(cuda, boxes, scores), Side(plugin, boxes, scores, np.array([0, 1])), LIMITS, same)
    # The engine's IoU may come out a step of float32 above: that is its rounding, and is told as such.
    (found,) = explain(Side(cuda, boxes, scores), Side(plugin, boxes, scores, np.array([0])), LIMITS, same)
    assert found.cause == "iou_rounding"


@pytest.mark.parametrize("seen", [([0], [0, 1]), ([0, 1], [0])], ids=str)
def test_two_engines_that_round_an_iou_at_the_threshold_otherwise(seen):
    boxes = np.array([[0, 0, 4, 2, 0], [2, 0, 4, 2, 0]], np.float32)
    scores = np.array([[0.9], [0.8]], np.float32)
    attributes = NmsHead("efficient_nms_rotated", Nms(score_threshold=0.1, iou_threshold=1 / 3)).attributes
    semantics = efficient_nms_rotated(attributes)
    ours, theirs = (Side(semantics, boxes, scores, np.array(one)) for one in seen)
    (found,) = explain(ours, theirs, LIMITS)
    assert (found.row, found.cause) == (1, "iou_rounding")
    assert found.replay == "the subject with IoUs at the threshold as the reference takes them"
    assert agrees(found, ours, theirs)
    assert not explain(ours, ours, LIMITS)


@pytest.mark.parametrize("column", [0, 4])
def test_a_record_whose_boxes_moved_too_far_is_not_explained(tmp_path, column):
    subject = golden_dir() / "records" / f"{NAME}-tensorrt-fp32.json"
    record = Record.load(subject)
    image = next(i for i, found in record.detections.items() if len(found) > 3)
    boxes = record.candidates[image].boxes.copy()
    boxes[:, column] += 0.3
    record.candidates[image] = dataclasses.replace(record.candidates[image], boxes=boxes)
    found = explain_records(reference_record(subject), record.save(tmp_path), golden_dir())
    assert found.causes["unexplained"] > 0
    assert {i for i, each in found.divergences.items() if each} == {image}
    said = "angles moved by 0.3" if column == 4 else "boxes moved by 0.3"
    assert any(said in d.replay for d in found.divergences[image])


def test_the_command_writes_a_run_with_polygons(tmp_path: Path):
    command = ["explain", NAME, "--images", "4", "--score-threshold", "0.01", "--deployed-iou-threshold", "0.4"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "efficient_nms_rotated on onnxruntime against mmyolo's NMS on torch" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("unexplained: 0")
    (found,) = read_run(tmp_path).explanations
    assert found.worst
    for crop in found.worst:
        assert (tmp_path / crop.picture).is_file()
        boxes = [*crop.reference, *crop.subject]
        assert len([box for box in boxes if not box.matched]) == 1
        (lonely,) = (box for box in boxes if not box.matched)
        centre = np.mean(lonely.corners, 0)
        assert (centre >= 0).all()
        assert (centre <= [crop.width, crop.height]).all()
    assert "<polygon" in (tmp_path / "report.html").read_text()
