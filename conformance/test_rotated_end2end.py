"""A rotated detector whose graph ends in EfficientNMSRotated_TRT, against torch with mmrotate's own post-processing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from test_rotated_detector import mmyolos
from typer.testing import CliRunner

from alignment.case import Case, reference_of
from alignment.cli import app
from alignment.compare.coco_map import coco_ap
from alignment.compare.detections import agree
from alignment.compare.dota_map import dota_map
from alignment.compare.measure import count_agreement
from alignment.data.samples import Samples, open_samples
from alignment.engine.capabilities import missing
from alignment.errors import AlignError
from alignment.export.float16 import float16_model, float32_nodes
from alignment.export.plugin_nms import plugin_of
from alignment.models.outputs import detect, to_outputs
from alignment.nms.multiclass import Detections
from alignment.nms.plugins import ROTATED
from alignment.pipeline import RunOptions, align_live
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.open import open_runner
from alignment.runners.plugin_nms import PluginNmsRunner
from alignment.variant import ZOO, Variant, load_variant

pytest.importorskip("mmyolo")
pytest.importorskip("mmrotate")
torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.rotated, pytest.mark.plugin, pytest.mark.nms]

NAME = "rtmdet_r_embedded"
HEAD = {"layout": "end2end", "boxes": "det_boxes", "scores": "det_scores", "labels": "det_labels"}
#: By precision: the least agreement, and the most that AP50 may differ.
PROMISED = {"fp32": (0.999, 0.001), "fp16": (0.98, 0.003)}


def written(folder: Path) -> Variant:
    """The YAML of the file that `align export` wrote into a folder."""
    (path,) = folder.glob("*.onnx")
    fields = yaml.safe_load((ZOO / f"{NAME}.yaml").read_text())
    fields |= {"name": "rotated_end2end", "source": {"kind": "onnx", "file": path.name, "head": HEAD}}
    del fields["nms"], fields["notes"]
    (folder / "rotated.yaml").write_text(yaml.safe_dump(fields))
    return load_variant(folder / "rotated.yaml")


@pytest.fixture(scope="module")
def variant(tmp_path_factory) -> Variant:
    folder = tmp_path_factory.mktemp("rotated")
    done = CliRunner().invoke(app, ["export", NAME, "--nms", "efficient_nms_rotated", "--out", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"{NAME}.efficient_nms_rotated.onnx" in done.stdout
    return written(folder)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return open_samples(load_variant(NAME))


@pytest.fixture(scope="module")
def mmrotates(samples) -> dict[int, Detections]:
    """What torch finds, post-processed by the head's own ``predict_by_feat``: rotated NMS on the original image."""
    nms, found = samples.variant.nms, {}
    with open_runner(samples.variant, reference_of(samples.variant)) as runner:
        for sample in samples:
            metas = [{"scale_factor": sample.transform.scale, "ori_shape": sample.transform.original}]
            (one,) = mmyolos(
                runner.detector,
                runner.run(sample.tensor[None]),
                metas,
                multi_label=nms.multi_label,
                score_thr=nms.score_threshold,
                nms_pre=nms.nms_pre,
                max_per_img=nms.max_per_image,
                iou_threshold=nms.iou_threshold,
            )
            boxes, scores, labels = (part.numpy() for part in (one.bboxes, one.scores, one.labels))
            rows = np.arange(len(scores), dtype=np.int32)
            found[sample.entry.id] = Detections(boxes, scores, labels.astype(np.int32), rows)
    return found


def test_the_file_carries_the_variants_settings(variant):
    model = onnx.load(variant.weights)
    (node,) = [node for node in model.graph.node if node.op_type == ROTATED]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    nms = load_variant(NAME).nms
    assert node.domain == ""
    assert attributes == {
        "score_threshold": pytest.approx(nms.score_threshold),
        "iou_threshold": pytest.approx(nms.iou_threshold),
        "max_output_boxes": nms.max_per_image,
        "pre_nms_topk": nms.nms_pre,
        "background_class": -1,
        "score_activation": 0,
        "class_agnostic": 0,
        "plugin_version": b"1",
    }
    shapes = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output}
    assert shapes == {
        "num_dets": ["batch", 1],
        "det_boxes": ["batch", 2000, 5],
        "det_scores": ["batch", 2000],
        "det_labels": ["batch", 2000],
    }


def cases() -> list[Any]:
    return [
        pytest.param(backend, precision, id=f"{backend}-{precision}", marks=[pytest.mark.gpu] * (backend == "tensorrt"))
        for backend in ("onnxruntime", "tensorrt")
        for precision in PROMISED
    ]


@pytest.mark.parametrize(("backend", "precision"), cases())
def test_it_finds_what_torch_and_mmrotate_find(variant, samples, mmrotates, backend, precision):
    if backend == "tensorrt" and (reason := missing()):
        pytest.skip(reason)
    with open_runner(variant, Case(variant.name, backend, precision)) as runner:
        found = detect(Samples(variant, samples.dataset), runner.run)
    matched, total = count_agreement([agree(mmrotates[image], one) for image, one in found.items()])
    scores = {
        name: [measure(samples.dataset, side)[1] for side in (mmrotates, found)]
        for name, measure in (("COCO's AP50", coco_ap), ("DOTA's AP50", dota_map))
    }
    for name, (ours, theirs) in scores.items():
        print(f"{name}: {ours:.5f} in torch, {theirs:.5f} on {backend} in {precision}")
    least, most = PROMISED[precision]
    assert total > 100
    assert matched / total >= least
    assert scores["DOTA's AP50"][0] > 0.5
    assert {name: abs(a - b) <= most for name, (a, b) in scores.items()} == dict.fromkeys(scores, True), scores


@pytest.mark.parametrize(
    ("name", "value"), [("iou_threshold", 0.5), ("score_threshold", 0.4), ("pre_nms_topk", 2), ("class_agnostic", 1)]
)
def test_a_wrong_setting_in_the_file_shows(variant, samples, mmrotates, tmp_path, name, value):
    """Of the first images, detection by detection: AP may not see it."""
    model = onnx.load(variant.weights)
    node = next(node for node in model.graph.node if node.op_type == ROTATED)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    onnx.save(model, tmp_path / "wrong.onnx")
    few = open_samples(samples.variant, None, 12)
    with open_runner(written(tmp_path), Case("wrong", "onnxruntime", "fp32")) as runner:
        found = detect(Samples(variant, few.dataset), runner.run)
    assert any(len(one) != len(mmrotates[image]) for image, one in found.items())


def test_a_float16_graph_keeps_its_plugin(variant, samples):
    """What a TensorRT is given that takes its types from the graph."""
    names = float32_nodes(variant.weights, ())
    half = float16_model(variant.weights, keep=names)
    model = onnx.load(half)
    assert plugin_of(model) == plugin_of(onnx.load(variant.weights))
    assert onnx.TensorProto.FLOAT16 in {weight.data_type for weight in model.graph.initializer}
    assert [output.name for output in model.graph.output] == ["num_dets", "det_boxes", "det_scores", "det_labels"]
    few = open_samples(samples.variant, None, 4)
    sides = []
    for path in (half, variant.weights):
        with PluginNmsRunner(path, OnnxRuntimeRunner) as runner:
            sides.append(detect(Samples(variant, few.dataset), runner.run))
    ours, theirs = sides
    assert all(agree(theirs[image], one).rate > 0.9 for image, one in ours.items())
    assert any(len(one) != len(theirs[i]) or (one.scores != theirs[i].scores).any() for i, one in ours.items())


def test_a_batch_is_answered_as_its_images_are(variant, samples):
    tensors = [sample.tensor for _, sample in zip(range(3), samples, strict=False)]
    with open_runner(variant, Case(variant.name, "onnxruntime", "fp32")) as runner:
        together = runner.run(np.stack(tensors))
        assert list(together) == ["num_dets", "det_boxes", "det_scores", "det_labels"]
        for index, tensor in enumerate(tensors):
            alone = runner.run(tensor[None])
            assert together["num_dets"][index] == alone["num_dets"][0] > 3
            for name, value in alone.items():
                np.testing.assert_allclose(together[name][index], value[0], rtol=1e-4, atol=1e-2, err_msg=name)


def test_the_pipeline_takes_the_file(variant, tmp_path):
    options = RunOptions(golden=tmp_path, referee_images=1)
    (result,) = align_live(
        variant, [Case(variant.name, "onnxruntime", "fp32")], open_samples(variant, None, 3), options
    )[0]
    assert result.status == "pass", result.reason
    assert result.provenance["plugin"] == f"{ROTATED} in NumPy"
    assert result.scores.subject_ap > 0.4
    assert result.scores.dota.ap50 > 0.5
    assert all(image.subject[0].corners for image in result.worst)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([NAME, "--nms", "efficient_nms"], "takes no rotated boxes: choose efficient_nms_rotated"),
        ([NAME, "--nms", "onnx_nms"], "takes no rotated boxes: choose efficient_nms_rotated"),
        (["yolov8_embedded", "--nms", "efficient_nms_rotated"], "takes no horizontal boxes: choose efficient_nms or"),
    ],
)
def test_an_nms_for_other_boxes_is_refused(command, said, tmp_path):
    done = CliRunner().invoke(app, ["export", *command, "--out", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_detections_are_five_numbers_and_a_score(variant):
    """Scores of their own, or as the sixth number, as mmdeploy has them; padding is dropped."""
    boxes = np.array([[[8, 9, 4, 2, 0.5], [20, 20, 9, 3, -1], [0, 0, 0, 0, 0]]], np.float32)
    scores, labels = np.array([[0.9, 0.4, 0]], np.float32), np.array([[2, 5, -1]], np.int32)
    named = {"num_dets": np.array([[2]]), "det_boxes": boxes, "det_scores": scores, "det_labels": labels}
    joined = {**named, "det_boxes": np.concatenate([boxes, scores[..., None]], 2)}
    for form in (named, joined):
        (kept,) = to_outputs(form, variant).kept
        np.testing.assert_array_equal(kept.boxes, boxes[0, :2])
        np.testing.assert_array_equal(kept.scores, scores[0, :2])
        assert kept.labels.tolist() == [2, 5]
    with pytest.raises(AlignError, match=r"layout end2end is count \[B, 1\], boxes \[B, K, 5\]"):
        to_outputs(named | {"det_boxes": boxes[..., :4]}, variant)


def test_a_yaml_that_says_nothing_of_rotated_boxes_is_refused(variant, tmp_path):
    fields = yaml.safe_load((variant.weights.parent / "rotated.yaml").read_text())
    fields |= {"boxes": "horizontal"}
    fields["source"]["file"] = str(variant.weights)
    (tmp_path / "upright.yaml").write_text(yaml.safe_dump(fields))
    upright = load_variant(tmp_path / "upright.yaml")
    with pytest.raises(AlignError, match=f"ends in {ROTATED}, whose boxes are rotated: set `boxes: rotated`"):
        open_runner(upright, Case(upright.name, "onnxruntime", "fp32"))
