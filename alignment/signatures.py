"""What each layer of a variant answers to one image, in a few numbers: two RUNs pin a change to its first layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from alignment.data.samples import Samples
from alignment.errors import AlignError
from alignment.export.onnx_export import exported, modules_of
from alignment.layers import mark_outputs
from alignment.results import GraphSignature, LayerSignature
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.scratch import scratch_folder
from alignment.variant import Variant

#: Operators that are layers with weights.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PROJECTIONS = 4
#: Of a tensor's root mean square: another CPU's order of sums moves outputs by some 1e-5, folding a BatchNorm in
#: another version of torch moves weights by 1e-7.
SAME_OUTPUT, SAME_WEIGHTS = 1e-3, 1e-5


def sketch(tensor: np.ndarray) -> list[float]:
    """The root mean square of a tensor, and `PROJECTIONS` of it onto fixed random signs.

    A projection p = Σ sᵢ xᵢ / √n is as large as the root mean square of x (Johnson and Lindenstrauss; signs by
    Achlioptas, 2003), so those of two tensors are as far apart as the root mean square of their difference: whatever
    differs shows, in one channel or in all.
    """
    flat = np.asarray(tensor, np.float64).ravel()
    if not flat.size:
        return [0.0] * (1 + PROJECTIONS)
    random = np.random.default_rng(0)
    found = [np.sqrt(np.mean(flat**2))]
    for _ in range(PROJECTIONS):
        bits = np.unpackbits(np.frombuffer(random.bytes(-(-flat.size // 8)), np.uint8), count=flat.size)
        with np.errstate(invalid="ignore"):  # of infinite values NaN is what is to be told
            found.append((2 * flat[bits == 1].sum() - flat.sum()) / np.sqrt(flat.size))
    return [float(f"{value:.7g}") for value in found]


def alike(one: list[float], other: list[float], tolerance: float) -> bool:
    """Whether two sketches are of the same tensor, but for `tolerance` × its root mean square."""
    if len(one) != len(other) or not np.isfinite([*one, *other]).all():
        return np.array_equal(one, other, equal_nan=True)
    return bool(np.abs(np.subtract(one, other)).max(initial=0.0) <= tolerance * max(one[0], other[0]))


def graph_signature(variant: Variant, samples: Samples) -> GraphSignature | None:
    """The signature of the variant's FP32 graph on the first of `samples`, by ONNX Runtime; None where that cannot run
    it, as a graph that ends in a plugin of TensorRT's."""
    path = exported(variant).onnx
    model = onnx.load(path)
    constants = {i.name: i for i in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in WEIGHTED]
    sample = samples.load(samples.dataset.images[0])
    found = GraphSignature(image_id=sample.entry.id, input_digest=sample.digest)
    with scratch_folder() as folder:
        marked = folder / path.name
        onnx.save(mark_outputs(model, [node.output[0] for node in layers]), marked)
        try:
            with OnnxRuntimeRunner(marked) as runner:
                answers = runner.run(sample.tensor[None])
        except AlignError:
            return None
    modules = modules_of(path)
    for node in layers:
        held = [onnx.numpy_helper.to_array(constants[name]).ravel() for name in node.input if name in constants]
        found.layers.append(
            LayerSignature(
                node=node.name,
                op=node.op_type,
                module=modules.get(node.name, ""),
                weights=sketch(np.concatenate(held)) if held else None,
                output=sketch(answers[node.output[0]]),
            )
        )
    ends = [o.name for o in model.graph.output]
    found.layers += [LayerSignature(node=name, op="output", output=sketch(answers[name])) for name in ends]
    return found


@dataclass(frozen=True)
class FirstChange:
    """Where two signatures part.

    Attributes:
        stage: ``input`` where the image's bytes differ, ``raw`` for a layer, ``decoded`` for the graph's outputs alone.
        layer: the first layer that answers otherwise; empty at the input.
        reason: in words, with how many layers hold other weights, and the first of them.
    """

    stage: Literal["input", "raw", "decoded"]
    layer: str
    reason: str


def first_change(run: GraphSignature, baseline: GraphSignature) -> FirstChange | None:
    """The first place where a graph answers otherwise than it did; None where it answers the same.

    Raises:
        ValueError: for signatures on different images, of which nothing can be said.
    """
    if run.image_id != baseline.image_id:
        raise ValueError(f"image {run.image_id} was looked at, in the baseline image {baseline.image_id}")
    if run.input_digest != baseline.input_digest:
        return FirstChange("input", "", f"image {run.image_id}, or its preprocessing, is another: other bytes go in")
    for place, (one, other) in enumerate(zip(run.layers, baseline.layers, strict=False)):
        if (one.node, one.op) != (other.node, other.op):
            return FirstChange("raw", one.node, f"another graph: layer {place + 1} was {other.node} ({other.op})")
    if len(run.layers) != len(baseline.layers):
        return FirstChange("raw", "", f"another graph: {len(run.layers)} layers, {len(baseline.layers)} before")
    changed = list(_other_weights(run, baseline))
    for one, other in zip(run.layers, baseline.layers, strict=True):
        if not alike(one.output, other.output, SAME_OUTPUT) or (changed and one is changed[0]):
            stage: Literal["raw", "decoded"] = "decoded" if one.op == "output" else "raw"
            return FirstChange(stage, named(one), _weights_in_words(one, changed, len(run.layers)))
    return None


def named(layer: LayerSignature) -> str:
    """Node, operator and module in words."""
    return f"{layer.node} ({layer.op})" + (f" of module {layer.module}" if layer.module else "")


def _other_weights(run: GraphSignature, baseline: GraphSignature) -> Iterator[LayerSignature]:
    for one, other in zip(run.layers, baseline.layers, strict=True):
        if one.weights is None or other.weights is None:
            if one.weights != other.weights:
                yield one
        elif not alike(one.weights, other.weights, SAME_WEIGHTS):
            yield one


def _weights_in_words(first: LayerSignature, changed: list[LayerSignature], count: int) -> str:
    if not changed:
        return "all layers hold the weights that they held: an attribute, or a layer without weights"
    if len(changed) == 1 and changed[0] is first:
        return "its weights are others, those of all other layers are not"
    return f"{len(changed)} of {count} layers hold other weights, first {named(changed[0])}"
