"""The metrics of a sensitivity sweep are their formulas, and rankings begin with what int8 spoils most."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from alignment.errors import AlignError
from alignment.quantize.sensitivity import (
    CANDIDATE,
    METRICS,
    Distortion,
    LayerSensitivity,
    Sensitivity,
    kl_divergence,
)

pytestmark = pytest.mark.sensitivity
NUMBERS = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
TENSORS = st.integers(1, 40).flatmap(lambda n: st.tuples(*[arrays(np.float32, (1, n), elements=NUMBERS)] * 2))
SCORES = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[arrays(np.float32, (1, n, 2), elements=st.floats(0, 1, width=32))] * 2)
)


def metrics_of(*pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    found = Distortion()
    for reference, subject in pairs:
        found.add(reference, subject)
    return found.metrics()


@settings(deadline=None)  # the first example imports torch
@given(TENSORS)
def test_one_pair_is_the_formula(pair):
    torch = pytest.importorskip("torch")
    reference, subject = (torch.tensor(side.astype(np.float64)) for side in pair)
    found = metrics_of(pair)
    noise, signal = float(((reference - subject) ** 2).sum()), float((reference**2).sum())
    assert found["mse"] == pytest.approx(float(torch.nn.functional.mse_loss(subject, reference)), rel=1e-4)
    if signal and (subject**2).sum():
        cosine = float(torch.nn.functional.cosine_similarity(reference, subject))
        assert found["cosine"] == pytest.approx(cosine, abs=1e-5)
    if signal and noise:
        assert found["sqnr"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)


@given(st.lists(TENSORS, min_size=1, max_size=5))
def test_several_pairs_are_means(pairs):
    found, alone = metrics_of(*pairs), [metrics_of(pair) for pair in pairs]
    for name in ("mse", "cosine"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in alone]))
    noise = np.mean([10 ** (-one["sqnr"] / 10) for one in alone])
    assert found["sqnr"] == pytest.approx(-10 * math.log10(noise), abs=1e-6)


def test_equal_and_empty_tensors():
    zeros, ones = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    most = 20 * math.log10(2**23)
    assert metrics_of((ones, ones)) == {"mse": 0, "cosine": 1, "sqnr": pytest.approx(most)}
    assert metrics_of((zeros, zeros)) == {"mse": 0, "cosine": 1, "sqnr": pytest.approx(most)}
    assert metrics_of((zeros, ones)) == {"mse": 1, "cosine": 0, "sqnr": pytest.approx(-most)}
    assert metrics_of((np.full((1, 4), 1e-30, np.float32), zeros))["sqnr"] == pytest.approx(most)
    assert metrics_of() == {}


def test_a_tensor_of_small_numbers_counts_as_much_as_one_of_large_ones():
    signal = np.ones((1, 8), np.float32)
    spoilt = signal * np.float32(1.1)
    small, large = ((signal * factor, spoilt * factor) for factor in np.float32([1e-3, 1e3]))
    assert metrics_of(small, (signal, signal))["sqnr"] == pytest.approx(
        metrics_of(large, (signal, signal))["sqnr"], abs=1e-3
    )
    assert metrics_of(large, (signal, signal))["sqnr"] == pytest.approx(20 + 10 * math.log10(2), abs=1e-3)


@given(SCORES)
def test_divergence_of_scores(pair):
    torch = pytest.importorskip("torch")
    p, q = (torch.tensor(side.astype(np.float64)).clamp(1e-7, 1 - 1e-7) for side in pair)
    bernoulli = torch.distributions.Bernoulli
    each = torch.distributions.kl_divergence(bernoulli(p), bernoulli(q))
    counted = (torch.tensor(pair[0]) >= CANDIDATE) | (torch.tensor(pair[1]) >= CANDIDATE)
    found = kl_divergence(*pair)
    assert found == pytest.approx(float(each[counted].sum()), rel=1e-6, abs=1e-7)
    assert found >= -1e-12


def test_a_box_that_appears_counts_and_background_does_not():
    nothing, background, box = (np.full((1, 1, 1), value, np.float32) for value in (0, CANDIDATE / 2, 0.5))
    assert kl_divergence(nothing, background) == 0
    assert kl_divergence(nothing, box) == pytest.approx(math.log(2), abs=1e-4)
    assert kl_divergence(box, nothing) > 1


def sensitivity(mode: str, *layers: dict[str, float]) -> Sensitivity:
    found = [LayerSensitivity(node=f"n{i}", module="", macs=1, metrics=one) for i, one in enumerate(layers)]
    return Sensitivity(
        variant="v", mode=mode, part="both", identity={"images": "3"}, images=3, baseline={"ap": 0.5}, layers=found
    )


@pytest.mark.parametrize(
    ("mode", "metric", "first"),
    [
        ("quantize-one", "kl", "n1"),
        ("quantize-one", "sqnr", "n0"),
        ("quantize-one", "cosine@layer", "n0"),
        # What is left out takes its error with it, but its own output is held to what it was in int8.
        ("leave-one-out", "kl", "n0"),
        ("leave-one-out", "sqnr", "n1"),
        ("leave-one-out", "cosine@layer", "n0"),
        ("leave-one-out", "mse@layer", "n1"),
    ],
)
def test_the_most_sensitive_comes_first(mode, metric, first):
    found = sensitivity(mode, {metric: 0.1}, {metric: 0.9})
    assert found.ranking(metric) == [first, "n1" if first == "n0" else "n0"]


def test_those_that_are_alike_stay_in_the_order_of_the_graph():
    for mode in ("quantize-one", "leave-one-out"):
        assert sensitivity(mode, *[{"map": 0.0}] * 5).ranking("map") == ["n0", "n1", "n2", "n3", "n4"]


def test_a_metric_that_is_not_there():
    found = sensitivity("quantize-one", {"map": 0.1})
    with pytest.raises(AlignError, match="no metric is named 'psnr': choose from map, agreement"):
        found.ranking("psnr")
    with pytest.raises(AlignError, match="do not have the metric kl: choose from map"):
        found.ranking("kl")


@settings(max_examples=20)
@given(
    st.sets(st.sampled_from(list(METRICS))).flatmap(
        lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(sorted(names), st.floats(-1e9, 1e9))), max_size=4)
    )
)
def test_a_file_is_read_as_it_was_written(tmp_path_factory, layers):
    path = tmp_path_factory.mktemp("sweep") / "v.sensitivity.json"
    found = sensitivity("leave-one-out", *layers)
    found.save(path)
    assert Sensitivity.load(path) == found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"variant": "v"', "Expecting"),
        ("[]", "valid dictionary"),
        (json.dumps({"variant": "v", "mode": "all"}), "mode: Input should be 'quantize-one' or 'leave-one-out'"),
        ("\xff", "decode"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, text, reason):
    path = tmp_path / "v.sensitivity.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(AlignError, match=rf"v\.sensitivity\.json: not a sensitivity sweep: .*{reason}.*: delete it"):
        Sensitivity.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(AlignError, match="write one by `align sensitivity`"):
        Sensitivity.load(tmp_path / "v.sensitivity.json")
