"""What TensorRT is told about int8, and what it tells: calibration caches, the engine inspector's JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.engine.inspect import parse, reformats
from alignment.engine.int8 import read_cache, write_cache
from alignment.errors import AlignError

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
