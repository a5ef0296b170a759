"""Cross-layer equalization: the same function, weights of one size on both sides, and hands off where it cannot be."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from alignment.data.samples import open_samples
from alignment.export.onnx_export import exported
from alignment.quantize.equalization import equalize, pairs_of
from alignment.quantize.graph import OnnxGraph
from alignment.variant import load_variant

WIDTH = 8
PAIR = "y = Conv(x, w1, b1); z = Relu(y); o = Conv(z, w2, b2)"


def tiny(text: str, outputs: tuple[str, ...] = ("o",), **values: np.ndarray | tuple[int, ...]) -> onnx.ModelProto:
    """A graph in ONNX's own notation, nodes named as their first outputs, that reads ``x``.

    Names with ``w`` are random weights, 8 to 8 channels and 1 × 1 unless a shape is given, with ``b`` biases; other
    keywords are constants.
    """
    nodes = [onnx.parser.parse_node(line.strip()) for line in text.split(";")]
    for node in nodes:
        node.name = node.output[0]
    read = sorted({name for node in nodes for name in node.input if name[:1] in ("w", "b")})
    rng = np.random.default_rng(0)
    shapes = {name: (WIDTH, WIDTH, 1, 1) if name[0] == "w" else (WIDTH,) for name in read} | values
    arrays = {
        name: rng.normal(0, 0.5, value).astype(np.float32) if isinstance(value, tuple) else value
        for name, value in shapes.items()
    }
    made = {name for node in nodes for name in node.output}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH, 6, 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if name not in made],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def run(model: onnx.ModelProto, image: np.ndarray | None = None) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    (value,) = model.graph.input
    if image is None:
        image = np.random.default_rng(1).standard_normal((1, WIDTH, 6, 6)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: image})


def assert_same_function(ours: onnx.ModelProto, theirs: onnx.ModelProto, image: np.ndarray | None = None) -> None:
    """Within 1e-5 of the largest output."""
    for mine, other in zip(run(ours, image), run(theirs, image), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * np.abs(other).max())


def assert_untouched(model: onnx.ModelProto) -> None:
    found, factors = equalize(model)
    assert factors == {}
    assert found.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def ranges(model: onnx.ModelProto, first: str = "w1", second: str = "w2") -> tuple[np.ndarray, np.ndarray]:
    """The largest weight of each channel between two convolutions, on its two sides."""
    one, other = np.abs(weights(model)[first]), np.abs(weights(model)[second])
    return one.max((1, 2, 3)), other.max((1, 2, 3) if len(other) == len(one) and other.shape[1] == 1 else (0, 2, 3))


TINY = {
    "relu": tiny(PAIR),
    "3 x 3 with padding": tiny(
        "y = Conv<pads = [1, 1, 1, 1]>(x, w1, b1); z = Relu(y); o = Conv<pads = [1, 1, 1, 1]>(z, w2, b2)",
        w1=(WIDTH, WIDTH, 3, 3),
        w2=(4, WIDTH, 3, 3),
        b2=(4,),
    ),
    "no biases": tiny("y = Conv(x, w1); z = Relu(y); o = Conv(z, w2)"),
    "nothing between": tiny("y = Conv(x, w1, b1); o = Conv(y, w2)"),
    "leaky": tiny("y = Conv(x, w1, b1); z = LeakyRelu<alpha = 0.1>(y); o = Conv(z, w2)"),
    "prelu": tiny("y = Conv(x, w1, b1); z = PRelu(y, slope); o = Conv(z, w2)", slope=(WIDTH, 1, 1)),
    "depthwise second": tiny(
        "y = Conv(x, w1, b1); z = Relu(y); o = Conv<group = 8>(z, w2, b2)", w2=(WIDTH, 1, 3, 3), b2=(WIDTH,)
    ),
    "depthwise first": tiny("y = Conv<group = 8>(x, w1, b1); z = Relu(y); o = Conv(z, w2)", w1=(WIDTH, 1, 3, 3)),
    "grouped first": tiny("y = Conv<group = 2>(x, w1, b1); z = Relu(y); o = Conv(z, w2)", w1=(WIDTH, 4, 1, 1)),
}


@pytest.mark.parametrize("model", TINY.values(), ids=TINY.keys())
def test_ranges_become_equal_and_the_function_stays(model):
    found, factors = equalize(model)
    before, after = ranges(model), ranges(found)
    np.testing.assert_allclose(after[0], after[1], rtol=1e-6)
    np.testing.assert_allclose(after[0], np.sqrt(before[0] * before[1]), rtol=1e-6)  # equation 9
    np.testing.assert_allclose(factors["y"], np.sqrt(before[0] / before[1]), rtol=1e-6)
    assert_same_function(found, model)
    onnx.checker.check_model(found)


def test_the_model_that_is_given_is_not_changed():
    model = tiny(PAIR)
    before = model.SerializeToString(deterministic=True)
    equalize(model)
    assert model.SerializeToString(deterministic=True) == before


@given(st.lists(st.integers(-6, 6).map(lambda power: 2.0**power), min_size=WIDTH, max_size=WIDTH))
@settings(max_examples=25, deadline=None)
def test_a_planted_rescaling_is_undone(scales):
    scale = np.array(scales, np.float32)
    model = tiny(PAIR)
    values = weights(model)
    planted = tiny(
        PAIR,
        w1=values["w1"] * scale.reshape(-1, 1, 1, 1),
        b1=values["b1"] * scale,
        w2=values["w2"] / scale.reshape(1, -1, 1, 1),
        b2=values["b2"],
    )
    ours, theirs = weights(equalize(planted)[0]), weights(equalize(model)[0])
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6, err_msg=name)


def test_three_in_a_row():
    model = tiny("y = Conv(x, w1, b1); z = Relu(y); t = Conv(z, w2, b2); u = Relu(t); o = Conv(u, w3)")
    found, factors = equalize(model)
    assert set(factors) == {"y", "t"}
    for pair in (("w1", "w2"), ("w2", "w3")):
        np.testing.assert_allclose(*ranges(found, *pair), rtol=0.05)  # after ten rounds
    assert_same_function(found, model)


def test_factors_say_what_was_done():
    model = tiny("y = Conv(x, w1, b1); z = Relu(y); t = Conv(z, w2, b2); u = Relu(t); o = Conv(u, w3)")
    found, factors = equalize(model)
    ours, theirs = weights(found), weights(model)
    wanted = {
        "w1": theirs["w1"] / factors["y"].reshape(-1, 1, 1, 1),
        "b1": theirs["b1"] / factors["y"],
        "w2": theirs["w2"] * factors["y"].reshape(1, -1, 1, 1) / factors["t"].reshape(-1, 1, 1, 1),
        "b2": theirs["b2"] / factors["t"],
        "w3": theirs["w3"] * factors["t"].reshape(1, -1, 1, 1),
    }
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dead", ["w1", "w2"])
def test_a_dead_channel_stays(dead):
    values = weights(tiny(PAIR))
    changed = values[dead].copy()
    changed[(3,) if dead == "w1" else (slice(None), 3)] = 0
    model = tiny(PAIR, **{**values, dead: changed})
    found, factors = equalize(model)
    assert factors["y"][3] == 1
    assert all(np.isfinite(value).all() for value in weights(found).values())
    assert_same_function(found, model)


UNTOUCHED = {
    "silu": tiny("y = Conv(x, w1, b1); g = Sigmoid(y); z = Mul(y, g); o = Conv(z, w2)"),
    "sigmoid": tiny("y = Conv(x, w1, b1); z = Sigmoid(y); o = Conv(z, w2)"),
    "relu6": tiny("y = Conv(x, w1, b1); z = Clip(y, low, six); o = Conv(z, w2)", low=np.float32(0), six=np.float32(6)),
    "weights shared by the pair": tiny("y = Conv(x, w1, b1); z = Relu(y); o = Conv(z, w1, b2)"),
    "weights of the first shared": tiny("y = Conv(x, w1); z = Relu(y); o = Conv(z, w2); p = Conv(x, w1)", ("o", "p")),
    "weights of the second shared": tiny("y = Conv(x, w1); z = Relu(y); o = Conv(z, w2); p = Conv(x, w2)", ("o", "p")),
    "an output between": tiny("y = Conv(x, w1, b1); z = Relu(y); o = Conv(z, w2)", ("o", "z")),
    "an output before the activation": tiny("y = Conv(x, w1, b1); z = Relu(y); o = Conv(z, w2)", ("o", "y")),
    "two readers": tiny("y = Conv(x, w1, b1); z = Relu(y); s = Conv(z, w2); o = Add(s, z)"),
    "two readers before the activation": tiny("y = Conv(x, w1, b1); z = Relu(y); s = Conv(z, w2); o = Add(s, y)"),
    "one reader, twice": tiny("y = Conv(x, w1, b1); o = Add(y, y)"),
    "groups": tiny("y = Conv(x, w1, b1); z = Relu(y); o = Conv<group = 2>(z, w2)", w2=(WIDTH, 4, 1, 1)),
    "depthwise with a multiplier": tiny(
        "y = Conv(x, w1, b1); z = Relu(y); o = Conv<group = 8>(z, w2)", w2=(2 * WIDTH, 1, 1, 1)
    ),
    "pooling between": tiny("y = Conv(x, w1, b1); z = MaxPool<kernel_shape = [2, 2]>(y); o = Conv(z, w2)"),
    "weights that are computed": tiny("v = Abs(w1); y = Conv(x, v, b1); z = Relu(y); o = Conv(z, w2)"),
    "it is the slope of a PRelu": tiny("y = Conv(x, w1, b1); z = PRelu(x, y); o = Conv(z, w2)"),
}


@pytest.mark.parametrize("model", UNTOUCHED.values(), ids=UNTOUCHED.keys())
def test_left_alone(model):
    assert_untouched(model)


@pytest.mark.parametrize(
    "text",
    [
        "y = Conv(x, w1, b1); z = Relu(y); o = Conv(z, w2); p = Conv(x, w3, b1)",
        "y = Conv(x, w1, b1); z = Relu(y); o = Conv(z, w2); t = Conv(x, w3, b1); u = Relu(t); p = Conv(u, w4)",
        "y = Conv(x, w1, b1); z = Relu(y); o = Conv(z, w2, b1); p = Relu(x)",
    ],
    ids=["with another", "by two pairs", "within the pair"],
)
def test_a_shared_bias(text):
    model = tiny(text, ("o", "p"))
    assert_same_function(equalize(model)[0], model)


@pytest.mark.parametrize("text", ["c = Abs(b1); y = Conv(x, w1, c); z = Relu(y); o = Conv(z, w2)"])
def test_a_bias_that_is_computed(text):
    model = tiny(text)
    assert_same_function(equalize(model)[0], model)


def test_yolov6():
    variant = load_variant("yolov6_embedded")
    pytest.importorskip("mmyolo")
    model = onnx.load(exported(variant).onnx)
    found, factors = equalize(model)
    assert len(factors) == len(pairs_of(OnnxGraph(model))) > 20
    sample = next(iter(open_samples(variant, limit=1)))
    for value, ours, theirs in zip(
        model.graph.output, run(found, sample.tensor[None]), run(model, sample.tensor[None]), strict=True
    ):
        # Sums are of other addends, through all of the network: 1e-4 of an output's largest value.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=value.name)


def test_yolov6_has_ranges_that_are_nearer_to_each_other():
    """Of one pair alone they are equal; a chain of them comes near."""
    pytest.importorskip("mmyolo")
    model = onnx.load(exported(load_variant("yolov6_embedded")).onnx)
    found = equalize(model)[0]

    def farthest(of: onnx.ModelProto) -> float:
        sides = (ranges(of, one.input[1], other.input[1]) for one, other in pairs_of(OnnxGraph(of)))
        return max(np.abs(np.log(a[(a > 0) & (b > 0)] / b[(a > 0) & (b > 0)])).max() for a, b in sides)

    assert farthest(found) < 0.1 * farthest(model)


@pytest.mark.parametrize("name", ["yolov8_embedded", "yolov5_embedded", "yolox_embedded"])
def test_detectors_with_silu(name):
    pytest.importorskip("mmyolo")
    assert_untouched(onnx.load(exported(load_variant(name)).onnx))
