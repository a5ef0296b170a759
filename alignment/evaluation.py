"""What a network detects on a dataset, in pieces of images that any process may run.

An image's detections depend on nothing but the image, so that the pieces together are what one process finds, to the
bit: in one thread each, as ONNX Runtime may sum otherwise in several.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.data.samples import Samples
from alignment.models.outputs import detect
from alignment.nms.multiclass import Detections
from alignment.runners.onnxruntime import OnnxRuntimeRunner

#: Images of a piece: opening the graph is to be little beside running it, and all workers are to have some.
PIECE = 16


@dataclass(frozen=True)
class _Piece:
    """Some images, and the file of a graph; it can be pickled."""

    graph: Path
    samples: Samples


def detect_node_by_node(graph: Path, samples: Samples, executor: Executor | None = None) -> dict[int, Detections]:
    """What a graph detects in ONNX Runtime, no nodes fused: int8 kernels that are saturate on CPUs without VNNI.

    Args:
        graph: an ONNX file; with an executor, one that its processes see under the same name, as they do the images.
        samples: the images.
        executor: where pieces of them are run, each in one thread; this process without one.

    Returns:
        Image id → detections in pixels of the original image, in the order of the images.
    """
    if executor is None:
        with OnnxRuntimeRunner(graph, optimize=False) as runner:
            return detect(samples, runner.run)
    dataset = samples.dataset
    # Images alone: what they show is of no use there, and much to send.
    bare = replace(dataset, truth={**dataset.truth, "images": [], "annotations": []})
    starts = range(0, len(samples), PIECE)
    parts = [Samples(samples.variant, replace(bare, images=dataset.images[i : i + PIECE])) for i in starts]
    pieces = [_Piece(graph.absolute(), part) for part in parts]
    return {image: one for found in executor.map(_detect, pieces) for image, one in found.items()}


def _detect(piece: _Piece) -> dict[int, Detections]:
    with OnnxRuntimeRunner(piece.graph, optimize=False, threads=1) as runner:
        return detect(piece.samples, runner.run)
