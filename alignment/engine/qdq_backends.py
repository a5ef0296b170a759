"""What runs a QDQ graph: ONNX Runtime node by node, TensorRT, and a stand-in for a faulty TensorRT.

The stand-in is ONNX Runtime on a graph with planted faults and the noise of float16, so that the search for culprits
can be held, without a GPU, to what was planted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from alignment.errors import AlignError
from alignment.export.float16 import split
from alignment.layers import mark_outputs
from alignment.quantize.graph import QUANTIZING, OnnxGraph
from alignment.quantize.pairs import QdqGraph
from alignment.scratch import scratch_folder
from alignment.variant import Variant

FaultKind = Literal["scale", "clip", "per-tensor"]
#: What a planted fault multiplies an activation's scale by: two bits lost; a range of an eighth.
COARSER, CLIPPED = np.float32(4), np.float32(1 / 8)
#: float16's unit roundoff.
HALF_NOISE = 2.0**-11


class QdqBackend(Protocol):
    """A backend under test."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that its answers depend on beside graph and images, JSON values."""

    def outputs(self, model: ModelProto, images: np.ndarray, marked: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """The outputs of a graph by name, and the further float tensors `marked`.

        Args:
            model: any part of the QDQ graph, none or all of its nodes reading int8.
            images: ``[B, 3, H, W] float32``.
        """

    def layers(self, model: ModelProto, marked: Sequence[str] = ()) -> list[str]:
        """Names of what it fused, Reformat layers excepted; the nodes themselves where it fuses none."""


class NodeByNode:
    """ONNX Runtime without any optimization: what the graph says."""

    @property
    def identity(self) -> dict[str, Any]:
        """See `QdqBackend`."""
        import onnxruntime

        return {"backend": "onnxruntime", "onnxruntime": onnxruntime.__version__}

    def outputs(self, model: ModelProto, images: np.ndarray, marked: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """See `QdqBackend`."""
        from alignment.runners.onnxruntime import OnnxRuntimeRunner

        with _file(mark_outputs(model, list(marked)) if marked else model) as path:
            try:
                return OnnxRuntimeRunner(path, optimize=False).run(images)
            except AlignError as error:  # names a file that nobody will find
                raise AlignError(error.what.replace(str(path), "QDQ graph"), error.mend) from None

    def layers(self, model: ModelProto, marked: Sequence[str] = ()) -> list[str]:
        """See `QdqBackend`."""
        return [node.name for node in model.graph.node]


@dataclass(frozen=True)
class Fault:
    """What a faulty backend does to a node while that reads int8.

    ``scale``: its activations are quantized at 4 × their scale; ``clip``: at an eighth of it, so that most of the range
    is cut off; ``per-tensor``: its weights have one scale, the largest of their channels.
    """

    kind: FaultKind
    node: str

    @classmethod
    def parse(cls, text: str) -> Fault:
        """From ``KIND:NODE``."""
        kind, _, node = text.partition(":")
        if kind not in get_args(FaultKind) or not node:
            raise AlignError(f"--fault {text}: not KIND:NODE", f"kinds: {', '.join(get_args(FaultKind))}")
        return cls(kind, node)  # type: ignore[arg-type]

    def planted(self, graph: QdqGraph) -> ModelProto:
        """A graph with this fault.  Raises AlignError for a node without such a pair."""
        if self.kind == "per-tensor":
            return graph.with_scales(self.node, np.amax, weights=True)
        factor = COARSER if self.kind == "scale" else CLIPPED
        return graph.with_scales(self.node, lambda scale: scale * factor)


@dataclass(frozen=True)
class Simulated:
    """ONNX Runtime with planted faults, and with noise where an engine rounds to float16.

    Attributes:
        faults: none or more; of a node that does not read int8 there is none.
        noise: the largest relative error, uniformly drawn, of what every node gives in float, decoding excepted.
        seed: of the noise.
    """

    faults: tuple[Fault, ...] = ()
    noise: float = HALF_NOISE
    seed: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """See `QdqBackend`."""
        faults = [f"{fault.kind}:{fault.node}" for fault in self.faults]
        fields = {"backend": "simulated", "faults": faults, "noise": self.noise, "seed": self.seed}
        return NodeByNode().identity | fields

    def outputs(self, model: ModelProto, images: np.ndarray, marked: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """See `QdqBackend`."""
        for fault in self.faults:
            graph = QdqGraph(model)
            model = fault.planted(graph) if fault.node in graph.int8_nodes else model
        return NodeByNode().outputs(noisy(model, self.noise, self.seed) if self.noise else model, images, marked)

    def layers(self, model: ModelProto, marked: Sequence[str] = ()) -> list[str]:
        """See `QdqBackend`."""
        return NodeByNode().layers(model, marked)


@dataclass(frozen=True)
class TensorRT:
    """An engine, built as that of the variant's QDQ graph is.

    Attributes:
        variant: whose `float32_nodes` hold.
        level: builder optimization level.
    """

    variant: Variant
    level: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """See `QdqBackend`."""
        from alignment.engine.build import RECIPE, build_environment
        from alignment.engine.capabilities import Capabilities, gpu, require

        require()
        return {
            "backend": "tensorrt",
            "tensorrt": Capabilities.current().version,
            "gpu": gpu().name,
            "level": self.level,
            "float32_nodes": list(self.variant.float32_nodes),
            "environment": build_environment(),
            "recipe": RECIPE,
        }

    def outputs(self, model: ModelProto, images: np.ndarray, marked: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """See `QdqBackend`."""
        with self._runner(model, marked) as runner:
            return dict(runner.run(images))

    def layers(self, model: ModelProto, marked: Sequence[str] = ()) -> list[str]:
        """See `QdqBackend`."""
        from alignment.engine.inspect import reformats

        with self._runner(model, marked) as runner:
            return [layer.name for layer in runner.layers() if not reformats([layer])]

    @contextmanager
    def _runner(self, model: ModelProto, marked: Sequence[str]) -> Iterator[Any]:
        from alignment.engine.capabilities import Capabilities
        from alignment.runners.int8 import explicit
        from alignment.runners.tensorrt import TensorRTRunner

        with _file(model, self.variant.name) as path:
            options = explicit(path, self.variant.float32_nodes)
            # With the int8 flag and neither QDQ nodes nor a calibrator TensorRT looks for ranges that are not there.
            floats = Capabilities.current().has_int8_flag and not QdqGraph(model).pairs
            options = dataclasses.replace(
                options,
                precision="fp16" if floats else "int8",
                optimization_level=self.level,
                layers_as_outputs=tuple(marked),
            )
            with TensorRTRunner(path, options) as runner:
                yield runner


def in_half(model: ModelProto) -> ModelProto:
    """The graph as float16 would have it where it is float, up to decoding: the least that an engine may differ by.

    What each node gives is rounded to float16, and so are weights that are read in float; Q/DQ pairs are left alone.
    """

    def rounding(tensor: str, name: str) -> list[NodeProto]:
        half = f"{name}_half"
        return [
            helper.make_node("Cast", [tensor], [half], half, to=TensorProto.FLOAT16),
            helper.make_node("Cast", [half], [name], name, to=TensorProto.FLOAT),
        ]

    graph = OnnxGraph(model)
    rounded = _after_each(model, graph, rounding)
    weights = {node.input[1] for node in graph.nodes if graph.weight(node) is not None}
    for value in rounded.graph.initializer:
        if value.name in weights:
            array = numpy_helper.to_array(value).astype(np.float16).astype(np.float32)
            value.CopyFrom(numpy_helper.from_array(array, value.name))
    return rounded


def noisy(model: ModelProto, noise: float, seed: int) -> ModelProto:
    """The graph with what its nodes give multiplied by random numbers from 1 − `noise` to 1 + `noise`."""
    seeds = itertools.count(1_000_000.0 * seed)  # float32 holds these

    def drawing(tensor: str, name: str) -> list[NodeProto]:
        factor = f"{name}_factor"
        drawn = helper.make_node("RandomUniformLike", [tensor], [factor], factor, low=1 - noise, high=1 + noise)
        drawn.attribute.append(helper.make_attribute("seed", next(seeds)))
        return [drawn, helper.make_node("Mul", [tensor, factor], [name], name)]

    return _after_each(model, OnnxGraph(model), drawing)


def _after_each(model: ModelProto, graph: OnnxGraph, make: Callable[[str, str], list[NodeProto]]) -> ModelProto:
    """The graph with nodes after each float tensor that is not decoding's, whose readers read what these give.

    Args:
        model: to be copied.
        graph: of it.
        make: from a tensor and the name of what is read in its place.
    """
    before = {node.name for node in split(model.graph)[0]}
    changed = ModelProto()
    changed.CopyFrom(model)
    instead: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in changed.graph.node:
        node.input[:] = [instead.get(name, name) for name in node.input]
        nodes.append(node)
        if node.name in before and node.op_type not in QUANTIZING:
            for tensor in filter(graph.is_activation, node.output):
                instead[tensor] = f"{tensor}_perturbed"
                nodes += make(tensor, instead[tensor])
    written = ModelProto()
    written.CopyFrom(changed)
    del written.graph.node[:]
    written.graph.node.extend(nodes)
    return written


@contextmanager
def _file(model: ModelProto, name: str = "model") -> Iterator[Path]:
    """The graph as a file, for as long as the block runs."""
    with scratch_folder() as folder:
        path = folder / f"{name}.onnx"
        onnx.save(model, path)
        yield path
