"""Builds the engine of a case on this machine's GPU, and records what it is made of and where its time goes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx

from alignment.case import Case
from alignment.data.samples import open_samples
from alignment.inspection.node_graph import NodeGraph
from alignment.inspection.saved import Inspection
from alignment.runners.int8 import TensorRTBuild, quantized_for, tensorrt_build
from alignment.runners.open import tensorrt_float
from alignment.variant import Variant

REPEATS = 200
WARMUP = 50


def inspect(
    variant: Variant, case: Case, level: int, batch: int = 1, measured: bool = True, data: Path | None = None
) -> Inspection:
    """The engine of a case, from the cache or built now, with the time of each layer.

    Args:
        variant: whose model.
        case: on TensorRT.
        level: the builder's optimization level.
        batch: images at once.
        measured: whether layers are timed.
        data: root of the dataset; default: the variant's own.

    Raises:
        AlignError: TensorRT cannot run here, or cannot build it.
    """
    from alignment.runners.tensorrt import TensorRTRunner

    wanted: tuple[str, ...] = ()
    kept: dict[str, str] = {}
    if case.precision == "int8":
        quantized = quantized_for(variant, case, data)
        wanted, kept = quantized.placement.int8_nodes, quantized.placement.float_nodes
        given = tensorrt_build(variant, case, quantized, batch, data)
    else:
        given = TensorRTBuild(*tensorrt_float(variant, case, batch), None)
    given = given._replace(options=dataclasses.replace(given.options, optimization_level=level))
    images = np.stack([sample.tensor for sample in open_samples(variant, data, batch)])
    with TensorRTRunner(*given) as runner:
        text = runner.inspector_text()
        times = runner.layer_times(images, REPEATS, WARMUP) if measured else {}
        whole = float(np.median(runner.latency(images, REPEATS, WARMUP)))
        provenance = {**runner.provenance, "level": level, "batch": batch, "latency_ms": whole}
    graph = NodeGraph.of(onnx.load(given.path, load_external_data=False))
    name = f"{case.id}-level{level}" + (f"-batch{batch}" if batch > 1 else "")
    return Inspection(name, text, times, graph, wanted, kept, provenance)
