"""Cases: what is compared, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from alignment.errors import AlignError
from alignment.results import CaseId
from alignment.variant import Variant

Backend = Literal["torch", "onnxruntime", "tensorrt"]
Precision = Literal["fp32", "tf32", "fp16"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Case:
    """Variant × backend × precision × quantization route."""

    variant: str
    backend: Backend
    precision: Precision
    route: str | None = None

    @property
    def id(self) -> str:
        """``yolov8_n-onnxruntime-fp32``."""
        return "-".join(part for part in (self.variant, self.backend, self.precision, self.route) if part)

    def result_id(self) -> CaseId:
        """The same as the typed results hold it."""
        return CaseId(
            id=self.id, variant=self.variant, backend=self.backend, precision=self.precision, route=self.route
        )


def cases_of(variant: Variant, backends: tuple[str, ...], precisions: tuple[str, ...]) -> list[Case]:
    """The cases of one variant; TF32 exists on TensorRT only, torch where the variant has a torch model, in FP32 only.

    Raises:
        AlignError: for a backend or precision that does not exist.
    """
    for kind, given, known in (("backend", backends, BACKENDS), ("precision", precisions, PRECISIONS)):
        for name in given:
            if name not in known:
                raise AlignError(f"--{kind} {name}: no such {kind}", f"choose from {', '.join(known)}")
    return [
        Case(variant.name, backend, precision)
        for backend in BACKENDS
        for precision in PRECISIONS
        if backend in backends
        and precision in precisions
        and (backend != "torch" or (variant.has_torch and precision == "fp32"))
        and (precision != "tf32" or backend == "tensorrt")
    ]


def reference_of(variant: Variant) -> Case:
    """What the other cases of a variant are held to: torch, or ONNX Runtime for a bare ONNX file."""
    return Case(variant.name, "torch" if variant.has_torch else "onnxruntime", "fp32")
