"""The layer-by-layer mode names the first node that leaves the float64 band."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from alignment.layers import LayerError, compare_layers, first_outside, mark_outputs
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.variant import load_variant

Plant = Callable[[onnx.ModelProto], str]


@pytest.fixture(scope="module")
def model() -> Path:
    """The embedded variant's ONNX file."""
    pytest.importorskip("mmyolo")
    from alignment.export.onnx_export import exported

    return exported(load_variant("yolov8_embedded")).onnx


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    """One image of a size that the dynamic part of the graph does not mind: the variant's own."""
    pytest.importorskip("mmyolo")
    from alignment.data.samples import open_samples

    return next(iter(open_samples(load_variant("yolov8_embedded"), None, 1))).tensor[None]


def compare(model: Path, batch: np.ndarray, plant: Plant | None = None) -> tuple[list[LayerError], str | None]:
    """All tensors, and the name of the node in which `plant` planted a fault on the subject's side alone."""
    planted: list[str] = []

    def subject(path: Path) -> OnnxRuntimeRunner:
        if plant:
            graph = onnx.load(path)
            planted.append(plant(graph))
            onnx.save(graph, path)
        return OnnxRuntimeRunner(path)

    return compare_layers(model, subject, batch), planted[0] if planted else None


def convolution(graph: onnx.ModelProto, share: float) -> onnx.NodeProto:
    """The convolution with a bias that comes after `share` of all."""
    nodes = [n for n in graph.graph.node if n.op_type == "Conv" and len(n.input) == 3]
    return nodes[int(share * len(nodes))]


def change_weights(graph: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    weights = next(i for i in graph.graph.initializer if i.name == name)
    weights.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weights)).astype(np.float32), name))


def scaled_weights(share: float) -> Plant:
    def plant(graph: onnx.ModelProto) -> str:
        node = convolution(graph, share)
        change_weights(graph, node.input[1], lambda w: w * np.float32(1.001))
        return node.name

    return plant


def zeroed_bias(graph: onnx.ModelProto) -> str:
    node = convolution(graph, 0.6)
    change_weights(graph, node.input[2], lambda b: b * 0)
    return node.name


def one_weight(graph: onnx.ModelProto) -> str:
    node = convolution(graph, 0.4)

    def nudge(weights: np.ndarray) -> np.ndarray:
        changed = weights.copy()
        index = np.unravel_index(np.abs(weights).argmax(), weights.shape)
        changed[index] *= 1.01
        return changed

    change_weights(graph, node.input[1], nudge)
    return node.name


def average_for_maximum(graph: onnx.ModelProto) -> str:
    node = next(n for n in graph.graph.node if n.op_type == "MaxPool")
    node.op_type = "AveragePool"
    kept = [a for a in node.attribute if a.name in ("kernel_shape", "pads", "strides")]
    del node.attribute[:]
    node.attribute.extend(kept)
    return node.name


def linear_for_nearest(graph: onnx.ModelProto) -> str:
    node = next(n for n in graph.graph.node if n.op_type == "Resize")
    kept = [a for a in node.attribute if a.name not in ("mode", "nearest_mode", "coordinate_transformation_mode")]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("mode", "linear")])
    return node.name


def tanh_for_sigmoid(graph: onnx.ModelProto) -> str:
    nodes = [n for n in graph.graph.node if n.op_type == "Sigmoid"]
    node = nodes[len(nodes) // 2]
    node.op_type = "Tanh"
    return node.name


def not_a_number(graph: onnx.ModelProto) -> str:
    node = convolution(graph, 0.5)
    change_weights(graph, node.input[2], lambda b: b * np.nan)
    return node.name


FAULTS = [
    pytest.param(scaled_weights(0.0), id="weights of the first convolution"),
    pytest.param(scaled_weights(0.5), id="weights in the middle"),
    pytest.param(scaled_weights(0.99), id="weights of the last convolution"),
    one_weight,
    zeroed_bias,
    average_for_maximum,
    linear_for_nearest,
    tanh_for_sigmoid,
    not_a_number,
]


def test_onnx_runtime_stays_inside_the_band_with_every_tensor(model, batch):
    layers, _ = compare(model, batch)
    graph = onnx.load(model).graph
    assert [(layer.node, layer.op, layer.inside) for layer in layers if not layer.inside] == []
    assert first_outside(layers) is None
    assert {n.name for n in graph.node if n.op_type == "Conv"} <= {layer.node for layer in layers}
    order = [node.name for node in graph.node]
    assert [order.index(layer.node) for layer in layers] == sorted(order.index(layer.node) for layer in layers)
    # A band as wide as the values themselves would hold nothing.
    assert all(layer.band <= 1e-3 * layer.magnitude for layer in layers if layer.op == "Conv")


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_named_exactly(model, batch, plant):
    layers, node = compare(model, batch, plant)
    first = first_outside(layers)
    assert first is not None
    assert first.node == node


def test_a_tensor_that_is_not_finite_is_infinitely_far(model, batch):
    layers, node = compare(model, batch, not_a_number)
    assert next(layer for layer in layers if layer.node == node).error == float("inf")


def test_marking_adds_outputs_once_and_leaves_the_model_alone(model):
    graph = onnx.load(model)
    before = graph.SerializeToString()
    known = [output.name for output in graph.graph.output]
    inner = graph.graph.node[0].output[0]
    marked = mark_outputs(graph, [inner, known[0]])
    assert [output.name for output in marked.graph.output] == [*known, inner]
    assert graph.SerializeToString() == before
