"""AdaRound and bias correction: on layers whose best rounding is known to be another than the nearest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from alignment.data.samples import open_samples
from alignment.errors import AlignError
from alignment.quantize import recipe, reconstruction
from alignment.quantize.adaround import Options, SoftRounding, Unit, nearest, reconstruct
from alignment.variant import load_variant, with_quantization

OUT, IN = 16, 64
QUICK = Options(iterations=600, batch=256)


def layer(samples: int, correlation: float, noise: float = 0.0, seed: int = 0) -> Unit:
    """A 1 × 1 convolution on inputs that share a common part, which is what gives rounding something to make good."""
    random = np.random.default_rng(seed)
    weight = torch.from_numpy(random.normal(0, 0.1, (OUT, IN, 1, 1)).astype(np.float32))
    common, own = random.normal(0, 1, (samples, 1)), random.normal(0, 1, (samples, IN))
    inputs = torch.from_numpy((correlation * common + (1 - correlation) * own).astype(np.float32))[:, :, None, None]
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 7  # 4 bits: rounding matters
    targets = functional.conv2d(inputs, weight)
    targets = targets + torch.from_numpy(random.normal(0, noise, targets.shape).astype(np.float32))
    return Unit("/conv", inputs, targets, lambda x, w: functional.conv2d(x, w[0]), {"w": weight}, {"w": scale})


def test_at_the_start_the_soft_weight_is_the_weight():
    unit = layer(4, 0.5)
    soft = SoftRounding(unit.weights["w"], unit.scales["w"])
    torch.testing.assert_close(soft(), unit.weights["w"], rtol=0, atol=2e-4 * float(unit.scales["w"].max()))


@pytest.mark.parametrize(("variable", "least", "most"), [(9.0, 0.0, 1e-6), (-9.0, 0.0, 1e-6), (0.0, 1.0, 1.0)])
def test_the_regularizer_counts_what_is_between_levels(variable, least, most):
    soft = SoftRounding(torch.zeros(1), torch.ones(1))
    soft.variable.data.fill_(variable)
    assert least <= soft.undecided(20.0).item() <= most


def test_every_weight_goes_to_one_of_its_two_levels():
    unit = layer(512, 0.9)
    found = reconstruct(unit, QUICK).weights["w"] / unit.scales["w"]
    levels = unit.weights["w"] / unit.scales["w"]
    assert ((found - found.round()).abs() < 1e-5).all()
    assert ((found.round() == levels.floor()) | (found.round() == levels.ceil())).all()


def test_common_inputs_are_made_good_for():
    """To nearest, errors of weights that see the same input add up; AdaRound lets them cancel."""
    found = reconstruct(layer(2048, 0.9), QUICK)
    assert found.improved
    assert found.adaround < 0.2 * found.nearest


def test_what_fits_its_samples_alone_is_rounded_to_nearest():
    """Fewer samples than weights, and targets that are noise: the fit says nothing about others."""
    unit = layer(16, 0.0, noise=3.0)
    found = reconstruct(unit, QUICK)
    assert not found.improved
    assert torch.equal(found.weights["w"], nearest(unit.weights["w"], unit.scales["w"]))


def test_the_same_seed_finds_the_same():
    one, same, other = (
        reconstruct(layer(512, 0.9), replace(QUICK, iterations=50, batch=32, seed=seed)).weights["w"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_samples_that_leave_none_to_judge_by_are_refused():
    with pytest.raises(AlignError, match=r"1 samples.*calibrate on more images"):
        reconstruct(layer(1, 0.5))


@pytest.fixture(scope="module")
def detectors():
    """A float and a quantized embedded YOLOX of which one stage is in int8, and some images."""
    pytest.importorskip("mmyolo")
    pytest.importorskip("pytorch_quantization")
    from alignment.quantize.torch_model import float_detector, quantized_detector

    keep = ["*/stem/*", "*/stage[1-3]/*", "/detector/neck/*", "/detector/bbox_head/*"]
    variant = with_quantization(load_variant("yolox_embedded"), {"keep_float": keep, "images": 8})
    found = recipe.quantize(variant)

    def opened():
        return float_detector(variant, found.source), quantized_detector(variant, found)

    return opened, found, [sample.tensor[None] for sample in open_samples(variant, limit=6)]


def distance(one, other, images) -> float:
    """Mean squared difference of the scores' logits, as nearly as scores tell."""
    total = 0.0
    with torch.no_grad():
        for image in map(torch.from_numpy, images):
            ours, theirs = (torch.logit(m(image)[1].double(), 1e-9) for m in (one, other))
            total += float((ours - theirs).square().mean())
    return total


@pytest.mark.parametrize(("rounding", "steps"), [("adaround", 150), ("brecq", 20)])
def test_units_of_a_network_end_on_whole_steps(detectors, rounding, steps, monkeypatch):
    monkeypatch.setattr(reconstruction, "PLACES", 2048)
    opened, found, images = detectors
    options = Options(iterations=steps, batch=64)
    better = reconstruction.improve(*opened(), images, rounding, options=options)
    assert set(better.weights) == {q.initializer for q in found.placement.weights}
    assert not better.biases
    layers = len(found.placement.weights)
    assert len(better.units) == layers if rounding == "adaround" else 0 < len(better.units) < layers
    if rounding == "adaround":
        assert sum(unit.improved for unit in better.units) > len(better.units) / 2
    for name, weight in better.weights.items():
        levels = weight / found.weight_scales[name].reshape(-1, 1, 1, 1)
        assert np.abs(levels - np.rint(levels)).max() < 1e-3


def test_a_mean_error_that_was_planted_is_taken_off_the_biases(detectors, monkeypatch):
    monkeypatch.setattr(reconstruction, "PLACES", 2048)
    opened, found, images = detectors
    float_model, quantized = opened()
    planted = 0.3
    nodes = {q.node for q in found.placement.weights}
    modules = dict(quantized.detector.named_modules())
    paths = [path for (path, op), calls in quantized._plan.items() if op == "Conv" and calls[0].node in nodes]
    for path in paths:
        modules[path].bias.data += planted
    shifted = distance(float_model, quantized, images)
    better = reconstruction.improve(float_model, quantized, images, "nearest", correct_bias=True)
    assert set(better.biases) == nodes
    assert not better.weights
    assert distance(float_model, quantized, images) < 0.05 * shifted
