"""Opens the runner of a case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignment.case import Case
from alignment.export.float16 import float16_model, float32_nodes
from alignment.export.onnx_export import exported
from alignment.runners.base import Runner
from alignment.variant import OnnxSource, Variant


def open_runner(variant: Variant, case: Case, batch: int = 1) -> Runner:
    """Loads the model of `variant` into the backend of `case`; exports it first where that is needed.

    Args:
        variant: whose model.
        case: names backend and precision.
        batch: the number of images at once that a backend is to be prepared for.

    Raises:
        AlignError: when the model cannot be loaded, or the backend is not on this machine.
    """
    if case.backend == "torch":
        from alignment.runners.torch import TorchRunner

        return TorchRunner(variant)
    path = exported(variant).onnx
    keep = float32_nodes(path, variant.float32_nodes) if case.precision == "fp16" else ()
    return open_model(path, case, batch, keep)


def open_model(path: Path, case: Case, batch: int = 1, keep: Sequence[str] = ()) -> Runner:
    """Loads a float32 ONNX file into the backend of `case`, which may run it in another precision.

    FP16 is a float16 graph on ONNX Runtime, and on a TensorRT that takes its types from the graph; an older one makes
    FP16 of the float32 graph by itself.  Either way the nodes named in `keep` stay float32.
    """
    if case.backend == "onnxruntime":
        from alignment.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(float16_model(path, False, keep) if case.precision == "fp16" else path)
    from alignment.engine.build import BuildOptions
    from alignment.engine.capabilities import Capabilities
    from alignment.runners.tensorrt import TensorRTRunner

    typed = case.precision == "fp16" and not Capabilities.current().has_fp16_flag
    options = BuildOptions(
        precision=case.precision,
        strongly_typed=typed,
        float32_nodes=() if typed else tuple(keep),
        opt_batch=batch,
        max_batch=batch,
    )
    return TensorRTRunner(float16_model(path, keep=keep) if typed else path, options)


def open_referee(variant: Variant, reference: Runner) -> Runner | None:
    """float64: the torch model itself, or the nodes of a bare ONNX file one by one."""
    if isinstance(variant.source, OnnxSource):
        from alignment.runners.evaluator import OnnxEvaluator

        return OnnxEvaluator(variant.source.file, "float64")
    from alignment.runners.torch import TorchRunner

    assert isinstance(reference, TorchRunner)
    return TorchRunner(variant, "float64", reference.detector)
