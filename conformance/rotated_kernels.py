"""The kernels of efficient_nms_rotated run on arrays, on a GPU or on the CPU, and what they ought to give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from alignment.engine.plugins import Kernels, Params, build_for_cpu, kernels
from alignment.nms.plugins import ROTATED, plugin_outputs

Outputs = dict[str, np.ndarray]
NAMES = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
USUAL: dict[str, Any] = {"score_threshold": 0.05, "iou_threshold": 0.3, "max_output_boxes": 100}
COMPILER = shutil.which("g++") or shutil.which("c++")


def attributes(**changed: Any) -> dict[str, Any]:
    return {**USUAL, **changed}


def expected(asked: dict[str, Any], boxes: np.ndarray, scores: np.ndarray) -> Outputs:
    """What the NumPy model of the plugin gives."""
    return dict(zip(NAMES, plugin_outputs(ROTATED, boxes, scores, asked), strict=True))


def filled(batch: int, most: int, dtype: Any, value: int) -> Outputs:
    shapes = [((batch, 1), np.int32), ((batch, most, 5), dtype), ((batch, most), dtype), ((batch, most), np.int32)]
    return {name: np.full(shape, value, kind) for name, (shape, kind) in zip(NAMES, shapes, strict=True)}


def same(one: Outputs, other: Outputs) -> bool:
    """To the bit, but for the sign of zero and the payload of NaN."""
    return all(np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f") for name in NAMES)


@cache
def emulated() -> Kernels:
    """The kernels compiled for the CPU, by tests/cuda_on_cpu.h."""
    return kernels(build_for_cpu())


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
