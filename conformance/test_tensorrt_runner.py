"""The TensorRT runner on a real GPU, on graphs of a few nodes, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from alignment.engine.build import BuildOptions
from alignment.engine.capabilities import gpu, missing
from alignment.errors import AlignError
from alignment.export.float16 import float32_nodes
from alignment.export.onnx_export import exported
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.tensorrt import TensorRTRunner
from alignment.variant import load_variant

pytestmark = pytest.mark.gpu
SIZE, CHANNELS = 32, 64
OPTIONS = BuildOptions(opt_batch=2, max_batch=4)
# Sums of 576 products that come out near 1: float32 (2^-24) errs by about 1e-6, TF32 (2^-11 per product) by 1e-3.
FP32_LIMIT = 1e-4


@pytest.fixture(scope="module", autouse=True)
def machine(tmp_path_factory) -> Iterator[None]:
    """Skips without TensorRT and a GPU; engines go to a cache of this module's own."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def save(path: Path, nodes: list, weights: dict[str, np.ndarray], outputs: dict[str, list]) -> Path:
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    answers = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "tiny", [image], answers, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def convolutions(path: Path, seed: int) -> Path:
    """Two convolutions that keep the variance, then a sigmoid; ``features`` is before it, ``scores`` after."""
    random = np.random.default_rng(seed)
    weights = {
        "w1": random.normal(0, 27**-0.5, (CHANNELS, 3, 3, 3)).astype(np.float32),
        "w2": random.normal(0, (9 * CHANNELS) ** -0.5, (CHANNELS, CHANNELS, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "w1"], ["middle"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["middle", "w2"], ["features"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["features"], ["scores"], "sigmoid"),
    ]
    shape = ["batch", CHANNELS, SIZE, SIZE]
    return save(path, nodes, weights, {"features": shape, "scores": shape})


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(0, 1, (count, 3, SIZE, SIZE)).astype(np.float32)


def largest_difference(runner: TensorRTRunner, path: Path, batch: np.ndarray) -> float:
    found, expected = runner.run(batch), OnnxRuntimeRunner(path).run(batch)
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in expected.items()}
    assert {a.dtype for a in found.values()} == {np.dtype(np.float32)}
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


@pytest.fixture(scope="module")
def model(machine, tmp_path_factory) -> Path:
    return convolutions(tmp_path_factory.mktemp("model") / "tiny.onnx", seed=1)


@pytest.fixture(scope="module")
def runner(model) -> Iterator[TensorRTRunner]:
    with TensorRTRunner(model, OPTIONS) as made:
        yield made


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equals_onnxruntime(runner, model, count):
    """5 images are more than the engine's 4, so they go in two pieces."""
    assert largest_difference(runner, model, images(count)) < FP32_LIMIT


def test_later_runs_leave_earlier_answers_alone(runner):
    first = runner.run(images(2))
    copy = {name: array.copy() for name, array in first.items()}
    runner.run(-images(2))
    assert all(np.array_equal(first[name], copy[name]) for name in copy)


def test_tf32_is_the_mismatch():
    """On a whole detector: for a graph of two convolutions TensorRT may choose FP32 kernels all the same."""
    if float(gpu().compute_capability) < 8:
        pytest.skip("this GPU has no TF32: it came with compute capability 8.0")
    variant = load_variant("yolov8_embedded")
    path = exported(variant).onnx
    image = np.random.default_rng(0).random((1, 3, variant.input.height, variant.input.width), np.float32)
    expected = OnnxRuntimeRunner(path).run(image)["boxes"]
    errors = {}
    for precision in ("fp32", "tf32"):
        with TensorRTRunner(path, BuildOptions(precision=precision)) as runner:
            assert runner.provenance["build"]["tf32"] == (precision == "tf32")
            errors[precision] = float(np.abs(runner.run(image)["boxes"] - expected).max())
    assert errors["fp32"] < 0.01
    assert errors["tf32"] > 10 * errors["fp32"]


def test_float16_with_decoding_in_float32_is_nearer():
    """And named nodes stay in float32: with all of them named, nothing is left to round."""
    variant = load_variant("yolov8_embedded")
    path = exported(variant).onnx
    image = np.random.default_rng(0).random((1, 3, variant.input.height, variant.input.width), np.float32)
    expected = OnnxRuntimeRunner(path).run(image)["boxes"]
    errors = []
    for keep in ((), float32_nodes(path, []), float32_nodes(path, ["*"])):
        with TensorRTRunner(path, BuildOptions(precision="fp16", float32_nodes=keep)) as runner:
            assert runner.provenance["build"]["float32_nodes"] == len(keep)
            errors.append(float(np.abs(runner.run(image)["boxes"] - expected).mean()))
    free, decoded, single = errors
    print(f"mean box error in px: free {free:.3g}, decoding in float32 {decoded:.3g}, all in float32 {single:.3g}")
    assert single < 1e-3 < decoded <= free


def test_second_engine_comes_from_the_cache(runner, model):
    assert not runner.provenance["engine_from_cache"]
    with TensorRTRunner(model, OPTIONS) as again:
        assert again.provenance["engine_from_cache"]
        assert again.provenance["engine_sha256"] == runner.provenance["engine_sha256"]
        assert again.warnings == runner.warnings


def test_provenance(runner):
    build = runner.provenance["build"]
    assert (build["precision"], build["tf32"], build["fp16"], build["batch"]) == ("fp32", False, False, [1, 2, 4])
    assert all(runner.provenance[key] for key in ("tensorrt", "gpu", "compute_capability", "cuda", "pycuda"))


def test_two_runners_alive_together(runner, model, tmp_path):
    other_model = convolutions(tmp_path / "other.onnx", seed=2)
    other = TensorRTRunner(other_model, OPTIONS)
    for _ in range(2):
        assert largest_difference(runner, model, images(2)) < FP32_LIMIT
        assert largest_difference(other, other_model, images(2)) < FP32_LIMIT
    other.close()
    other.close()
    assert largest_difference(runner, model, images(3)) < FP32_LIMIT
    with pytest.raises(AlignError, match="closed"):
        other.run(images(1))


def test_too_small_a_batch_is_filled_up(model):
    with TensorRTRunner(model, BuildOptions(min_batch=2, opt_batch=2, max_batch=4)) as pair:
        assert largest_difference(pair, model, images(1)) < FP32_LIMIT


def test_inner_tensor_as_output(runner, model):
    with TensorRTRunner(model, BuildOptions(opt_batch=2, max_batch=4, layers_as_outputs=("middle", "scores"))) as wide:
        answers = wide.run(images(2))
    assert set(answers) == {"middle", "features", "scores"}
    assert np.abs(answers["features"] - runner.run(images(2))["features"]).max() < FP32_LIMIT
    with pytest.raises(AlignError, match=r"no tensor 'midle'.*middle"):
        TensorRTRunner(model, BuildOptions(layers_as_outputs=("midle",)))


def test_latency(runner):
    times = runner.latency(images(2), 5)
    assert len(times) == 5
    assert min(times) > 0
    with pytest.raises(AlignError, match="5 images"):
        runner.latency(images(5), 1)


def test_wrong_image_size(runner):
    with pytest.raises(AlignError, match="images of"):
        runner.run(np.zeros((1, 3, SIZE, SIZE + 32), np.float32))


@pytest.mark.topk
def test_topk_above_the_limit(tmp_path):
    """3 x 32 x 32 is too few, so the image is repeated; TensorRT takes K up to 3840."""
    nodes = [
        helper.make_node("Concat", ["images", "images"], ["twice"], "twice", axis=1),
        helper.make_node("Flatten", ["twice"], ["flat"], "flat", axis=1),
        helper.make_node("TopK", ["flat", "k"], ["values", "indices"], "topk", axis=1),
    ]
    path = save(tmp_path / "topk.onnx", nodes, {"k": np.array([3841], np.int64)}, {"values": ["batch", 3841]})
    with pytest.raises(AlignError, match="3840"):
        TensorRTRunner(path, OPTIONS)


def test_unknown_operator(tmp_path):
    nodes = [helper.make_node("NoSuchOperator", ["images"], ["y"], "strange")]
    path = save(tmp_path / "unknown.onnx", nodes, {}, {"y": ["batch", 3, SIZE, SIZE]})
    with pytest.raises(AlignError, match=r"strange.*NoSuchOperator"):
        TensorRTRunner(path, OPTIONS)
