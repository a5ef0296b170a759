"""What quantization-aware training leaves behind: weights, biases and scales, for the graph that it began with."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.quantize.placement import Placement
from alignment.storage import writing
from alignment.variant import Variant

_MEND = "train it again with `align qat`"
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
        try:
            with np.load(path) as stored:
                identity = json.loads(str(stored["identity"]))
                for key in stored.files:
                    part, _, name = key.partition("/")
                    if name:
                        parts[part][name] = stored[key]
        except OSError as error:
            raise AlignError(f"{path}: {error.strerror or error}", f"give the path of a .qat.npz, or {_MEND}") from None
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise AlignError(f"{path}: not a file of align qat: {error}", _MEND) from None
        if identity != identity_of(variant):
            raise AlignError(f"{path}: trained for another network than {variant.name}", _MEND)
        parts["scales"] = {name: np.float32(scale) for name, scale in parts["scales"].items()}
        return cls(**parts, identity=identity)

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
