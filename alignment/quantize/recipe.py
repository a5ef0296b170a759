"""From a variant to its int8 artefacts: one calibration, one placement, one set of scales, for every route."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from alignment.data.samples import Samples, open_samples
from alignment.engine.int8 import write_cache
from alignment.export.onnx_export import exported
from alignment.quantize.calibrate import Calibration, calibrate, identity_of
from alignment.quantize.observers import scale_of, weight_amax
from alignment.quantize.placement import Placement, place
from alignment.quantize.qdq import group_amax, write_qdq
from alignment.storage import cache_dir, locked, writing
from alignment.variant import Quantization, Variant

#: The split that detectors were trained on: scores are taken on the other one.
SPLIT = "train2017"
#: TensorRT whose name a calibration cache carries unless another is asked for.
CACHE_VERSION = "8.6.1"


@dataclass(frozen=True)
class Quantized:
    """A quantized variant.

    Attributes:
        source: the float32 ONNX file.
        model: the same with QDQ nodes.
        placement: where these are.
        amax: largest magnitude of every activation tensor, members of one group alike.
        scales: of the quantized activations, float32.
        weight_scales: ``[C] float32`` of the quantized initializers.
        calibration: what it stands on.
    """

    source: Path
    model: onnx.ModelProto
    placement: Placement
    amax: dict[str, float]
    scales: dict[str, np.float32]
    weight_scales: dict[str, np.ndarray]
    calibration: Calibration

    @property
    def ranges(self) -> tuple[tuple[str, float], ...]:
        """For the routes without QDQ: the range of every tensor, by name."""
        return tuple((name, value) for name, value in self.amax.items() if value > 0)

    def cache(self, version: str = CACHE_VERSION) -> str:
        """The same as text of a calibration cache, for TensorRT of that version."""
        return write_cache(dict(self.ranges), version)

    def save(self, folder: Path, name: str) -> list[Path]:
        """Writes ``<name>.qdq.onnx``, ``<name>.ranges.json``, ``<name>.calibration`` (a TensorRT calibration cache)
        and ``<name>.scales.json`` (every scale with its statistics); returns their paths."""
        texts = {
            f"{name}.ranges.json": json.dumps(dict(self.ranges), indent=1),
            f"{name}.calibration": self.cache(),
            f"{name}.scales.json": json.dumps(self.report(), indent=1),
        }
        paths = [folder / f"{name}.qdq.onnx"]
        with writing(paths[0]) as temporary:
            onnx.save(self.model, temporary)
        for file_name, text in texts.items():
            paths.append(folder / file_name)
            with writing(paths[-1]) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        return paths

    def report(self) -> dict[str, Any]:
        """Every scale with what it was made from."""
        places = {quantizer.tensor: quantizer for quantizer in self.placement.activations}
        activations = {}
        for name, statistics in self.calibration.tensors.items():
            entry: dict[str, Any] = {"amax": self.amax[name], "minimum": statistics.minimum}
            entry |= {"maximum": statistics.maximum, "elements": statistics.elements}
            if name in places:
                entry |= {"scale": float(self.scales[name]), "group": places[name].group, "rule": places[name].rule}
            activations[name] = entry
        weights = {name: [float(s) for s in scales] for name, scales in self.weight_scales.items()}
        return {
            "policy": self.placement.policy,
            "identity": self.calibration.identity,
            "float_nodes": self.placement.float_nodes,
            "activations": activations,
            "weights": weights,
        }


def calibration_path(variant: Variant, identity: Mapping[str, Any]) -> Path:
    """Where the calibration of a variant on some images is kept."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "calibration" / f"{variant.name}-{digest}.npz"


def calibration_samples(variant: Variant, data: Path | None = None) -> Samples:
    """The images that a variant is calibrated on."""
    return open_samples(variant, data, variant.quantization.images, SPLIT)


def quantize(
    variant: Variant,
    data: Path | None = None,
    batch: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Quantized:
    """Calibrates where that was not done yet, places quantizers, and writes their scales into the graph.

    Args:
        variant: to quantize, by its `quantization`.
        data: COCO-layout root, for variants on COCO.
        batch: images that go through ONNX Runtime at once.
        progress: called with the number of images done.

    Raises:
        AlignError: for images or weights that are missing, unknown methods or nodes, scales that int8 cannot have.
    """
    source = exported(variant).onnx
    samples = calibration_samples(variant, data)
    path = calibration_path(variant, identity_of(source, samples))
    return apply(source, variant.quantization, calibrate(source, samples, path, batch, progress))


def apply(source: Path, recipe: Quantization, calibration: Calibration) -> Quantized:
    """The quantized graph that follows from a calibration."""
    model = onnx.load(source)
    placement = place(model, recipe.policy, recipe.keep_float)
    amax = calibration.amax(recipe.method)
    amax |= group_amax(placement, amax)
    scales = {q.tensor: scale_of(amax[q.tensor]) for q in placement.activations}
    weights = {weight.name: weight for weight in model.graph.initializer}
    weight_scales = {
        q.initializer: scale_of(weight_amax(numpy_helper.to_array(weights[q.initializer]), q.axis, recipe.weights))
        for q in placement.weights
    }
    quantized = write_qdq(model, placement, scales, weight_scales)
    return Quantized(source, quantized, placement, amax, scales, weight_scales, calibration)


def quantized_file(model: onnx.ModelProto, name: str) -> Path:
    """A quantized graph as a file: in the cache, named by its content."""
    content = model.SerializeToString(deterministic=True)
    path = cache_dir() / "quantized" / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.qdq.onnx"
    with locked(path):
        if not path.is_file():
            with writing(path) as temporary:
                temporary.write_bytes(content)
    return path
