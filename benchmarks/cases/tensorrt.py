"""On a GPU: engines of every route and policy, detections end to end, the plugin for rotated boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases.detection import contestants
from benchmarks.cases.images import scoring_samples
from benchmarks.harness import Case, Contestant, Kind, Setting, Work

#: The one builder optimization level of all engines, and timed runs a turn.  Level 0 times no kernels while it builds,
#: so that a row is ready in one to six minutes; at level 2 none is in six.
LEVEL, RUNS = 0, 200
#: Rows of `benchmarks.int8`.
ROWS: dict[str, Kind] = {
    "qdq": "ours",
    "qdq:policy=full": "ours",
    "qdq:policy=conv-only": "ours",
    "dynamic_range": "ours",
    "implicit": "ours",
    "implicit_entropy2:plain": "peer",
    "implicit_minmax:plain": "peer",
    "implicit_legacy:plain": "peer",
    "fp16": "peer",
    "fp32": "peer",
}


def missing() -> str | None:
    """Why TensorRT cannot run here."""
    from alignment.engine.capabilities import missing

    reason = missing()
    return None if reason is None else f"needs TensorRT: {reason}"


def engine(row: str) -> Callable[[Setting], Work]:
    """`RUNS` runs of one engine on one batch, by the GPU's clock, without copies: what ``trtexec`` times."""

    def prepare(setting: Setting) -> Work:
        from alignment.runners.tensorrt import TensorRTRunner
        from alignment.variant import load_variant
        from benchmarks.int8 import build_of

        variant = load_variant(setting.variant)
        batch = np.stack([sample.tensor for sample in scoring_samples(setting)])
        runner = TensorRTRunner(*build_of(variant, row, LEVEL, setting.size))
        return lambda: runner.latency(batch, RUNS, 50)

    return prepare


def plugin(nms: bool) -> Callable[[Setting], Work]:
    """The same of an FP16 engine of rotated boxes, which ends in the plugin, or before it."""

    def prepare(setting: Setting) -> Work:
        import onnx

        from alignment.case import Case as Alignable
        from alignment.export.nms_head import NmsHead, with_nms
        from alignment.export.onnx_export import ExportOptions, exported
        from alignment.runners.open import open_model
        from alignment.variant import load_variant

        variant = load_variant(setting.variant)
        model = onnx.load(exported(variant, ExportOptions(outputs="decoded")).onnx)
        path = setting.folder / f"plugin-{nms}.onnx"
        onnx.save(with_nms(model, NmsHead("efficient_nms_rotated", variant.nms)) if nms else model, path)
        runner = open_model(path, Alignable(variant.name, "tensorrt", "fp16"), setting.size)
        batch = np.stack([sample.tensor for sample in scoring_samples(setting)])
        return lambda: runner.latency(batch, RUNS, 50)

    return prepare


def judge(setting: Setting, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median milliseconds of one batch."""
    return {name: {"ms by the GPU's clock": float(np.median(times))} for name, times in results.items()}


ENGINES = Case(
    name="engines",
    title=f"{RUNS} runs of one batch on a GPU, engines of `builder_optimization_level` {LEVEL}",
    axis="images a batch",
    sizes=(1, 16),
    variant="yolov8_n",
    contestants=tuple(Contestant(row, kind, engine(row), ("tensorrt",)) for row, kind in ROWS.items()),
    judge=judge,
    missing=missing,
)
DETECTION = Case(
    name="detection-tensorrt",
    title="Images from files to detections in FP32 on TensorRT, beside inference alone",
    axis="images",
    sizes=(16, 32, 64),
    variant="yolov8_n",
    contestants=contestants("tensorrt"),
    missing=missing,
)
PLUGIN = Case(
    name="plugin",
    title=f"{RUNS} runs of one batch on a GPU: an FP16 engine that ends in the plugin for rotated NMS, and one without",
    axis="images a batch",
    sizes=(1, 16),
    variant="rtmdet_r_embedded",
    contestants=(
        Contestant("with the plugin", "ours", plugin(nms=True), ("tensorrt",)),
        Contestant("without NMS", "floor", plugin(nms=False), ("tensorrt",)),
    ),
    judge=judge,
    missing=missing,
)
