"""Fake quantization inside the torch model: the placement and the scales of the QDQ graph, applied where torch runs.

The model's own code stays as it is.  While it runs, every function that an ONNX node was traced from is met by a
`TorchFunctionMode`, and known by the module that calls it and by its turn there: the node map says which node that is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import absl.logging
import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from alignment.errors import QUANTIZATION_MEND, AlignError
from alignment.quantize.placement import Placement
from alignment.variant import Variant

try:
    from pytorch_quantization.nn import TensorQuantizer
    from pytorch_quantization.tensor_quant import QuantDescriptor
except ImportError as error:
    raise AlignError(f"pytorch-quantization cannot be imported: {error}", QUANTIZATION_MEND) from None

if TYPE_CHECKING:
    from alignment.models.detector import Detector
    from alignment.quantize.recipe import Quantized

#: The functions that an ONNX operator is traced from.
FUNCTIONS: dict[Callable[..., Any], str] = {
    torch.conv2d: "Conv",
    torch.conv_transpose2d: "ConvTranspose",
    functional.linear: "Gemm",
    torch.cat: "Concat",
    torch.add: "Add",
    Tensor.add: "Add",
    Tensor.add_: "Add",
    Tensor.__add__: "Add",
    Tensor.__iadd__: "Add",
    torch.max_pool2d: "MaxPool",
    functional.max_pool2d: "MaxPool",
    functional.interpolate: "Resize",
    torch.split: "Split",
    Tensor.split: "Split",
    torch.chunk: "Split",
    Tensor.chunk: "Split",
    Tensor.__getitem__: "Slice",
    functional.avg_pool2d: "AveragePool",
    functional.adaptive_avg_pool2d: "GlobalAveragePool",
}
#: Their inputs come as a list.
LISTED = ("Concat",)

# torch's own fake quantization: the other one needs a compiled extension.  It says so once for each process.
TensorQuantizer.use_fb_fake_quant = True
absl.logging.get_absl_logger().setLevel(logging.ERROR)
# What it does to the root logger is not for a part of a program to do: warnings of others would look like its own.
logging.root.removeHandler(absl.logging.get_absl_handler())


@dataclass
class _Reads:
    """What one ONNX node reads quantized: input index → place among the quantizers; and that of its weight."""

    node: str
    inputs: dict[int, int] = field(default_factory=dict)
    weight: int | None = None


class QuantizedDetector(nn.Module):
    """A fused detector with fake quantization.

    It has one TensorQuantizer for each quantizer of the placement, however many nodes read it, and one for each
    quantized weight; gradients pass straight through, zero where a value is clipped.

    Args:
        detector: fused, as it was exported; used as it is, not copied.
        node_map: ONNX node → module, of that export; see `alignment.export.node_map`.
        placement: where quantizers go.
        scales: float32, of the quantized activations.
        weight_scales: ``[C] float32`` of the quantized weights, by initializer.

    Raises:
        AlignError: for a placement of another graph, or with nodes that torch's functions are not matched with.
    """

    def __init__(
        self,
        detector: Detector,
        node_map: Mapping[str, Mapping[str, str]],
        placement: Placement,
        scales: Mapping[str, np.float32],
        weight_scales: Mapping[str, np.ndarray],
    ) -> None:
        super().__init__()
        self.detector = detector
        self.initializers = [quantizer.initializer for quantizer in placement.weights]
        self.activations = nn.ModuleList(quantizer_of(scales[q.tensor]) for q in placement.activations)
        reads = {name: _Reads(name) for name in node_map}
        for node in (*(n for q in placement.activations for n, _ in q.readers), *(q.node for q in placement.weights)):
            if node not in reads:
                raise AlignError(f"node {node}: not in the node map", "place quantizers in the graph of this export")
        self.weights = nn.ModuleList()
        for weight in placement.weights:
            entry = node_map[weight.node]
            dims = detector.get_submodule(entry["module"]).weight.dim()  # type: ignore[operator, union-attr]
            # A MatMul has torch's weight transposed.
            axis = 0 if entry["op"] == "MatMul" else weight.axis
            self.weights.append(quantizer_of(weight_scales[weight.initializer], axis, dims))
        for place, quantizer in enumerate(placement.activations):
            for node, index in quantizer.readers:
                reads[node].inputs[index] = place
        for place, weight in enumerate(placement.weights):
            reads[weight.node].weight = place
        #: (module path, operator) → its nodes in the order of their calls.
        self._plan: dict[tuple[str, str], list[_Reads]] = {}
        for name, entry in node_map.items():
            op = "Gemm" if entry["op"] == "MatMul" else entry["op"]
            self._plan.setdefault((entry["module"], op), []).append(reads[name])
            if (reads[name].inputs or reads[name].weight is not None) and op not in FUNCTIONS.values():
                raise AlignError(
                    f"node {name}: no function of torch is known for a quantized {op}", "name it in keep_float"
                )

    @property
    def output_names(self) -> list[str]:
        """See `Detector`."""
        return self.detector.output_names

    def read_weight(self, place: int, weight: Tensor) -> Tensor:
        """A weight as its node reads it, quantized; `place` is among `initializers`."""
        quantizer = self.weights[place]
        # Weights have no level -128: the QDQ graph holds them clipped.  As there, those that are over by a rounding
        # error of the scale are not: they would be without a gradient.
        limit = cast(Tensor, quantizer.amax) * 1.001
        return quantizer(torch.clamp(weight, -limit, limit))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """See `Detector`.  Raises AlignError when the model did not call what the graph says it calls."""
        with Quantizing(self) as mode:
            outputs = self.detector(image)
        mode.require_all()
        return outputs


class Quantizing(TorchFunctionMode):
    """Quantizes what the functions read, for one forward of the detector, or of the module `inside` it."""

    def __init__(self, owner: QuantizedDetector, inside: str = "") -> None:
        super().__init__()
        self._owner = owner
        parts = owner.detector.named_modules() if not inside else _inside(owner.detector, inside)
        self._paths = {id(module): path for path, module in parts}
        self._stack: list[str] = []
        self._calls: Counter[tuple[str, str]] = Counter()
        #: id of a tensor → itself, which keeps the id its own, and what it was concatenated from.
        self._joined: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __enter__(self) -> Quantizing:
        self._hooks = [
            register_module_forward_pre_hook(self._into),
            register_module_forward_hook(self._out_of, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _into(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._paths.get(id(module), ""))

    def _out_of(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = FUNCTIONS.get(func)
        if op is None:
            return func(*args, **kwargs)
        key = (self._stack[-1] if self._stack else "", op)
        turns = int(_drops(args[1])) if op == "Slice" else 1
        planned = self._owner._plan.get(key, [])
        turn = self._calls[key]
        self._calls[key] += turns
        if turns and turn < len(planned) and (planned[turn].inputs or planned[turn].weight is not None):
            args = self._read(planned[turn], op, list(args))
        result = func(*args, **kwargs)
        if op in LISTED and not planned:
            # Simplification has merged it into the Concat that reads it.
            self._joined[id(result)] = result, self._parts(args[0])
        return result

    def _parts(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Tensors as the graph concatenates them: with what a merged Concat was given in its place."""
        return [part for one in tensors for part in self._joined.get(id(one), (one, [one]))[1]]

    def _read(self, reads: _Reads, op: str, args: list[Any]) -> list[Any]:
        quantizers = self._owner.activations
        if op in LISTED:
            parts = self._parts(args[0])
            if max(reads.inputs) >= len(parts):
                raise AlignError(
                    f"node {reads.node}: reads input {max(reads.inputs)} quantized, torch gives it {len(parts)}",
                    "name it in keep_float, or export again with this model",
                )
            args[0] = [quantizers[reads.inputs[i]](x) if i in reads.inputs else x for i, x in enumerate(parts)]
            return args
        for index, place in reads.inputs.items():
            args[index] = quantizers[place](args[index])
        if reads.weight is not None:
            args[1] = self._owner.read_weight(reads.weight, args[1])
        return args

    def require_all(self) -> None:
        """Every node that reads quantized was met, no more and no fewer."""
        for key, planned in self._owner._plan.items():
            quantized = next((one.node for one in planned if one.inputs or one.weight is not None), None)
            if quantized and self._calls[key] != len(planned):
                raise AlignError(
                    f"node {quantized}: {len(planned)} {key[1]} in the graph, {self._calls[key]} calls in torch's "
                    f"{key[0] or 'decoding'}",
                    "name it in keep_float, or export again with this model",
                )


def _inside(detector: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield from detector.get_submodule(path).named_modules(prefix=path)


def _drops(index: Any) -> bool:
    """Whether an index becomes a Slice node: simplification makes one of those along several axes."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, slice) and part != slice(None) for part in parts)


def quantizer_of(scale: np.float32 | np.ndarray, axis: int | None = None, dims: int = 4) -> TensorQuantizer:
    """A TensorQuantizer of exactly that float32 scale; it divides its amax by 127.

    Args:
        scale: of the whole tensor, or ``[C]`` along `axis` of a weight.
        axis: of the channels.
        dims: how many axes the weight has.
    """
    shape = [] if axis is None else [-1 if dim == axis else 1 for dim in range(dims)]
    amax = amax_with(np.asarray(scale, np.float32)).reshape(shape)
    return TensorQuantizer(QuantDescriptor(num_bits=8, axis=axis, amax=amax))


def amax_with(scale: np.ndarray) -> np.ndarray:
    """float32 whose quotient by 127 is `scale` to the last bit: 127 times it, or a neighbour of that."""
    middle = scale * np.float32(127)
    found = middle.copy()
    for candidate in (np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf)), middle):
        found = np.where(candidate / np.float32(127) == scale, candidate, found)
    return found


def float_detector(variant: Variant, source: Path) -> Detector:
    """The fused torch model of a variant with the weights and biases of a graph that stems from its export.

    Raises:
        AlignError: for a bare ONNX file.
    """
    from alignment.models.detector import fused
    from alignment.models.mmyolo_source import build_detector

    detector = fused(build_detector(variant))
    node_map, model = node_map_of(variant), onnx.load(source)
    values = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if "weight" in node_map.get(node.name, {}):
            module: Any = detector.get_submodule(node_map[node.name]["module"])
            for parameter, name in zip((module.weight, module.bias), node.input[1:3], strict=False):
                parameter.data.copy_(torch.from_numpy(numpy_helper.to_array(values[name]).copy()))
    return detector


def quantized_detector(variant: Variant, quantized: Quantized) -> QuantizedDetector:
    """The torch model of a variant with the weights and the fake quantization of its QDQ graph.

    Raises:
        AlignError: for a bare ONNX file.
    """
    return QuantizedDetector(
        float_detector(variant, quantized.source),
        node_map_of(variant),
        quantized.placement,
        quantized.scales,
        quantized.weight_scales,
    )


def node_map_of(variant: Variant) -> dict[str, dict[str, str]]:
    from alignment.export.onnx_export import exported, read_node_map

    path = exported(variant).node_map
    if path is None:
        raise AlignError(f"{variant.name}: a bare ONNX file has no torch model", "round its weights to nearest")
    return read_node_map(path)
