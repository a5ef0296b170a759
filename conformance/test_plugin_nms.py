"""Bare ONNX files that end in EfficientNMS_TRT, as `align export --nms efficient_nms` writes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import helper
from typer.testing import CliRunner

from alignment.case import Case
from alignment.cli import app
from alignment.compare.detections import agree
from alignment.data.samples import Sample, open_samples
from alignment.engine.capabilities import missing
from alignment.errors import AlignError
from alignment.export.nms_head import NmsHead, with_nms
from alignment.export.onnx_export import ExportOptions, exported
from alignment.export.plugin_nms import before_plugin, plugin_in, plugin_of
from alignment.models.outputs import detections_of, to_outputs
from alignment.nms.multiclass import Detections
from alignment.nms.plugins import ROTATED, UPRIGHT
from alignment.pipeline import RunOptions, align_live
from alignment.results import CaseResult
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.open import open_runner
from alignment.runners.plugin_nms import PluginNmsRunner
from alignment.variant import ZOO, Nms, Variant, load_variant

pytest.importorskip("mmyolo")
pytestmark = [pytest.mark.nms, pytest.mark.plugin]
IMAGES = 5
NMS = Nms(score_threshold=0.02, iou_threshold=0.6, max_per_image=50)
HEADS = {
    "efficient_nms": {"layout": "end2end", "boxes": "det_boxes", "scores": "det_scores", "labels": "det_labels"},
    "onnx_nms": {"layout": "end2end", "output": "detections"},
}


def written(folder: Path, model: onnx.ModelProto, kind: str) -> Variant:
    """A file and the YAML beside it."""
    onnx.save(model, folder / f"{kind}.onnx")
    fields = yaml.safe_load((ZOO / "yolov8_embedded.yaml").read_text())
    fields |= {"name": kind, "source": {"kind": "onnx", "file": f"{kind}.onnx", "head": HEADS[kind]}}
    del fields["nms"]
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(fields))
    return load_variant(folder / f"{kind}.yaml")


@pytest.fixture(scope="module")
def decoded() -> onnx.ModelProto:
    return onnx.load(exported(load_variant("yolov8_embedded"), ExportOptions(outputs="decoded")).onnx)


@pytest.fixture(scope="module")
def variant(decoded, tmp_path_factory) -> Variant:
    """The embedded detector, then 300 rows of highest score, then the plugin."""
    return written(
        tmp_path_factory.mktemp("plugin"), with_nms(decoded, NmsHead("efficient_nms", NMS, 300)), "efficient_nms"
    )


@pytest.fixture(scope="module")
def samples(variant) -> list[Sample]:
    return list(open_samples(variant, None, IMAGES))


def found(variant: Variant, samples: list[Sample], batch: int = 1, precision: str = "fp32") -> list[Detections]:
    answers = []
    with open_runner(variant, Case(variant.name, "onnxruntime", precision), batch) as runner:  # type: ignore[arg-type]
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            outputs = to_outputs(runner.run(np.stack([s.tensor for s in part])), variant, len(part)).images()
            answers += [detections_of(o, s.transform, variant) for o, s in zip(outputs, part, strict=True)]
    return answers


def live(variant: Variant, folder: Path, *cases: Case) -> list[CaseResult]:
    options = RunOptions(golden=folder, referee_images=2)
    return align_live(variant, list(cases), open_samples(variant, None, IMAGES), options)[0]


def test_it_keeps_what_onnxs_own_nms_keeps(variant, decoded, samples, tmp_path):
    """Of these images no class has more than `max_per_image`, and no IoU is the threshold: no difference is left."""
    other = written(tmp_path, with_nms(decoded, NmsHead("onnx_nms", NMS, 300)), "onnx_nms")
    ours, theirs = found(variant, samples), found(other, samples)
    assert sum(map(len, ours)) > 4 * IMAGES
    for a, b in zip(ours, theirs, strict=True):
        kept = min(len(b), NMS.max_per_image)
        assert len(a) == kept
        np.testing.assert_array_equal(a.scores, b.scores[:kept])
        np.testing.assert_array_equal(a.labels, b.labels[:kept])
        np.testing.assert_array_equal(a.boxes, b.boxes[:kept])


def test_a_batch_is_answered_as_its_images_are(variant, samples):
    for alone, among in zip(found(variant, samples), found(variant, samples, 3), strict=True):
        assert agree(alone, among).rate == 1.0


def test_it_is_its_own_reference_and_float64_the_referee(variant, tmp_path):
    (single,) = live(variant, tmp_path, Case(variant.name, "onnxruntime", "fp32"))
    assert single.status == "pass", single.reason
    assert single.reference == "float64"
    assert single.notes == []
    assert single.provenance["plugin"] == "EfficientNMS_TRT in NumPy"
    assert single.provenance["onnx_sha256"] == exported(variant).sha256
    assert single.scores.subject_ap > 0.5


def test_float16_is_what_comes_before_the_plugin(variant, samples):
    for a, b in zip(found(variant, samples), found(variant, samples, precision="fp16"), strict=True):
        assert agree(a, b).rate > 0.9
        assert not np.isin(b.scores, a.scores).all()


@pytest.mark.gpu
def test_tensorrt_runs_the_file_itself(variant, tmp_path):
    if reason := missing():
        pytest.skip(reason)
    _, result = live(
        variant, tmp_path, *(Case(variant.name, backend, "fp32") for backend in ("onnxruntime", "tensorrt"))
    )
    assert result.status == "pass", result.reason


def test_the_command_line_takes_what_the_exporter_writes(tmp_path):
    command = ["export", "yolov8_embedded", "--nms", "efficient_nms", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.onnx")
    variant = written(tmp_path, onnx.load(path), "efficient_nms")
    command = ["run", str(variant.weights.with_suffix(".yaml")), "--images", "2", "--golden", str(tmp_path / "golden")]
    done = CliRunner().invoke(app, [*command, "--backend", "onnxruntime", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    yaml_file = command[1]
    for other in (["layers", yaml_file], ["quantize", yaml_file, "--out", str(tmp_path / "int8")]):
        done = CliRunner().invoke(app, other)
        assert done.exit_code == 2, done.output
        assert "ends in EfficientNMS_TRT: no " in done.stderr


def small(**changes: object) -> onnx.ModelProto:
    """A graph of the plugin alone, its boxes given as centre and size, its scores as logits."""
    shapes = {"images": [1, 3, 32, 32], "count": [1, 1], "b": [1, 2, 4], "s": [1, 2], "l": [1, 2]}
    image, *outputs = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items())
    settings = {"score_threshold": 0.5, "iou_threshold": 0.5, "max_output_boxes": 2, "box_coding": 1, **changes}
    settings = {name: value for name, value in settings.items() if value is not None}
    boxes = np.array([[[8, 8, 4, 4], [8, 8, 4, 3.9], [20, 20, 4, 8], [30, 30, 2, 2]]], np.float32)
    scores = np.array([[[0.5, -9], [2, -9], [-9, 1], [-9, -9]]], np.float32)
    constants = [onnx.numpy_helper.from_array(v, n) for n, v in {"boxes_": boxes, "scores_": scores}.items()]
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    nodes = [
        helper.make_node("ReduceMax", ["images"], ["most"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["most", "zero"], ["none"]),
        *(helper.make_node("Add", [f"{name}_", "none"], [name], name) for name in ("boxes", "scores")),
        helper.make_node(
            "EfficientNMS_TRT", ["boxes", "scores"], ["count", "b", "s", "l"], "nms", "", "TRT", **settings
        ),
    ]
    graph = helper.make_graph(nodes, "g", [image], outputs, [*constants, zero])
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("TRT", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_coding_activation_and_padding(tmp_path):
    onnx.save(small(score_activation=1, max_output_boxes=5), tmp_path / "small.onnx")
    with PluginNmsRunner(tmp_path / "small.onnx", OnnxRuntimeRunner) as runner:
        named = runner.run(np.ones((1, 3, 32, 32), np.float32))
    assert list(named) == ["count", "b", "s", "l"]
    assert named["count"].tolist() == [[2]]
    corners = np.zeros((5, 4))
    corners[:2] = [[6, 6.05, 10, 9.95], [18, 16, 22, 24]]
    np.testing.assert_allclose(named["b"][0], corners, rtol=1e-6)
    np.testing.assert_allclose(named["s"][0], [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1)), 0, 0, 0], rtol=1e-6)
    assert named["l"][0].tolist() == [0, 1, 0, 0, 0]


def third_input(model: onnx.ModelProto) -> None:
    plugin_of(model).input.append("most")


def read_on(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", ["s"], ["negative"]))


def hidden_output(model: onnx.ModelProto) -> None:
    del model.graph.output[0]


def second_plugin(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("BatchedNMS_TRT", ["boxes", "scores"], ["other"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (third_input, "3 inputs and 4 outputs, not 2 and 4"),
        (read_on, "its outputs are not those of the graph"),
        (hidden_output, "its outputs are not those of the graph"),
        (second_plugin, "it is not the only plugin"),
        (None, "no attribute iou_threshold"),
    ],
)
def test_another_form_is_refused(tmp_path: Path, change: Callable[[onnx.ModelProto], None] | None, said: str):
    model = small(**({} if change else {"iou_threshold": None}))
    if change:
        change(model)
    variant = written(tmp_path, model, "efficient_nms")
    with pytest.raises(AlignError, match=said) as caught:
        exported(variant)
    assert str(variant.weights) in str(caught.value)
    assert "align export --nms efficient_nms" in caught.value.mend


@pytest.mark.parametrize("plugin", [UPRIGHT, ROTATED])
@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("score_threshold", "low", "score_threshold is b'low', not one float"),
        ("score_threshold", float("nan"), "score_threshold is nan, not one float"),
        ("iou_threshold", 1, "iou_threshold is 1, not one float from 0 to 1"),
        ("iou_threshold", 1.5, "iou_threshold is 1.5, not one float from 0 to 1"),
        ("max_output_boxes", 0, "max_output_boxes is 0, not one int of 1 or more"),
        ("max_output_boxes", [2, 2], "max_output_boxes is [2, 2], not one int of 1 or more"),
        ("score_activation", 2, "score_activation is 2, not one int from 0 to 1"),
    ],
)
def test_what_the_plugin_refuses_is_refused_everywhere(tmp_path, plugin, attribute, value, said):
    """Else a file passes on ONNX Runtime of which TensorRT makes no engine."""
    model = small(**{attribute: value})
    plugin_of(model).op_type = plugin
    with pytest.raises(AlignError, match=re.escape(f"a.onnx: holds {plugin}, ")) as caught:
        before_plugin(model, tmp_path / "a.onnx")
    assert f"in a form that is unknown here: {said}: export it" in str(caught.value)


@pytest.mark.parametrize(("attribute", "value"), [("background_class", -2), ("pre_nms_topk", -1)])
def test_what_the_rotated_plugin_alone_refuses(tmp_path, attribute, value):
    model = small(**{attribute: value})
    before_plugin(model, tmp_path / "a.onnx")
    plugin_of(model).op_type = ROTATED
    with pytest.raises(AlignError, match=f"{attribute} is {value}, not one int of {value + 1} or more"):
        before_plugin(model, tmp_path / "a.onnx")


def test_weights_in_a_file_of_their_own_may_change(tmp_path):
    path, answers = tmp_path / "small.onnx", []
    onnx.save(small(), path, save_as_external_data=True, location="weights", size_threshold=0)
    written, weights = path.read_bytes(), (tmp_path / "weights").read_bytes()
    for content in (weights, weights.replace(np.float32(20).tobytes(), np.float32(21).tobytes())):
        (tmp_path / "weights").write_bytes(content)
        with PluginNmsRunner(path, OnnxRuntimeRunner) as runner:
            answers.append(runner.run(np.ones((1, 3, 32, 32), np.float32))["b"])
    assert path.read_bytes() == written
    np.testing.assert_array_equal(np.unique(answers[1] - answers[0]), [0, 1])


def test_a_file_that_is_no_onnx_has_no_plugin(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\xff no protobuf")
    assert not plugin_in(tmp_path / "a.onnx")
    assert not plugin_in(tmp_path / "absent.onnx")


def test_the_graph_before_the_plugin_is_a_valid_one(variant):
    cut = before_plugin(onnx.load(variant.weights), variant.weights)
    onnx.checker.check_model(cut, full_check=True)
    assert [output.name for output in cut.graph.output] == ["topk_boxes", "topk_scores"]
    assert plugin_of(cut) is None
