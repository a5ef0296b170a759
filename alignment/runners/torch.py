"""torch on the CPU, in float32 as the users run it or in float64 as the referee."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from alignment.export.onnx_export import file_digest
from alignment.runners.base import Runner, cpu_threads
from alignment.variant import Variant

if TYPE_CHECKING:
    from alignment.models.detector import Detector
    from alignment.quantize.torch_model import QuantizedDetector


class TorchRunner(Runner):
    """The variant's mmyolo model, nothing fused.

    Args:
        variant: with an mmyolo source.
        dtype: float64 makes it the referee.
        detector: a model that was built before; it is copied when it must change its dtype.

    Raises:
        AlignError: when the model cannot be built or its checkpoint does not fit.
    """

    def __init__(
        self,
        variant: Variant,
        dtype: Literal["float32", "float64"] = "float32",
        detector: Detector | QuantizedDetector | None = None,
    ) -> None:
        import torch

        if detector is None:
            from alignment.models.mmyolo_source import build_detector

            detector = build_detector(variant)
        self.detector: Any = detector if dtype == "float32" else copy.deepcopy(detector).double()
        if threads := cpu_threads():
            torch.set_num_threads(threads)
        self._dtype = getattr(torch, dtype)
        self.warnings = []
        self.provenance = {
            "backend": "torch",
            "torch": torch.__version__,
            "dtype": dtype,
            "device": "cpu",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "weights_sha256": file_digest(variant.weights),
        }

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """See `Runner.run`; values are of the runner's dtype."""
        import torch

        with torch.inference_mode():
            values = self.detector(torch.from_numpy(batch).to(self._dtype))
        return {name: value.numpy() for name, value in zip(self.detector.output_names, values, strict=True)}
