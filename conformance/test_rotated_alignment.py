"""A rotated detector from torch to the report: faults are found at the stage that they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alignment.case import Case, reference_of
from alignment.data.preprocess import Transform
from alignment.data.samples import open_samples
from alignment.nms.multiclass import Detections, postprocess
from alignment.pipeline import RunOptions, align_live, boxes_of
from alignment.replay import replay
from alignment.report.gather import beside
from alignment.report.html import render
from alignment.results import Alignment, Box, CaseResult
from alignment.runners.record import ANGLE_STEP, BOX_STEP, Record, record_path
from alignment.variant import Nms, Variant, load_variant

pytestmark = pytest.mark.rotated
IMAGES = 3
NAME = "rtmdet_r_embedded"
TRT = Case(NAME, "tensorrt", "fp32")


def made(width: int) -> Record:
    rng = np.random.default_rng(0)
    record = Record("net-tensorrt-fp32", {"variant_fingerprint": "f" * 16, "weights_sha256": "0" * 64})
    for image in (10, 11, 12):
        corner = rng.uniform(0, 300, (200, 2))
        columns = [corner, corner + rng.uniform(1, 99, (200, 2)), rng.uniform(-1.57, 1.57, (200, 1))]
        boxes = np.concatenate(columns, 1).astype(np.float32)[:, :width]
        scores = (rng.random((200, 3)) ** 6 * (image != 11)).astype(np.float32)
        found = postprocess(boxes, scores, Transform((1.0, 1.0), (0.0, 0.0), (400, 400)), Nms(iou_threshold=0.1))
        record.add(image, f"{image:016x}", boxes, scores, found)
    return record


def test_a_record_keeps_angles_in_steps_of_their_own(tmp_path):
    record = made(5)
    path = record.save(tmp_path)
    loaded = Record.load(path)
    assert json.loads(path.read_text())["steps"]["angles"] == ANGLE_STEP
    assert loaded.rotated
    for image in record.digests:
        for name, theirs in vars(record.detections[image]).items():
            np.testing.assert_array_equal(getattr(loaded.detections[image], name), theirs)
        assert loaded.detections[image].boxes.shape[1] == loaded.candidates[image].boxes.shape[1] == 5
    for image, (boxes, _) in record.full.items():
        error = np.abs(loaded.full[image][0] - boxes)
        assert error[:, :4].max() <= BOX_STEP / 2
        assert error[:, 4].max() <= ANGLE_STEP / 2
    again = loaded.save(tmp_path / "again")
    assert again.read_text() == path.read_text()


def test_records_of_upright_boxes_are_written_as_ever(tmp_path):
    path = made(4).save(tmp_path)
    fields = json.loads(path.read_text())
    assert fields["record_version"] == 1
    assert list(fields["steps"]) == ["boxes", "scores"]
    assert not Record.load(path).rotated


@pytest.fixture(scope="module")
def variant() -> Variant:
    pytest.importorskip("mmyolo")
    pytest.importorskip("mmrotate")
    variant = load_variant(NAME)
    if not variant.weights.is_file():
        pytest.skip(f"{variant.weights} is not there")
    return variant


@pytest.fixture(scope="module")
def live(variant, tmp_path_factory) -> tuple[CaseResult, Path, Path]:
    """A run of torch and ONNX Runtime; ONNX Runtime's record then stands for TensorRT's."""
    golden, out = tmp_path_factory.mktemp("golden"), tmp_path_factory.mktemp("run")
    cases = [reference_of(variant), Case(NAME, "onnxruntime", "fp32")]
    options = RunOptions(golden=golden, out=out, records=golden / "records", referee_images=2)
    results, _ = align_live(variant, cases, open_samples(variant, None, IMAGES), options)
    record = Record.load(record_path(golden / "records", cases[1].id))
    record.case, record.result.case = TRT.id, TRT.result_id()
    record.save(golden / "records")
    return results[1], golden, out


def checks(result: CaseResult, stage: str) -> dict[str, bool]:
    return {check.name: check.ok for s in result.stages if s.name == stage for check in s.checks}


def test_a_rotated_detector_is_aligned(live):
    result = live[0]
    assert result.status == "pass", result.reason
    assert checks(result, "decoded") == {"boxes": True, "angles": True, "scores": True}
    assert " rad" in result.reason
    assert result.scores.subject_ap > 0.4
    assert {t.name for s in result.stages if s.name == "raw" for t in s.tensors} == {
        f"{kind}_s{s}" for kind in ("cls", "bbox", "angle") for s in (8, 16, 32)
    }


def flip_sign(boxes: np.ndarray) -> None:
    boxes[..., 4] *= -1


def swap_sides(boxes: np.ndarray) -> None:
    boxes[..., [2, 3]] = boxes[..., [3, 2]]


def other_half_turn(boxes: np.ndarray) -> None:
    boxes[..., 4] += np.where(boxes[..., 4] > 0, -np.pi, np.pi)


def degrees(boxes: np.ndarray) -> None:
    boxes[..., 4] = np.rad2deg(boxes[..., 4])


@pytest.mark.parametrize(
    ("fault", "check"), [(flip_sign, "angles"), (swap_sides, "boxes"), (degrees, "angles"), (other_half_turn, None)]
)
def test_a_fault_of_decoding_is_found_there_and_half_a_turn_is_none(variant, tmp_path, monkeypatch, fault, check):
    from alignment.runners.onnxruntime import OnnxRuntimeRunner

    run = OnnxRuntimeRunner.run

    def spoilt(self: OnnxRuntimeRunner, batch: np.ndarray) -> dict[str, np.ndarray]:
        named = run(self, batch)
        fault(named["boxes"])
        return named

    monkeypatch.setattr(OnnxRuntimeRunner, "run", spoilt)
    options = RunOptions(golden=tmp_path, referee_images=1)
    case = Case(NAME, "onnxruntime", "fp32")
    result = align_live(variant, [case], open_samples(variant, None, 2), options)[0][0]
    if check is None:
        assert result.status == "pass", result.reason
        return
    assert (result.status, result.first_difference, result.wrong_side) == ("fail", "decoded", "subject")
    assert checks(result, "decoded")[check] is False
    assert checks(result, "raw") == {"raw": True}
    assert checks(result, "detections") == {"agreement": False}


@pytest.mark.parametrize("with_images", [True, False])
def test_a_record_of_rotated_boxes_is_replayed(live, variant, with_images):
    ran, golden, _ = live
    found = replay(variant, TRT, golden, open_samples(variant, None, IMAGES) if with_images else None)
    assert found.status == "pass", found.reason
    names = [t.name for s in found.stages if s.name == "decoded" for t in s.tensors]
    assert names == [
        *("boxes", "angles", "scores"),
        *("boxes, full tensors", "angles, full tensors", "scores, full tensors"),
        *("boxes, candidates", "angles, candidates", "scores, candidates"),
    ]
    if with_images:
        assert found.scores == ran.scores


@pytest.mark.parametrize("part", ["candidates", "full"])
def test_a_wrong_angle_in_a_record_is_found(live, variant, tmp_path, part):
    _, golden, _ = live
    record = Record.load(record_path(golden / "records", TRT.id))
    if part == "candidates":
        next(iter(record.candidates.values())).boxes[0, 4] += 0.1
    else:
        next(iter(record.full.values()))[0][5, 4] += 0.1
    record.save(tmp_path / "records")
    reference = record_path(golden / "records", reference_of(variant).id)
    Record.load(reference).save(tmp_path / "records")
    found = replay(variant, TRT, tmp_path, None)
    assert (found.status, found.first_difference) == ("fail", "decoded")


def page(cases: list[CaseResult], folder: Path) -> str:
    alignment = Alignment(created="", command="", cases=cases)
    return render(beside(Alignment.model_validate(json.loads(alignment.model_dump_json())), folder))


def test_the_report_draws_rotated_boxes_as_polygons(live):
    result, _, out = live
    boxes = [box for image in result.worst for box in image.reference]
    assert boxes
    for box in boxes:
        around = np.array(box.corners)
        assert around.shape == (4, 2)
        np.testing.assert_allclose(box.xyxy, [*around.min(0), *around.max(0)])
    text = page([result], out)
    assert text.count("<polygon points=") >= len(boxes)
    points = " ".join(f"{x},{y}" for x, y in boxes[0].corners)
    assert f'<polygon points="{points}" class="reference"' in text


def shape_of(change: Callable[[Box], Box], live: tuple[CaseResult, Path, Path]) -> str:
    result, _, out = live
    worst = result.worst[0].model_copy(update={"reference": [change(result.worst[0].reference[0])], "subject": []})
    return page([result.model_copy(update={"worst": [worst]})], out)


def test_boxes_without_corners_are_rectangles_and_corners_that_are_not_finite_are_not_drawn(live):
    upright = shape_of(lambda box: box.model_copy(update={"corners": None}), live)
    assert "<polygon" not in upright
    assert '<rect x="' in upright
    lost = shape_of(lambda box: box.model_copy(update={"corners": [(0, 0), (1, 0), (1, float("inf")), (0, 1)]}), live)
    assert "<polygon" not in lost
    assert "1 box not drawn: not finite" in lost


def test_results_of_upright_boxes_are_as_before():
    found = Detections(
        np.array([[1, 2, 3, 4]], np.float32), np.array([0.9], np.float32), np.zeros(1, int), np.zeros(1, int)
    )
    (box,) = boxes_of(found, np.array([True]), ["a"])
    assert box == Box(xyxy=(1, 2, 3, 4), score=0.9, label=0, label_name="a")
    assert Box.model_validate({"xyxy": [1, 2, 3, 4], "score": 0.9, "label": 0}).corners is None


def test_without_mmrotate_it_is_skipped_with_the_mend(monkeypatch):
    from alignment import session

    monkeypatch.setattr(session, "find_spec", lambda name: None)
    reason = session.unavailable(load_variant("rtmdet_r_embedded"), None)
    assert reason
    assert "pip install --no-deps mmrotate" in reason
    assert session.unavailable(load_variant("rtmdet_embedded"), None) is None
