"""Fake quantization in torch is that of the QDQ graph: the same scales, at the same places, none left out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from alignment.compare.detections import agree
from alignment.data.samples import open_samples
from alignment.errors import AlignError
from alignment.models.outputs import detections_of, to_outputs
from alignment.quantize import recipe
from alignment.quantize.observers import scale_of
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.variant import Variant, load_variant, with_quantization

torch = pytest.importorskip("torch")
pytest.importorskip("mmyolo")
pytest.importorskip("pytorch_quantization")
torch_model = pytest.importorskip("alignment.quantize.torch_model")

FAMILIES = [f"{name}_embedded" for name in ("yolov5", "yolov6", "yolov7", "yolov8", "yolox", "ppyoloe", "rtmdet")]
SCALES = st.floats(2.0**-30, 2.0**30, width=32).map(np.float32)


def small(name: str) -> Variant:
    return with_quantization(load_variant(name), {"images": 4})


@pytest.fixture(scope="module")
def yolov8() -> SimpleNamespace:
    variant = small("yolov8_embedded")
    image = torch.from_numpy(next(iter(open_samples(variant, limit=1))).tensor[None])
    return SimpleNamespace(variant=variant, quantized=recipe.quantize(variant), image=image)


def onnx_fake_quantize(values: np.ndarray, scale: np.ndarray, axis: int | None) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear of ONNX Runtime."""
    from onnxruntime import InferenceSession

    extra = {} if axis is None else {"axis": axis}
    zeros = np.zeros(scale.shape, np.int8)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **extra),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **extra),
        ],
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape)],
        [onnx.numpy_helper.from_array(scale, "s"), onnx.numpy_helper.from_array(zeros, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": values})[0]


@given(st.lists(SCALES, min_size=1, max_size=20))
def test_the_scale_is_exact(scales):
    wanted = np.array(scales, np.float32)
    amax = torch_model.amax_with(scale_of(wanted))
    np.testing.assert_array_equal(amax / np.float32(127), scale_of(wanted))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_one_step_apart_at_most_in_a_thousandth_of_the_elements(axis):
    rng = np.random.default_rng(0)
    values = (3 * rng.standard_normal((8, 8, 64, 64))).astype(np.float32)
    scale = scale_of(rng.uniform(1, 9, 1 if axis is None else 8).astype(np.float32))
    scale = scale[0] if axis is None else scale
    ours = torch_model.quantizer_of(scale, axis)(torch.from_numpy(values)).numpy()
    theirs = onnx_fake_quantize(values, np.asarray(scale), axis)
    steps = np.abs(ours - theirs) / (
        scale if axis is None else scale.reshape([-1 if d == axis else 1 for d in range(4)])
    )
    assert steps.max() <= 1.001
    assert (steps > 0.5).mean() <= 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_finds_what_its_qdq_graph_finds(name):
    variant = small(name)
    quantized = recipe.quantize(variant)
    detector = torch_model.quantized_detector(variant, quantized)
    runner = OnnxRuntimeRunner(recipe.graph_file(quantized.model, name), optimize=False)
    matched = total = 0
    for sample in open_samples(variant, limit=6):
        with torch.no_grad():
            values = detector(torch.from_numpy(sample.tensor[None]))
        named = {key: value.numpy() for key, value in zip(detector.output_names, values, strict=True)}
        sides = (to_outputs(given, variant, 1) for given in (runner.run(sample.tensor[None]), named))
        found = agree(*(detections_of(side, sample.transform, variant) for side in sides))
        matched, total = matched + found.matched, total + found.total
    assert total > 20
    assert matched / total >= 0.85  # single boxes cross IoU 0.9 or a score 0.05; AP is held in test_int8_alignment


def test_a_call_that_is_missing_is_named(yolov8):
    detector = torch_model.quantized_detector(yolov8.variant, yolov8.quantized)
    for module in detector.detector.modules():
        if getattr(module, "add_identity", False):
            module.add_identity = False
    with pytest.raises(AlignError, match=r"/Add: 1 Add in the graph, 0 calls"):
        detector(yolov8.image)


def test_an_operator_that_torch_is_not_matched_with_is_named(yolov8):
    placement = yolov8.quantized.placement
    first = placement.activations[0]
    node = next(n for n in onnx.load(yolov8.quantized.source).graph.node if n.op_type == "Sigmoid")
    changed = replace(placement, activations=(replace(first, readers=((node.name, 0),)), *placement.activations[1:]))
    with pytest.raises(AlignError, match="no function of torch is known for a quantized Sigmoid"):
        torch_model.quantized_detector(yolov8.variant, replace(yolov8.quantized, placement=changed))


@pytest.mark.parametrize("op", ["Conv", "Add", "Concat", "MaxPool", "Resize", "Split"])
def test_what_each_operator_reads_is_quantized_in_torch(yolov8, op):
    """One reader alone, with a scale that clips all to nearly nothing, changes the answers."""
    quantized = yolov8.quantized
    ops = {node.name: node.op_type for node in onnx.load(quantized.source).graph.node}
    chosen, reader = next((q, r) for q in quantized.placement.activations for r in q.readers if ops[r[0]] == op)
    alone = replace(quantized.placement, activations=(replace(chosen, readers=(reader,)),), weights=())
    changed = replace(quantized, placement=alone, scales={chosen.tensor: np.float32(1e-6)})
    detector = torch_model.quantized_detector(yolov8.variant, changed)
    with torch.no_grad():
        assert not torch.allclose(detector(yolov8.image)[1], detector.detector(yolov8.image)[1], atol=1e-4)


def test_without_quantizers_it_is_the_fused_model(yolov8):
    nothing = replace(yolov8.quantized.placement, activations=(), weights=())
    detector = torch_model.quantized_detector(yolov8.variant, replace(yolov8.quantized, placement=nothing))
    with torch.no_grad():
        torch.testing.assert_close(detector(yolov8.image)[1], detector.detector(yolov8.image)[1], rtol=0, atol=0)


def test_gradients_pass_through_the_quantizers(yolov8):
    detector = torch_model.quantized_detector(yolov8.variant, yolov8.quantized)
    first = detector.detector.model.backbone.stage1[0].conv.weight.requires_grad_()
    detector(yolov8.image)[1].sum().backward()
    assert float(first.grad.abs().max()) > 0
