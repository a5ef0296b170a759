"""Records: what was stored comes back, and replaying them finds what a live run finds."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from alignment.case import Case, reference_of
from alignment.data.preprocess import Transform
from alignment.data.samples import Samples, open_samples
from alignment.errors import AlignError
from alignment.golden import Golden, GoldenCase, Tolerance, golden_path, update
from alignment.nms.multiclass import postprocess
from alignment.replay import has_record, replay
from alignment.results import CaseResult, StageName, StageResult
from alignment.runners.record import (
    BOX_STEP,
    CANDIDATE_SCORE,
    CANDIDATES,
    FULL_IMAGES,
    SCORE_STEP,
    Candidates,
    Record,
    best_candidates,
    record_path,
)
from alignment.variant import Nms, Variant, load_variant

IMAGES = 6
TRT = Case("yolov8_embedded", "tensorrt", "fp32")
IDENTITY = {"variant_fingerprint": "f" * 16, "weights_sha256": "0" * 64}


def made(images: int = 4, seed: int = 0) -> Record:
    """A record of random outputs; one image without any detection."""
    rng = np.random.default_rng(seed)
    record = Record("net-tensorrt-fp32", IDENTITY)
    for image in range(10, 10 + images):
        corner = rng.uniform(0, 300, (400, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(1, 99, (400, 2))], 1).astype(np.float32)
        scores = (rng.random((400, 3)) ** 6 * (image != 11)).astype(np.float32)
        found = postprocess(boxes, scores, Transform((1.0, 1.0), (0.0, 0.0), (400, 400)), Nms())
        record.add(image, f"{image:016x}", boxes, scores, found)
    return record


def same(one: object, other: object) -> bool:
    names = [f.name for f in dataclasses.fields(one)]  # type: ignore[arg-type]
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_detections_and_candidates_come_back_to_the_bit_and_full_tensors_to_half_a_step(tmp_path):
    record = made()
    loaded = Record.load(record.save(tmp_path))
    assert (loaded.case, loaded.identity, loaded.result) == (record.case, IDENTITY, None)
    assert list(loaded.digests.items()) == list(record.digests.items())
    assert len(record.detections[11]) == 0
    for image in record.digests:
        assert same(loaded.detections[image], record.detections[image])
        assert same(loaded.candidates[image], record.candidates[image])
    assert list(loaded.full) == list(record.full) == [10, 11]
    assert len(record.full) == FULL_IMAGES
    for image, tensors in record.full.items():
        for step, ours, theirs in zip((BOX_STEP, SCORE_STEP), loaded.full[image], tensors, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=step / 2)


def test_saving_what_was_loaded_changes_nothing(tmp_path):
    first = made().save(tmp_path / "a")
    second = Record.load(first).save(tmp_path / "b")
    assert second.read_text() == first.read_text()
    with np.load(first.with_suffix(".npz")) as a, np.load(second.with_suffix(".npz")) as b:
        assert sorted(a) == sorted(b)
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_candidates_are_the_best_pairs_by_falling_score():
    rng = np.random.default_rng(1)
    boxes, scores = rng.random((300, 4)).astype(np.float32), rng.random((300, 2)).astype(np.float32)
    found = best_candidates(boxes, scores)
    assert len(found.scores) == CANDIDATES
    assert found.scores.tolist() == sorted(scores.ravel().tolist(), reverse=True)[:CANDIDATES]
    assert np.array_equal(scores[found.rows, found.labels], found.scores)
    assert np.array_equal(boxes[found.rows], found.boxes)
    few = best_candidates(boxes, np.where(scores > 0.99, scores, np.float32(CANDIDATE_SCORE / 2)))
    assert len(few.scores) == (scores > 0.99).sum()


def damage_json(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        fields = json.loads(path.read_text())
        edit(fields)
        path.write_text(json.dumps(fields))

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda path: path.unlink(),
    "no arrays": lambda path: path.with_suffix(".npz").unlink(),
    "truncated JSON": cut,
    "truncated arrays": lambda path: cut(path.with_suffix(".npz")),
    "flipped byte": lambda path: flip(path.with_suffix(".npz")),
    "empty arrays": lambda path: path.with_suffix(".npz").write_bytes(b""),
    "other version": damage_json(lambda fields: fields.update(record_version=99)),
    "no version": damage_json(lambda fields: fields.pop("record_version")),
    "field missing": damage_json(lambda fields: fields.pop("identity")),
    "empty identity": damage_json(lambda fields: fields["identity"].clear()),
    "identity without the weights": damage_json(lambda fields: fields["identity"].pop("weights_sha256")),
    "bad result": damage_json(lambda fields: fields.update(result={"case": 1})),
    "list": lambda path: path.write_text("[]"),
    "arrays of another run": lambda path: made(3, 1).save(path.parent / "b").with_suffix(".npz").replace(
        path.with_suffix(".npz")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_record_is_named_with_its_mend(tmp_path, name):
    path = made().save(tmp_path)
    DAMAGES[name](path)
    with pytest.raises(AlignError) as caught:
        Record.load(path)
    assert str(path.with_suffix("")) in caught.value.what
    assert "make the record again" in caught.value.mend
    assert "\n" not in str(caught.value)
    if name == "other version":
        assert "version 99, not 1" in caught.value.what


@pytest.mark.parametrize("part", ["numpy.savez_compressed", "json.dumps"])
def test_saving_that_fails_leaves_what_was_there(tmp_path, monkeypatch, part):
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    made().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(part, fail)
    with pytest.raises(OSError, match="no space left"):
        made(3, 1).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> tuple[Variant, Samples, CaseResult, Path]:
    """A run of torch and ONNX Runtime with records; ONNX Runtime's record then stands for TensorRT's."""
    pytest.importorskip("mmyolo")
    from alignment.pipeline import RunOptions, align_live

    variant = load_variant("yolov8_embedded")
    samples = open_samples(variant, None, IMAGES)
    golden = tmp_path_factory.mktemp("golden")
    cases = [reference_of(variant), Case(variant.name, "onnxruntime", "fp32")]
    options = RunOptions(golden=golden, records=golden / "records", referee_images=2)
    results, _ = align_live(variant, cases, samples, options)
    record = Record.load(record_path(golden / "records", cases[1].id))
    assert record.result is not None
    record.case, record.result.case = TRT.id, TRT.result_id()
    record.save(golden / "records")
    return variant, samples, results[1], golden


@pytest.fixture
def golden(live, tmp_path) -> Path:
    """A golden folder of the test's own, with the records of `live`."""
    for path in (live[3] / "records").iterdir():
        target = tmp_path / "records" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def rewrite(golden: Path, case: Case, edit: Callable[[Record], object]) -> None:
    record = Record.load(record_path(golden / "records", case.id))
    edit(record)
    record.save(golden / "records")


def stage(result: CaseResult, name: StageName) -> StageResult:
    return next(s for s in result.stages if s.name == name)


def test_replaying_with_the_images_gives_the_verdict_of_the_live_run(live, golden):
    variant, samples, ran, _ = live
    assert has_record(golden, TRT)
    found = replay(variant, TRT, golden, samples)
    assert found.replayed
    assert (found.case, found.images) == (TRT.result_id(), IMAGES)
    assert found.status == ran.status == "pass"
    assert found.wrong_side == ran.wrong_side
    assert found.scores == ran.scores
    assert {s.name: s.status for s in found.stages} == {s.name: s.status for s in ran.stages}
    assert stage(found, "detections").checks == stage(ran, "detections").checks
    assert stage(found, "raw").tensors == stage(ran, "raw").tensors
    assert "recheck" in stage(found, "raw").note
    assert "replayed" in found.reason


def test_replaying_without_images_says_what_it_cannot_check(live, golden):
    variant, _, ran, _ = live
    found = replay(variant, TRT, golden, None)
    assert (found.status, found.replayed, found.images) == ("pass", True, IMAGES)
    for name in ("input", "map"):
        assert stage(found, name).status == "not_checked"
        assert "--data" in stage(found, name).note
    assert f"{ran.scores.subject_ap:.4f}" in stage(found, "map").note


def test_replaying_fewer_images_scores_those(live, golden):
    variant = live[0]
    found = replay(variant, TRT, golden, open_samples(variant, None, 3))
    assert (found.status, found.images) == ("pass", 3)
    assert stage(found, "input").checks[0].value == 3


@pytest.mark.parametrize("recorded_ap", [0.001, 0.5])
def test_a_record_is_doubted_by_the_ap_that_its_reference_has_here(live, golden, recorded_ap):
    """Without images that is the recorded one."""
    variant, samples, _, _ = live

    def edit(record: Record) -> None:
        record.result.scores.reference_ap = recorded_ap
        record.result.warnings = ["weights clamped: 1", "reference AP 0.0010: as it was then"]

    rewrite(golden, TRT, edit)
    assert replay(variant, TRT, golden, samples).warnings == ["weights clamped: 1"]
    (first, *rest) = replay(variant, TRT, golden, None).warnings
    assert first == "weights clamped: 1"
    assert [said.split(":")[0] for said in rest] == (["reference AP 0.0010"] if recorded_ap < 0.01 else [])
    assert "reference AP 0.0010: as it was then" not in rest


def test_tolerances_as_tight_as_the_measured_errors_hold_for_the_replay_too(live, golden):
    variant, samples, ran, _ = live
    update(golden, ran.model_copy(update={"case": TRT.result_id()}), {}, "test")
    found = replay(variant, TRT, golden, samples)
    assert found.status == "pass", found.reason


def test_rounding_to_fixed_point_is_no_difference_under_a_tight_tolerance(live, golden):
    variant = live[0]
    reference = Record.load(record_path(golden / "records", reference_of(variant).id))

    def nearly_the_same(record: Record) -> None:
        record.candidates = reference.candidates
        record.full = {i: (boxes + BOX_STEP, scores - SCORE_STEP) for i, (boxes, scores) in reference.full.items()}
        for tensor in stage(record.result, "decoded").tensors:
            tensor.difference.max_abs = 1e-9

    rewrite(golden, TRT, nearly_the_same)
    tight: dict = {name: Tolerance(value=1e-8, origin="test") for name in ("boxes", "scores")}
    content = Golden(variant=variant.name, cases={TRT.id: GoldenCase(tolerances=tight)})
    golden_path(golden, variant.name).write_text(yaml.safe_dump(content.model_dump(exclude_none=True)))
    found = replay(variant, TRT, golden, None)
    assert found.status == "pass", found.reason


def shift_candidates(record: Record) -> None:
    next(iter(record.candidates.values())).boxes[0] += 0.5


def shift_full(record: Record) -> None:
    next(iter(record.full.values()))[0][5] += 0.5


def full_scores(record: Record) -> None:
    next(iter(record.full.values()))[1][5] += 0.01


def shift_detections(record: Record) -> None:
    for found in record.detections.values():
        found.boxes[:] += 0.1 * (found.boxes[:, 2:3] - found.boxes[:, :1])


def drop_detections(record: Record) -> None:
    for image, found in record.detections.items():
        kept = {f.name: getattr(found, f.name)[1:] for f in dataclasses.fields(found)}
        record.detections[image] = type(found)(**kept)


def keep_candidates(part: Callable[[int], slice]) -> Callable[[Record], None]:
    def fault(record: Record) -> None:
        for image, found in record.candidates.items():
            kept = part(len(found.scores))
            record.candidates[image] = Candidates(**{k: v[kept] for k, v in vars(found).items()})

    return fault


no_candidates = keep_candidates(lambda count: slice(0))
without_the_best = keep_candidates(lambda count: slice(1, None))
without_the_top_half = keep_candidates(lambda count: slice(count // 2, None))


def other_rows(record: Record) -> None:
    for found in record.candidates.values():
        found.rows[:] += 1


def no_full(record: Record) -> None:
    record.full.clear()


def one_full(record: Record) -> None:
    record.full.popitem()


def cut_full(record: Record) -> None:
    record.full = {i: (boxes[1:], scores[1:]) for i, (boxes, scores) in record.full.items()}


def no_statistics(record: Record) -> None:
    stage(record.result, "decoded").tensors.clear()


@pytest.mark.parametrize(
    ("fault", "where", "check"),
    [
        (no_candidates, "decoded", "scores"),
        (without_the_best, "decoded", "scores"),
        (without_the_top_half, "decoded", "scores"),
        (other_rows, "decoded", "scores"),
        (no_full, "decoded", "full tensors"),
        (one_full, "decoded", "full tensors"),
        (cut_full, "decoded", "full tensors"),
        (no_statistics, "decoded", "statistics"),
        (shift_candidates, "decoded", "boxes"),
        (shift_full, "decoded", "boxes"),
        (full_scores, "decoded", "scores"),
        (shift_detections, "detections", "agreement"),
        (drop_detections, "detections", "agreement"),
    ],
)
@pytest.mark.parametrize("with_images", [True, False])
def test_a_fault_in_the_recorded_answers_is_found(live, golden, fault, where, check, with_images):
    variant, samples, _, _ = live
    rewrite(golden, TRT, fault)
    found = replay(variant, TRT, golden, samples if with_images else None)
    assert (found.status, found.first_difference) == ("fail", where)
    assert any(c.name == check and not c.ok for c in stage(found, where).checks)


@pytest.mark.parametrize("side", [TRT, Case("yolov8_embedded", "torch", "fp32")], ids=lambda case: case.backend)
def test_candidates_that_one_side_lost_are_missed_whichever_it_is(live, golden, side):
    rewrite(golden, side, without_the_top_half)
    assert replay(live[0], TRT, golden, None).first_difference == "decoded"


def test_below_the_last_candidate_of_a_full_list_nothing_can_be_said(live, golden):
    boxes = np.random.default_rng(2).random((CANDIDATES + 9, 4))
    scores = np.linspace(0.9, 0.1, len(boxes))[:, None]
    other = scores.copy()  # the last that is listed and the first that is not change places
    other[[CANDIDATES - 1, CANDIDATES]] = scores[[CANDIDATES, CANDIDATES - 1]]
    image = live[1].dataset.images[0].id
    for case, given in ((TRT, other), (reference_of(live[0]), scores)):
        best = best_candidates(boxes, given)
        rewrite(golden, case, lambda record, best=best: record.candidates.update({image: best}))
    found = replay(live[0], TRT, golden, None)
    assert found.status == "pass", found.reason
    note = stage(found, "decoded").note
    assert re.search(
        rf"at most the best {CANDIDATES} \(so many are listed of \d of {IMAGES} images, where nothing", note
    )
    assert f"the full tensors of {FULL_IMAGES} images" in note


def test_a_fault_in_the_recorded_statistics_is_found(live, golden):
    def spoil(record: Record) -> None:
        stage(record.result, "raw").tensors[0].difference.max_abs = 1.0

    rewrite(golden, TRT, spoil)
    assert replay(live[0], TRT, golden, None).first_difference == "raw"


def test_other_input_bytes_are_found(live, golden):
    variant, samples, _, _ = live
    rewrite(golden, TRT, lambda record: record.digests.update({samples.dataset.images[2].id: "0" * 16}))
    found = replay(variant, TRT, golden, samples)
    assert (found.status, found.first_difference) == ("fail", "input")
    assert stage(found, "input").checks[0].value == IMAGES - 1


def other_preprocessing(variant: Variant) -> Variant:
    return variant.model_copy(update={"preprocess": variant.preprocess.model_copy(update={"pad_value": 0})})


def test_a_record_of_other_preprocessing_is_stale(live, golden):
    with pytest.raises(AlignError, match=r"tensorrt-fp32\.json: stale: the variant's YAML changed"):
        replay(other_preprocessing(live[0]), TRT, golden, None)


def test_a_record_of_other_weights_is_stale(live, golden, tmp_path):
    weights = tmp_path / "other.pth"
    weights.write_bytes(live[0].weights.read_bytes() + b"\0")
    source = live[0].source.model_copy(update={"checkpoint": weights})
    with pytest.raises(AlignError, match=r"stale: made with other weights than .*other\.pth"):
        replay(live[0].model_copy(update={"source": source}), TRT, golden, None)


def test_a_reference_of_another_run_is_refused(live, golden):
    reference = reference_of(live[0])
    rewrite(golden, reference, lambda record: record.identity.update(weights_sha256="1" * 64))
    with pytest.raises(AlignError, match="other weights than the record of its reference"):
        replay(live[0], TRT, golden, None)


def test_a_reference_of_other_images_is_refused(live, golden):
    def forget(record: Record) -> None:
        record.digests.pop(list(record.digests)[-1])

    rewrite(golden, reference_of(live[0]), forget)
    with pytest.raises(AlignError, match="images"):
        replay(live[0], TRT, golden, None)


@pytest.mark.parametrize("missing", [TRT, Case("yolov8_embedded", "torch", "fp32")], ids=lambda case: case.id)
def test_a_record_that_is_missing_is_named(live, golden, missing):
    record_path(golden / "records", missing.id).unlink()
    with pytest.raises(AlignError, match=missing.id):
        replay(live[0], TRT, golden, None)
    assert has_record(golden, TRT) is (missing != TRT)


def test_a_record_without_a_result_is_refused(live, golden):
    rewrite(golden, TRT, lambda record: setattr(record, "result", None))
    with pytest.raises(AlignError, match="holds no result: make the record again"):
        replay(live[0], TRT, golden, None)
