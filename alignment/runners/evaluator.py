"""An ONNX graph evaluated node by node in float32 or float64: the referee of every single tensor.

The semantics are those of onnx's own reference evaluator; the few operators that are slow there run through torch.
No node is fused or reordered, so each intermediate tensor exists and has the exact value that the graph defines, up
to the rounding of the chosen dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from alignment.errors import AlignError
from alignment.reading import cut
from alignment.runners.base import Runner, filled, in_pieces


class OnnxEvaluator(Runner):
    """Runs an ONNX file in NumPy and torch.

    Args:
        model: path of the file, or the model itself.
        dtype: of every float tensor: weights, constants, casts and activations.

    Attributes:
        fixed_batch: the batch that the graph declares, 0 where it is dynamic.

    Raises:
        AlignError: for an operator that it does not know.
    """

    def __init__(
        self, model: Path | onnx.ModelProto, dtype: Literal["float32", "float64"] = "float64", name: object = ""
    ) -> None:
        import torch

        self._dtype, self._name = np.dtype(dtype), model if isinstance(model, Path) else name
        graph = onnx.load(model) if isinstance(model, Path) else model
        if dtype == "float64":
            graph = to_float64(graph)
        try:
            self._evaluator = ReferenceEvaluator(graph, new_ops=_fast_ops())
        except Exception as error:
            raise self._failure(error) from error
        self._input = graph.graph.input[0].name
        self.fixed_batch = _first_axis(graph.graph.input[0])
        self._outputs = [output.name for output in graph.graph.output]
        self._batched = {o.name for o in graph.graph.output if self.fixed_batch and _first_axis(o) == self.fixed_batch}
        self.warnings = []
        self.provenance = {
            "backend": "onnx reference evaluator",
            "onnx": onnx.__version__,
            "torch": torch.__version__,
            "dtype": dtype,
        }

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """See `Runner.run`; values are of the evaluator's dtype.

        Raises:
            AlignError: for a node that cannot be evaluated.
        """
        return in_pieces(batch, self.fixed_batch or len(batch), self._batched, self._piece)

    def tensors(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Every tensor of the graph by name, the input included, of a batch that is filled up where it is fixed."""
        return dict(self._evaluate(filled(batch, self.fixed_batch or len(batch)), every=True))

    def _piece(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._evaluate(images), strict=True))

    def _evaluate(self, images: np.ndarray, every: bool = False) -> Any:
        try:
            return self._evaluator.run(None, {self._input: images.astype(self._dtype)}, intermediate=every)
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> AlignError:
        """One error for all those that the operators of onnx's reference evaluator have."""
        where = f"{self._name}: " if self._name else ""
        what = f"{where}onnx's reference evaluator fails in {self._dtype}: {cut(f'{type(error).__name__}: {error}')}"
        return AlignError(what, "export it again, with other operators")


def _first_axis(value: onnx.ValueInfoProto) -> int:
    """The batch that an input or output declares, 0 where it is dynamic."""
    axes = value.type.tensor_type.shape.dim
    return axes[0].dim_value if axes else 0


def to_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose float32 weights, constants, casts and declared types are float64."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    graph = double.graph
    for index, tensor in enumerate(graph.initializer):
        graph.initializer[index].CopyFrom(_widen(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                attribute.t.CopyFrom(_widen(attribute.t))
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.DOUBLE
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    del graph.value_info[:]
    return double


def _widen(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)


def _fast_ops() -> list[type[OpRun]]:
    """Conv and MaxPool through torch, and a Sigmoid that keeps float64."""
    import torch
    from torch.nn import functional

    def pads_of(pads: list[int] | None, auto_pad: str | None) -> list[int]:
        if auto_pad not in (None, "", "NOTSET", "VALID"):
            raise NotImplementedError(f"auto_pad {auto_pad}: export with explicit pads")
        before_after = list(pads or [0, 0, 0, 0])
        half = len(before_after) // 2
        return [p for axis in reversed(range(half)) for p in (before_after[axis], before_after[axis + half])]

    class Conv(OpRun):
        """2-D convolution."""

        op_domain = ""

        def _run(
            self,
            X: Any,
            W: Any,
            B: Any = None,
            auto_pad: Any = None,
            dilations: Any = None,
            group: Any = None,
            kernel_shape: Any = None,
            pads: Any = None,
            strides: Any = None,
        ) -> tuple[np.ndarray]:
            padded = functional.pad(torch.from_numpy(np.ascontiguousarray(X)), pads_of(pads, auto_pad))
            bias = None if B is None else torch.from_numpy(B.copy())
            out = functional.conv2d(
                padded,
                torch.from_numpy(W.copy()),
                bias,
                stride=tuple(strides or (1, 1)),
                dilation=tuple(dilations or (1, 1)),
                groups=group or 1,
            )
            return (out.numpy(),)

    class MaxPool(OpRun):
        """2-D max pooling, values only."""

        op_domain = ""

        def _run(
            self,
            x: Any,
            auto_pad: Any = None,
            ceil_mode: Any = None,
            dilations: Any = None,
            kernel_shape: Any = None,
            pads: Any = None,
            storage_order: Any = None,
            strides: Any = None,
        ) -> tuple[np.ndarray]:
            padded = functional.pad(
                torch.from_numpy(np.ascontiguousarray(x)), pads_of(pads, auto_pad), value=float("-inf")
            )
            out = functional.max_pool2d(
                padded,
                tuple(kernel_shape),
                stride=tuple(strides or (1, 1)),
                dilation=tuple(dilations or (1, 1)),
                ceil_mode=bool(ceil_mode),
            )
            return (out.numpy(),)

    class Sigmoid(OpRun):
        """1 / (1 + exp(-x)) without overflow."""

        op_domain = ""

        def _run(self, X: Any) -> tuple[np.ndarray]:
            return (torch.sigmoid(torch.from_numpy(np.ascontiguousarray(X))).numpy(),)

    return [Conv, MaxPool, Sigmoid]
