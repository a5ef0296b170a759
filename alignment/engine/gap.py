"""How far a backend is from ONNX Runtime on parts of a QDQ graph, in what an engine may differ by.

A unit is a node that reads int8, with the pairs that it reads.  For a set of units the QDQ graph keeps the pairs of
these alone; the engine of that graph is held to ONNX Runtime on the same graph, node by node, at the outputs of the
head.  Two right answers differ there: an engine rounds to float16 where it is float, a value next to the edge of a
step then falls on its other side, and that moves what follows.  How much is measured for every set, not assumed: by
ONNX Runtime on the graph in which every float tensor is rounded to float16, and on the one in which it is moved by as
much at random.

The gap of a set is the mean distance of the engine from ONNX Runtime, divided by the largest of: the two just named;
the engine's own without any int8; and half of what int8 itself costs, the distance of ONNX Runtime's QDQ graph from
float.  It is the median of the images', as one value that falls on the other side may move one image far; and that of
the worst output.  A fault shows best among few units: alone, a scale that is 4 times too large gives a gap of 3 to 30,
and of hardly more than 1 among 90, whose rounding hides it.  A set of which no engine comes has an infinite gap.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from alignment import cache
from alignment.engine.qdq_backends import HALF_NOISE, NodeByNode, QdqBackend, in_half, noisy
from alignment.errors import AlignError, BuildError
from alignment.quantize.pairs import QdqGraph

# Raise it when the same graphs come to be measured otherwise: what was kept is then left alone.
RECIPE = 1
#: A gap above it is bad.  Of yolov6_embedded on TensorRT 8.6 and an H100, parts of 5 nodes or less reach 2.6 where
#: nothing is wrong, and a scale that is 4 times too large gives 4.1 to 7.5.
THRESHOLD = 3.0
#: The largest relative error of float16 with its mean: what is drawn for the second of the two noises.
NOISE, NOISE_SEED = HALF_NOISE / 2, 99
#: What int8 itself costs counts so far: an engine may add half of it.
INT8_PART = 0.5
#: Part of an output's magnitude below which no distance counts: float32 sums in another order.
EPSILON = 1e-6

#: One number an image.
Each = tuple[float, ...]


@dataclass(frozen=True)
class Distances:
    """Mean absolute distances at one output, image by image, from ONNX Runtime on the graph with some units in int8.

    Attributes:
        candidate: of the backend under test; infinite where it gives values that are not finite.
        noise: of the same graph with the noise of float16, the larger of two.
        int8: of the graph in float.
        size: the mean magnitude of the output itself.
    """

    candidate: Each
    noise: Each
    int8: Each
    size: Each

    def ratio(self, own: Each | None = None) -> float:
        """The candidate's distance in what is allowed, with its `own` where nothing is int8; median of the images."""
        found = []
        for index, (distance, noise, int8, size) in enumerate(
            zip(self.candidate, self.noise, self.int8, self.size, strict=True)
        ):
            # What float16 cannot hold says nothing of what an engine may differ by.
            floor = max(noise if math.isfinite(noise) else 0.0, INT8_PART * int8, EPSILON * size)
            floor = max(floor, own[index]) if own else floor
            found.append(distance / floor if floor else (math.inf if distance else 0.0))
        return float(np.median(found))


@dataclass(frozen=True)
class Measured:
    """One set of units.

    Attributes:
        units: that read int8.
        outputs: what was found at each; infinite distances where the backend made no engine.
        seconds: that the backend took, building included.
        failure: why it made none; empty where it did.
    """

    units: tuple[str, ...]
    outputs: dict[str, Distances]
    seconds: float
    failure: str = ""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Measured:
        """Of what `asdict` gave, from JSON."""
        outputs = {
            name: Distances(**{kind: tuple(each) for kind, each in distances.items()})
            for name, distances in fields["outputs"].items()
        }
        return cls(tuple(fields["units"]), outputs, fields["seconds"], fields["failure"])


class Reference:
    """ONNX Runtime on parts of a QDQ graph, node by node, and what an engine may differ by; each part once.

    Args:
        graph: of which parts are run.
        images: ``[B, 3, H, W] float32``.
    """

    def __init__(self, graph: QdqGraph, images: np.ndarray) -> None:
        self.graph, self.images, self.outputs = graph, images, outputs_of(graph.model)
        self._known: dict[frozenset[str], tuple[dict[str, np.ndarray], dict[str, Each]]] = {}

    def values(self, units: Collection[str]) -> dict[str, np.ndarray]:
        """By output, what ONNX Runtime gives where these units read int8."""
        return self._at(units)[0]

    def noise(self, units: Collection[str]) -> dict[str, Each]:
        """By output, the mean distance from that of the same graph with the noise of float16, the larger of two."""
        return self._at(units)[1]

    def _at(self, units: Collection[str]) -> tuple[dict[str, np.ndarray], dict[str, Each]]:
        key = frozenset(units)
        if key not in self._known:
            part, plain = self.graph.only(key), NodeByNode()
            values = plain.outputs(part, self.images)
            doubles = [plain.outputs(one, self.images) for one in (in_half(part), noisy(part, NOISE, NOISE_SEED))]
            noise = {}
            for name in self.outputs:
                first, second = (distances(double[name], values[name]) for double in doubles)
                noise[name] = tuple(map(max, first, second))
            self._known[key] = {name: values[name] for name in self.outputs}, noise
        return self._known[key]


class Comparison:
    """Measures sets of units, each once: what was measured is kept in the cache.

    Args:
        subject: the graph that the backend gets parts of.
        reference: of the graph that ONNX Runtime gets parts of, with the same units; often the same graph.
        candidate: the backend under test.
        threshold: a set with a larger gap is bad.
        own: by output, the backend's distance where nothing is int8; default: measured.
        progress: called before each measurement, with how many there were.

    Raises:
        AlignError: for graphs whose units differ, or which have none.
    """

    def __init__(
        self,
        subject: QdqGraph,
        reference: Reference,
        candidate: QdqBackend,
        threshold: float = THRESHOLD,
        own: Mapping[str, Each] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.units, others = subject.int8_nodes, reference.graph.int8_nodes
        if not self.units:
            raise AlignError("the graph has no Q/DQ pairs", "give a QDQ graph, as `align quantize` writes it")
        if other := sorted(set(self.units) ^ set(others)):
            raise AlignError(f"node {other[0]} reads int8 in one of the two graphs only", "give two of one placement")
        self.subject, self.reference, self.candidate = subject, reference, candidate
        self.threshold, self.builds = threshold, 0
        self._own, self._progress = own, progress
        digests = [
            hashlib.sha256(graph.model.SerializeToString(deterministic=True)).hexdigest()
            for graph in (subject, reference.graph)
        ]
        shown = hashlib.sha256(np.ascontiguousarray(reference.images).tobytes()).hexdigest()
        self.identity = {"recipe": RECIPE, "qdq": digests[0], "reference": digests[1], "images": shown}
        self.identity |= {"candidate": candidate.identity, "reference_backend": NodeByNode().identity}
        self.measured: dict[frozenset[str], Measured] = {}

    def gap(self, units: Collection[str]) -> float:
        """How many times as far from ONNX Runtime as is right, at the worst output; infinite for what is not finite."""
        return max(self.gaps(units).values())

    def gaps(self, units: Collection[str]) -> dict[str, float]:
        """The same at each output."""
        return {name: found.ratio(self.own[name]) for name, found in self.measure(units).outputs.items()}

    def bad(self, units: Collection[str]) -> bool:
        """Whether the gap of a set is too large."""
        return self.gap(units) > self.threshold

    @property
    def own(self) -> Mapping[str, Each]:
        """By output, the backend's distance from ONNX Runtime where nothing is int8.

        Raises:
            AlignError: where it is not finite, or no engine comes: no Q/DQ pair is to blame for that.
        """
        if self._own is None:
            if failure := self.measure(()).failure:
                raise BuildError(failure)
            own = {name: found.candidate for name, found in self.measure(()).outputs.items()}
            if not np.isfinite(list(own.values())).all():
                raise AlignError(
                    "the backend gives values that are not finite without any int8",
                    "mend that first: `align layers VARIANT --precision fp16` names the node",
                )
            self._own = own
        return self._own

    @property
    def float_gap(self) -> float:
        """The backend's distance where nothing is int8, in those of float16's noise."""
        return max(found.ratio() for found in self.measure(()).outputs.values())

    def measure(self, units: Collection[str]) -> Measured:
        """Builds and runs, unless this set was measured before."""
        key = frozenset(units)
        if key not in self.measured:
            names = cache.digest_of({"units": sorted(key)})
            known_by = cache.Key("gap", f"{len(key)} nodes", {**self.identity, "units_sha256": names})
            self.measured[key] = Measured.of(cache.value(known_by, lambda: asdict(self._measured(key))))
        return self.measured[key]

    def _measured(self, units: Collection[str]) -> Measured:
        if self._progress:
            self._progress(self.builds)
        self.builds += 1
        truth, noise, floats = self.reference.values(units), self.reference.noise(units), self.reference.values(())
        for name, value in (*truth.items(), *floats.items()):
            if not np.isfinite(value).all():
                raise AlignError(
                    f"ONNX Runtime gives values that are not finite at {name}",
                    "mend the graph first: an engine can be held to nothing there",
                )
        start = time.perf_counter()
        failure = ""
        try:
            found = self.candidate.outputs(self.subject.only(units), self.reference.images)
        except BuildError as error:
            failure, found = str(error), {name: np.full_like(value, np.nan) for name, value in truth.items()}
        seconds = time.perf_counter() - start
        outputs = {
            name: Distances(
                distances(found[name], value), noise[name], distances(floats[name], value), distances(value)
            )
            for name, value in truth.items()
        }
        return Measured(tuple(unit for unit in self.units if unit in units), outputs, round(seconds, 3), failure)


def outputs_of(model: ModelProto) -> tuple[str, ...]:
    """The float outputs that are compared: those that are not computed from other outputs, as boxes and scores are."""
    floats = [value.name for value in model.graph.output if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    behind: set[str] = set()
    for node in model.graph.node:
        if any(name in behind or name in floats for name in node.input):
            behind |= set(node.output)
    return tuple(name for name in floats if name not in behind)


def distances(values: np.ndarray, other: np.ndarray | float = 0.0) -> Each:
    """Mean of the absolute difference, image by image; infinite where it is not finite, or shapes differ."""
    if np.shape(other) not in ((), values.shape):
        return (math.inf,) * len(other)  # type: ignore[arg-type]
    with np.errstate(over="ignore", invalid="ignore"):
        means = np.abs(values.astype(np.float64) - other).reshape(len(values), -1).mean(1)
    return tuple(float(mean) if math.isfinite(mean) else math.inf for mean in means)
