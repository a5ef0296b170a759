"""What TensorRT is told about int8, and what it tells: calibration caches, the engine inspector's JSON."""

from __future__ import annotations

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.case import ROUTES, Case
from alignment.data.samples import open_samples
from alignment.engine.build import BuildOptions, build_engine
from alignment.engine.capabilities import Capabilities, missing
from alignment.engine.inspect import parse, reformats
from alignment.engine.int8 import LEGACY_QUANTILE, ranges_in_cache, read_cache, write_cache
from alignment.engine.log import Log
from alignment.errors import AlignError
from alignment.quantize.recipe import apply, graph_file
from alignment.runners.int8 import tensorrt_build
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.tensorrt import TensorRTRunner
from alignment.variant import load_variant, with_quantization

# Tensor names hold slashes, colons and spaces: "(Unnamed Layer* 3) [Shuffle]_output".
NAMES = st.text("abc/:. ()*[]_0", min_size=1, max_size=12).map(lambda name: f"t{name}t")
AMAX = st.floats(2.0**-20, 2.0**20, width=32)


def test_a_cache_is_what_tensorrt_8_6_writes():
    """``3c010a14`` was read from a cache that TensorRT 8.6 wrote; its float32 is amax / 127 of a sigmoid."""
    (scale,) = np.frombuffer(bytes.fromhex("3c010a14"), ">f4")
    text = write_cache({"images": float(scale) * 127}, "8.6.1")
    assert text.splitlines()[0] == "TRT-8601-EntropyCalibration2"
    name, digits = text.splitlines()[1].split(": ")
    assert name == "images"
    assert abs(int(digits, 16) - 0x3C010A14) <= 1  # one ulp: the product above was rounded


@pytest.mark.parametrize(
    ("version", "kind", "first"),
    [("8.6.1", "minmax", "TRT-8601-MinMaxCalibration"), ("10.16.1.11", "entropy2", "TRT-101601-EntropyCalibration2")],
)
def test_the_first_line_names_version_and_algorithm(version, kind, first):
    assert write_cache({}, version, kind).splitlines()[0] == first


@given(st.dictionaries(NAMES, AMAX, max_size=5))
def test_a_cache_is_read_back_to_the_bit(amax):
    found = read_cache(write_cache(amax, "8.6.1"))
    assert found == {name: float(np.float32(value) / np.float32(127)) for name, value in amax.items()}


def test_a_cache_of_the_legacy_calibrator_is_read():
    """TensorRT 8.6.1 wrote these lines for yolov8_embedded: cutoff 1 and quantile 0.9999 come before the scales."""
    text = (
        "0 3ff0000000000000 3fefff2e48e8a71e\nimages: 3c0098a9\n/detector/backbone/stem/conv/Conv_output_0: 3ce266fc\n"
    )
    assert struct.unpack(">d", bytes.fromhex(text.split()[2])) == (LEGACY_QUANTILE,)
    assert read_cache(text)["images"] == pytest.approx(1 / 127, rel=0.01)


@pytest.mark.parametrize("text", ["", "images: 3c010a14\n", "TRT-8601-EntropyCalibration2\nimages: 3c01\n"])
def test_what_is_no_cache_is_refused(text):
    with pytest.raises(AlignError, match="calibration cache"):
        read_cache(text)


def engine_text(*layers: object) -> str:
    return json.dumps({"Layers": list(layers)}).replace("?", "\x1f")


def test_layers_of_an_engine():
    convolution = {
        "Name": "conv1 + PWN(PWN(sigmoid), mul)",
        "LayerType": "CaskConvolution",
        "Outputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
        "Metadata": "[ONNX Layer: conv1]?[ONNX Layer: mul]",
    }
    copy = {
        "Name": "Reformatting CopyNode for Input Tensor 0 to conv1",
        "LayerType": "Reformat",
        "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}],
    }
    found = parse(engine_text(convolution, copy, "only a name"))
    assert [one.types for one in found] == [("Int8",), ("Half",), ()]
    assert found[0].metadata == "[ONNX Layer: conv1]\x1f[ONNX Layer: mul]"
    assert found[2].name == "only a name"
    assert reformats(found) == 1


def test_a_cache_is_read_as_ranges():
    ranges = ranges_in_cache(write_cache({"images": 2.5, "dead": 0.0}, "8.6.1"))
    assert ranges.keys() == {"images"}
    assert ranges["images"] == pytest.approx(2.5, rel=1e-6)


@pytest.fixture(scope="module")
def embedded(quantized_build):
    """The embedded YOLOv8, calibrated on 4 images, and one image."""
    if reason := missing():
        pytest.skip(reason)
    pytest.importorskip("mmyolo")
    variant = with_quantization(load_variant("yolov8_embedded"), {"images": 4})
    return variant, quantized_build(variant), next(iter(open_samples(variant, limit=1))).tensor[None]


@pytest.mark.gpu
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_runs_convolutions_in_int8(embedded, route):
    variant, quantized, image = embedded
    case = Case(variant.name, "tensorrt", "int8", route)
    if route != "qdq" and not Capabilities.current().has_int8_flag:
        pytest.skip(f"TensorRT {Capabilities.current().version} has no route {route}")
    build = tensorrt_build(variant, case, quantized)
    with TensorRTRunner(*build) as runner:
        scores = runner.run(image)["scores"]
        layers = runner.layers()
    int8 = [one for one in layers if "Conv" in one.kind and "Int8" in one.types]
    assert len(int8) >= len(quantized.placement.weights) / 2
    same_ranges = quantized
    if build.images is not None:
        found = ranges_in_cache(build.images.cache)
        same_ranges = apply(quantized.source, variant.quantization, quantized.calibration, found)
    graph = OnnxRuntimeRunner(graph_file(same_ranges.model, "tiny"), optimize=False)
    assert np.abs(scores - graph.run(image)["scores"]).max() < 0.35
    if build.images is not None:
        observed = quantized.calibration.amax("minmax")
        assert len(found.keys() & observed.keys()) > 0.5 * len(observed)
        if route == "implicit_minmax":
            wrong = [n for n in found.keys() & observed.keys() if abs(found[n] / observed[n] - 1) > 0.02]
            assert len(wrong) < 0.1 * len(found), wrong


@pytest.mark.gpu
def test_a_range_that_is_missing_is_told(embedded):
    _, quantized, _ = embedded
    some = tuple(quantized.ranges[:20])
    log = Log()
    # TensorRT 8.6 may find no kernel for a convolution half of whose tensors have a range: that is told too.
    with contextlib.suppress(AlignError):
        build_engine(quantized.source, BuildOptions(precision="int8", ranges=some), log)
    assert any("missing scale" in text for _, text in log.messages)
