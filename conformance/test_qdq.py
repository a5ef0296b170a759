"""QDQ graphs: what ONNX Runtime computes is NumPy's fake quantization, scales come back, wrong ones are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from test_placement import EMBEDDED, WIDTH, graphs, tiny

from alignment.errors import AlignError
from alignment.quantize.placement import POLICIES, Placement, Quantizer, place
from alignment.quantize.qdq import fake_quantizers, group_amax, write_qdq
from alignment.variant import load_variant

SCALE = np.float32(0.05)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
    """What ONNX Runtime computes, node by node as written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(outputs, {value.name: feeds[value.name] for value in session.get_inputs()})


def fake(values: np.ndarray, scale: np.ndarray | np.float32, axis: int | None = None) -> np.ndarray:
    """The float32 values that int8 stands for; scales along `axis` if there are several."""
    steps = scale if axis is None else np.expand_dims(scale, [i for i in range(values.ndim) if i != axis])
    return np.clip(np.rint(values / steps), -128, 127).astype(np.float32) * steps


def oracle(
    model: onnx.ModelProto, placement: Placement, scales: dict, weight_scales: dict, x: np.ndarray
) -> np.ndarray:
    """The output of a graph whose nodes run alone, on inputs that NumPy quantized where the placement says so."""
    values = {"x": x} | {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
    activation = {(name, index): scales[q.tensor] for q in placement.activations for name, index in q.readers}
    weights = {q.node: (weight_scales[q.initializer], q.axis) for q in placement.weights}
    for node in model.graph.node:
        given = {f"i{index}": values[name] for index, name in enumerate(node.input)}
        for index, name in enumerate(given):
            if (node.name, index) in activation:
                given[name] = fake(given[name], activation[node.name, index])
        if node.name in weights:
            scale, axis = weights[node.name]
            limit = np.expand_dims(127 * scale, [i for i in range(given["i1"].ndim) if i != axis])
            given["i1"] = fake(np.clip(given["i1"], -limit, limit), scale, axis)
        alone = onnx.NodeProto.FromString(node.SerializeToString())
        alone.input[:] = given
        kinds = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape) for name, array in given.items()
        ]
        results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in node.output]
        graph = helper.make_graph([alone], "alone", kinds, results)
        one = helper.make_model(graph, opset_imports=model.opset_import, ir_version=8)
        values |= zip(node.output, run(one, given), strict=True)
    return values[model.graph.output[0].name]


def amax_of_weights(model: onnx.ModelProto, placement: Placement) -> dict[str, np.ndarray]:
    """The largest magnitude of each output channel."""
    arrays = {weight.name: np.abs(numpy_helper.to_array(weight)) for weight in model.graph.initializer}
    found = {}
    for quantizer in placement.weights:
        array = arrays[quantizer.initializer]
        found[quantizer.initializer] = array.max(tuple(axis for axis in range(array.ndim) if axis != quantizer.axis))
    return found


def quantized(model: onnx.ModelProto, placement: Placement, seed: int = 0) -> tuple[onnx.ModelProto, dict, dict]:
    """A graph with random scales, and these; some weights are clipped."""
    random = np.random.default_rng(seed)
    amax = group_amax(placement, {q.tensor: random.uniform(0.5, 4) for q in placement.activations})
    scales = {name: np.float32(value / 127) for name, value in amax.items()}
    clip = random.choice([0.7, 1.0])
    weight_scales = {
        name: (clip * top / 127).astype(np.float32) for name, top in amax_of_weights(model, placement).items()
    }
    return write_qdq(model, placement, scales, weight_scales), scales, weight_scales


@settings(deadline=None, max_examples=100)
@given(graphs(), st.sampled_from(list(POLICIES.values())), st.integers(0, 99))
def test_equals_fake_quantization(model, policy, seed):
    placement = place(model, replace(policy, heads=True))
    written, scales, weight_scales = quantized(model, placement, seed)
    onnx.checker.check_model(written, full_check=True)
    x = np.random.default_rng(seed).normal(0, 1, (1, 16, 8, 8)).astype(np.float32)
    expected = oracle(model, placement, scales, weight_scales, x)
    np.testing.assert_array_equal(run(written, {"x": x})[0], expected)
    found, found_weights = fake_quantizers(written)
    assert found == scales
    assert all(scale.dtype == np.float32 for scale in (*found.values(), *found_weights.values()))
    np.testing.assert_equal(found_weights, weight_scales)
    groups = {q.group: found[q.tensor] for q in placement.activations}
    assert all(found[q.tensor] == groups[q.group] for q in placement.activations)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ("ConvTranspose (x, w)", (32, 24, 2, 2)),
        ("Conv <group = 32> (x, w)", (32, 1, 3, 3)),
        ("Gemm (f, w)", (2048, 10)),
        ("Gemm <transB = 1> (f, w)", (10, 2048)),
        ("MatMul (x, w)", (8, 5)),
    ],
)
def test_weights_of_other_operators(node, shape):
    model = tiny(f"f = Flatten (x); h = {node}", w=shape)
    placement = place(model, "full")
    written, scales, weight_scales = quantized(model, placement)
    x = np.random.default_rng(1).normal(0, 1, (1, WIDTH, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(written, {"x": x})[0], oracle(model, placement, scales, weight_scales, x))


def one_convolution(**changes: object) -> tuple[onnx.ModelProto, Placement, dict, dict]:
    """The arguments of `write_qdq` for one convolution whose input is also read in float."""
    model = tiny("c = Conv (x, w); y = Mul (c, x)")
    placement = place(model, POLICIES["full"])
    arguments = {"scales": {"x": SCALE}, "weight_scales": {"w": np.full(WIDTH, SCALE)}} | changes
    return model, placement, arguments["scales"], arguments["weight_scales"]


def test_names_and_order():
    model, *rest = one_convolution()
    before = model.SerializeToString()
    written = write_qdq(model, *rest)
    assert model.SerializeToString() == before
    assert [node.name for node in written.graph.node] == [
        "x_QuantizeLinear", "x_DequantizeLinear", "w_QuantizeLinear", "w_DequantizeLinear", "c", "y"
    ]  # fmt: skip
    assert list(written.graph.node[4].input) == ["x_dequantized", "w_dequantized"]
    assert list(written.graph.node[5].input) == ["c", "x"]
    assert written.graph.output == model.graph.output
    assert written.SerializeToString() == write_qdq(model, *rest).SerializeToString()


def test_no_weight_becomes_minus_128():
    model = tiny(
        "h = Conv (x, w); m = MatMul (x, v)", w=np.full((4, 32, 1, 1), -2, np.float32), v=np.eye(8, dtype=np.float32)
    )
    scales = np.float32([2 / 127, 2 / 128, 1 / 127, 3 / 127])
    arguments = place(model, "full"), {"x": SCALE}, {"w": scales, "v": np.full(8, SCALE)}
    written = write_qdq(model, *arguments)
    output = helper.make_tensor_value_info("w_quantized", onnx.TensorProto.INT8, [4, 32, 1, 1])
    written.graph.output.append(output)
    found = run(written, {"x": np.zeros((1, WIDTH, 8, 8), np.float32)}, ["w_quantized"])[0]
    assert found[:, 0, 0, 0].tolist() == [-127, -127, -127, -85]


def test_rounding_is_no_clipping():
    """A scale that is a rounding error short of amax / 127 leaves the weights as they are."""
    model = tiny("h = Conv (x, w)")
    placement = place(model, "full")
    short = np.nextafter(amax_of_weights(model, placement)["w"] / np.float32(127), np.float32(0))
    assert write_qdq(model, placement, {"x": SCALE}, {"w": short}).graph.initializer[0] == model.graph.initializer[0]


@pytest.mark.parametrize("policy", ["conv-only", "full"])
def test_shared_weights(policy):
    """Two convolutions have one pair; who reads the weights in float gets them as they were, clipped or not."""
    model = tiny(
        "a = Conv (x, w); y = Conv (a, w); z = Add (y, w); h = Conv (z, w1)", width=8, w=(8, 8, 1, 1), w1=(8, 8, 1, 1)
    )
    placement = place(model, policy)
    weight_scales = {name: 0.5 / np.float32(127) * top for name, top in amax_of_weights(model, placement).items()}
    scales = {q.tensor: SCALE for q in placement.activations}
    written = write_qdq(model, placement, scales, weight_scales)
    readers = {node.name: node.input[1] for node in written.graph.node if node.name in "ayz"}
    assert readers == {"a": "w_dequantized", "y": "w_dequantized", "z": "w_float"}
    x = np.random.default_rng(1).normal(0, 1, (1, 8, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(written, {"x": x})[0], oracle(model, placement, scales, weight_scales, x))
    written = write_qdq(model, placement, scales, {name: 2.1 * scale for name, scale in weight_scales.items()})
    assert {node.name: node.input[1] for node in written.graph.node}["z"] == "w"


BAD = {"zero": 0, "negative": -1, "denormal": 1e-39, "nan": np.nan, "infinite": np.inf}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_scale_that_int8_cannot_have(value):
    scale = np.full(WIDTH, SCALE)
    scale[7] = value
    with pytest.raises(AlignError, match=r"tensor x: scale .* is none that int8 can have: calibrate anew, or keep"):
        write_qdq(*one_convolution(scales={"x": np.float32(value)}))
    with pytest.raises(AlignError, match=r"weights of w, channel 7: scale .* is none that int8 can have"):
        write_qdq(*one_convolution(weight_scales={"w": scale}))


WRONG = {
    "tensor x: no scale": {"scales": {}},
    "weights of w: no scale": {"weight_scales": {}},
    "tensor x: 32 scales": {"scales": {"x": np.full(WIDTH, SCALE)}},
    r"weights of w: scales of shape \(3,\): one for each of 32 channels": {"weight_scales": {"w": np.full(3, SCALE)}},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_scales(message):
    with pytest.raises(AlignError, match=message):
        write_qdq(*one_convolution(**WRONG[message]))


def test_wrong_graphs():
    model, placement, *scales = one_convolution()
    with pytest.raises(AlignError, match="the name x_QuantizeLinear is taken"):
        write_qdq(write_qdq(model, placement, *scales), replace(placement, weights=()), *scales)
    other = replace(placement, activations=(Quantizer("x", (("y", 0),), "x", "weighted"),))
    with pytest.raises(AlignError, match="node y does not read x: place quantizers in this graph"):
        write_qdq(model, other, *scales)
    with pytest.raises(AlignError, match="tensor x: no range"):
        group_amax(placement, {})
    model.opset_import[0].version = 12
    with pytest.raises(AlignError, match="opset 12 has no scales per channel: export with opset 13 or later"):
        write_qdq(model, placement, *scales)


def test_group_amax():
    places = [Quantizer(name, (), group, "concat") for name, group in (("a", "a"), ("b", "a"), ("c", "c"))]
    placement = Placement("full", tuple(places), (), {})
    assert group_amax(placement, {"a": 1.0, "b": 3.0, "c": 2.0, "d": 9.0}) == {"a": 3.0, "b": 3.0, "c": 2.0}


def test_scales_of_other_tools():
    """Constants instead of initializers; two scales for one tensor are no answer."""
    text = "q = QuantizeLinear (x, s, z); p = QuantizeLinear (x, t, z); d = DequantizeLinear (q, s, z)"
    model = tiny(text, s=np.float32(0.5), t=np.float32(0.5), z=np.int8(0))
    constant = helper.make_node("Constant", [], ["s"], "constant", value=model.graph.initializer.pop(0))
    model.graph.node.insert(0, constant)
    assert fake_quantizers(model) == ({"x": np.float32(0.5)}, {})
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32(0.25), "t"))
    with pytest.raises(AlignError, match="tensor x: quantized twice"):
        fake_quantizers(model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded(name, policy):
    pytest.importorskip("mmyolo")
    from alignment.export.onnx_export import exported

    variant = load_variant(name)
    model = onnx.load(exported(variant).onnx)
    placement = place(model, policy)
    scales = {q.tensor: SCALE for q in placement.activations}
    weight_scales = {name: np.maximum(top, 1e-6) / 127 for name, top in amax_of_weights(model, placement).items()}
    written = write_qdq(model, placement, scales, weight_scales)
    onnx.checker.check_model(written, full_check=True)
    assert fake_quantizers(written)[0] == scales
    x = np.random.default_rng(0).uniform(0, 1, (1, 3, variant.input.height, variant.input.width)).astype(np.float32)
    outputs = run(written, {"images": x})
    assert [output.shape for output in outputs] == [output.shape for output in run(model, {"images": x})]
    assert all(np.isfinite(output).all() for output in outputs)
