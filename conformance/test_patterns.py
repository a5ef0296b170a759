"""Patterns of bad engines in QDQ graphs: one tiny graph each, and none where nothing is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_pairs import quantized
from test_placement import tiny

from alignment.engine.patterns import PATTERNS, find_patterns
from alignment.errors import AlignError
from alignment.quantize.pairs import QdqGraph
from alignment.quantize.placement import POLICIES, Quantizer, place
from alignment.quantize.recipe import quantize
from alignment.variant import load_variant

pytestmark = pytest.mark.culprit
UNEVEN = np.float32(10.0 ** np.linspace(-4, 0, 32))[:, None, None, None] * np.ones((1, 32, 1, 1), np.float32)


def with_constant(model: onnx.ModelProto, name: str, value: object) -> onnx.ModelProto:
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    found = next(one for one in changed.graph.initializer if one.name == name)
    found.CopyFrom(numpy_helper.from_array(np.full(found.dims, value, np.float32), name))
    return changed


def with_pair(text: str, tensor: str, *readers: str, **weights: object) -> onnx.ModelProto:
    """A graph in which these nodes, beside the convolutions, read a tensor through a pair, each at its first input."""
    model = tiny(text, **weights)
    placement = place(model, "conv-only")
    slots = tuple((node.name, list(node.input).index(tensor)) for node in model.graph.node if node.name in readers)
    added = Quantizer(tensor, slots, tensor, "planted")
    return quantized(model, replace(placement, activations=(*placement.activations, added)))


def scale_of_zero() -> onnx.ModelProto:
    return with_constant(quantized(tiny("c = Conv (x, w)")), "x_scale", 0)


def denormal_scale() -> onnx.ModelProto:
    return with_constant(quantized(tiny("c = Conv (x, w)")), "w_scale", 1e-40)


def before_an_activation() -> onnx.ModelProto:
    return with_pair("h = Conv (x, w); c = Relu (h)", "h", "c")


def before_a_product() -> onnx.ModelProto:
    return with_pair("h = Conv (x, w); s = Sigmoid (h); c = Mul (h, s)", "h", "c")


def before_an_add() -> onnx.ModelProto:
    return with_pair("h = Conv (x, w); c = Add (x, h)", "h", "c")


def unlike_inputs() -> onnx.ModelProto:
    model = quantized(tiny("a = Relu (x); c = Concat <axis = 1> (x, a); h = Conv (c, w)", w=(32, 64, 1, 1)))
    return with_constant(model, "a_scale", 0.2)


def two_readers() -> onnx.ModelProto:
    graph = QdqGraph(quantized(tiny("a = Relu (x); h = Conv (a, w); c = Conv (a, w1)")))
    return graph.with_scales("c", lambda scale: scale * 4)


def transposed() -> onnx.ModelProto:
    return quantized(tiny("c = ConvTranspose (x, w)"))


def depthwise() -> onnx.ModelProto:
    return quantized(tiny("c = Conv <group = 32> (x, w)", w=(32, 1, 3, 3)))


def other_axis() -> onnx.ModelProto:
    model = quantized(tiny("c = Conv (x, w)"))
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.i = 1 if attribute.name == "axis" else attribute.i
    return model


def one_scale() -> onnx.ModelProto:
    return QdqGraph(quantized(tiny("c = Conv (x, w)", w=UNEVEN))).with_scales("c", np.amax, weights=True)


class Case(NamedTuple):
    """A graph that shows a pattern at its node ``c``, with words of the evidence."""

    pattern: str
    graph: object
    evidence: str


CASES = [
    Case("bad scale", scale_of_zero, "the scale of x is 0"),
    Case("bad scale", denormal_scale, "the scale of w, channel 0 is "),
    Case("pair inside a fusion", before_an_activation, "between it and h"),
    Case("pair inside a fusion", before_a_product, "between it and h"),
    Case("pair inside a fusion", before_an_add, "between it and h"),
    Case("Concat of unlike scales", unlike_inputs, "from 0.05 to 0.2"),
    Case("one tensor, two scales", two_readers, "reads a with scale 0.2, h with 0.05"),
    Case("ConvTranspose in int8", transposed, "reads int8"),
    Case("depthwise in int8", depthwise, "reads int8"),
    Case("wrong axis", other_axis, "along axis 1, its output channels along 0"),
    Case("one scale for unlike channels", one_scale, "0.0001 to 1"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.graph.__name__)
def test_a_pattern(case):
    found = find_patterns(QdqGraph(case.graph()), {"c": "model.c"})
    assert [(one.pattern, one.node, one.module) for one in found] == [(case.pattern, "c", "model.c")]
    assert case.evidence in found[0].evidence
    assert found[0].remedy
    assert str(found[0]).startswith(f"{case.pattern}: c (model.c): ")


def test_a_clipped_range():
    graph = QdqGraph(quantized(tiny("c = Conv (x, w)")))
    reach = 127 * 0.05
    assert find_patterns(graph, ranges={"x": 1.9 * reach}) == []
    found = find_patterns(graph, ranges={"x": 3 * reach})
    assert [(one.pattern, one.node) for one in found] == [("clipped range", "c")]
    assert "19" in found[0].evidence


def test_an_activation_with_a_scale_for_each_channel():
    """As no calibration here makes them, but a file may have them."""
    model = unlike_inputs()
    for scale in [one for one in model.graph.initializer if one.name in ("a_scale", "x_scale")]:
        scale.CopyFrom(numpy_helper.from_array(np.linspace(0.1, 0.2, 32, dtype=np.float32), scale.name))
    reach = np.float32(0.2) * 127
    found = find_patterns(QdqGraph(model), ranges={"a": 1.9 * reach, "x": 3 * reach})
    assert [(one.pattern, one.node) for one in found] == [("clipped range", "c")]


def test_every_pattern_has_a_graph():
    assert {case.pattern for case in CASES} | {"clipped range"} == set(PATTERNS)


@pytest.mark.parametrize(
    "text",
    [
        "h = Conv (x, w); c = Relu (h); k = Conv (c, w1)",
        "h = Conv (x, w); s = Sigmoid (h); c = Mul (h, s); k = Conv (c, w1)",
        "h = Conv (x, w); c = Add (x, h); k = Conv (c, w1)",
        "a = Relu (x); c = Concat <axis = 1> (x, a); k = Conv (c, w)",
        "c = Conv <group = 2> (x, w)",
    ],
)
def test_what_is_placed_as_it_should_be(text):
    weights = {"w": (32, 64, 1, 1)} if "Concat" in text else {"w": (32, 16, 1, 1)} if "group" in text else {}
    model = tiny(text, **weights)
    assert find_patterns(QdqGraph(quantized(model, place(model, replace(POLICIES["tensorrt"], heads=True))))) == []
    channels = tiny("c = Conv (x, w)", w=UNEVEN)
    assert find_patterns(QdqGraph(quantized(channels))) == []


@pytest.mark.parametrize("name", ["yolov5_embedded", "yolov8_embedded", "yolox_embedded"])
def test_a_healthy_graph_has_none(name):
    pytest.importorskip("mmyolo")
    found = quantize(load_variant(name))
    statistics = found.calibration.tensors
    ranges = {tensor: max(abs(one.minimum), abs(one.maximum)) for tensor, one in statistics.items()}
    assert find_patterns(QdqGraph(found.model), ranges=ranges) == []


def test_a_graph_without_pairs():
    with pytest.raises(AlignError, match="no Q/DQ pairs"):
        find_patterns(QdqGraph(tiny("c = Conv (x, w)")))
