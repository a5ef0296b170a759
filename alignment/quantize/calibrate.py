"""Calibration: what values the activation tensors of an ONNX graph take, over some images, in one pass.

The statistics are those of all methods: which of them turns a tensor's values into a range is chosen afterwards.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from alignment import __version__
from alignment.data.samples import Samples
from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.layers import mark_outputs
from alignment.quantize.graph import WEIGHTED
from alignment.quantize.observers import amax_of
from alignment.quantize.sharing import Joined, followed, shared
from alignment.quantize.statistics import Statistics
from alignment.reading import cut, read_arrays
from alignment.runners.onnxruntime import cannot_run, open_session
from alignment.storage import locked, writing

#: Images between two writes of what was seen so far.
SAVE_EVERY = 32
#: Raise it when `Statistics` come to hold something else, or files to be laid out in another way.
STATISTICS = 3
_THREADS = 2
_ANEW = "calibrate anew, into another file"
#: Elements of a tensor for which memory is kept.
_KEPT = 2**28
#: Nodes that ONNX Runtime computes together with the sum of products that only they read, which rounds otherwise; and
#: those that it does with their reader: a 1 × 1 convolution has another kernel with padding, a GELU another formula.
_INTO_SUMS, _INTO_READERS = ("Add", "Sub", "Mul", "Div", "BatchNormalization"), ("Pad", "Erf")


@dataclass
class Calibration:
    """Statistics of activation tensors, and what they were taken from.

    Attributes:
        identity: graph, images, preprocessing and versions; see `identity_of`.
        images: how many were seen.
        tensors: by ONNX tensor name, in the order of the graph.
    """

    identity: dict[str, Any]
    images: int = 0
    tensors: dict[str, Statistics] = field(default_factory=dict)

    def amax(self, method: str) -> dict[str, float]:
        """The largest magnitude that int8 is to represent, by tensor; 0 for one that was 0 everywhere."""
        return {name: amax_of(statistics, method) for name, statistics in self.tensors.items()}

    def save(self, path: Path) -> None:
        """Writes an ``.npz`` that `load` reads.

        Arrays of all tensors are joined, and not compressed: 1600 small ones, or zlib, would take as long as some
        images.
        """
        columns: dict[str, list[np.ndarray]] = {}
        for statistics in self.tensors.values():
            for key, array in statistics.to_arrays().items():
                columns.setdefault(key, []).append(array.reshape(-1))
        about = {"identity": self.identity, "images": self.images, "tensors": list(self.tensors)}
        arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        for key, column in columns.items():
            arrays[key] = np.concatenate(column)
            arrays[f"{key}/lengths"] = np.array([len(array) for array in column])
        with writing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads what `save` wrote.  Raises AlignError for a file that is missing, truncated or something else."""
        again = "delete it, and calibrate anew"
        try:
            arrays = read_arrays(path, again, again, "not a calibration")
            about = json.loads(arrays.pop("about").tobytes())
            parts: dict[str, list[np.ndarray]] = {
                key: np.split(array, np.cumsum(arrays[f"{key}/lengths"])[:-1])
                for key, array in arrays.items()
                if not key.endswith("/lengths")
            }
            tensors = {
                name: Statistics.from_arrays({key: column[index] for key, column in parts.items()})
                for index, name in enumerate(about["tensors"])
            }
            return cls(about["identity"], int(about["images"]), tensors)
        except AlignError:
            raise
        except Exception as error:  # NumPy and JSON each have their own
            raise AlignError(f"{path}: not a calibration: {cut(error)}", again) from None

    def require(self, identity: dict[str, Any], path: Path) -> None:
        """Raises AlignError naming what is no longer as it was when `path` was written."""
        for key in dict.fromkeys([*identity, *self.identity]):
            if identity.get(key) != self.identity.get(key):
                raise AlignError(
                    f"{path}: a calibration of another {key}: {self.identity.get(key)}, now {identity.get(key)}",
                    _ANEW,
                )

    def only(self, names: Collection[str], path: Path) -> Calibration:
        """That of these tensors alone.  Raises AlignError where `path`, which it was read from, is without one."""
        missing = [name for name in names if name not in self.tensors]
        if missing:
            found = (
                f"{len(self.tensors)} tensors; {len(missing)} that are wanted are not among them, {missing[0]} first"
            )
            raise AlignError(f"{path}: a calibration of {found}", _ANEW)
        wanted = set(names)
        return replace(self, tensors={name: one for name, one in self.tensors.items() if name in wanted})


def identity_of(model: Path, samples: Samples) -> dict[str, Any]:
    """All that a calibration depends on."""
    import onnxruntime

    variant = samples.variant
    return {
        "graph": file_digest(model),
        "images": f"{samples.dataset.content_fingerprint}, the first {len(samples)}",
        "input": variant.input.model_dump_json(),
        "preprocess": variant.preprocess.model_dump_json(),
        "onnxruntime": onnxruntime.__version__,
        "alignment": __version__,
        "statistics": STATISTICS,
    }


def activations(model: onnx.ModelProto) -> list[str]:
    """The float32 tensors that depend on the graph's input, the input first, in the order of the graph."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = [*inferred.value_info, *inferred.output, *inferred.input]
    floats = {value.name for value in known if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    weights = {weight.name for weight in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    moving = set(names)
    for node in model.graph.node:
        if not moving.isdisjoint(node.input):
            moving.update(node.output)
            names += node.output
    return [name for name in names if name in floats]


def calibrate(
    model: Path,
    samples: Samples,
    path: Path,
    batch: int = 1,
    progress: Callable[[int], None] | None = None,
    tensors: Collection[str] | None = None,
) -> Calibration:
    """Runs images through a graph in ONNX Runtime and keeps the statistics of its activation tensors.

    What was seen is written every `SAVE_EVERY` images, so that an interrupted calibration goes on where it was.

    Each tensor that is handed out is memory to write and to read again, and a fusion that ONNX Runtime leaves: a few
    cost much less than all.  Their statistics are the same to the bit, but where ONNX Runtime fuses what no detector of
    convolutions has, a layer normalization written out: there to a rounding.

    Args:
        model: a float32 ONNX file with one image input.
        samples: the images.
        path: ``.npz`` of the calibration; one that is there is completed, or returned as it is.
        batch: images at once; the statistics are the same for any number.
        progress: called with the number of images done.
        tensors: names of those that are wanted, among `activations`; default: all.  A file that has more will do.

    Returns:
        The calibration of the wanted tensors.

    Raises:
        AlignError: for a file of another graph, other images, another version or without some of the tensors; for
            values that are not finite; for tensors that the graph does not have.
    """
    identity = identity_of(model, samples)
    graph = onnx.load(model)
    names = activations(graph)
    wanted = names if tensors is None else tensors
    unknown = set(wanted).difference(names)
    if unknown:
        raise AlignError(f"{model}: no float32 activation is named {min(unknown)}", "name tensors of this graph")
    with locked(path):
        found = Calibration(identity)
        if path.is_file():
            found = Calibration.load(path)
            found.require(identity, path)
            found.only(wanted, path)
        if found.images < len(samples):
            _observe(model, graph, found.tensors or wanted, samples, found, batch, progress, path)
    return found.only(wanted, path)


def _observe(
    model: Path,
    graph: onnx.ModelProto,
    wanted: Collection[str],
    samples: Samples,
    found: Calibration,
    batch: int,
    progress: Callable[[int], None] | None,
    path: Path,
) -> None:
    names = activations(graph)
    batch = _possible_batch(graph, batch, model)
    joined = _joined(graph, names)
    held = followed([names[0], *wanted], joined)
    joined = {name: whole for name, whole in joined.items() if name in held}
    handed = (held | _rounding_alone(graph)).difference(joined)
    network = _Observed(graph, [name for name in names if name in handed], model)
    for name in names:
        if name in held:
            found.tensors.setdefault(name, Statistics())
    saved, images = found.images, samples.after(found.images)
    with ThreadPoolExecutor(_THREADS) as pool:
        while together := list(itertools.islice(images, batch)):
            tensor = np.stack([sample.tensor for sample in together])
            seen = [one for one in network.run(tensor).items() if one[0] in held]
            # Big ones first: the threads then end together.
            values = sorted(seen, key=lambda one: -one[1].size)
            ranges = dict(pool.map(lambda one: (one[0], _add(found.tensors[one[0]], *one)), values))
            for name, whole in joined.items():
                ranges[name] = whole.ranges(ranges)
                for low, high in ranges[name]:
                    found.tensors[name].add_range(low, high)
            found.images += len(tensor)
            if found.images - saved >= SAVE_EVERY or found.images == len(samples):
                for name, whole in joined.items():
                    whole.join(found.tensors[name], found.tensors)
                found.save(path)
                saved = found.images
            if progress:
                progress(found.images)


def _joined(graph: onnx.ModelProto, names: list[str]) -> dict[str, Joined]:
    image = _image_shape(graph)
    # A batch that no other axis is likely to have, so that axes of images are told from others.
    prime = 10_007 if image and not graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value else 1
    return shared(graph, names, shapes_of(graph, names, (prime, *image)) if image else {}, prime)


def _rounding_alone(graph: onnx.ModelProto) -> set[str]:
    """Tensors that are handed out even if nobody wants them, so that ONNX Runtime rounds as if all were wanted."""
    nodes = graph.graph.node
    readers = Counter(name for node in nodes for name in node.input)
    read = {name for node in nodes if node.op_type in _INTO_SUMS for name in node.input if readers[name] == 1}
    sums = (name for node in nodes if node.op_type in WEIGHTED for name in node.output)
    return read.intersection(sums).union(
        name for node in nodes if node.op_type in _INTO_READERS for name in node.output
    )


def _possible_batch(graph: onnx.ModelProto, batch: int, path: Path) -> int:
    """How many images at once: one where the graph's batch is fixed to it."""
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    fixed = dims[0].dim_value if dims else 0
    if fixed > 1:
        raise AlignError(f"{path}: its batch is fixed to {fixed}", "export it with a dynamic batch, or a batch of 1")
    return fixed or batch


def _add(statistics: Statistics, name: str, values: np.ndarray) -> list[tuple[float, float]]:
    try:
        return statistics.add(values)
    except ValueError as error:
        raise AlignError(f"tensor {name}: {error}", "run `align layers` on this model: it finds the node") from None


class _Observed:
    """A graph in ONNX Runtime that gives some of its tensors, the input first.

    Tensors whose shapes are known beforehand are written by the last nodes' kernels to memory that is kept: fresh
    memory, and a copy to it, would take as long as the network itself.
    """

    def __init__(self, graph: onnx.ModelProto, names: list[str], path: Path) -> None:
        self.image, *self.others = names
        self._graph, self._path = graph, path
        self._session = open_session(mark_outputs(graph, self.others), path) if self.others else None
        self._kept: dict[str, np.ndarray] = {}
        self._shape: tuple[int, ...] = ()

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """All tensors; the next call writes over them."""
        if self._session is None:
            return {self.image: batch}
        if batch.shape != self._shape:
            self._shape, self._kept = batch.shape, {}
            shapes = shapes_of(self._graph, self.others, batch.shape)
            self._kept = {
                name: np.empty(shape, np.float32) for name, shape in shapes.items() if math.prod(shape) < _KEPT
            }
        binding = self._session.io_binding()
        binding.bind_cpu_input(self.image, batch)
        for name in self.others:
            kept = self._kept.get(name)
            if kept is None:
                binding.bind_output(name)
            else:
                binding.bind_output(name, "cpu", 0, np.float32, kept.shape, kept.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has one exception type for each status code
            raise cannot_run(self._path, batch.shape, error) from None
        found = zip(self.others, binding.get_outputs(), strict=True)
        values = {name: self._kept[name] if name in self._kept else value.numpy() for name, value in found}
        return {self.image: batch, **values}


def _image_shape(graph: onnx.ModelProto) -> tuple[int, ...]:
    """``(3, H, W)``; empty where the graph leaves one of them open."""
    sizes = tuple(dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim)[1:]
    return sizes if all(sizes) else ()


def shapes_of(graph: onnx.ModelProto, names: list[str], batch: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of those tensors whose shape follows from the input's."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    # What is written there may be of another batch, and would be believed.
    del fixed.graph.value_info[:]
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    for dim, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, batch, strict=False):
        dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    found = {}
    for value in (*inferred.value_info, *inferred.output, *inferred.input):
        tensor = value.type.tensor_type
        dims = tuple(dim.dim_value for dim in tensor.shape.dim)
        if tensor.HasField("shape") and all(dim > 0 for dim in dims):
            found[value.name] = dims
    return {name: found[name] for name in names if name in found}
