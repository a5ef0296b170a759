"""Cases: what is compared, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from alignment.errors import AlignError
from alignment.results import CaseId
from alignment.variant import Variant

Backend = Literal["torch", "onnxruntime", "tensorrt"]
Precision = Literal["fp32", "tf32", "fp16", "int8"]
#: How int8 reaches a backend: as QDQ nodes (in torch: fake quantization), or, in TensorRT alone, as the range of every
#: tensor, as a calibration cache with these ranges, or by a calibrator of TensorRT's own.
Route = Literal["qdq", "dynamic_range", "implicit", "implicit_entropy2", "implicit_minmax", "implicit_legacy"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ROUTES: tuple[Route, ...] = get_args(Route)


@dataclass(frozen=True)
class Case:
    """Variant × backend × precision × quantization route."""

    variant: str
    backend: Backend
    precision: Precision
    route: Route | None = None

    @property
    def id(self) -> str:
        """``yolov8_n-onnxruntime-fp32``."""
        return "-".join(part for part in (self.variant, self.backend, self.precision, self.route) if part)

    def result_id(self) -> CaseId:
        """The same as the typed results hold it."""
        return CaseId(
            id=self.id, variant=self.variant, backend=self.backend, precision=self.precision, route=self.route
        )


def require_known(kind: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises AlignError for names of a backend, precision or route (`kind`) that do not exist, and for none."""
    if not given:
        raise AlignError(f"--{kind}: names no {kind}", f"choose from {', '.join(known)}")
    for name in given:
        if name not in known:
            raise AlignError(f"--{kind} {name}: no such {kind}", f"choose from {', '.join(known)}")


def cases_of(
    variant: Variant, backends: tuple[str, ...], precisions: tuple[str, ...], routes: tuple[str, ...] = ROUTES
) -> list[Case]:
    """The cases of one variant.

    TF32 exists on TensorRT only; torch where the variant has a torch model, in FP32 and INT8; routes in INT8, all but
    ``qdq`` on TensorRT.

    Raises:
        AlignError: for a backend, precision or route that does not exist, and where none is named.
    """
    asked: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
        ("backend", backends, BACKENDS),
        ("precision", precisions, PRECISIONS),
        ("route", routes, ROUTES),
    )
    for kind, given, known in asked:
        require_known(kind, given, known)
    return [
        Case(variant.name, backend, precision, route)
        for backend in BACKENDS
        for precision in PRECISIONS
        if backend in backends
        and precision in precisions
        and (backend != "torch" or (variant.has_torch and precision in ("fp32", "int8")))
        and (precision != "tf32" or backend == "tensorrt")
        for route in (_routes(backend, routes) if precision == "int8" else (None,))
    ]


def _routes(backend: Backend, routes: tuple[str, ...]) -> tuple[Route, ...]:
    return tuple(route for route in ROUTES if route in routes and (route == "qdq" or backend == "tensorrt"))


def twin_of(case: Case) -> Case | None:
    """For QDQ on torch and TensorRT: the same on ONNX Runtime, which computes node by node what the graph says."""
    if case.route != "qdq" or case.backend == "onnxruntime":
        return None
    return Case(case.variant, "onnxruntime", "int8", "qdq")


def reference_of(variant: Variant) -> Case:
    """What the other cases of a variant are held to: torch, or ONNX Runtime for a bare ONNX file."""
    return Case(variant.name, "torch" if variant.has_torch else "onnxruntime", "fp32")
