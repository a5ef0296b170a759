"""What quantization-aware training leaves behind: weights, biases and scales, for the graph that it began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.quantize.placement import Placement
from alignment.reading import cut, read_arrays
from alignment.storage import writing
from alignment.variant import Variant

_MEND = "train it again with `align qat`"
_LIMITS = np.finfo(np.float32)
_PARTS = ("weights", "biases", "scales", "weight_scales")


@dataclass(frozen=True)
class Trained:
    """The file ``<variant>.qat.npz``.

    Attributes:
        weights: float32, by initializer; quantized ones are whole numbers of steps.
        biases: float32, by node.
        scales: float32, of the quantized activations, by tensor.
        weight_scales: ``[C] float32``, by initializer.
        identity: of the float network that was trained, see `identity_of`.
    """

    weights: Mapping[str, np.ndarray]
    biases: Mapping[str, np.ndarray]
    scales: Mapping[str, np.float32]
    weight_scales: Mapping[str, np.ndarray]
    identity: Mapping[str, str]

    def save(self, path: Path) -> None:
        """Writes the file."""
        arrays = {f"{part}/{name}": value for part in _PARTS for name, value in getattr(self, part).items()}
        with writing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, identity=np.array(json.dumps(dict(self.identity))), **arrays)

    @classmethod
    def load(cls, path: Path, variant: Variant) -> Trained:
        """Reads the file.

        Raises:
            AlignError: for a file that is not there or not of this form, or was made for another network.
        """
        parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        stored = read_arrays(path, f"give the path of a .qat.npz, or {_MEND}", _MEND, "not a file of align qat")
        try:
            identity = json.loads(str(stored.pop("identity")))
            for key, array in stored.items():
                part, _, name = key.partition("/")
                if array.dtype != np.float32 or not np.isfinite(array).all():
                    raise ValueError(f"{key} is not of finite float32")
                if "scales" in part and not ((array >= _LIMITS.tiny) & (array <= _LIMITS.max / 256)).all():
                    raise ValueError(f"{key} holds a scale that int8 cannot have")
                parts[part][name] = np.float32(array.item()) if part == "scales" else array
        except (KeyError, ValueError) as error:
            raise AlignError(f"{path}: not a file of align qat: {cut(error)}", _MEND) from None
        if identity != identity_of(variant):
            raise AlignError(f"{path}: trained for another network than {variant.name}", _MEND)
        return cls(**parts, identity=identity)

    def require_fitting(self, model: onnx.ModelProto, path: Path) -> None:
        """Raises AlignError where a graph has not what these weights and biases are for, or has it in another shape."""
        shapes = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
        channels = {node.name: shapes.get(node.input[1]) for node in model.graph.node if len(node.input) > 1}
        for name, weight in self.weights.items():
            if shapes.get(name) != weight.shape:
                has = shapes.get(name, "none of that name")
                raise AlignError(f"{path}: weights {cut(name, 60)} are {weight.shape}, the graph has {has}", _MEND)
        for name, scales in self.weight_scales.items():
            if scales.ndim != 1 or len(scales) not in shapes.get(name, ()):
                raise AlignError(f"{path}: scales of {cut(name, 60)} are {scales.shape}, of {shapes.get(name)}", _MEND)
        for name, bias in self.biases.items():
            of = channels.get(name) or ()
            if bias.ndim != 1 or len(bias) not in of:
                raise AlignError(f"{path}: biases {cut(name, 60)} are {bias.shape}, of weights {of}", _MEND)

    def require_placed(self, placement: Placement, path: Path) -> None:
        """Raises AlignError when these scales are not those of a placement."""
        tensors = {quantizer.tensor for quantizer in placement.activations}
        initializers = {quantizer.initializer for quantizer in placement.weights}
        strays = sorted((tensors ^ set(self.scales)) | (initializers ^ set(self.weight_scales)))
        if strays:
            raise AlignError(
                f"{path}: trained with other nodes in float, see {strays[0]}",
                f"give the keep_float and policy that it was trained with, or {_MEND}",
            )


def identity_of(variant: Variant) -> dict[str, str]:
    """Which float network it is: all but its name, and the weights."""
    return {"variant_fingerprint": variant.fingerprint(), "weights_sha256": file_digest(variant.weights)}
