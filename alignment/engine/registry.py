"""The plugins that an ONNX file needs, in TensorRT's registry: before it is parsed, and before its engine is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.export.onnx_export import file_digest
from alignment.export.plugin_nms import plugin_in
from alignment.nms.plugins import ROTATED


def register_plugins(logger: Any, onnx_path: Path) -> None:
    """Makes TensorRT's own plugins known, and this project's where the file has one, which is built the first time.

    Args:
        logger: a ``trt.ILogger``.
        onnx_path: the file.

    Raises:
        AlignError: where it cannot be built, without CUDA's compiler or TensorRT's headers.
    """
    import tensorrt as trt

    trt.init_libnvinfer_plugins(logger, "")
    if plugin_in(onnx_path) == ROTATED:
        from alignment.engine.plugins import load_plugin

        load_plugin()


def plugin_identity(onnx_path: Path) -> dict[str, str]:
    """``plugin_sha256``, of the library of this project's plugin, for a file that has it; raises as that builds it."""
    if plugin_in(onnx_path) != ROTATED:
        return {}
    from alignment.engine.plugins import build_plugin

    return {"plugin_sha256": file_digest(Path(build_plugin()))}
