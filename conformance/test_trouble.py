"""Each detector of trouble finds what was planted for it, and nothing in a sound variant."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from alignment.quantize import recipe
from alignment.quantize.recipe import Quantized
from alignment.quantize.trouble import Trouble, troubles
from alignment.variant import load_variant, with_quantization


@pytest.fixture(scope="module")
def sound(quantized_build) -> Quantized:
    return quantized_build(with_quantization(load_variant("yolov8_embedded"), {"images": 4, "method": "percentile"}))


def kinds(found: list[Trouble]) -> set[str]:
    return {trouble.kind for trouble in found}


def test_nothing_in_a_sound_variant(sound):
    assert troubles(sound) == []


def test_a_channel_that_dwarfs_the_others(sound):
    calibration = copy.deepcopy(sound.calibration)
    quantizer = sound.placement.activations[3]
    channels = calibration.tensors[quantizer.tensor].channels
    channels[1:] = channels[0] / 1000
    (found,) = troubles(replace(sound, calibration=calibration), {quantizer.readers[0][0]: "backbone.stage"})
    assert (found.kind, found.tensor, found.module) == ("starved channels", quantizer.tensor, "backbone.stage")
    assert found.value == pytest.approx(1 - 1 / len(channels))
    assert f"--keep-float {quantizer.readers[0][0]}" in str(found)


def test_a_range_that_is_far_too_wide(sound):
    tensor = sound.placement.activations[0].tensor
    found = troubles(replace(sound, amax={**sound.amax, tensor: 200 * sound.amax[tensor]}))
    assert kinds(found) == {"low SQNR"}
    assert found[0].tensor == tensor


@pytest.mark.parametrize("amax", [0.0, 1e-44])
def test_a_tensor_without_range(sound, amax):
    tensor = list(sound.amax)[-1]
    (found,) = troubles(replace(sound, amax={**sound.amax, tensor: amax}))
    assert (found.kind, found.tensor) == ("vanishing scale", tensor)


def test_weights_beyond_their_range(sound):
    name = sound.placement.weights[0].initializer
    half = sound.weight_scales[name] / np.float32(3)
    (found,) = troubles(replace(sound, weight_scales={**sound.weight_scales, name: half}))
    assert (found.kind, found.tensor) == ("clipped weights", name)


def test_channels_of_very_different_weights(sound):
    name = sound.placement.weights[0].initializer
    scales = sound.weight_scales[name].copy()
    scales[0] *= 2000
    assert kinds(troubles(replace(sound, weight_scales={**sound.weight_scales, name: scales}))) == {"uneven channels"}


def test_the_hard_variant_is_found_and_equalization_mends_it():
    """yolov6_embedded has channels that were rescaled through its Relus; see `alignment.models.rescale`."""
    variant = with_quantization(load_variant("yolov6_embedded"), {"images": 4, "method": "percentile"})
    before = [t for t in troubles(recipe.quantize(variant)) if t.kind == "starved channels"]
    equalized = with_quantization(variant, {"equalization": True})
    after = [t for t in troubles(recipe.quantize(equalized)) if t.kind == "starved channels"]
    assert len(before) >= 3
    assert len(after) < len(before)
