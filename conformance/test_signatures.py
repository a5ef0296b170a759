"""Signatures of a graph: whatever differs shows, what rounding moves does not, and the first layer is named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.samples import open_samples
from alignment.results import GraphSignature, LayerSignature
from alignment.signatures import SAME_OUTPUT, SAME_WEIGHTS, alike, first_change, graph_signature, sketch
from alignment.variant import load_variant


def tensor(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 2.0, size)


@given(st.integers(0, 999), st.integers(1, 5000))
@settings(deadline=None, max_examples=50)
def test_rounding_to_float32_leaves_a_sketch_alike(seed: int, size: int):
    x = tensor(seed, size)
    assert alike(sketch(x), sketch(x.astype(np.float32)), SAME_WEIGHTS)


@given(st.integers(0, 999), st.integers(64, 5000), st.floats(0.01, 10))
@settings(deadline=None, max_examples=50)
def test_one_channel_of_64_that_is_scaled_shows(seed: int, size: int, factor: float):
    x = tensor(seed, size)
    y = x.copy()
    y[: len(y) // 64] *= 1 + factor
    assert not alike(sketch(x), sketch(y), SAME_WEIGHTS)


def test_a_permutation_shows_though_its_mean_and_power_are_the_same():
    x = tensor(0, 512)
    assert not alike(sketch(x), sketch(x[::-1]), SAME_OUTPUT)


def test_a_sketch_is_as_the_definition_has_it():
    values = sketch(np.full(4, 3.0))
    assert values[0] == 3.0
    assert all(value in (-6.0, -3.0, 0.0, 3.0, 6.0) for value in values[1:])  # 3 × (±1 ±1 ±1 ±1) / √4
    assert sketch(np.zeros(0)) == [0.0] * len(values)


def test_what_is_not_finite_is_alike_only_to_the_same():
    broken = sketch(np.array([1.0, np.inf]))
    assert alike(broken, sketch(np.array([1.0, np.inf])), SAME_OUTPUT)
    assert not alike(broken, sketch(np.ones(2)), SAME_OUTPUT)


LAYERS = [("stem", 0), ("neck", 1), ("head", 2)]


def signature(weights: dict[str, int] | None = None, outputs: dict[str, int] | None = None) -> GraphSignature:
    """Three layers and an output; the dictionaries give another seed to some."""
    weights, outputs = weights or {}, outputs or {}
    found = GraphSignature(image_id=7, input_digest="a" * 16)
    for name, seed in LAYERS:
        held, answer = (sketch(tensor(other.get(name, seed), 90)) for other in (weights, outputs))
        found.layers.append(LayerSignature(node=f"/{name}/Conv", op="Conv", module=name, weights=held, output=answer))
    answer = sketch(tensor(outputs.get("boxes", 9), 90))
    found.layers.append(LayerSignature(node="boxes", op="output", output=answer))
    return found


def test_the_same_graph_has_not_changed():
    assert first_change(signature(), signature()) is None


def test_one_layer_with_other_weights_is_named_though_all_behind_it_answer_otherwise():
    changed = signature({"neck": 50}, {"neck": 51, "head": 52, "boxes": 53})
    found = first_change(changed, signature())
    assert found is not None
    assert (found.stage, found.layer) == ("raw", "/neck/Conv (Conv) of module neck")
    assert found.reason == "its weights are others, those of all other layers are not"


def test_other_weights_that_change_no_answer_are_named_too():
    found = first_change(signature({"head": 50}), signature())
    assert found is not None
    assert found.layer.startswith("/head/Conv")


def test_a_layer_without_other_weights_may_be_the_first_and_more_than_one_layer_trained():
    found = first_change(signature({"neck": 50, "head": 50}, {"stem": 50}), signature())
    assert found is not None
    assert found.layer.startswith("/stem/Conv")
    assert found.reason == "2 of 4 layers hold other weights, first /neck/Conv (Conv) of module neck"


def test_an_output_alone_is_the_decoded_stage():
    found = first_change(signature(outputs={"boxes": 50}), signature())
    assert found is not None
    assert (found.stage, found.layer) == ("decoded", "boxes (output)")
    assert "layer without weights" in found.reason


def test_other_bytes_that_go_in_come_before_any_layer():
    other = signature({"neck": 50}).model_copy(update={"input_digest": "b" * 16})
    found = first_change(other, signature())
    assert found is not None
    assert (found.stage, found.layer) == ("input", "")


def test_another_graph_is_told_by_its_first_layer():
    other = signature()
    other.layers.insert(1, LayerSignature(node="/extra/Conv", op="Conv", output=[1.0]))
    found = first_change(other, signature())
    assert found is not None
    assert (found.layer, found.reason) == ("/extra/Conv", "another graph: layer 2 was /neck/Conv (Conv)")


def test_another_image_tells_nothing():
    with pytest.raises(ValueError, match="image 8 was looked at, in the baseline image 7"):
        first_change(signature().model_copy(update={"image_id": 8}), signature())


def test_a_real_graph_signs_the_same_twice_and_names_its_modules():
    pytest.importorskip("mmyolo")
    variant = load_variant("yolov8_embedded")
    samples = open_samples(variant, limit=1)
    one, other = graph_signature(variant, samples), graph_signature(variant, samples)
    assert one is not None
    assert one == other
    layers = [layer for layer in one.layers if layer.op != "output"]
    assert len(layers) > 50
    assert all(layer.module and layer.weights for layer in layers)
    assert {"boxes", "scores"} <= {layer.node for layer in one.layers if layer.op == "output"}
