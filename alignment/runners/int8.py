"""Opens the runner of an int8 case: one calibration, one placement, by whatever route."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignment.case import Case
from alignment.engine.build import BuildOptions
from alignment.engine.int8 import CalibrationImages, CalibratorKind
from alignment.errors import AlignError
from alignment.export.float16 import float32_nodes
from alignment.quantize.recipe import Quantized, calibration_samples, graph_file, quantize
from alignment.runners.base import Runner
from alignment.variant import Variant

#: The calibrator of each route that has one; ``implicit`` gives it our ranges as a cache in place of images.
CALIBRATORS: dict[str, CalibratorKind] = {
    "implicit": "entropy2",
    "implicit_entropy2": "entropy2",
    "implicit_minmax": "minmax",
    "implicit_legacy": "legacy",
}
#: Of the engine that a latency is measured on, TensorRT's own default; and how often it is run.
LATENCY_LEVEL, REPEATS, WARMUP = 3, 200, 50


class TensorRTBuild(NamedTuple):
    """What `TensorRTRunner` takes: a graph, how to build it, and what its calibrator reads."""

    path: Path
    options: BuildOptions
    images: CalibrationImages | None


def open_int8(variant: Variant, case: Case, batch: int = 1, data: Path | None = None) -> Runner:
    """Quantizes `variant` by its own recipe, and loads it by the route of `case`.

    Args:
        variant: whose model.
        case: of precision int8.
        batch: the number of images at once that a backend is to be prepared for.
        data: root of the dataset whose training images are calibrated on; default: the variant's own.

    Raises:
        AlignError: for images that are missing, a model that cannot be quantized, a backend that is not here.
    """
    quantized = quantized_for(variant, case, data)
    if case.backend == "torch":
        return _open_torch(variant, quantized)
    if case.backend == "onnxruntime":
        from alignment.runners.onnxruntime import OnnxRuntimeRunner

        # Fused int8 kernels saturate on CPUs without VNNI; node by node the graph is what it says.
        return OnnxRuntimeRunner(graph_file(quantized.model, f"{variant.name}.qdq"), optimize=False)
    from alignment.runners.tensorrt import TensorRTRunner

    return TensorRTRunner(*tensorrt_build(variant, case, quantized, batch, data))


def quantized_for(variant: Variant, case: Case, data: Path | None = None) -> Quantized:
    """The variant quantized by its own recipe, with what the route of an int8 case needs."""
    return quantize(variant, data, every=case.route in ("dynamic_range", "implicit"))


def _open_torch(variant: Variant, quantized: Quantized) -> Runner:
    from alignment.quantize.torch_model import quantized_detector
    from alignment.runners.torch import TorchRunner

    return TorchRunner(variant, detector=quantized_detector(variant, quantized))


def tensorrt_build(
    variant: Variant, case: Case, quantized: Quantized, batch: int = 1, data: Path | None = None
) -> TensorRTBuild:
    """What TensorRT is given for an int8 case.

    Raises:
        AlignError: for a route that this TensorRT does not have.
    """
    from alignment.engine.capabilities import Capabilities

    ability = Capabilities.current()
    if case.route != "qdq" and not ability.has_int8_flag:
        raise AlignError(f"{case.id}: TensorRT {ability.version} knows int8 from QDQ nodes only", "take the route qdq")
    if case.route == "qdq":
        path = graph_file(quantized.model, f"{variant.name}.qdq")
        return TensorRTBuild(path, explicit(path, variant.float32_nodes, batch), None)
    reads = case.route in CALIBRATORS and case.route != "implicit"
    path = quantized.source
    decoding = float32_nodes(path, variant.float32_nodes)
    options = BuildOptions(
        precision="int8",
        float32_nodes=decoding,
        # Without Q/DQ nodes nothing in the graph says what stays float: these layers are bound to it.  Not while one of
        # TensorRT's calibrators reads images: it does so in float32, and then finds no implementation of float16.
        float16_nodes=() if reads else tuple(n for n in quantized.placement.float_nodes if n not in decoding),
        ranges=quantized.ranges if case.route == "dynamic_range" else (),
        calibrator=CALIBRATORS.get(case.route or "", ""),
        cache=quantized.cache(ability.version) if case.route == "implicit" else "",
        opt_batch=batch,
        max_batch=batch,
    )
    return TensorRTBuild(path, options, calibration_images(variant, data) if reads else None)


def explicit(path: Path, patterns: Sequence[str] = (), batch: int = 1) -> BuildOptions:
    """How a graph is built whose int8 comes from QDQ nodes, decoding in float32.

    Args:
        path: its file.
        patterns: the variant's `float32_nodes`.
        batch: the number of images at once.
    """
    from alignment.engine.capabilities import Capabilities

    flags = Capabilities.current().has_int8_flag
    return BuildOptions(
        precision="int8",
        strongly_typed=not flags,
        float32_nodes=float32_nodes(path, patterns) if flags else (),
        opt_batch=batch,
        max_batch=batch,
    )


def qdq_latency(variant: Variant, quantized: Quantized, image: np.ndarray, level: int = LATENCY_LEVEL) -> float:
    """Milliseconds on the GPU for one image in an engine of the QDQ graph: the median of `REPEATS` runs.

    Args:
        variant: that was quantized.
        quantized: of it.
        image: ``[3, H, W] float32``.
        level: of the builder.

    Raises:
        AlignError: TensorRT cannot run here.
        BuildError: it builds no engine of the graph.
    """
    from alignment.runners.tensorrt import TensorRTRunner

    path, options, _ = tensorrt_build(variant, Case(variant.name, "tensorrt", "int8", "qdq"), quantized)
    with TensorRTRunner(path, dataclasses.replace(options, optimization_level=level)) as runner:
        return float(np.median(runner.latency(image[None], REPEATS, WARMUP)))


def calibration_images(variant: Variant, data: Path | None) -> CalibrationImages:
    """The images of a variant's recipe, as one of TensorRT's calibrators reads them."""
    samples = calibration_samples(variant, data)

    def batches() -> Iterator[np.ndarray]:
        return (sample.tensor[None] for sample in samples)

    parts = [samples.dataset.content_fingerprint, len(samples), variant.fingerprint()]
    return CalibrationImages(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16], batches)
