"""The layer-by-layer mode: which node is the first to leave the float64 band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from alignment.case import Precision
from alignment.export.float16 import float32_nodes
from alignment.export.onnx_export import modules_of
from alignment.runners.base import Runner, filled
from alignment.runners.evaluator import OnnxEvaluator
from alignment.scratch import scratch_folder

#: The subject may be this many times as far from float64 as plain float32 arithmetic on the same nodes: other
#: backends sum in another order, fuse nodes and approximate exp.
BAND_FACTOR = 16.0
#: The same for float16, whose sums are made in float32: ONNX Runtime comes to 0.6 of this band at most, on 11 models.
HALF_BAND_FACTOR = 4.0
HALF_MAX, HALF_SMALLEST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_normal)
#: Operators that average: a backend may add the terms one after another, where plain float32 adds them pairwise.
AVERAGING = ("GlobalAveragePool", "ReduceMean")
#: Operators of one tensor that hand a deviation of it on, no larger than it came.
HANDING_ON = ("Flatten", "HardSigmoid", "Identity", "Relu", "Reshape", "Sigmoid", "Squeeze", "Unsqueeze")
EPSILON, HALF_EPSILON = float(np.finfo(np.float32).eps), float(np.finfo(np.float16).eps)
RangeFault = Literal["overflow", "underflow"]
#: What float16 cannot do with such values.
RANGE: dict[RangeFault, str] = {
    "overflow": f"float16 ends at {HALF_MAX:.0f}",
    "underflow": f"float16 loses bits below {HALF_SMALLEST:.2g}",
}


@dataclass(frozen=True)
class LayerError:
    """One intermediate tensor.

    Attributes:
        node, op: the ONNX node that makes it.
        tensor: its name.
        error: largest distance of the subject from float64.
        band: the largest distance that float32 explains here, `BAND_FACTOR` × plain float32's own; in FP16
            `HALF_BAND_FACTOR` × 2^13 × that, as float16's mantissa is 13 bits shorter.
        low, high: smallest and largest value, in float64.
        module: the torch module behind the node, empty where none is known.
        range_fault: in FP16, ``overflow`` where float16 cannot hold the values and ``underflow`` where most of them lie
            below its normal numbers and the error shows it.
    """

    node: str
    op: str
    tensor: str
    error: float
    band: float
    low: float
    high: float
    module: str = ""
    range_fault: RangeFault | None = None

    @property
    def magnitude(self) -> float:
        """Largest absolute value, in float64."""
        return max(-self.low, self.high)

    @property
    def inside(self) -> bool:
        """Whether the precision explains the error."""
        return self.error <= self.band

    @property
    def place(self) -> str:
        """Node, operator, module and tensor in words."""
        module = f" of module {self.module}" if self.module else ""
        return f"{self.node} ({self.op}){module}, tensor {self.tensor}"


def compare_layers(
    model: Path,
    open_subject: Callable[[Path], Runner],
    batch: np.ndarray,
    precision: Precision = "fp32",
    patterns: Sequence[str] = (),
) -> list[LayerError]:
    """Holds every float tensor of a graph to float64.

    Args:
        model: ONNX file; a node map beside it gives the modules.
        open_subject: opens the backend on a file; it gets the graph with every float tensor marked as output, which
            keeps some backends from fusing across it.
        batch: ``[B, 3, H, W] float32``.
        precision: that the subject runs in; ``fp16`` has a wider band, and a range to stay in.
        patterns: the variant's `float32_nodes`.

    Returns:
        One entry a tensor, in the order of the graph.
    """
    graph = onnx.load(model)
    evaluator = OnnxEvaluator(graph, "float32", model)
    batch = filled(batch, evaluator.fixed_batch or len(batch))
    plain = evaluator.tensors(batch)
    truth = OnnxEvaluator(graph, "float64", model).tensors(batch)
    # How many boxes an NMS keeps may hang on a rounding: what follows it has nothing to be compared with then.
    same = {n for n, v in plain.items() if isinstance(v, np.ndarray) and v.shape == np.shape(truth[n])}
    floats = {n for n in same if plain[n].dtype == np.float32}
    made = [(node, name) for node in graph.graph.node for name in node.output if name in floats]
    with scratch_folder() as folder:
        marked = folder / model.name
        onnx.save(mark_outputs(graph, [name for _, name in made]), marked)
        with open_subject(marked) as subject:
            ours = subject.run(batch)
    modules = modules_of(model)
    slack = averaging_slack(graph.graph, truth)
    halves: set[str] | None = None
    if precision == "fp16":
        single = set(float32_nodes(model, patterns))
        halves = {name for node in graph.graph.node if node.name not in single for name in node.output}
    return [
        _layer(node, name, (ours[name], plain[name], truth[name]), slack.get(name, 0.0), modules, halves)
        for node, name in made
    ]


def first_outside(layers: list[LayerError]) -> LayerError | None:
    """The first tensor whose error the precision does not explain."""
    return next((layer for layer in layers if not layer.inside), None)


def first_range_fault(layers: list[LayerError]) -> LayerError | None:
    """The first tensor that float16 has no range for."""
    return next((layer for layer in layers if layer.range_fault), None)


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


def averaging_slack(graph: onnx.GraphProto, truths: dict[str, np.ndarray]) -> dict[str, float]:
    """By how many roundings' worth the order in which an average adds its terms can move a tensor, in its own units.

    The rounding of n terms that are added in sequence is a random walk (Higham, 1993): √n × their mean magnitude.  A
    convolution, or a Gemm, that reads nothing but the average hands it on, multiplied at most by the L1 norm of the
    weights of one output; so does what follows, until a node reads another activation as well, beside which it is lost.
    """
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    slack: dict[str, float] = {}
    for node in graph.node:
        read, given = node.input[0] if node.input else "", node.output[0]
        if node.op_type in AVERAGING:
            terms, averages = truths[read], max(1, truths[given].size)
            slack[given] = float(np.abs(terms).sum() / max(1, terms.size) * np.sqrt(terms.size / averages))
        elif read in slack and node.op_type in HANDING_ON:
            slack[given] = slack[read]
        elif read in slack and node.op_type in ("Conv", "Gemm") and node.input[1] in weights:
            matrix = np.abs(weights[node.input[1]])
            if node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute):
                matrix = matrix.T
            slack[given] = slack[read] * float(matrix.reshape(len(matrix), -1).sum(1).max(initial=0.0))
    return slack


def _layer(
    node: onnx.NodeProto,
    name: str,
    values: tuple[np.ndarray, np.ndarray, np.ndarray],
    slack: float,
    modules: dict[str, str],
    halves: set[str] | None,
) -> LayerError:
    """`values`: the subject's, plain float32's and float64's; `slack`: see `averaging_slack`; `halves`: the tensors
    that are float16 in FP16, None in another precision."""
    ours, plain, truth = values
    low, high = (float(truth.min()), float(truth.max())) if truth.size else (0.0, 0.0)
    own = float(np.abs(plain - truth).max(initial=0.0))
    # A tensor that plain float32 gets exactly, a Reshape's say, still carries half a rounding of its inputs.
    factor = BAND_FACTOR if halves is None else HALF_BAND_FACTOR * HALF_EPSILON / EPSILON
    floor = max(-low, high, slack)
    band = factor * max(own, EPSILON * floor)
    distance = np.abs(ours - truth) if ours.shape == truth.shape else np.array(np.inf)
    error = float(distance.max(initial=0.0)) if np.isfinite(distance).all() else float("inf")
    fault = _range_fault(ours, truth, name in halves, error > band) if halves is not None else None
    return LayerError(node.name, node.op_type, name, error, band, low, high, modules.get(node.name, ""), fault)


def _range_fault(ours: np.ndarray, truth: np.ndarray, half: bool, outside: bool) -> RangeFault | None:
    """`half`: the tensor is float16, so its range counts even where the backend happens to keep more."""
    magnitudes = np.abs(truth[truth != 0])
    if not np.isfinite(ours).all() or (half and magnitudes.max(initial=0.0) > HALF_MAX):
        return "overflow"
    tiny = bool(magnitudes.size) and float(np.median(magnitudes)) < HALF_SMALLEST
    return "underflow" if half and tiny and outside else None
