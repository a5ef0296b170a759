"""Opens the runner of a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from alignment.case import Case
from alignment.engine.build import BuildOptions
from alignment.export.float16 import float16_model, float32_nodes
from alignment.export.onnx_export import exported
from alignment.export.plugin_nms import plugin_in
from alignment.runners.base import Runner
from alignment.variant import OnnxSource, Variant


def open_runner(variant: Variant, case: Case, batch: int = 1, data: Path | None = None) -> Runner:
    """Loads the model of `variant` into the backend of `case`; exports and quantizes it first where that is needed.

    Args:
        variant: whose model.
        case: names backend, precision and route.
        batch: the number of images at once that a backend is to be prepared for.
        data: root of the dataset whose training images int8 is calibrated on; default: the variant's own.

    Raises:
        AlignError: when the model cannot be loaded, or the backend is not on this machine.
    """
    if case.precision == "int8":
        from alignment.runners.int8 import open_int8

        return open_int8(variant, case, batch, data)
    if case.backend == "torch":
        from alignment.runners.torch import TorchRunner

        return TorchRunner(variant)
    path, keep = _float_model(variant, case)
    return open_model(path, case, batch, keep)


def tensorrt_float(variant: Variant, case: Case, batch: int = 1) -> tuple[Path, BuildOptions]:
    """What TensorRT is given for a case of another precision than int8."""
    path, keep = _float_model(variant, case)
    return _tensorrt_options(path, case, batch, keep)


def _float_model(variant: Variant, case: Case) -> tuple[Path, Sequence[str]]:
    """The float32 graph, and the nodes that stay float32 in FP16."""
    path = exported(variant).onnx
    return path, float32_nodes(path, variant.float32_nodes) if case.precision == "fp16" else ()


def open_model(path: Path, case: Case, batch: int = 1, keep: Sequence[str] = ()) -> Runner:
    """Loads a float32 ONNX file into the backend of `case`, which may run it in another precision.

    FP16 is a float16 graph on ONNX Runtime, and on a TensorRT that takes its types from the graph; an older one makes
    FP16 of the float32 graph by itself.  Either way the nodes named in `keep` stay float32.
    """
    if case.backend == "onnxruntime":
        from alignment.runners.onnxruntime import OnnxRuntimeRunner

        def graph(path: Path) -> Runner:
            return OnnxRuntimeRunner(float16_model(path, False, keep) if case.precision == "fp16" else path)

        return _with_plugin(path, graph)
    from alignment.runners.tensorrt import TensorRTRunner

    return TensorRTRunner(*_tensorrt_options(path, case, batch, keep))


def _with_plugin(path: Path, graph: Callable[[Path], Runner]) -> Runner:
    """`graph` on a file, which may end in a plugin that only TensorRT has."""
    if plugin_in(path) is None:
        return graph(path)
    from alignment.runners.plugin_nms import PluginNmsRunner

    return PluginNmsRunner(path, graph)


def _tensorrt_options(path: Path, case: Case, batch: int, keep: Sequence[str]) -> tuple[Path, BuildOptions]:
    from alignment.engine.capabilities import Capabilities

    typed = case.precision == "fp16" and not Capabilities.current().has_fp16_flag
    options = BuildOptions(
        precision=case.precision,
        strongly_typed=typed,
        float32_nodes=() if typed else tuple(keep),
        opt_batch=batch,
        max_batch=batch,
    )
    return float16_model(path, keep=keep) if typed else path, options


def open_referee(variant: Variant, reference: Runner) -> Runner | None:
    """float64: the torch model itself, or the nodes of a bare ONNX file one by one."""
    if isinstance(variant.source, OnnxSource):
        from alignment.runners.evaluator import OnnxEvaluator

        return _with_plugin(variant.source.file, OnnxEvaluator)
    from alignment.runners.torch import TorchRunner

    assert isinstance(reference, TorchRunner)
    return TorchRunner(variant, "float64", reference.detector)
