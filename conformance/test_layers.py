"""The layer-by-layer mode names the first node that leaves the float64 band."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from alignment.case import Case, Precision
from alignment.cli import app
from alignment.data.samples import open_samples
from alignment.engine.capabilities import missing
from alignment.errors import AlignError
from alignment.export.float16 import float32_nodes
from alignment.layers import (
    HALF_MAX,
    HALF_SMALLEST,
    LayerError,
    averaging_slack,
    compare_layers,
    first_outside,
    first_range_fault,
    mark_outputs,
)
from alignment.pipeline import RunOptions, align_live
from alignment.runners.base import Runner
from alignment.runners.open import open_model
from alignment.variant import ZOO, load_variant, zoo

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
    return next(iter(open_samples(load_variant("yolov8_embedded"), None, 1))).tensor[None]


def compare(
    model: Path, batch: np.ndarray, plant: Plant | None = None, precision: Precision = "fp32"
) -> tuple[list[LayerError], str | None]:
    """All tensors, and the name of the node in which `plant` planted a fault on the subject's side alone."""
    planted: list[str] = []

    def subject(path: Path) -> Runner:
        if plant:
            graph = onnx.load(path)
            planted.append(plant(graph))
            onnx.save(graph, path)
        keep = float32_nodes(path, []) if precision == "fp16" else ()
        return open_model(path, Case("yolov8_embedded", "onnxruntime", precision), keep=keep)

    return compare_layers(model, subject, batch, precision), planted[0] if planted else None


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


@pytest.fixture(scope="module", params=[p.stem for p in zoo() if p.stem.endswith("_embedded")])
def family(request) -> tuple[Path, np.ndarray]:
    """Each embedded variant's ONNX file and one image."""
    pytest.importorskip("mmyolo")
    from alignment.export.onnx_export import exported

    variant = load_variant(request.param)
    if variant.rotated:
        pytest.importorskip("mmrotate")
    return exported(variant).onnx, next(iter(open_samples(variant, None, 1))).tensor[None]


def test_every_family_stays_inside_the_band(family):
    """RTMDet's and PP-YOLOE's channel attention averages up to 1600 values, which ONNX Runtime adds one after another,
    and a convolution of the averages hands on what that costs."""
    path, image = family
    layers, _ = compare(path, image)
    assert [layer.place for layer in layers if not layer.inside] == []
    attention = [layer for layer in layers if "/attention/" in layer.node or layer.op == "GlobalAveragePool"]
    assert bool(attention) is path.name.startswith(("rtmdet", "ppyoloe"))
    assert all(layer.band <= 1e-3 * layer.magnitude for layer in attention)


def attention_weights(graph: onnx.ModelProto) -> str:
    pool = next(n for n in graph.graph.node if n.op_type == "GlobalAveragePool")
    node = next(n for n in graph.graph.node if pool.output[0] in n.input)
    change_weights(graph, node.input[1], lambda w: w * np.float32(1.001))
    return node.name


def test_a_fault_in_what_reads_an_average_is_named():
    pytest.importorskip("mmrotate")
    from alignment.export.onnx_export import exported

    variant = load_variant("rtmdet_r_embedded")
    image = next(iter(open_samples(variant, None, 1))).tensor[None]
    layers, node = compare(exported(variant).onnx, image, attention_weights)
    assert first_outside(layers).node == node


def test_an_average_gives_slack_to_the_nodes_that_it_alone_feeds():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 2, 1, 1)).astype(np.float32)
    matrix = rng.normal(size=(3, 5)).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
        helper.make_node("Conv", ["mean", "weights"], ["conv"]),
        helper.make_node("Sigmoid", ["conv"], ["gate"]),
        helper.make_node("Flatten", ["gate"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix"], ["gemm"]),
        helper.make_node("Gemm", ["flat", "turned"], ["same"], transB=1),
        helper.make_node("Add", ["gemm", "same"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["end"]),
        helper.make_node("Conv", ["x", "weights"], ["map"]),
    ]
    constants = {"weights": weights, "matrix": matrix, "turned": matrix.T.copy()}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [], [], initializers)
    x = rng.normal(size=(1, 2, 8, 8))
    slack = averaging_slack(graph, {"x": x, "mean": x.mean((2, 3), keepdims=True)})
    mean = np.abs(x).mean() * 8
    conv = mean * np.abs(weights).sum((1, 2, 3)).max()
    gemm = conv * np.abs(matrix).sum(0).max()
    expected = {"mean": mean, "conv": conv, "gate": conv, "flat": conv, "gemm": gemm, "same": gemm}
    assert slack == pytest.approx(expected)


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_named_exactly(model, batch, plant):
    layers, node = compare(model, batch, plant)
    first = first_outside(layers)
    assert first is not None
    assert first.node == node


def test_a_tensor_that_is_not_finite_is_infinitely_far(model, batch):
    layers, node = compare(model, batch, not_a_number)
    assert next(layer for layer in layers if layer.node == node).error == float("inf")


def test_float16_stays_inside_its_band_and_its_range(model, batch):
    layers, _ = compare(model, batch, precision="fp16")
    assert [layer.place for layer in layers if not layer.inside] == []
    assert first_range_fault(layers) is None
    assert all(layer.band <= 0.1 * layer.magnitude for layer in layers if layer.op == "Conv")
    # Sums that float16 makes are off by far more than float32 explains: the subject did run in float16.
    single, _ = compare(model, batch)
    assert sum(half.error > full.band for half, full in zip(layers, single, strict=True)) > len(layers) / 2


@pytest.mark.parametrize("plant", [zeroed_bias, average_for_maximum, linear_for_nearest, tanh_for_sigmoid])
def test_a_fault_that_float16_does_not_explain_is_named(model, batch, plant):
    layers, node = compare(model, batch, plant, "fp16")
    first = first_outside(layers)
    assert first is not None
    assert (first.node, first.range_fault) == (node, None)


class Rescaled:
    """The embedded graph with a convolution scaled up or down and the next one the other way round: float32 does not
    mind, float16 has no numbers for what lies between."""

    def __init__(self, model: Path, folder: Path, scale: float) -> None:
        graph = onnx.load(model)
        self.node = convolution(graph, 0.1)
        (activation,) = [n for n in graph.graph.node if n.op_type == "Mul" and self.node.output[0] in n.input]
        (self.following,) = [n for n in graph.graph.node if activation.output[0] in n.input]
        for name, factor in (
            (self.node.input[1], scale),
            (self.node.input[2], scale),
            (self.following.input[1], 1 / scale),
        ):
            change_weights(graph, name, lambda weights, by=factor: weights * np.float32(by))
        self.path = folder / "rescaled.onnx"
        onnx.save(graph, self.path)
        shutil.copy(model.with_suffix(".node_map.json"), folder / "rescaled.node_map.json")
        fields = yaml.safe_load((ZOO / "yolov8_embedded.yaml").read_text())
        fields |= {
            "name": "rescaled",
            "source": {"kind": "onnx", "file": "rescaled.onnx", "head": {"layout": "decoded"}},
        }
        self.variant = folder / "rescaled.yaml"
        self.variant.write_text(yaml.safe_dump(fields))


@pytest.fixture(params=[(1e4, "overflow"), (1e-7, "underflow")], ids=lambda given: given[1])
def rescaled(request, model, tmp_path) -> tuple[Rescaled, str]:
    scale, kind = request.param
    return Rescaled(model, tmp_path, scale), kind


def test_the_first_tensor_out_of_the_range_of_float16_is_named(rescaled, batch):
    planted, kind = rescaled
    layers, _ = compare(planted.path, batch, precision="fp16")
    fault = first_range_fault(layers)
    assert fault is not None
    assert (fault.tensor, fault.node, fault.range_fault) == (planted.node.output[0], planted.node.name, kind)
    assert fault.module == "model.backbone.stage2.0.conv"
    assert fault.high > HALF_MAX if kind == "overflow" else 0 < fault.high < HALF_SMALLEST
    assert first_outside(layers) == fault
    assert all(layer.range_fault is None and layer.inside for layer in compare(planted.path, batch)[0])


def test_a_run_out_of_the_range_of_float16_fails_and_sends_to_the_layers(rescaled, tmp_path):
    planted, _ = rescaled
    variant = load_variant(planted.variant)
    cases = [Case("rescaled", "onnxruntime", precision) for precision in ("fp32", "fp16")]
    results, _ = align_live(variant, cases, open_samples(variant, None, 2), RunOptions(golden=tmp_path / "golden"))
    single, half = results
    assert single.status == "pass", single.reason
    assert (half.status, half.first_difference, half.wrong_side) == ("fail", "decoded", "subject")
    assert f"`align layers {planted.variant} --backend onnxruntime --precision fp16` says why" in half.reason


@pytest.mark.parametrize("backend", [pytest.param("tensorrt", marks=pytest.mark.gpu), "onnxruntime"])
def test_the_command_names_tensor_module_range_and_a_remedy_that_works(rescaled, backend):
    if backend == "tensorrt" and (reason := missing()):
        pytest.skip(reason)
    planted, kind = rescaled
    if backend == "tensorrt" and kind == "underflow":
        pytest.skip("TensorRT computes such a layer in float32 by itself: there is nothing to name")
    command = ["layers", str(planted.variant), "--precision", "fp16", "--backend", backend]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"first {kind} of float16: ")]
    assert f"{planted.node.name} (Conv) of module model.backbone.stage2.0.conv, tensor {planted.node.output[0]}" in line
    assert " in float64; float16 " in line
    assert "name that node in the variant's float32_nodes" in line
    fields = yaml.safe_load(planted.variant.read_text())
    fields["float32_nodes"] = ["/detector/backbone/stage2/stage2.0/*", planted.following.name]
    planted.variant.write_text(yaml.safe_dump(fields))
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output


def test_a_node_to_keep_in_float32_that_is_not_there_is_an_error(model):
    with pytest.raises(AlignError, match=r"no node is named '/detector/backbone/stem/conv/Con'.*stem/conv/Conv"):
        float32_nodes(model, ["/detector/backbone/stem/conv/Con"])
    decoding = float32_nodes(model, [])
    assert float32_nodes(model, ["*/stem/*"]) == (
        "/detector/backbone/stem/conv/Conv",
        "/detector/backbone/stem/activate/Sigmoid",
        "/detector/backbone/stem/activate/Mul",
        *decoding,
    )


def test_marking_adds_outputs_once_and_leaves_the_model_alone(model):
    graph = onnx.load(model)
    before = graph.SerializeToString()
    known = [output.name for output in graph.graph.output]
    inner = graph.graph.node[0].output[0]
    marked = mark_outputs(graph, [inner, known[0]])
    assert [output.name for output in marked.graph.output] == [*known, inner]
    assert graph.SerializeToString() == before
