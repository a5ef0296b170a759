"""Deployed copies of every family of detectors: what is folded changes no answer, and ONNX holds it node by node."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lively import lively_variant
from onnx import numpy_helper

from alignment.export.onnx_export import ExportedModel, ExportOptions, export
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.variant import Variant

pytest.importorskip("mmyolo")
torch = pytest.importorskip("torch")

SIZE = (96, 128)
FAMILIES = ["yolov5", "yolov6", "yolov7", "yolov8", "yolox", "ppyoloe", "rtmdet", "rtmdet_r"]
VARIANTS = [*(f"{family}_embedded" for family in FAMILIES), "yolov7_l_narrow"]
SHARED = ["rtmdet_embedded", "rtmdet_r_embedded"]
EXPORTS = [ExportOptions(13), ExportOptions(17, 2)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lively")


@pytest.fixture(scope="module", params=VARIANTS)
def family(request, folder) -> tuple[Variant, Any]:
    """A variant with random weights, and its detector."""
    return built(request.param, folder)


def built(name: str, folder: Path) -> tuple[Variant, Any]:
    from alignment.models.mmyolo_source import build_detector

    if name.startswith("rtmdet_r_") and find_spec("mmrotate") is None:
        pytest.skip("mmrotate is not installed")
    variant = lively_variant(name, folder, SIZE)
    return variant, build_detector(variant)


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, *SIZE)).astype(np.float32)


def answers(detector: Any) -> dict[str, np.ndarray]:
    """In float64."""
    with torch.inference_mode():
        values = copy.deepcopy(detector).double()(torch.from_numpy(images()).double())
    return {name: value.numpy() for name, value in zip(detector.output_names, values, strict=True)}


def worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest error, relative to the largest value of its tensor."""
    assert list(found) == list(expected)
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in expected)


def test_folding_changes_no_answer_and_leaves_only_convolutions(family):
    from alignment.models.detector import fused

    _, detector = family
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    expected = answers(detector)
    assert expected["scores"].std() > 0.05, "the weights are alive"
    deployed = fused(detector, torch.float64)
    assert worst(answers(deployed), expected) < 1e-9
    assert worst(answers(fused(detector)), expected) < 1e-3, "each weight is rounded once more"
    left = {type(module).__name__ for module in deployed.modules()}
    assert not left & {"BatchNorm2d", "SyncBatchNorm", "ImplicitA", "ImplicitM"}
    assert all(value.equal(before[name]) for name, value in detector.state_dict().items())


@pytest.mark.parametrize("name", SHARED)
def test_levels_that_share_a_convolution_get_one_each(name, folder, monkeypatch):
    from alignment.models import detector as module

    def convolutions(detector: Any) -> list[Any]:
        return [level[0].conv for level in detector.model.bbox_head.head_module.cls_convs]

    _, detector = built(name, folder)
    weights = {conv.weight.detach().numpy().tobytes() for conv in convolutions(module.fused(detector))}
    assert len(weights) == 3, "each holds the gain of its level's BatchNorm"
    assert len(set(map(id, convolutions(detector)))) == 1, "the original still shares"
    # What this guards against: three BatchNorms folded into the one convolution.
    monkeypatch.setattr(module, "_unshare_convolutions", lambda _: None)
    assert worst(answers(module.fused(detector, torch.float64)), answers(detector)) > 1e-3


@pytest.mark.parametrize("name", ["yolov7_embedded", "yolov7_l_narrow"])
def test_implicit_layers_are_alive_and_their_head_becomes_one_convolution(name, folder):
    from alignment.models.detector import fused

    _, detector = built(name, folder)
    expected = answers(detector)
    silent = copy.deepcopy(detector)
    for layers in silent.model.bbox_head.head_module.convs_pred:
        torch.nn.init.zeros_(layers[0].implicit)
        torch.nn.init.ones_(layers[2].implicit)
    assert worst(answers(silent), expected) > 1e-2
    for layers in fused(detector).model.bbox_head.head_module.convs_pred:
        assert [type(layer).__name__ for layer in layers] == ["Identity", "Conv2d", "Identity"]


def test_an_implicit_layer_before_padding_stays():
    from alignment.models.detector import _fold_implicit_layers
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from mmyolo.models.layers import ImplicitA

    layers = torch.nn.Sequential(ImplicitA(2, mean=1), torch.nn.Conv2d(2, 3, 3, padding=1, bias=False)).double()
    image = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    expected = layers(image)
    _fold_implicit_layers(layers)
    assert type(layers[0]).__name__ == "ImplicitA"
    inner = torch.nn.Sequential(layers[0], torch.nn.Conv2d(2, 3, 3, bias=False).double())
    answer = inner(image)
    _fold_implicit_layers(inner)
    assert type(inner[0]).__name__ == "Identity"
    torch.testing.assert_close(inner(image), answer)
    torch.testing.assert_close(layers(image), expected)


@pytest.mark.parametrize("options", EXPORTS, ids=lambda o: f"opset{o.opset}-batch{o.batch or 'N'}")
def test_onnx_gives_the_answers_and_every_weight_is_its_modules(family, options, tmp_path):
    """`build_node_map` raises where a node does not hold the weights of its module."""
    variant, detector = family
    made = export(variant, tmp_path, options)
    with OnnxRuntimeRunner(made.onnx) as runner:
        assert worst(runner.run(images()), answers(detector)) < 2e-4
    modules = weighted(made)
    assert len(modules) == len(set(modules)), "one node a module"
    assert all(path.startswith("model.") for path in modules)


def weighted(made: ExportedModel) -> list[str]:
    """Modules of the nodes that have weights; every Conv is among them."""
    assert made.node_map is not None
    entries = json.loads(made.node_map.read_text())
    model = onnx.load(made.onnx)
    initializers = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            assert entries[node.name]["weight"] == node.input[1]
            assert initializers[node.input[1]].ndim == 4
    return [entry["module"] for entry in entries.values() if "weight" in entry]
