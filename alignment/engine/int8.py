"""How int8 reaches TensorRT without QDQ nodes: a range on every tensor, or one of TensorRT's own calibrators."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from alignment.engine.capabilities import Capabilities
from alignment.errors import AlignError

CalibratorKind = Literal["entropy2", "minmax", "legacy"]
#: Quantile of the legacy calibrator, its percentile: TensorRT has no other one.
LEGACY_QUANTILE = 0.9999
#: The largest scale of which float32 has 127.
_LARGEST = (2 - 2.0**-23) * 2.0**127 / 128
#: What a calibration cache calls the algorithm that made it.
ALGORITHMS: dict[CalibratorKind, str] = {
    "entropy2": "EntropyCalibration2",
    "minmax": "MinMaxCalibration",
    "legacy": "LegacyCalibration",
}
#: First line of a cache: version and algorithm, or, of the legacy calibrator, its regression cutoff and its quantile.
_FIRST = re.compile(r"TRT-\d+-\w+|\d [0-9a-f]{16} [0-9a-f]{16}")


@dataclass
class CalibrationImages:
    """What a calibrator reads, and, after the build, the cache that it wrote.

    Attributes:
        identity: of these images, preprocessed; part of an engine's identity.
        batches: gives ``[1, 3, H, W] float32``, one image at a time.
        cache: text of TensorRT's calibration cache.
    """

    identity: str
    batches: Callable[[], Iterator[np.ndarray]]
    cache: str = ""


def write_cache(amax: Mapping[str, float], version: str, kind: CalibratorKind = "entropy2") -> str:
    """Ranges as text of a TensorRT calibration cache: a line a tensor, the float32 scale amax / 127 in hexadecimal.

    Args:
        amax: largest magnitude, by TensorRT's tensor name.
        version: of the TensorRT that will read it, "8.6.1": a cache of another one is refused.
        kind: the calibrator that will read it.
    """
    major, minor, patch = (int(part) for part in version.split(".")[:3])
    number = major * 1000 + minor * 100 + patch if major < 10 else major * 10000 + minor * 100 + patch
    lines = [f"TRT-{number}-{ALGORITHMS[kind]}"]
    for name, value in amax.items():
        scale = np.float32(value) / np.float32(127)
        lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
    return "\n".join(lines) + "\n"


def read_cache(text: str, origin: object = "calibration cache") -> dict[str, float]:
    """The scale of each tensor in a TensorRT calibration cache.

    Args:
        text: of the cache.
        origin: where it is from, for errors.

    Raises:
        AlignError: for what is none.
    """
    first, *lines = text.splitlines() or [""]
    if not _FIRST.fullmatch(first):
        what = f"{origin}: not a TensorRT calibration cache: it begins with {first[:40]!r}"
        raise AlignError(what, "give the file it wrote")
    found = {}
    for line in filter(None, lines):
        name, _, digits = line.rpartition(": ")
        try:
            (found[name],) = struct.unpack(">f", bytes.fromhex(digits))
        except (ValueError, struct.error):
            found[name] = -1.0
        if not 0 <= found[name] <= _LARGEST:
            raise AlignError(f"{origin}: no scale in the line {line[:80]!r}", "calibrate anew")
    return found


def ranges_in_cache(text: str, origin: object = "calibration cache") -> dict[str, float]:
    """The largest magnitude of each tensor, 127 × its scale, in a TensorRT calibration cache; without those of 0.

    Arguments and errors as of `read_cache`.
    """
    scales = read_cache(text, origin)
    if not scales:
        raise AlignError(f"{origin}: a calibration cache of no tensor", "calibrate anew")
    for name, scale in scales.items():
        if 0 < scale < np.finfo(np.float32).tiny:
            raise AlignError(f"{origin}: {name}: scale {scale:g} is none that int8 can have", "calibrate anew")
    return {name: float(np.float32(scale) * np.float32(127)) for name, scale in scales.items() if scale > 0}


def set_ranges(network: Any, amax: Mapping[str, float], ability: Capabilities) -> list[str]:
    """Gives every float tensor of a network its range.

    Tensors that TensorRT's parser adds on the way have none in `amax`: one that only moves data takes its input's;
    constants stay without, as a node that reads one beside a tensor, decoding above all, runs in float.

    Returns:
        Names of the float tensors that are left without; TensorRT runs what touches them in float.

    Raises:
        AlignError: for a TensorRT that takes no ranges.
    """
    import tensorrt as trt

    if not ability.has_dynamic_range:
        raise AlignError(f"TensorRT {ability.version} takes no ranges for tensors", "take the route qdq")
    moving = (trt.LayerType.SHUFFLE, trt.LayerType.SLICE, trt.LayerType.IDENTITY, trt.LayerType.RESIZE)
    known = dict(amax)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name in known:
            tensor.set_dynamic_range(-known[tensor.name], known[tensor.name])
    without = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for number in range(layer.num_outputs):
            tensor = layer.get_output(number)
            if tensor.dtype != trt.DataType.FLOAT:
                continue
            if tensor.name not in known and layer.type in moving and _name(layer.get_input(0)) in known:
                known[tensor.name] = known[_name(layer.get_input(0))]
            if known.get(tensor.name, 0.0) > 0.0:
                tensor.set_dynamic_range(-known[tensor.name], known[tensor.name])
            elif layer.type != trt.LayerType.CONSTANT:
                without.append(tensor.name)
    return without


def _name(tensor: Any) -> str:
    return tensor.name


def make_calibrator(kind: CalibratorKind, images: CalibrationImages | None, cache: str, ability: Capabilities) -> Any:
    """One of TensorRT's calibrators, fed with images, or with a cache in their place.

    The cache that TensorRT makes of the images goes into `images`.  The GPU's context must be current while it works.

    Raises:
        AlignError: for a TensorRT that has none.
    """
    import pycuda.driver as cuda
    import tensorrt as trt

    if not ability.has_calibrators:
        raise AlignError(f"TensorRT {ability.version} has no calibrators", "take the route qdq")
    bases = {
        "entropy2": trt.IInt8EntropyCalibrator2,
        "minmax": trt.IInt8MinMaxCalibrator,
        "legacy": trt.IInt8LegacyCalibrator,
    }
    base = bases[kind]

    class Calibrator(base):  # type: ignore[misc, valid-type]
        """Feeds one image at a time."""

        def __init__(self) -> None:
            base.__init__(self)
            self.batches = iter(()) if images is None else images.batches()
            self.memory: cuda.DeviceAllocation | None = None

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> list[int] | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            batch = np.ascontiguousarray(batch, np.float32)
            if self.memory is None:
                self.memory = cuda.mem_alloc(batch.nbytes)
            cuda.memcpy_htod(self.memory, batch)
            return [int(self.memory)]

        def read_calibration_cache(self) -> bytes | None:
            return cache.encode() if cache else None

        def write_calibration_cache(self, written: bytes) -> None:
            if images is not None:
                images.cache = bytes(written).decode()

        def get_quantile(self) -> float:
            return LEGACY_QUANTILE

        def get_regression_cutoff(self) -> float:
            return 1.0

        def read_histogram_cache(self, length: int) -> None:
            return None

        def write_histogram_cache(self, written: bytes, length: int) -> None:
            return None

    return Calibrator()
