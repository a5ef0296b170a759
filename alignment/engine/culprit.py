"""Which Q/DQ pairs make an engine worse than the same QDQ graph in ONNX Runtime, and what shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from alignment.engine.delta import LIMIT, Blamed, search
from alignment.engine.gap import Comparison, distances
from alignment.engine.qdq_backends import NodeByNode
from alignment.errors import AlignError
from alignment.quantize.graph import OnnxGraph


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
        gap: of that set alone; infinite where no engine comes of it.
        failure: why none comes; empty where one does.
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
    failure: str
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
    found: Blamed
    culprits: tuple[Culprit, ...]


def find(
    comparison: Comparison,
    blocks: int = 1,
    cost: Callable[[str], float] = lambda unit: 0.0,
    modules: Mapping[str, str] | None = None,
    limit: int = LIMIT,
) -> Verdict:
    """The smallest set of units without whose Q/DQ pairs the backend does what ONNX Runtime does, with evidence.

    Args:
        comparison: of a backend with ONNX Runtime.
        blocks: see `alignment.engine.delta.search`.
        cost: of leaving a unit float, its multiplications say.
        modules: node → torch module, as far as it is known.
        limit: stop after so many sets.
    """
    found = search(comparison.bad, comparison.units, blocks, cost, limit)
    kept = [unit for unit in comparison.units if unit not in found.removal]
    culprits = tuple(_culprit(comparison, unit, _core(found, unit), modules or {}) for unit in found.removal)
    whole, mended = comparison.gap(comparison.units), comparison.gap(kept)
    return Verdict(whole, mended, comparison.float_gap, found, culprits)


def _core(found: Blamed, unit: str) -> tuple[str, ...]:
    return next(core for core in found.cores if unit in core)


def _culprit(comparison: Comparison, unit: str, core: tuple[str, ...], modules: Mapping[str, str]) -> Culprit:
    graph, gaps = comparison.subject, comparison.gaps(core)
    node = next(node for node in graph.model.graph.node if node.name == unit)
    worst = max(gaps, key=gaps.__getitem__)
    pairs = [pair for pair in graph.pairs if pair.node == unit]
    scales = {pair.tensor: float(np.amax(graph.values(pair.scale))) for pair in pairs if not pair.stored}
    steps = [graph.values(pair.scale) for pair in pairs if pair.stored]
    spread = (float(min(map(np.amin, steps))), float(max(map(np.amax, steps)))) if steps else None
    failure = comparison.measure(core).failure
    tensors = () if failure else _tensors(comparison, unit, core)
    module = modules.get(unit, "")
    return Culprit(unit, node.op_type, module, core, gaps[worst], failure, worst, scales, spread, tensors)


def _tensors(comparison: Comparison, unit: str, core: tuple[str, ...]) -> tuple[TensorError, ...]:
    """What the unit reads and gives, in the backend and in ONNX Runtime, where only its core reads int8."""
    graph, images = comparison.reference.graph, comparison.reference.images
    subject, reference, floating = comparison.subject.only(core), graph.only(core), graph.only(())
    lookup = OnnxGraph(floating)
    node = lookup.nodes[lookup.position[unit]]
    known = {value.name for value in (*subject.graph.input, *subject.graph.output)}
    read = [pair.tensor for pair in comparison.subject.pairs if pair.node == unit and not pair.stored]
    roles = {tensor: "reads" for tensor in read} | {_activated(lookup, name): "gives" for name in node.output}
    plain, whole = NodeByNode(), set(comparison.candidate.layers(subject))
    found = []
    for tensor, role in roles.items():
        if tensor in known:
            continue
        try:
            ours = comparison.candidate.outputs(subject, images, (tensor,))[tensor]
            changed = set(comparison.candidate.layers(subject, (tensor,))) != whole
        except AlignError:
            continue  # an engine's network may lack a tensor, or not be built with it as an output
        truth = plain.outputs(reference, images, (tensor,))[tensor]
        floats = plain.outputs(floating, images, (tensor,))[tensor]
        size = max(float(np.mean(distances(truth))), 1e-30)
        error, int8 = (float(np.mean(distances(other, truth))) / size for other in (ours, floats))
        found.append(TensorError(tensor, role, error, int8, changed))
    return tuple(found)


def _activated(graph: OnnxGraph, tensor: str) -> str:
    """The tensor behind the activation of a convolution's output, which a backend computes with it."""
    outputs = [name for node in graph.nodes for name in node.output]
    # The last: of ``x * Sigmoid(x)`` the product.
    return next((name for name in reversed(outputs) if graph.before_activation(name) == tensor), tensor)
