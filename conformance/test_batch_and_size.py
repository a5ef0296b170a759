"""Batches and input sizes: an image is answered the same alone and among others, and at every size."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from alignment.case import Backend, Case
from alignment.cli import app
from alignment.compare.detections import agree
from alignment.data.samples import Sample, open_samples
from alignment.engine.capabilities import missing
from alignment.errors import AlignError
from alignment.models.outputs import Outputs, detections_of, to_outputs
from alignment.pipeline import RunOptions, align_live
from alignment.results import Alignment, CaseResult
from alignment.runners.base import Runner
from alignment.runners.open import open_runner
from alignment.runners.record import Record, record_path
from alignment.variant import ZOO, Variant, load_variant, resized, zoo

#: Images and sizes of one family in full; the others have their own size and fewer images.
IMAGES, FEW = 16, 6
FULL = "yolov8_embedded"
SIZES = [(320, 320), (416, 416), (256, 384)]
OTHERS = [p.stem for p in zoo() if p.stem.endswith("_embedded") and p.stem != FULL]
#: Kernels may sum in another order for another batch: the limits of `golden.DEFAULTS` for float32, halved.
BOXES, SCORES = 0.01, 5e-5


@pytest.fixture(
    scope="module",
    params=[*((FULL, size) for size in SIZES), *((name, None) for name in OTHERS)],
    ids=lambda param: f"{param[0]}-{'x'.join(map(str, param[1]))}" if param[1] else param[0],
)
def variant(request) -> Variant:
    """Every embedded variant, one of them at each size."""
    pytest.importorskip("mmyolo")
    name, size = request.param
    found = load_variant(name)
    if found.rotated:
        pytest.importorskip("mmrotate")
    return resized(found, *size) if size else found


@pytest.fixture(scope="module")
def samples(variant) -> list[Sample]:
    return list(open_samples(variant, None, IMAGES if variant.name.startswith(FULL) else FEW))


BACKENDS = [pytest.param(name, marks=[pytest.mark.gpu] if name == "tensorrt" else []) for name in get_args(Backend)]


@pytest.fixture(scope="module", params=BACKENDS)
def runner(request, variant):
    """Each backend; TensorRT with a profile from 1 over 8 to 16 images."""
    if request.param == "tensorrt":
        if reason := missing():
            pytest.skip(reason)
        from alignment.engine.build import BuildOptions
        from alignment.export.onnx_export import exported
        from alignment.runners.tensorrt import TensorRTRunner

        opened: Runner = TensorRTRunner(exported(variant).onnx, BuildOptions(min_batch=1, opt_batch=8, max_batch=16))
        assert opened.provenance["build"]["batch"] == [1, 8, 16]
    else:
        opened = open_runner(variant, Case(variant.name, request.param, "fp32"))
    with opened:
        yield opened


@pytest.fixture(scope="module")
def alone(runner, variant, samples) -> list[Outputs]:
    """The answer to each image on its own."""
    return [to_outputs(runner.run(sample.tensor[None]), variant) for sample in samples]


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_an_image_is_answered_in_a_batch_as_alone(runner, variant, samples, alone, batch):
    count = 0
    for start in range(0, len(samples), batch):
        several = samples[start : start + batch]
        named = runner.run(np.stack([sample.tensor for sample in several]))
        answers = to_outputs(named, variant, len(several)).images()
        assert len(answers) == len(several)
        for sample, single, among in zip(several, alone[start:], answers, strict=False):
            assert np.abs(among.boxes - single.boxes).max() <= BOXES
            assert np.abs(among.scores - single.scores).max() <= SCORES
            assert among.raw.keys() == single.raw.keys()
            expected, found = (detections_of(o, sample.transform, variant) for o in (single, among))
            assert agree(expected, found).rate == 1.0
            strong = [np.sort(d.labels[d.scores >= 0.01]) for d in (expected, found)]
            np.testing.assert_array_equal(*strong)
            count += len(strong[0])
    assert count > len(samples)


def test_every_image_has_an_answer_of_its_own(alone):
    # Otherwise a backend that mixed up the images of a batch would go unnoticed.
    for i, one in enumerate(alone):
        assert all(np.abs(one.boxes - other.boxes).max() > 100 * BOXES for other in alone[:i])


def run(folder: Path, batch: int) -> dict[str, CaseResult]:
    """torch and ONNX Runtime on 7 images, with records."""
    variant = load_variant("yolov8_embedded")
    cases = [Case(variant.name, backend, "fp32") for backend in ("torch", "onnxruntime")]
    options = RunOptions(golden=folder, records=folder, referee_images=2, batch=batch)
    progress: list[int] = []
    results, _ = align_live(variant, cases, open_samples(variant, None, 7), options, progress.append)
    assert progress == list(range(1, 8))
    return {result.case.backend: result for result in results}


def test_a_run_in_batches_finds_and_records_what_one_image_at_a_time_does(tmp_path):
    pytest.importorskip("mmyolo")
    single, batched = run(tmp_path / "1", 1), run(tmp_path / "3", 3)
    for backend, result in batched.items():
        one = single[backend]
        assert result.status == one.status == "pass", result.reason
        assert result.provenance == {**one.provenance, "batch": 3}
        assert result.scores.subject_ap == pytest.approx(one.scores.subject_ap, abs=1e-6)
        assert [[c.name for c in s.checks] for s in result.stages] == [[c.name for c in s.checks] for s in one.stages]
        counts = [[t.difference.count for s in r.stages for t in s.tensors] for r in (one, result)]
        assert counts[0] == counts[1]
        ours, theirs = (Record.load(record_path(tmp_path / n, result.case.id)) for n in "31")
        assert (ours.digests, ours.identity) == (theirs.digests, theirs.identity)
        for image, found in theirs.detections.items():
            assert agree(found, ours.detections[image]).rate == 1.0
        for image, (boxes, scores) in theirs.full.items():
            assert np.abs(ours.full[image][0] - boxes).max() <= BOXES
            assert np.abs(ours.full[image][1] - scores).max() <= SCORES


def test_a_resized_variant_is_another_one():
    variant = load_variant("yolov8_embedded")
    larger = resized(variant, 384, 640)
    assert (larger.name, larger.input.height, larger.input.width) == ("yolov8_embedded_384x640", 384, 640)
    assert larger.fingerprint() != variant.fingerprint()
    assert resized(variant, 320, 320) is variant


@pytest.mark.parametrize(("height", "width"), [(400, 416), (0, 32), (-32, 32)])
def test_a_size_that_no_network_takes_is_refused(height, width):
    with pytest.raises(AlignError, match="give multiples of 32"):
        resized(load_variant("yolov8_embedded"), height, width)


def test_an_onnx_file_keeps_its_size():
    with pytest.raises(AlignError, match="the size of an ONNX file is its own"):
        resized(load_variant("yolox_nano_onnx"), 320, 320)


def test_run_takes_size_and_batch(tmp_path):
    pytest.importorskip("mmyolo")
    options = ["--backend", "onnxruntime", "--images", "5", "--size", "256x384", "--batch", "4", "--out", tmp_path]
    done = CliRunner().invoke(app, ["run", "yolov8_embedded", *map(str, options)])
    assert done.exit_code == 0, done.output
    (case,) = Alignment.model_validate_json((tmp_path / "alignment.json").read_text()).cases
    assert (case.case.id, case.provenance["batch"]) == ("yolov8_embedded_256x384-onnxruntime-fp32", 4)


@pytest.mark.parametrize("given", ["yolov8_embedded", "a copy.yaml"])
def test_a_failing_run_of_another_size_gives_a_command_that_works(tmp_path, given):
    """Taken from its output as it stands, also where the variant is a file."""
    pytest.importorskip("mmyolo")
    path = tmp_path / given
    if path.suffix:
        fields = yaml.safe_load((ZOO / "yolov8_embedded.yaml").read_text())
        path.write_text(yaml.safe_dump(fields))
    case = "yolov8_embedded_256x384-onnxruntime-fp16"
    held = {"tolerances": {"boxes": {"value": 1e-12, "origin": "absurd"}}}
    (tmp_path / "yolov8_embedded_256x384.yaml").write_text(
        yaml.safe_dump({"variant": "yolov8_embedded_256x384", "cases": {case: held}})
    )
    options = ["--backend", "onnxruntime", "--images", "1", "--size", "256x384", "--precision", "fp16"]
    name = str(path) if path.suffix else given
    done = CliRunner().invoke(app, ["run", name, *options, "--golden", str(tmp_path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 1, done.output
    (failed,) = Alignment.model_validate_json((tmp_path / "run" / "alignment.json").read_text()).cases
    command = failed.reason.split("`")[1]
    assert command.startswith(f"align layers {shlex.quote(name)} --size 256x384 ")
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert case in done.stdout


def test_export_takes_a_size(tmp_path):
    pytest.importorskip("mmyolo")
    import onnx

    done = CliRunner().invoke(app, ["export", "yolov8_embedded", "--size", "416", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    model = onnx.load(tmp_path / "yolov8_embedded_416x416.onnx")
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]] == [3, 416, 416]


@pytest.mark.parametrize("size", ["400", "4x4x4", "x", "320x", "large"])
def test_a_wrong_size_exits_2(tmp_path, size):
    done = CliRunner().invoke(app, ["run", "yolov8_embedded", "--size", size, "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "size" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
