"""Q/DQ pairs of a file: parts of a QDQ graph are what quantizing these parts alone gives."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from test_placement import graphs, tiny
from test_qdq import SCALE, amax_of_weights, fake, run

from alignment.errors import AlignError
from alignment.quantize.pairs import QdqGraph
from alignment.quantize.placement import Placement, place
from alignment.quantize.qdq import fake_quantizers, write_qdq

pytestmark = pytest.mark.culprit
X = np.random.default_rng(0).normal(0, 1, (1, 32, 8, 8)).astype(np.float32)
SHARED = "a = Conv (x, w0); b = Conv (x, w1); y = Add (a, b)"


def quantized(model: onnx.ModelProto, placement: Placement | None = None) -> onnx.ModelProto:
    """The graph as the policy ``full`` quantizes it, or what is placed; no weight is clipped."""
    placement = placement or place(model, "full")
    scales = {quantizer.tensor: SCALE for quantizer in placement.activations}
    weights = {name: np.maximum(top, 1e-3) / np.float32(127) for name, top in amax_of_weights(model, placement).items()}
    return write_qdq(model, placement, scales, weights)


@settings(deadline=None, max_examples=50)
@given(graphs(), st.data())
def test_parts_of_a_file_are_parts_of_the_placement(model, data):
    placement = place(model, "full")
    graph = QdqGraph(quantized(model, placement))
    assert set(graph.int8_nodes) == set(placement.int8_nodes)
    nodes = graph.int8_nodes
    some = data.draw(st.sets(st.sampled_from(nodes))) if nodes else set()
    part = graph.only(some)
    onnx.checker.check_model(part, full_check=True)
    assert part == graph.without(set(nodes) - some)
    expected = quantized(model, placement.restricted(some))
    assert sorted(node.name for node in part.graph.node) == sorted(node.name for node in expected.graph.node)
    assert {value.name for value in part.graph.initializer} == {value.name for value in expected.graph.initializer}
    x = X[:, :16]
    np.testing.assert_array_equal(run(part, {"x": x})[0], run(expected, {"x": x})[0])
    assert graph.only(nodes) == graph.model


def test_none_is_the_float_graph():
    model = tiny("c = Conv (x, w); r = Relu (c); h = Conv (r, w1)")
    part = QdqGraph(quantized(model)).only(())
    assert [node.name for node in part.graph.node] == ["c", "r", "h"]
    np.testing.assert_array_equal(run(part, {"x": X})[0], run(model, {"x": X})[0])


def test_the_file_is_left_alone():
    model = quantized(tiny("c = Conv (x, w); h = Conv (c, w1)"))
    before = model.SerializeToString()
    graph = QdqGraph(model)
    graph.without(["c"])
    graph.with_scales("h", lambda scale: scale * 2)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("several", [False, True])
def test_weights_that_are_int8_in_the_file(several):
    """Other tools store integers with a DequantizeLinear behind; read in float, they are what that gives."""
    random = np.random.default_rng(1)
    steps = np.float32(random.uniform(0.01, 0.02, 32) if several else 0.01)
    integers = random.integers(-127, 128, (32, 32, 1, 1)).astype(np.int8)
    model = quantized(tiny("c = Conv (x, w)"))
    kept = [node for node in model.graph.node if node.name != "w_QuantizeLinear"]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    dequantize = next(node for node in model.graph.node if node.name == "w_DequantizeLinear")
    dequantize.input[:] = ["integers", "steps", "zeros"]
    if not several:
        del dequantize.attribute[:]
    arrays = {"integers": integers, "steps": steps, "zeros": np.zeros(steps.shape, np.int8)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    graph = QdqGraph(model)
    pair = next(pair for pair in graph.pairs if pair.stored)
    assert (pair.node, pair.index, pair.tensor, pair.axis) == ("c", 1, "integers", 0 if several else None)
    part = graph.only(())
    floats = tiny("c = Conv (x, w)", w=integers * steps.reshape((-1, 1, 1, 1) if several else ()))
    np.testing.assert_array_equal(run(part, {"x": X})[0], run(floats, {"x": X})[0])
    with pytest.raises(AlignError, match="node c reads no weights through a Q/DQ pair"):
        graph.with_scales("c", np.amax, weights=True)


def test_a_scale_of_one_reader():
    graph = QdqGraph(quantized(tiny(SHARED)))
    changed = graph.with_scales("b", lambda scale: scale * 4)
    onnx.checker.check_model(changed, full_check=True)
    scales = {
        pair.node: float(QdqGraph(changed).values(pair.scale))
        for pair in QdqGraph(changed).pairs
        if pair.node in "ab" and not pair.stored
    }
    assert scales == {"a": pytest.approx(float(SCALE)), "b": pytest.approx(4 * float(SCALE))}
    alone = QdqGraph(changed).only(["b"])
    assert fake_quantizers(alone)[0] == {"x": np.float32(4) * SCALE}
    # Nobody else reads the pair of the Conv: it is gone.
    single = QdqGraph(quantized(tiny("c = Conv (x, w)"))).with_scales("c", lambda scale: scale * 4)
    assert [node.op_type for node in single.graph.node].count("QuantizeLinear") == 2


def test_one_scale_for_all_channels():
    graph = QdqGraph(quantized(tiny("c = Conv (x, w)")))
    changed = graph.with_scales("c", np.amax, weights=True)
    weights = numpy_helper.to_array(graph.constants["w"])
    top = fake_quantizers(graph.model)[1]["w"].max()
    floats = tiny("c = Conv (x, w)", w=fake(weights, top))
    expected = run(floats, {"x": fake(X, SCALE)})[0]
    np.testing.assert_allclose(run(changed, {"x": X})[0], expected, rtol=1e-4, atol=1e-4)


def test_two_pairs_in_a_row():
    """What a second pair quantizes is the first one's output: in float, neither is there."""
    model = tiny("c = Conv (x, w)")
    chain = [
        helper.make_node(kind, [read, "s", "z"], [given], given)
        for kind, read, given in (
            ("QuantizeLinear", "x", "q"), ("DequantizeLinear", "q", "d"),
            ("QuantizeLinear", "d", "q1"), ("DequantizeLinear", "q1", "d1"),
        )
    ]  # fmt: skip
    model.graph.node[0].input[0] = "d1"
    nodes = [*chain, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([numpy_helper.from_array(SCALE, "s"), numpy_helper.from_array(np.int8(0), "z")])
    assert [node.name for node in QdqGraph(model).without(["c"]).graph.node] == ["c"]


def test_nodes_that_read_no_int8():
    graph = QdqGraph(quantized(tiny("c = Conv (x, w); r = Relu (c); h = Conv (r, w1)")))
    for call in (graph.only, graph.without):
        with pytest.raises(AlignError, match="node r reads no int8"):
            call(["r"])
    graph.model.graph.node[-1].name = ""
    with pytest.raises(AlignError, match=r"\(unnamed\) reads int8"):
        QdqGraph(graph.model)


def test_what_a_branch_reads_stays():
    """A weight that only the bodies of an If read is not dead."""
    model = quantized(tiny("a = Conv(x, w0)"))
    inner = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["given"], name="given")],
        "body",
        [],
        [helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, [2])],
    )
    branch = helper.make_node("If", ["yes"], ["chosen"], name="branch", then_branch=inner, else_branch=inner)
    model.graph.node.append(branch)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "inner"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    left = QdqGraph(model).only(())
    assert {"inner", "yes"} <= {value.name for value in left.graph.initializer}
    assert not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in left.graph.node)
