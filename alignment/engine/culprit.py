"""Which Q/DQ pairs make an engine worse than the same QDQ graph in ONNX Runtime.

A unit is a node that reads int8, with the pairs that it reads.  For a set of units the QDQ graph keeps the pairs of
these alone; the engine of that graph is held to ONNX Runtime on the same graph, node by node, at the outputs of the
head's convolutions.  Two right answers differ there: an engine rounds to float16 where it is float, a value next to
the edge of a step then falls on its other side, and that moves what follows.  How much is measured for every set, not
assumed: by ONNX Runtime on the graph in which every float tensor is rounded to float16, and on the one in which it is
moved by as much at random.

The gap of a set is the mean distance of the engine from ONNX Runtime, divided by the largest of: the two just named;
the engine's own without any int8; and half of what int8 itself costs, the distance of ONNX Runtime's QDQ graph from
float.  Of several outputs the worst counts.  A fault shows best among few units: alone, a scale that is 4 times too
large gives a gap of 3 to 30, and of hardly more than 1 among 90, whose rounding hides it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import onnx
from onnx import ModelProto

from alignment.engine.candidates import HALF_NOISE, Candidate, NodeByNode, in_half, noisy
from alignment.engine.delta import Found, search
from alignment.errors import AlignError
from alignment.export.float16 import split
from alignment.quantize.graph import OnnxGraph
from alignment.quantize.pairs import QdqGraph
from alignment.storage import cache_dir, writing

# Raise it when the same graphs come to be measured otherwise: what was kept is then left alone.
RECIPE = 1
#: A gap above it is bad.  ONNX Runtime with twice the noise of float16 stays below 1.8 on the embedded variants.
THRESHOLD = 2.0
#: The largest relative error of float16 with its mean: what is drawn for the second of the two noises.
NOISE, NOISE_SEED = HALF_NOISE / 2, 99
#: What int8 itself costs counts so far: an engine may add half of it.
INT8_PART = 0.5
#: Part of an output's magnitude below which no distance counts: float32 sums in another order.
EPSILON = 1e-6


@dataclass(frozen=True)
class Distances:
    """Mean absolute distances at one output, from ONNX Runtime on the graph with some units in int8.

    Attributes:
        candidate: of the backend under test; infinite where it gives values that are not finite.
        noise: of the same graph with the noise of float16, the larger of two.
        int8: of the graph in float.
        size: the mean magnitude of the output itself.
    """

    candidate: float
    noise: float
    int8: float
    size: float


@dataclass(frozen=True)
class Measured:
    """One set of units: what was found at each output, and the seconds that the backend took, building included."""

    units: tuple[str, ...]
    outputs: dict[str, Distances]
    seconds: float


class Comparison:
    """Measures sets of units, each once: what was measured is kept in a file, whole after each.

    Args:
        subject: the graph that the backend gets parts of.
        reference: the graph that ONNX Runtime gets parts of, with the same units; often the same.
        candidate: the backend under test.
        images: ``[B, 3, H, W] float32``.
        threshold: a set with a larger gap is bad.
        own: by output, the backend's distance where nothing is int8; default: measured.
        progress: called before each measurement, with how many there were.

    Raises:
        AlignError: for graphs whose units or outputs differ, or which have none.
    """

    def __init__(
        self,
        subject: QdqGraph,
        reference: QdqGraph,
        candidate: Candidate,
        images: np.ndarray,
        threshold: float = THRESHOLD,
        own: Mapping[str, float] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.units = subject.int8_nodes
        if not self.units:
            raise AlignError("the graph has no Q/DQ pairs", "give a QDQ graph, as `align quantize` writes it")
        if set(self.units) != set(reference.int8_nodes):
            other = min(set(self.units) ^ set(reference.int8_nodes))
            raise AlignError(f"node {other} reads int8 in one of the two graphs only", "give two of one placement")
        self.subject, self.reference, self.candidate, self.images = subject, reference, candidate, images
        self.threshold, self._progress = threshold, progress
        self.outputs = outputs_of(reference.model)
        digests = [hashlib.sha256(_bytes(graph.model)).hexdigest() for graph in (subject, reference)]
        shown = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
        self.identity = {"recipe": RECIPE, "qdq": digests[0], "reference": digests[1], "images": shown}
        self.identity |= {"candidate": candidate.identity, "reference_backend": NodeByNode().identity}
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:24]
        self.path = cache_dir() / "culprit" / f"{key}.json"
        self.measured: dict[frozenset[str], Measured] = self._kept()
        self.builds = 0
        self._own = own
        self._float: dict[str, np.ndarray] | None = None

    def gap(self, units: Collection[str]) -> float:
        """How many times as far from ONNX Runtime as is right, at the worst output; infinite for what is not finite."""
        found = self.measure(units).outputs
        return max(_ratio(distances, self.own.get(name, 0.0)) for name, distances in found.items())

    def bad(self, units: Collection[str]) -> bool:
        """Whether the gap of a set is too large."""
        return self.gap(units) > self.threshold

    @property
    def own(self) -> Mapping[str, float]:
        """By output, the backend's distance from ONNX Runtime where nothing is int8.

        Raises:
            AlignError: where it is not finite: no Q/DQ pair is to blame for that.
        """
        if self._own is None:
            own = {name: distances.candidate for name, distances in self.measure(()).outputs.items()}
            if not all(map(math.isfinite, own.values())):
                raise AlignError(
                    "the backend gives values that are not finite without any int8",
                    "mend that first: `align layers VARIANT --precision fp16` names the node",
                )
            self._own = own
        return self._own

    @property
    def float_gap(self) -> float:
        """The backend's distance where nothing is int8, in those of float16."""
        return max(
            distances.candidate / max(distances.noise, EPSILON * distances.size, 1e-30)
            for distances in self.measure(()).outputs.values()
        )

    def measure(self, units: Collection[str]) -> Measured:
        """Builds and runs, unless this set was measured before."""
        key = frozenset(units)
        if key not in self.measured:
            if self._progress:
                self._progress(self.builds)
            self.builds += 1
            self.measured[key] = self._measured(key)
            self._keep()
        return self.measured[key]

    def _measured(self, units: Collection[str]) -> Measured:
        graph, plain = self.reference.only(units), NodeByNode()
        truth = self._outputs(plain, graph)
        doubles = [self._outputs(plain, double) for double in (in_half(graph), noisy(graph, NOISE, NOISE_SEED))]
        if self._float is None:
            self._float = self._outputs(plain, self.reference.only(())) if units else truth
        start = time.perf_counter()
        found = self._outputs(self.candidate, self.subject.only(units))
        seconds = time.perf_counter() - start
        outputs = {
            name: Distances(
                distance(found[name], truth[name]),
                max(distance(double[name], truth[name]) for double in doubles),
                distance(self._float[name], truth[name]),
                distance(truth[name]),
            )
            for name in self.outputs
        }
        return Measured(tuple(unit for unit in self.units if unit in units), outputs, round(seconds, 3))

    def _outputs(self, backend: Candidate, model: ModelProto) -> dict[str, np.ndarray]:
        found = backend.outputs(model, self.images)
        return {name: found[name] for name in self.outputs}

    def _kept(self) -> dict[frozenset[str], Measured]:
        if not self.path.is_file():
            return {}
        found = {}
        for one in json.loads(self.path.read_text(encoding="utf-8"))["measured"]:
            outputs = {name: Distances(**values) for name, values in one["outputs"].items()}
            found[frozenset(one["units"])] = Measured(tuple(one["units"]), outputs, one["seconds"])
        return found

    def _keep(self) -> None:
        fields = {"identity": self.identity, "measured": [asdict(one) for one in self.measured.values()]}
        with writing(self.path) as temporary:
            temporary.write_text(json.dumps(fields) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class TensorError:
    """A tensor inside the graph in which one smallest bad set alone reads int8.

    Attributes:
        tensor: its name.
        role: whether the culprit ``reads`` it, or ``gives`` it, behind its activation.
        error: mean distance of the backend from ONNX Runtime, as part of the tensor's mean magnitude.
        int8: mean distance of ONNX Runtime from float, as part of the same.
        fusion_changed: whether the backend fuses otherwise where this tensor is an output: then the engine that this
            was seen in is not the one that is to blame.
    """

    tensor: str
    role: str
    error: float
    int8: float
    fusion_changed: bool


@dataclass(frozen=True)
class Culprit:
    """A unit whose Q/DQ pairs are to go.

    Attributes:
        node, op, module: of ONNX, and of torch where it is known.
        core: the smallest bad set that it stands for, itself included.
        gap: of that set alone.
        output: at which that gap is.
        scales: of the activations that it reads, by tensor.
        weight_scales: smallest and largest of its weights' scales.
        tensors: what the backend makes of tensors next to it.
    """

    node: str
    op: str
    module: str
    core: tuple[str, ...]
    gap: float
    output: str
    scales: dict[str, float]
    weight_scales: tuple[float, float] | None
    tensors: tuple[TensorError, ...]


@dataclass(frozen=True)
class Verdict:
    """What a search came to.

    Attributes:
        gap: of the whole graph.
        mended: of the graph without the culprits' pairs.
        float_gap: of the backend where nothing is int8, see `Comparison.float_gap`.
        found: see `alignment.engine.delta`.
        culprits: one for each unit of `found.removal`.
    """

    gap: float
    mended: float
    float_gap: float
    found: Found
    culprits: tuple[Culprit, ...] = field(default=())


def find(
    comparison: Comparison,
    blocks: int = 1,
    cost: Callable[[str], float] = lambda unit: 0.0,
    modules: Mapping[str, str] | None = None,
) -> Verdict:
    """The smallest set of units without whose Q/DQ pairs the backend does what ONNX Runtime does, with evidence.

    Args:
        comparison: of a backend with ONNX Runtime.
        blocks: see `alignment.engine.delta.search`.
        cost: of leaving a unit float, its multiplications say.
        modules: node → torch module, as far as it is known.
    """
    found = search(comparison.bad, comparison.units, blocks, cost)
    kept = [unit for unit in comparison.units if unit not in found.removal]
    culprits = tuple(_culprit(comparison, unit, _core(found, unit), modules or {}) for unit in found.removal)
    whole, mended = comparison.gap(comparison.units), comparison.gap(kept)
    return Verdict(whole, mended, comparison.float_gap, found, culprits)


def outputs_of(model: ModelProto) -> tuple[str, ...]:
    """The outputs that are compared: those of the head's convolutions; where decoding hides these, all float ones."""
    before = {name for node in split(model.graph)[0] for name in node.output}
    floats = [value.name for value in model.graph.output if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    return tuple(name for name in floats if name in before) or tuple(floats)


def distance(values: np.ndarray, other: np.ndarray | float = 0.0) -> float:
    """Mean of the absolute difference; infinite where it is not finite, or shapes differ."""
    if np.shape(other) not in ((), values.shape):
        return math.inf
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.mean(np.abs(values.astype(np.float64) - other))) if values.size else 0.0
    return found if math.isfinite(found) else math.inf


def _ratio(distances: Distances, own: float) -> float:
    if not math.isfinite(distances.candidate):
        return math.inf
    # What float16 cannot hold says nothing of what an engine may differ by.
    noise = distances.noise if math.isfinite(distances.noise) else 0.0
    floor = max(noise, own, INT8_PART * distances.int8, EPSILON * distances.size)
    return distances.candidate / floor if floor else (math.inf if distances.candidate else 0.0)


def _core(found: Found, unit: str) -> tuple[str, ...]:
    return next(core for core in found.cores if unit in core)


def _culprit(comparison: Comparison, unit: str, core: tuple[str, ...], modules: Mapping[str, str]) -> Culprit:
    graph, own = comparison.subject, comparison.own
    node = next(node for node in graph.model.graph.node if node.name == unit)
    outputs = comparison.measure(core).outputs
    worst = max(outputs, key=lambda name: _ratio(outputs[name], own.get(name, 0.0)))
    pairs = [pair for pair in graph.pairs if pair.node == unit]
    scales = {pair.tensor: float(graph.values(pair.scale)) for pair in pairs if not pair.constant}
    steps = [graph.values(pair.scale) for pair in pairs if pair.constant]
    spread = (float(min(map(np.min, steps))), float(max(map(np.max, steps)))) if steps else None
    tensors = _tensors(comparison, unit, core)
    gap, module = comparison.gap(core), modules.get(unit, "")
    return Culprit(unit, node.op_type, module, core, gap, worst, scales, spread, tensors)


def _tensors(comparison: Comparison, unit: str, core: tuple[str, ...]) -> tuple[TensorError, ...]:
    """What the unit reads and gives, in the backend and in ONNX Runtime, where only its core reads int8."""
    subject, reference = comparison.subject.only(core), comparison.reference.only(core)
    lookup = OnnxGraph(comparison.reference.only(()))
    node = lookup.nodes[lookup.position[unit]]
    known = {value.name for value in (*subject.graph.input, *subject.graph.output)}
    read = [pair.tensor for pair in comparison.subject.pairs if pair.node == unit and not pair.constant]
    roles = {tensor: "reads" for tensor in read} | {_activated(lookup, name): "gives" for name in node.output}
    plain, whole = NodeByNode(), set(comparison.candidate.layers(subject))
    found = []
    for tensor, role in roles.items():
        if tensor in known:
            continue
        ours = comparison.candidate.outputs(subject, comparison.images, (tensor,))[tensor]
        truth = plain.outputs(reference, comparison.images, (tensor,))[tensor]
        floats = plain.outputs(comparison.reference.only(()), comparison.images, (tensor,))[tensor]
        size = max(distance(truth), 1e-30)
        changed = set(comparison.candidate.layers(subject, (tensor,))) != whole
        found.append(TensorError(tensor, role, distance(ours, truth) / size, distance(floats, truth) / size, changed))
    return tuple(found)


def _activated(graph: OnnxGraph, tensor: str) -> str:
    """The tensor behind the activation of a convolution's output, which a backend computes with it."""
    outputs = [name for node in graph.nodes for name in node.output]
    # The last: of ``x * Sigmoid(x)`` the product.
    return next((name for name in reversed(outputs) if graph.before_activation(name) == tensor), tensor)


def _bytes(model: ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)
