"""Fake quantization in torch is that of the QDQ graph: the same scales, at the same places, none left out."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lively import lively_variant
from onnx import TensorProto, helper

from alignment.compare.detections import agree
from alignment.data.samples import open_samples
from alignment.errors import AlignError
from alignment.export.onnx_export import exported, read_node_map
from alignment.layers import mark_outputs
from alignment.models.outputs import detections_of, to_outputs
from alignment.quantize import recipe
from alignment.quantize.observers import scale_of
from alignment.quantize.placement import Placement, WeightQuantizer, place
from alignment.quantize.qdq import fake_quantizers
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.variant import Variant, load_variant, with_quantization

torch = pytest.importorskip("torch")
pytest.importorskip("mmyolo")
pytest.importorskip("pytorch_quantization")
torch_model = pytest.importorskip("alignment.quantize.torch_model")

NAMES = ("yolov5", "yolov6", "yolov7", "yolov8", "yolox", "ppyoloe", "rtmdet", "rtmdet_r")
FAMILIES = [f"{name}_embedded" for name in NAMES]
#: Simplification merges Concats of yolov7_l, and Slices of YOLOX.
GRAPHS = [*FAMILIES, "yolov7_l_narrow"]
SCALES = st.floats(2.0**-30, 2.0**30, width=32).map(np.float32)


def small(name: str) -> Variant:
    if name.startswith("rtmdet_r_"):
        pytest.importorskip("mmrotate")
    return with_quantization(load_variant(name), {"images": 4})


@pytest.fixture(scope="module")
def yolov8(quantized_build) -> SimpleNamespace:
    variant = small("yolov8_embedded")
    image = torch.from_numpy(next(iter(open_samples(variant, limit=1))).tensor[None])
    return SimpleNamespace(variant=variant, quantized=quantized_build(variant), image=image)


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


class Recorder(torch.nn.Module):
    """In a quantizer's place: keeps what is read through it."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[np.ndarray] = []
        self.amax = torch.tensor(torch.inf)

    def forward(self, values):
        self.read.append(values.detach().numpy().copy())
        return values


@pytest.mark.parametrize("name", GRAPHS)
def test_each_reader_reads_the_tensor_that_the_graph_says(name, tmp_path):
    variant = lively_variant(name, tmp_path) if name == "yolov7_l_narrow" else small(name)
    source = exported(variant).onnx
    model = onnx.load(source)
    placement = place(model, "full")
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    ones = {q.initializer: np.ones(weights[q.initializer].shape[q.axis], np.float32) for q in placement.weights}
    detector = torch_model.QuantizedDetector(
        torch_model.float_detector(variant, source),
        read_node_map(exported(variant).node_map),
        placement,
        {q.tensor: np.float32(1) for q in placement.activations},
        ones,
    )
    detector.activations = torch.nn.ModuleList(Recorder() for _ in placement.activations)
    detector.weights = torch.nn.ModuleList(Recorder() for _ in placement.weights)
    size = variant.input.height, variant.input.width
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, *size)).astype(np.float32)
    with torch.no_grad():
        detector(torch.from_numpy(image))
    names = [q.tensor for q in placement.activations if q.tensor != "images"]
    runner = OnnxRuntimeRunner(recipe.graph_file(mark_outputs(model, names), name), optimize=False)
    expected = {"images": image, **runner.run(image)}
    for quantizer, recorder in zip(placement.activations, detector.activations, strict=True):
        assert len(recorder.read) == len(quantizer.readers), quantizer
        for found in recorder.read:
            largest = float(np.abs(expected[quantizer.tensor]).max())
            np.testing.assert_allclose(found, expected[quantizer.tensor], rtol=0, atol=1e-4 * largest)
    for weight, recorder in zip(placement.weights, detector.weights, strict=True):
        np.testing.assert_array_equal(recorder.read, weights[weight.initializer][None])


def unlike_the_graph(detector, quantized, image) -> Iterator[str]:
    """The tensors whose quantizer is run another number of times, or gives other values, than in the QDQ graph."""
    scales, _ = fake_quantizers(quantized.model)
    calls: Counter[str] = Counter()
    far: set[str] = set()

    def hook(tensor):
        def compare(module, args, output):
            calls[tensor] += 1
            expected = onnx_fake_quantize(args[0].numpy(), np.asarray(scales[tensor]), None)
            steps = np.abs(output.numpy() - expected) / scales[tensor]
            if steps.max() > 1.001 or (steps > 1e-3).mean() > 1e-3:
                far.add(tensor)

        return compare

    placed = quantized.placement.activations
    handles = [one.register_forward_hook(hook(q.tensor)) for one, q in zip(detector.activations, placed, strict=True)]
    with torch.no_grad():
        detector(image)
    for handle in handles:
        handle.remove()
    yield from (q.tensor for q in placed if q.tensor in far or calls[q.tensor] != len(q.readers))


@pytest.mark.parametrize("fault", ["none", "scale", "disabled", "not called"])
def test_every_quantizer_gives_on_an_image_what_it_gives_in_onnx_runtime(yolov8, fault):
    detector = torch_model.quantized_detector(yolov8.variant, yolov8.quantized)
    chosen = yolov8.quantized.placement.activations[7]
    if fault == "scale":
        detector.activations[7].amax.mul_(1.01)
    elif fault == "disabled":
        detector.activations[7].disable()
    elif fault == "not called":
        planned = next(r for rs in detector._plan.values() for r in rs if r.node == chosen.readers[0][0])
        planned.inputs.clear()
    wrong = list(unlike_the_graph(detector, yolov8.quantized, yolov8.image))
    assert wrong == ([] if fault == "none" else [chosen.tensor])


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


def test_copies_and_stored_scales_answer_alike(yolov8):
    detector = torch_model.quantized_detector(yolov8.variant, yolov8.quantized)
    others = {tensor: np.float32(1) for tensor in yolov8.quantized.scales}
    loaded = torch_model.quantized_detector(yolov8.variant, replace(yolov8.quantized, scales=others))
    loaded.load_state_dict(detector.state_dict())
    with torch.no_grad():
        expected = detector(yolov8.image)[1]
        for other in (loaded, copy.deepcopy(detector), pickle.loads(pickle.dumps(detector)), detector.train().eval()):
            assert torch.equal(other(yolov8.image)[1], expected)


def linear_layer(op: str, axis: int):
    """A Linear with a quantized weight, its scales those of the largest magnitudes."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(40, 1000)

        def forward(self, values):
            return self.fc(values)

    torch.manual_seed(0)
    layer = Layer()
    # Just below a power of two, steps of amax / 127 are coarser than those of amax: it rounds away from some.
    layer.fc.weight.data[:, 0] = torch.linspace(0.993, 0.9999, 1000)
    scale = scale_of(layer.fc.weight.detach().abs().amax(1).numpy())
    placement = Placement("full", (), (WeightQuantizer("w", "/fc", axis),), {})
    nodes = {"/fc": {"op": op, "module": "fc"}}
    return torch_model.QuantizedDetector(layer, nodes, placement, {}, {"w": scale}), scale


@pytest.mark.parametrize(("op", "axis"), [("Gemm", 0), ("MatMul", 1)])
def test_a_linear_layer_has_a_scale_for_each_output(op, axis):
    detector, scale = linear_layer(op, axis)
    weight = detector.detector.fc.weight.detach().numpy()
    expected = np.clip(np.rint(weight / scale[:, None]), -127, 127) * scale[:, None]
    with torch.no_grad():
        found = (detector(torch.eye(40)) - detector.detector.fc.bias).numpy().T
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_largest_weight_of_a_channel_keeps_its_gradient():
    """amax / 127 rounds: 127 times the scale may be a hair less than the weight that it comes from."""
    detector, scale = linear_layer("Gemm", 0)
    weight = detector.detector.fc.weight
    assert bool((weight.abs() > torch.from_numpy(torch_model.amax_with(scale))[:, None]).any())
    detector(torch.ones(1, 40)).sum().backward()
    assert bool((weight.grad == 1).all())


def test_a_placement_of_another_graph_is_refused(yolov8):
    placement = yolov8.quantized.placement
    foreign = replace(placement, weights=(WeightQuantizer("w", "/elsewhere", 0), *placement.weights))
    with pytest.raises(AlignError, match="node /elsewhere: not in the node map"):
        torch_model.quantized_detector(yolov8.variant, replace(yolov8.quantized, placement=foreign))
