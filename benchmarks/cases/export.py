"""From an mmyolo config and checkpoint to an ONNX file, of a network that becomes deeper."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Case, Contestant, Setting, Work

if TYPE_CHECKING:
    from alignment.variant import Variant

_number = itertools.count()


def deeper(setting: Setting) -> Variant:
    """The variant with `size` blocks a stage, `size` × 2 in the long ones, and weights as they are initialized."""
    import torch
    from mmengine.logging import MMLogger

    from alignment.models.mmyolo_source import load_config
    from alignment.variant import load_variant

    variant = load_variant(setting.variant)
    source: Any = variant.source
    parts = ("backbone", "neck")
    options = {**source.options, **{f"model.{part}.deepen_factor": setting.size / 3 for part in parts}}
    checkpoint = setting.folder / "deeper.pth"
    deep = variant.model_copy(
        update={"source": source.model_copy(update={"options": options, "checkpoint": checkpoint})}
    )
    if not checkpoint.is_file():
        config = load_config(deep)
        from mmyolo.registry import MODELS

        MMLogger.get_current_instance().setLevel(logging.ERROR)
        torch.manual_seed(0)
        torch.save({"state_dict": MODELS.build(config.model).state_dict()}, checkpoint)
    return deep


def ours(setting: Setting) -> Work:
    """Build, fuse, trace, simplify, infer shapes, map nodes to modules, check, write with its papers."""
    from alignment.export.onnx_export import ExportOptions, export

    variant = deeper(setting)
    return lambda: export(variant, setting.folder / str(next(_number)), ExportOptions()).onnx


def torch_export(slim: bool = False, dynamo: bool = False) -> Callable[[Setting], Work]:
    """``torch.onnx.export`` of the same module, which is built and fused anew; with `slim`, onnxslim after it."""

    def prepare(setting: Setting) -> Work:
        import torch

        from alignment.models.detector import fused
        from alignment.models.mmyolo_source import build_detector

        variant = deeper(setting)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)

        def work() -> Path:
            path = setting.folder / f"{next(_number)}.onnx"
            detector = fused(build_detector(variant)).eval()
            image = torch.zeros(1, 3, variant.input.height, variant.input.width)
            names: dict[str, Any] = {"input_names": ["images"], "output_names": list(detector.output_names)}
            if not dynamo:
                names["dynamic_axes"] = {name: {0: "batch"} for name in ("images", *detector.output_names)}
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    detector, (image,), str(path), opset_version=18 if dynamo else 17, dynamo=dynamo, **names
                )
            if slim:
                import onnx
                import onnxslim

                onnx.save(onnxslim.slim(onnx.load(path)), path)
            return path

        return work

    return prepare


def judge(setting: Setting, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many nodes the graphs have."""
    import onnx

    return {name: {"nodes": float(len(onnx.load(path).graph.node))} for name, path in results.items()}


_TORCH = ("torch",)
CASE = Case(
    name="export",
    title="An ONNX file of a YOLOv8 of embedded width, whose stages have 1, 2 and 4 blocks; building the torch model "
    "is part of it",
    axis="blocks a stage",
    sizes=(1, 2, 4),
    variant="yolov8_embedded",
    repeat=3,
    contestants=(
        Contestant("ours", "ours", ours),
        Contestant("torch.onnx.export and onnxslim", "peer", torch_export(slim=True), ("torch", "onnxslim")),
        Contestant("torch.onnx.export, dynamo", "peer", torch_export(dynamo=True), ("torch", "onnxscript")),
        Contestant("torch.onnx.export", "floor", torch_export(), _TORCH),
    ),
    judge=judge,
)
