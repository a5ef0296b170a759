"""Bare ONNX files of every head layout: the same detector gives the same boxes, scores and detections in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_layouts as layouts
import pytest
import yaml
from typer.testing import CliRunner

from alignment import pipeline
from alignment.case import Case, cases_of, reference_of
from alignment.cli import app
from alignment.compare.detections import agree
from alignment.data.samples import Sample, open_samples
from alignment.errors import AlignError
from alignment.export.onnx_export import ExportOptions, exported
from alignment.golden import update
from alignment.layers import compare_layers
from alignment.models.outputs import ENDS_IN_NMS, Outputs, detections_of, to_outputs
from alignment.nms.multiclass import Detections
from alignment.pipeline import RunOptions, align_live
from alignment.replay import replay
from alignment.results import CaseResult
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.record import Record
from alignment.variant import ZOO, Variant, load_variant

pytest.importorskip("mmyolo")

IMAGES = 6
Layout = Callable[[layouts.Graph], dict[str, str]]
NAMES = {"boxes": "boxes_", "scores": "scores_"}
DECODED: dict[str, tuple[Layout, dict[str, Any]]] = {
    "yolov8": (layouts.yolov8, {"layout": "yolov8"}),
    "yolov8 that says so": (layouts.yolov8, {"layout": "yolov8", "transposed": True, "output": "output0"}),
    "yolov8 with logits": (layouts.yolov8_logits, {"layout": "yolov8", "scores_activation": "sigmoid"}),
    "yolov5": (layouts.yolov5, {"layout": "yolov5"}),
    "yolov5 beside other outputs": (layouts.yolov5_beside_others, {"layout": "yolov5"}),
    "yolov5 transposed": (layouts.yolov5_transposed, {"layout": "yolov5"}),
    "yolov5 with logits": (layouts.yolov5_logits, {"layout": "yolov5", "scores_activation": "sigmoid"}),
    "yolox": (layouts.yolox, {"layout": "yolox"}),
    "decoded": (layouts.decoded, {"layout": "decoded", **NAMES}),
    "decoded, centre and size": (layouts.decoded_centred, {"layout": "decoded", "box_format": "cxcywh", **NAMES}),
    "PP-YOLOE": (layouts.ppyoloe, {"layout": "decoded", **NAMES}),
    "decoded with logits": (layouts.decoded_logits, {"layout": "decoded", "scores_activation": "sigmoid", **NAMES}),
}
NMS_NAMES = {"boxes": "det_boxes", "scores": "det_scores", "labels": "det_classes"}
END2END: dict[str, tuple[Layout, dict[str, Any]]] = {
    "YOLOv7": (layouts.yolov7, {"layout": "end2end"}),
    "YOLOv10": (layouts.yolov10, {"layout": "end2end"}),
    "EfficientNMS": (layouts.efficient_nms, {"layout": "end2end", **NMS_NAMES}),
    "mmdeploy": (layouts.mmdeploy, {"layout": "end2end", "boxes": "dets", "count": None}),
}
ALL = {**DECODED, **END2END}


@dataclasses.dataclass
class Original:
    """The embedded detector as it is exported, and what it says about some images."""

    variant: Variant
    samples: list[Sample]
    outputs: list[Outputs]
    detections: list[Detections]
    ap: float


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("onnx-heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def embedded() -> Variant:
    return load_variant("yolov8_embedded")


@pytest.fixture(scope="module")
def write(cache, embedded) -> Callable[..., Variant]:
    """Writes the detector in a layout, and the YAML beside it, which is all that a new file needs."""

    def make(layout: Layout, head: dict[str, Any], batch: int | None = 1, **changes: Any) -> Variant:
        name = f"{layout.__name__}_{batch or 'n'}"
        path = cache / f"{name}.onnx"
        if not path.is_file():
            graph = layouts.Graph(exported(embedded, ExportOptions(17, batch, "decoded")).onnx)
            graph.save(path, layout(graph))
        fields = yaml.safe_load((ZOO / "yolov8_embedded.yaml").read_text())
        fields.update(name=name, source={"kind": "onnx", "file": path.name, "head": head}, **changes)
        if head["layout"] == "end2end":
            del fields["nms"]
        (cache / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        return load_variant(cache / f"{name}.yaml")

    return make


@pytest.fixture(scope="module")
def original(write) -> Original:
    variant = write(layouts.decoded, {"layout": "decoded", **NAMES})
    samples = list(open_samples(variant, limit=IMAGES))
    outputs = [to_outputs(ours, variant) for ours in run(variant, samples)]
    found = [detections_of(o, s.transform, variant) for o, s in zip(outputs, samples, strict=True)]
    return Original(variant, samples, outputs, found, live(variant).scores.subject_ap)


def run(variant: Variant, samples: list[Sample]) -> list[dict[str, np.ndarray]]:
    with OnnxRuntimeRunner(variant.weights) as runner:
        return [runner.run(sample.tensor[None]) for sample in samples]


def live(variant: Variant, **options: Any) -> CaseResult:
    """The verdict on ONNX Runtime, with its AP, as `align run` gives it."""
    cases = cases_of(variant, ("torch", "onnxruntime"), ("fp32",))
    options.setdefault("referee_images", 0)
    (result,), _ = align_live(variant, cases, open_samples(variant, limit=IMAGES), RunOptions(**options))
    return result


def close(ours: np.ndarray, theirs: np.ndarray, absolute: float) -> bool:
    return ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-4, atol=absolute)


@pytest.mark.parametrize(("layout", "head"), DECODED.values(), ids=DECODED)
def test_every_layout_gives_the_same_boxes_and_scores(write, original, layout, head):
    variant = write(layout, head)
    for named, other, sample, found in zip(
        run(variant, original.samples), original.outputs, original.samples, original.detections, strict=True
    ):
        ours = to_outputs(named, variant)
        assert close(ours.boxes, other.boxes, 320 * 1e-4)
        assert close(ours.scores, other.scores, 2e-6)
        assert agree(found, detections_of(ours, sample.transform, variant)).rate == 1


@pytest.mark.parametrize(("layout", "head"), END2END.values(), ids=END2END)
def test_a_graph_that_ends_in_nms_gives_the_same_detections(write, original, layout, head):
    variant = write(layout, head)
    for named, sample, found in zip(run(variant, original.samples), original.samples, original.detections, strict=True):
        ours = detections_of(to_outputs(named, variant), sample.transform, variant)
        assert agree(found, ours).rate == 1
        assert (np.diff(ours.scores) <= 0).all()
        assert ours.scores.min() > 0
        # Padding would be found here: it says 0.9 in one layout, 0 in the others.
        strong = found.scores >= 0.25
        assert (ours.scores >= 0.25).sum() == strong.sum()
        height, width = sample.transform.original
        assert (ours.boxes >= 0).all()
        assert (ours.boxes <= [width, height, width, height]).all()


@pytest.mark.parametrize(("layout", "head"), ALL.values(), ids=ALL)
def test_every_layout_runs_to_the_same_ap(write, original, layout, head):
    result = live(write(layout, head), referee_images=1)
    assert result.status == "pass"
    assert result.notes == []
    assert result.scores.subject_ap == pytest.approx(original.ap, abs=0.002)
    stages = {stage.name: stage for stage in result.stages}
    if head["layout"] == "end2end":
        assert [(stages[s].status, stages[s].note) for s in ("raw", "decoded")] == [("not_checked", ENDS_IN_NMS)] * 2
        # The reference itself is held to float64.
        assert [(c.name, c.value) for c in stages["detections"].checks] == [("agreement", 1.0)]
    else:
        assert stages["decoded"].status == "pass"
        assert max(t.referee_images for t in stages["decoded"].tensors) == 1


@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("name", ["yolov8", "yolox", "YOLOv7"])
def test_a_fixed_batch_and_a_dynamic_one_give_the_same(write, original, name, batch):
    layout, head = ALL[name]
    variant = write(layout, head, batch)
    for named, sample, found in zip(run(variant, original.samples), original.samples, original.detections, strict=True):
        assert agree(found, detections_of(to_outputs(named, variant), sample.transform, variant)).rate == 1
    result = live(variant, referee_images=1)
    assert (result.status, result.notes) == ("pass", [])
    assert result.scores.subject_ap == pytest.approx(original.ap, abs=0.002)


def test_undecoded_yolov5_maps_are_decoded_as_mmyolo_does(cache, original):
    """mmyolo's own boxes and scores beside its maps, which are decoded here."""
    graph = layouts.Graph(exported(load_variant("yolov5_embedded"), ExportOptions(17, 1, "both")).onnx)
    maps = layouts.yolov5_maps(graph)
    graph.save(cache / "yolov5_raw.onnx", {**maps, "boxes_": "boxes", "scores_": "scores"})
    anchors = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
    fields = yaml.safe_load((ZOO / "yolov5_embedded.yaml").read_text())
    raw, theirs = (
        Variant.model_validate({**fields, "source": {"kind": "onnx", "file": cache / "yolov5_raw.onnx", "head": head}})
        for head in ({"layout": "yolov5_raw", "anchors": anchors}, {"layout": "decoded", **NAMES})
    )
    # mmyolo counts cell by cell and then anchor by anchor, YOLOv5 the other way round.
    levels = np.split(np.arange(6300).reshape(-1, 3), [1600, 2000])
    order = np.concatenate([level.T.ravel() for level in levels])
    for named, sample in zip(run(raw, original.samples), original.samples, strict=True):
        ours, other = to_outputs(named, raw), to_outputs(named, theirs)
        assert sorted(ours.raw) == ["map_16", "map_32", "map_8"]
        assert close(ours.boxes, other.boxes[:, order], 320 * 1e-4)
        assert close(ours.scores, other.scores[:, order], 2e-6)
        both = [detections_of(outputs, sample.transform, raw) for outputs in (ours, other)]
        assert agree(*both).rate == 1
        assert both[0].scores.max() > 0.5


# A head, or a file, that is not what it is said to be; what is said about it, None where only AP can tell.
FAULTS: dict[str, tuple[Layout, dict[str, Any], str | None]] = {
    "corners declared centre and size": (layouts.decoded, {"layout": "decoded", "box_format": "cxcywh", **NAMES}, None),
    "centre and size declared corners": (layouts.yolov8, {"layout": "yolov8", "box_format": "xyxy"}, "box_format"),
    "boxes as scores": (layouts.decoded, {"layout": "decoded", "boxes": "scores_", "scores": "boxes_"}, "scores_ ["),
    "transposed wrongly": (layouts.yolov8, {"layout": "yolov8", "transposed": False}, "source.head"),
    "yolov5 declared yolov8": (layouts.yolov5, {"layout": "yolov8"}, "7 classes?"),
    "undecoded declared decoded": (layouts.yolox, {"layout": "yolov5"}, None),
    "decoded declared undecoded": (layouts.yolov5, {"layout": "yolox", "strides": [8, 16, 32]}, None),
    "other strides": (layouts.yolox, {"layout": "yolox", "strides": [32, 16, 8]}, None),
    "logits declared probabilities": (layouts.yolov8_logits, {"layout": "yolov8"}, "scores_activation: sigmoid"),
    "two sigmoids": (layouts.yolov8, {"layout": "yolov8", "scores_activation": "sigmoid"}, "scores_activation: none"),
    "classes shifted by one": (layouts.shifted_classes, {"layout": "decoded", **NAMES}, None),
    "labels that count from 1": (layouts.labels_from_one, {"layout": "end2end"}, "label 6"),
    "padding counted": (layouts.efficient_nms, {"layout": "end2end", "count": None, **NMS_NAMES}, None),
}


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("layout", "head", "said"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_said_or_seen_in_the_ap(write, original, layout, head, said):
    variant = write(layout, head)
    if said is None:
        assert live(variant).scores.subject_ap < original.ap - 0.05
    else:
        with pytest.raises(AlignError) as caught:
            live(variant)
        assert f"{variant.weights}: " in str(caught.value)
        assert said in str(caught.value)


def test_the_golden_ap_makes_such_a_fault_a_failure(write, original, tmp_path):
    good, bad = (write(layout, {"layout": "decoded", **NAMES}) for layout in (layouts.decoded, layouts.shifted_classes))
    dataset = {"fingerprint": open_samples(good, limit=IMAGES).dataset.fingerprint}
    update(tmp_path, live(good), dataset, "a test")
    named_alike = bad.model_copy(update={"name": good.name})
    assert live(good, golden=tmp_path).status == "pass"
    failed = live(named_alike, golden=tmp_path)
    assert (failed.status, failed.first_difference) == ("fail", "map")


def test_golden_values_of_a_graph_that_ends_in_nms_are_its_agreement_and_ap(write, tmp_path):
    variant = write(*END2END["YOLOv10"])
    path = update(tmp_path, live(variant, referee_images=1), {"fingerprint": "x"}, "a test")
    (case,) = yaml.safe_load(path.read_text())["cases"].values()
    assert set(case["tolerances"]) == {"agreement"}
    assert "over the referee's images" in case["tolerances"]["agreement"]["origin"]
    assert case["ap"]["images"] == IMAGES


class Planted(OnnxRuntimeRunner):
    """ONNX Runtime in the place of TensorRT, with an error in the detections."""

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        rows = super().run(batch)["output0"]
        return {"output0": rows + self.error}

    error = np.zeros(6, np.float32)


@pytest.fixture
def two_sides(write, monkeypatch, tmp_path) -> Callable[[list[float]], tuple[Variant, Case, CaseResult]]:
    """A file that ends in NMS on two backends, of which the second errs; records lie in ``tmp_path/records``."""

    def make(error: list[float]) -> tuple[Variant, Case, CaseResult]:
        variant = write(*END2END["YOLOv10"])
        case = Case(variant.name, "tensorrt", "fp32")
        reference = Planted(variant.weights)
        subject = Planted(variant.weights)
        subject.error = np.array(error, np.float32)
        runners = {reference_of(variant): reference, case: subject}
        monkeypatch.setattr(pipeline, "open_runner", lambda _, asked, *__: runners[asked])
        samples = open_samples(variant, limit=IMAGES)
        options = RunOptions(golden=tmp_path, records=tmp_path / "records", referee_images=1)
        (result,), _ = align_live(variant, [case], samples, options)
        return variant, case, result

    return make


def test_two_backends_of_a_graph_that_ends_in_nms_are_compared_and_replayed(two_sides, tmp_path):
    variant, case, result = two_sides([0.01, 0, 0, 0, 0, 0])
    assert result.status == "pass"
    notes = {stage.name: (stage.status, stage.note) for stage in result.stages}
    assert notes["raw"] == notes["decoded"] == ("not_checked", ENDS_IN_NMS)
    assert "agreement 1.0000" in result.reason
    record = Record.load(tmp_path / "records" / f"{case.id}.json")
    assert all(len(found) for found in record.detections.values())
    assert all(len(found.scores) == 0 for found in record.candidates.values())
    for samples in (None, open_samples(variant, limit=IMAGES)):
        again = replay(variant, case, tmp_path, samples)
        assert (again.status, again.replayed, again.images) == ("pass", True, IMAGES)
        stages = {stage.name: stage for stage in again.stages}
        assert {stages[name].note for name in ("raw", "decoded")} == {ENDS_IN_NMS}
        assert [c.value for c in stages["detections"].checks] == [1.0]
        if samples:
            assert [c.name for c in stages["map"].checks] == ["delta_ap"]
            assert again.scores == result.scores


@pytest.mark.parametrize("error", [[30, 0, 30, 0, 0, 0], [0, 0, 0, 0, -0.1, 0]], ids=["boxes", "scores"])
def test_an_error_behind_the_nms_fails_at_the_detections(two_sides, tmp_path, error):
    variant, case, result = two_sides(error)
    assert (result.status, result.first_difference) == ("fail", "detections")
    again = replay(variant, case, tmp_path, None)
    assert (again.status, again.first_difference) == ("fail", "detections")


def test_a_graph_that_float64_cannot_run_has_no_referee_and_says_so(write, original):
    result = live(write(layouts.odd_padding, {"layout": "decoded", **NAMES}), referee_images=2)
    assert result.status == "pass"
    (note,) = result.notes
    assert "no float64 referee: " in note
    assert "auto_pad" in note
    assert result.scores.subject_ap == pytest.approx(original.ap, abs=1e-6)


def test_a_plugin_of_tensorrt_is_named_with_what_to_export_instead(write):
    variant = write(layouts.plugin, {"layout": "end2end"})
    with pytest.raises(AlignError, match="holds EfficientNMS_TRT, which only TensorRT runs") as caught:
        live(variant)
    assert "NonMaxSuppression" in caught.value.mend


def test_rows_of_detections_cannot_be_joined_over_pieces(write, original):
    batch = np.stack([sample.tensor for sample in original.samples[:2]])
    with OnnxRuntimeRunner(write(*END2END["YOLOv7"]).weights) as runner, pytest.raises(AlignError, match="batch axis"):
        runner.run(batch)


@pytest.mark.parametrize(("name", "batch"), [("YOLOv10", 1), ("yolov8", 2)])
def test_layers_of_a_bare_file(write, original, name, batch):
    variant = write(*ALL[name], batch)
    layers = compare_layers(variant.weights, OnnxRuntimeRunner, original.samples[0].tensor[None])
    assert len(layers) > 50
    assert all(np.isfinite(layer.error) for layer in layers)


def test_the_command_line_needs_the_yaml_alone(write, tmp_path):
    variant = write(*ALL["YOLOv7"])
    path = variant.weights.with_suffix(".yaml")
    command = ["run", str(path), "--images", "3", "--backend", "torch,onnxruntime", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*command, "--golden", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert ENDS_IN_NMS in (tmp_path / "run" / "report.html").read_text()
    fields = yaml.safe_load(path.read_text())
    fields["source"] = {"kind": "onnx", "file": str(variant.weights), "head": {"layout": "yolov8"}}
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(fields))
    for arguments in (["run", str(wrong), *command[2:]], ["export", str(path), "--out", str(tmp_path / "onnx")]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2, done.output
        assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1
        assert "Traceback" not in done.output
