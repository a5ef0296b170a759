"""The layer-by-layer mode: which node is the first to leave the float64 band."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from alignment.runners.base import Runner
from alignment.runners.evaluator import OnnxEvaluator

#: The subject may be this many times as far from float64 as plain float32 arithmetic on the same nodes: other
#: backends sum in another order, fuse nodes and approximate exp.
BAND_FACTOR = 16.0


@dataclass(frozen=True)
class LayerError:
    """One intermediate tensor.

    Attributes:
        node, op: the ONNX node that makes it.
        tensor: its name.
        error: largest distance of the subject from float64.
        band: the largest distance that float32 explains here, `BAND_FACTOR` × plain float32's own.
        magnitude: largest absolute value, in float64.
    """

    node: str
    op: str
    tensor: str
    error: float
    band: float
    magnitude: float

    @property
    def inside(self) -> bool:
        """Whether float32 explains the error."""
        return self.error <= self.band


def compare_layers(model: Path, open_subject: Callable[[Path], Runner], batch: np.ndarray) -> list[LayerError]:
    """Holds every float tensor of a graph to float64.

    Args:
        model: ONNX file.
        open_subject: opens the backend on a file; it gets the graph with every float tensor marked as output, which
            keeps some backends from fusing across it.
        batch: ``[B, 3, H, W] float32``.

    Returns:
        One entry a tensor, in the order of the graph.
    """
    graph = onnx.load(model)
    plain = OnnxEvaluator(graph, "float32").tensors(batch)
    truth = OnnxEvaluator(graph, "float64").tensors(batch)
    floats = {n for n, v in plain.items() if isinstance(v, np.ndarray) and v.dtype == np.float32}
    made = [(node, name) for node in graph.graph.node for name in node.output if name in floats]
    with tempfile.TemporaryDirectory() as folder:
        marked = Path(folder) / model.name
        onnx.save(mark_outputs(graph, [name for _, name in made]), marked)
        with open_subject(marked) as subject:
            ours = subject.run(batch)
    return [_layer(node, name, ours[name], plain[name], truth[name]) for node, name in made]


def first_outside(layers: list[LayerError]) -> LayerError | None:
    """The first tensor whose error float32 does not explain."""
    return next((layer for layer in layers if not layer.inside), None)


def mark_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """A copy of the model in which the float tensors `names` are outputs too."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    known = {output.name for output in marked.graph.output}
    shapes = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    for name in names:
        if name not in known:
            value = shapes.get(name) or onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            marked.graph.output.append(value)
    return marked


def _layer(node: onnx.NodeProto, name: str, ours: np.ndarray, plain: np.ndarray, truth: np.ndarray) -> LayerError:
    magnitude = float(np.abs(truth).max(initial=0.0))
    own = float(np.abs(plain - truth).max(initial=0.0))
    # A tensor that plain float32 gets exactly, a Reshape's say, still carries half a rounding of its inputs.
    band = BAND_FACTOR * max(own, float(np.finfo(np.float32).eps) * magnitude)
    distance = np.abs(ours - truth)
    error = float(distance.max(initial=0.0)) if np.isfinite(distance).all() else float("inf")
    return LayerError(node.name, node.op_type, name, error, band, magnitude)
