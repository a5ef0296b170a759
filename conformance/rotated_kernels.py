"""The kernels of efficient_nms_rotated run on arrays, on a GPU or on the CPU, and what they ought to give."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from alignment.engine.plugins import KERNEL_SOURCES, Kernels, Params, kernels, source_dir
from alignment.nms.semantics import Semantics, run
from alignment.storage import cache_dir, locked

Outputs = dict[str, np.ndarray]
NAMES = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
USUAL: dict[str, Any] = {"score_threshold": 0.05, "iou_threshold": 0.3, "max_output_boxes": 100}
COMPILER = shutil.which("g++") or shutil.which("c++")


def attributes(**changed: Any) -> dict[str, Any]:
    return {**USUAL, **changed}


def expected(asked: dict[str, Any], boxes: np.ndarray, scores: np.ndarray) -> Outputs:
    """What the NumPy semantics keep, laid out as the plugin does."""
    seen = scores.astype(np.float32)
    if asked.get("score_activation"):
        with np.errstate(over="ignore"):
            seen = (1 / (1 + np.exp(-seen.astype(np.float64)))).astype(np.float32)
    background = asked.get("background_class", -1)
    semantics = Semantics(
        score_threshold=asked["score_threshold"],
        iou_threshold=asked["iou_threshold"],
        threshold_float32=True,
        background=background if background >= 0 else None,
        topk=asked.get("pre_nms_topk") or None,
        classes="together" if asked.get("class_agnostic") else "apart",
        max_output=asked["max_output_boxes"],
    )
    outputs = filled(len(boxes), asked["max_output_boxes"], boxes.dtype, 0)
    outputs["detection_classes"][:] = -1
    for image in range(len(boxes)):
        fates = run(semantics, boxes[image].astype(np.float32), seen[image])
        kept, found = fates.kept, slice(0, len(fates.kept))
        outputs["num_detections"][image] = len(kept)
        outputs["detection_boxes"][image, found] = boxes[image][fates.rows[kept]]
        outputs["detection_scores"][image, found] = fates.scores[kept]
        outputs["detection_classes"][image, found] = fates.labels[kept]
    return outputs


def filled(batch: int, most: int, dtype: Any, value: int) -> Outputs:
    shapes = [((batch, 1), np.int32), ((batch, most, 5), dtype), ((batch, most), dtype), ((batch, most), np.int32)]
    return {name: np.full(shape, value, kind) for name, (shape, kind) in zip(NAMES, shapes, strict=True)}


def same(one: Outputs, other: Outputs) -> bool:
    """To the bit, but for the sign of zero and the payload of NaN."""
    return all(np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f") for name in NAMES)


@cache
def emulated() -> Kernels:
    """The kernels compiled for the CPU, by tests/cuda_on_cpu.h."""
    folder = source_dir()
    newest = max(p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file())
    path = cache_dir() / "plugins" / f"emulated-{newest}.so"
    with locked(path):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            sources = [str(folder / name) for name in KERNEL_SOURCES]
            flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-DENR_EMULATED", "-w"]
            subprocess.run([str(COMPILER), *flags, "-x", "c++", *sources, "-o", str(path)], check=True)
    return kernels(path)


def on_cpu(asked: dict[str, Any], boxes: np.ndarray, scores: np.ndarray) -> Outputs:
    """Runs the kernels thread by thread on the CPU."""
    params, library = Params.of(asked), emulated()
    outputs = filled(len(boxes), asked["max_output_boxes"], boxes.dtype, 77)
    size = library.workspace_bytes(params, scores.shape, boxes.dtype)
    workspace = np.random.default_rng(0).integers(0, 256, size + 16, np.uint8)
    pointers = tuple(array.ctypes.data for array in (boxes, scores, *outputs.values()))
    library.run(params, scores.shape, boxes.dtype, pointers, (-(-workspace.ctypes.data // 16) * 16, size))
    return outputs


def on_gpu(asked: dict[str, Any], boxes: np.ndarray, scores: np.ndarray) -> Outputs:
    """Runs the kernels on the GPU, in memory that held something else."""
    import pycuda.driver as cuda

    from alignment.engine.build import cuda_context

    params, library = Params.of(asked), kernels()
    outputs = filled(len(boxes), asked["max_output_boxes"], boxes.dtype, 77)
    size = library.workspace_bytes(params, scores.shape, boxes.dtype)
    with cuda_context():
        memory = []
        for array in (boxes, scores, *outputs.values()):
            memory.append(cuda.mem_alloc(max(array.nbytes, 1)))
            cuda.memcpy_htod(memory[-1], np.ascontiguousarray(array))
        workspace, stream = cuda.mem_alloc(size), cuda.Stream()
        cuda.memset_d8(workspace, 0x5A, size)
        cuda.Context.synchronize()
        library.run(params, scores.shape, boxes.dtype, tuple(map(int, memory)), (int(workspace), size), stream.handle)
        stream.synchronize()
        for array, place in zip(outputs.values(), memory[2:], strict=True):
            cuda.memcpy_dtoh(array, place)
        del memory, workspace
    return outputs


RUNNERS: dict[str, Callable[[dict[str, Any], np.ndarray, np.ndarray], Outputs]] = {"cpu": on_cpu, "gpu": on_gpu}


def scene(
    seed: int, batch: int, count: int, classes: int, dtype: Any = np.float32, side: float = 200, steps: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes ``[batch, count, 5]`` about objects and scores ``[batch, count, classes]``; `steps`: so many scores."""
    rng = np.random.default_rng(seed)
    objects = rng.uniform(0, side, (batch, max(count // 10, 1), 2))
    pick = rng.integers(0, objects.shape[1], (batch, count))
    centres = np.take_along_axis(objects, pick[..., None], 1) + rng.normal(0, 2, (batch, count, 2))
    sizes = np.exp(rng.normal(2.5, 0.5, (batch, count, 2)))
    angles = rng.uniform(-np.pi / 2, np.pi / 2, (batch, count, 1))
    scores = rng.uniform(0, 1, (batch, count, classes)) ** 3
    if steps:
        scores = np.round(scores * steps) / steps
    return np.concatenate([centres, sizes, angles], -1).astype(dtype), scores.astype(dtype)
