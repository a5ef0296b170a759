"""Observers: statistics that do not depend on order or batches, and the methods, held against those of others."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from alignment.errors import AlignError
from alignment.quantize.observers import (
    ENTROPY_BINS,
    FRACTIONS,
    LEVELS,
    METHODS,
    PERCENTILE,
    amax_of,
    fake_quantize,
    scale_of,
    squared_error,
    weight_amax,
)
from alignment.quantize.statistics import AVERAGING, BINS, Statistics

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
#: Of like size: hardly any two of `FINITE` are.
NEAR = st.floats(-8, 8, width=32)
TINY = float(np.finfo(np.float32).smallest_subnormal)


def samples(name: str) -> np.ndarray:
    """``[8, 4, 25, 40] float32`` values as activations have them."""
    rng = np.random.default_rng(7)
    normal = rng.normal(size=(8, 4, 25, 40))
    values = {
        "gaussian": normal,
        "heavy tail": rng.standard_t(3, normal.shape),
        "relu": np.maximum(normal, 0),
        "silu": 3 * normal / (1 + np.exp(-3 * normal)),
        "outlier": np.where(np.arange(normal.size).reshape(normal.shape) == 12345, 1000, normal),
        "few large": np.where(np.arange(normal.size).reshape(normal.shape) % 500, normal, 20 * normal),
        "constant": np.full(normal.shape, 0.7),
        "denormals": normal * 1e-41,
        "zeros": np.zeros(normal.shape),
    }
    return values[name].astype(np.float32)


SPREAD = ("gaussian", "heavy tail", "relu", "silu", "outlier", "few large")
ALL = (*SPREAD, "constant", "denormals", "zeros")


def observed(*batches: np.ndarray) -> Statistics:
    statistics = Statistics()
    for batch in batches:
        statistics.add(batch)
    return statistics


def content(statistics: Statistics, *but: str) -> dict[str, tuple]:
    """All that is kept, to the bit."""
    found = statistics.to_arrays()
    return {key: (a.dtype, a.shape, a.tobytes()) for key, a in found.items() if key not in but}


IMAGES = st.integers(1, 6).flatmap(lambda n: arrays(np.float32, (n, 2, 1, 3), elements=FINITE | NEAR))


@settings(max_examples=300, deadline=None)
@given(IMAGES, st.data())
def test_order_and_batches_do_not_change_a_bit(images, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(images)), max_size=4)))
    whole = observed(images)
    assert content(observed(*np.split(images, cuts))) == content(whole)
    shuffled = images[data.draw(st.permutations(range(len(images))))]
    assert content(observed(shuffled), "average") == content(whole, "average")


@settings(max_examples=300, deadline=None)
@given(IMAGES)
def test_every_value_is_in_the_bin_that_exact_arithmetic_finds(images):
    statistics, largest = observed(images), float(np.abs(images).max())
    if largest:
        assert largest < BINS * statistics.width
        assert statistics.exponent == -126 or largest >= BINS * statistics.width / 2, "the least width that will do"
    expected = np.zeros(2 * BINS, np.int64)
    for value in images.ravel():
        expected[BINS + math.floor(Fraction(float(value)) / Fraction(statistics.width))] += 1
    np.testing.assert_array_equal(statistics.counts, expected)


@pytest.mark.parametrize("shape", [(1, 1_200_007), (1, 3, 700, 701), (2, 1_000_003, 1, 1), (1, 400_000, 1, 3)])
def test_long_tensors_are_counted_whole(shape):
    """Whatever the rows and pieces that they are counted in."""
    values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    statistics = observed(values)
    bins = np.floor(values.ravel() / np.float64(statistics.width)).astype(int) + BINS
    np.testing.assert_array_equal(statistics.counts, np.bincount(bins, minlength=2 * BINS))
    assert statistics.elements == statistics.counts.sum() == values.size


def test_negative_values_that_are_nothing_beside_the_largest_keep_their_sign():
    """-1e-45 / 2 is -0 in float32."""
    for order in ([-TINY, 1e30], [1e30, -TINY]):
        statistics = observed(*np.array(order, np.float32).reshape(2, 1, 1))
        assert statistics.counts[BINS - 1] == 1


def test_zeros_have_no_sign():
    zeros = np.array([0.0, -0.0], np.float32).reshape(2, 1)
    assert content(observed(zeros)) == content(observed(zeros[::-1]))


@pytest.mark.parametrize("name", ALL)
def test_range_and_channels_are_those_of_the_values(name):
    values = samples(name)
    statistics = observed(*np.split(values, 4))
    assert (statistics.minimum, statistics.maximum) == (values.min(), values.max())
    assert statistics.elements == values.size
    np.testing.assert_array_equal(statistics.channels, np.abs(values).max((0, 2, 3)))


def test_the_moving_average_is_torchs_image_by_image():
    torch = pytest.importorskip("torch")
    observer = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=AVERAGING)
    values = samples("gaussian")
    for image in values:
        observer(torch.from_numpy(image))
    expected = (float(observer.min_val), float(observer.max_val))
    np.testing.assert_allclose(observed(values).average, expected, rtol=1e-6)  # torch's is in float32
    assert amax_of(observed(values), "moving_average") == max(map(abs, observed(values).average))


def test_memory_does_not_grow_with_what_is_seen():
    def size(statistics: Statistics) -> int:
        return sum(array.nbytes for array in statistics.to_arrays().values())

    statistics = observed(samples("gaussian"))
    before = size(statistics)
    for power in range(0, 100, 10):
        statistics.add(samples("gaussian") * np.float32(2.0**power))
    assert size(statistics) == before < 2 * BINS * 8 + 256


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ["gaussian", "outlier", "denormals", "zeros"])
def test_joined_statistics_are_those_of_all_values(first, second):
    values = samples(first), samples(second)
    joined, parts = Statistics(), [observed(value) for value in values]
    joined.join(parts, np.concatenate([part.channels for part in parts]))
    for low, high in Statistics().add(np.concatenate(values, axis=1)):
        joined.add_range(low, high)
    assert content(joined) == content(observed(np.concatenate(values, axis=1)))


@pytest.mark.parametrize("name", ALL)
def test_arrays_there_and_back(name):
    before = observed(samples(name))
    after = Statistics.from_arrays({key: array.copy() for key, array in before.to_arrays().items()})
    assert content(after) == content(before)
    for statistics in (before, after):
        statistics.add(2 * samples("silu"))
    assert content(after) == content(before)
    assert content(Statistics.from_arrays(Statistics().to_arrays())) == content(Statistics())


def test_arrays_of_something_else_are_refused():
    with pytest.raises(ValueError, match="bins"):
        Statistics.from_arrays(observed(samples("relu")).to_arrays() | {"counts": np.zeros(7, np.int64)})
    with pytest.raises(KeyError):
        Statistics.from_arrays({"counts": np.zeros(2 * BINS, np.int64)})


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 60), (2,)])
def test_what_is_not_finite_is_refused_and_not_kept(fault, shape):
    values = np.ones(shape, np.float32)
    values.flat[-1] = fault
    statistics = observed(values[:1])
    before = content(statistics)
    with pytest.raises(ValueError, match="not finite"):
        statistics.add(values[1:])
    assert content(statistics) == before


@pytest.mark.parametrize("shape", [(0, 4), (1, 0, 4), (0, 2, 3, 3), (1, 0, 3, 3), (2, 3, 0, 1)])
def test_tensors_without_elements_add_nothing(shape):
    assert content(observed(np.zeros(shape, np.float32))) == content(Statistics())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_zeros_has_no_range(method):
    assert amax_of(Statistics(), method) == amax_of(observed(samples("zeros")), method) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_zeros_that_came_first_count(method):
    zeros, values = samples("zeros"), samples("gaussian")
    first, last = observed(zeros, values), observed(values, zeros)
    assert content(first, "average") == content(last, "average")
    if method != "moving_average":
        assert amax_of(first, method) == amax_of(last, method)


@pytest.mark.parametrize("name", [name for name in ALL if name != "zeros"])
@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_within_the_values_and_go_with_their_size(method, name):
    values = samples(name)
    amax = amax_of(observed(values), method)
    assert 0 < amax <= np.abs(values).max()
    if name != "denormals":
        for power in (-40, 13, 60):
            assert amax_of(observed(values * np.float32(2.0**power)), method) == amax * 2.0**power


@pytest.mark.parametrize("method", ["minmax", "percentile", "histogram", "entropy"])
def test_a_constant_is_its_own_range(method):
    assert amax_of(observed(samples("constant")), method) == np.float32(0.7)


def test_a_method_that_does_not_exist():
    with pytest.raises(AlignError, match="'median'") as caught:
        amax_of(observed(samples("relu")), "median")
    assert all(method in str(caught.value) for method in METHODS)


@pytest.mark.parametrize("name", ALL)
def test_percentile_is_numpys_quantile_to_a_bin(name):
    statistics = observed(samples(name))
    expected = np.quantile(np.abs(samples(name)).astype(np.float64), PERCENTILE / 100, method="inverted_cdf")
    assert 0 <= amax_of(statistics, "percentile") - expected <= statistics.width


def entropy_bins(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Counts of |x| in bins twice as wide, up to the last that is not empty, and their edges."""
    counts, width = statistics.magnitudes()
    joined = np.append(counts, np.zeros(len(counts) % 2)).reshape(-1, 2).sum(1)
    assert len(joined) <= ENTROPY_BINS
    return joined, 2 * width * np.arange(len(joined) + 1)


def divergence(bins: np.ndarray, kept: int) -> float:
    """Kullback-Leibler, of the first `kept` bins, with what is beyond in the last of them, from 128 levels."""
    levels = np.arange(kept) * LEVELS // kept
    held = np.where(bins[:kept] > 0, 1.0, 0.0)
    mass, filled = (np.bincount(levels, weights, LEVELS) for weights in (bins[:kept], held))
    spread = held * (mass / np.maximum(filled, 1))[levels]
    clipped = bins[:kept].copy()
    clipped[-1] += bins[kept:].sum()
    if ((clipped > 0) & (spread == 0)).any():
        return math.inf
    p, q = (side[clipped > 0] / side.sum() for side in (clipped, spread))
    return float((p * np.log(p / q)).sum())


def expected_entropy(statistics: Statistics) -> float:
    bins, edges = entropy_bins(statistics)
    if len(bins) <= LEVELS:
        return statistics.amax
    bins[0] = bins[1]
    divergences = np.array([divergence(bins, kept) for kept in range(LEVELS, len(bins) + 1)])
    best = LEVELS + np.flatnonzero(divergences == divergences.min())[-1]
    return min(edges[best], statistics.amax)


@pytest.mark.parametrize("name", [*SPREAD, "constant"])
def test_entropy_is_the_range_of_least_divergence(name):
    statistics = observed(samples(name))
    assert amax_of(statistics, "entropy") == expected_entropy(statistics)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("part", [0.01, 0.05, 1])
def test_entropy_where_few_bins_are_filled(part, seed):
    """Many ranges then diverge by 0: the widest is to be taken, whatever is left of rounding."""
    rng = np.random.default_rng(seed)
    bins = int(rng.integers(260, 800))
    counts = rng.integers(1, 9, bins) * (rng.random(bins) < part)
    counts[-1] += 1
    statistics = observed(np.repeat(np.arange(bins) + 0.5, counts).astype(np.float32)[None])
    assert amax_of(statistics, "entropy") == expected_entropy(statistics)


@pytest.mark.parametrize("name", SPREAD)  # of a constant it takes the least of NaNs: one bin below the value
def test_entropy_is_pytorch_quantizations(name):
    calibrators = pytest.importorskip("pytorch_quantization.calib.histogram")
    statistics = observed(samples(name))
    bins, edges = entropy_bins(statistics)
    expected = float(calibrators._compute_amax_entropy(bins, edges, 8, False))
    assert amax_of(statistics, "entropy") == min(expected, statistics.amax)


@pytest.mark.parametrize("name", SPREAD)
def test_mse_is_no_worse_than_pytorch_quantizations(name, monkeypatch):
    torch = pytest.importorskip("torch")
    calibrators = pytest.importorskip("pytorch_quantization.calib.histogram")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    statistics = observed(samples(name))
    expected = float(calibrators._compute_amax_mse(*entropy_bins(statistics), 8, False))
    found = amax_of(statistics, "mse")
    # It tries 2048 ranges, on the histogram of |x|; ours are 1/128 of the largest magnitude apart.
    assert squared_error(statistics, found) <= 1.01 * squared_error(statistics, expected)
    assert abs(found - expected) <= 0.06 * statistics.amax


@pytest.mark.parametrize("name", SPREAD)
def test_the_error_is_that_of_the_values_if_in_the_middle_of_their_bins(name):
    width = observed(samples(name)).width
    bins = np.floor(samples(name) / width)
    values = np.where(bins == 0, 0, (bins + 0.5) * width).astype(np.float32)  # the bin from 0 on is one of zeros
    for fraction in (0.25, 0.5, 1.0):
        amax = np.abs(values).max() * fraction
        error = ((fake_quantize(values, scale_of(amax)) - values).astype(np.float64) ** 2).mean()
        assert squared_error(observed(values), amax) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("name", SPREAD)
def test_mse_takes_the_range_of_the_least_error(name):
    statistics = observed(samples(name))
    candidates = statistics.amax * FRACTIONS
    errors = [squared_error(statistics, candidate) for candidate in candidates]
    assert amax_of(statistics, "mse") == candidates[np.argmin(errors)]


def torch_search(values: np.ndarray, statistics: Statistics | None = None) -> tuple[float, float]:
    """The larger magnitude at which torch's HistogramObserver ends, and the width of a bin, over its own histogram or,
    in float64, over that of `statistics`."""
    torch = pytest.importorskip("torch")
    observer = torch.ao.quantization.HistogramObserver(bins=2048)
    observer(torch.from_numpy(values))
    if statistics:
        filled = np.flatnonzero(statistics.counts)
        first, last = filled[0], filled[-1] + 1
        observer.bins, observer.histogram = last - first, torch.from_numpy(statistics.counts[first:last].astype(float))
        ends = ((index - BINS) * statistics.width for index in (first, last))
        observer.min_val, observer.max_val = (torch.tensor(end, dtype=torch.float64) for end in ends)
    width = float(observer.max_val - observer.min_val) / observer.bins
    return max(abs(float(end)) for end in observer._non_linear_param_search()), width


@pytest.fixture
def float64():
    torch = pytest.importorskip("torch")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", SPREAD)
def test_histogram_is_torchs_search_on_the_same_bins(name, float64):
    statistics = observed(samples(name))
    expected, _ = torch_search(samples(name), statistics)
    assert amax_of(statistics, "histogram") == min(expected, statistics.amax)


@pytest.mark.parametrize("name", SPREAD)
def test_histogram_is_near_torchs_own(name):
    """Which has 2048 bins between the least and the largest value, so that its search ends up to two bins away."""
    statistics = observed(samples(name))
    expected, width = torch_search(samples(name))
    assert abs(amax_of(statistics, "histogram") - expected) <= 2 * max(width, statistics.width)


def test_channels_of_weights():
    weight = np.random.default_rng(3).normal(size=(3, 5, 2, 2)).astype(np.float32)
    for axis in (0, 1):
        expected = np.abs(weight).max(tuple(i for i in range(4) if i != axis))
        found = weight_amax(weight, axis)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_no_channel_of_a_weight_has_a_scale_that_int8_cannot_have(method):
    weight = np.array([[0, 0], [TINY, 0], [1e-38, -1e-37], [2, 0.5]], np.float32)
    found = weight_amax(weight, 0, method)
    np.testing.assert_array_equal(found[:3] > 0.2, True)
    np.testing.assert_array_equal(found[:3], found[0])
    for dead in (weight[:2], weight[:3]):
        assert (scale_of(weight_amax(dead, 0, method)) >= np.finfo(np.float32).tiny).all()


def test_mse_of_weights_is_the_least_of_each_channel():
    weight = np.random.default_rng(5).normal(size=(4, 4096)).astype(np.float32)

    def error(row: np.ndarray, amax: np.float32) -> float:
        return float(((fake_quantize(row, scale_of(amax), low=-127) - row).astype(np.float64) ** 2).sum())

    for row, found in zip(weight, weight_amax(weight, 0, "mse"), strict=True):
        candidates = np.abs(row).max() * FRACTIONS.astype(np.float32)
        assert error(row, found) == min(error(row, candidate) for candidate in candidates)
        assert found < np.abs(row).max()


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_scales_are_divided_in_float32(amax):
    expected = np.float32(amax) / np.float32(127)
    assert scale_of(amax) == expected
    assert scale_of(amax).dtype == np.float32
    np.testing.assert_array_equal(scale_of(np.full(3, amax, np.float32)), np.full(3, expected))


def onnxruntime_qdq(values: np.ndarray, scale: np.ndarray, axis: int | None) -> np.ndarray:
    from onnxruntime import InferenceSession

    place = {} if axis is None else {"axis": axis}
    constants = [
        onnx.numpy_helper.from_array(scale, "s"),
        onnx.numpy_helper.from_array(np.zeros(scale.shape, np.int8), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **place),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **place),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape) for name in "xy"]
    graph = helper.make_graph(nodes, "qdq", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": values})[0]


SCALES = st.floats(2.0**-30, 2.0**30, width=32)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, 3, elements=SCALES), st.sampled_from([None, 0, 1, -1]), st.data())
def test_fake_quantization_is_onnxruntimes_to_the_bit(scales, axis, data):
    halves = arrays(np.float32, (3, 3), elements=st.integers(-270, 270).map(lambda i: i / 2))
    scale = scales if axis is not None else scales[0].reshape(())
    along = scale if axis is None else np.expand_dims(scale, 1 - axis % 2)
    # Halves of the scale, most of them ties, some beyond the last level; or values that are anywhere.
    ties = data.draw(st.booleans())
    values = data.draw(halves) * along if ties else data.draw(arrays(np.float32, (3, 3), elements=FINITE))
    found = fake_quantize(values, scale, axis)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, onnxruntime_qdq(values, scale, axis))
