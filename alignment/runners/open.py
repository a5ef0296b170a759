"""Opens the runner of a case."""

from __future__ import annotations

from pathlib import Path

from alignment.case import Case
from alignment.export.onnx_export import exported
from alignment.runners.base import Runner
from alignment.variant import OnnxSource, Variant


def open_runner(variant: Variant, case: Case) -> Runner:
    """Loads the model of `variant` into the backend of `case`; exports it first where that is needed.

    Raises:
        AlignError: when the model cannot be loaded, or the backend is not on this machine.
    """
    if case.backend == "torch":
        from alignment.runners.torch import TorchRunner

        return TorchRunner(variant)
    return open_model(exported(variant).onnx, case)


def open_model(path: Path, case: Case) -> Runner:
    """Loads an ONNX file into the backend of `case`."""
    if case.backend == "onnxruntime":
        from alignment.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(path)
    from alignment.engine.build import BuildOptions
    from alignment.runners.tensorrt import TensorRTRunner

    return TensorRTRunner(path, BuildOptions(precision=case.precision))


def open_referee(variant: Variant, reference: Runner) -> Runner | None:
    """float64: the torch model itself, or the nodes of a bare ONNX file one by one."""
    if isinstance(variant.source, OnnxSource):
        from alignment.runners.evaluator import OnnxEvaluator

        return OnnxEvaluator(variant.source.file, "float64")
    from alignment.runners.torch import TorchRunner

    assert isinstance(reference, TorchRunner)
    return TorchRunner(variant, "float64", reference.detector)
