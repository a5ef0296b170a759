"""What range int8 is to represent of a tensor: the methods that read it from the statistics of its values.

int8 is symmetric: a tensor's largest magnitude `amax` goes to 127, so that scale = amax / 127.  Activations are
quantized to [-128, 127], weights to [-127, 127].
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import Literal, overload

import numpy as np

from alignment.errors import AlignError
from alignment.quantize.statistics import BINS, Statistics

#: Of the magnitudes, how many in a hundred `percentile` keeps.
PERCENTILE = 99.99
#: Bins of the entropy method, and levels of int8 without its sign: as in TensorRT and pytorch-quantization.
ENTROPY_BINS, LEVELS = 2048, 128
#: Ranges that the search of `histogram` looks at together.
_AT_ONCE = 16
#: Divergences that are nearer to each other than this are equal: sums over 10^10 values leave less.
_ROUNDING = 1e-11
#: Ranges that the mse methods try, as fractions of the largest magnitude.
FRACTIONS = np.arange(16, 129) / np.float64(128)
#: The least range of a weight's channel: at all of `FRACTIONS` its scale is a normal float32, as int8 needs it.
_LEAST_RANGE = np.float32(1024 * np.finfo(np.float32).tiny)


def minmax(statistics: Statistics) -> float:
    """The largest magnitude."""
    return statistics.amax


def moving_average(statistics: Statistics) -> float:
    """The larger magnitude of the averages of each image's minimum and maximum."""
    return max(map(abs, statistics.average)) if statistics.average else 0.0


def percentile(statistics: Statistics) -> float:
    """The magnitude that `PERCENTILE` in a hundred values do not exceed, to the upper edge of a bin."""
    counts, width = statistics.magnitudes()
    cumulated = np.cumsum(counts)
    index = int(np.searchsorted(cumulated, cumulated[-1] * (PERCENTILE / 100)))
    return min((index + 1) * width, statistics.amax)


def entropy(statistics: Statistics) -> float:
    """The range whose int8 distribution has the least Kullback-Leibler divergence from the whole one.

    As TensorRT and pytorch-quantization have it: of 2048 bins of |x| the first i = 128, 129, ... are kept, what lies
    beyond is counted in the last of them, and the distribution within is that of 128 levels, each spread over its bins
    that are not empty.  The bin of zeros is taken to be as its neighbour.  The last of equal minima is taken.

    The 2048 bins are the histogram's, joined in pairs: they reach to the power of two above the largest magnitude, and
    the search ends at the last that is not empty.

    Every sum over the bins of a level is a difference of cumulated sums, so that one range costs 128 steps, not 2048.
    """
    counts, width = statistics.magnitudes()
    joined = np.append(counts, 0.0) if len(counts) % 2 else counts
    bins, width = joined.reshape(-1, BINS // ENTROPY_BINS).sum(1), width * (BINS // ENTROPY_BINS)
    if len(bins) <= LEVELS:
        return statistics.amax
    bins[0] = bins[1]
    mass, filled = (np.concatenate([[0.0], np.cumsum(a)]) for a in (bins, bins > 0))
    own = np.concatenate([[0.0], np.cumsum(_x_log_x(bins))])
    kept = np.arange(LEVELS, len(bins) + 1)
    edges = -(-kept[:, None] * np.arange(LEVELS + 1) // LEVELS)
    level_mass, level_filled = np.diff(mass[edges], axis=1), np.diff(filled[edges], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(level_filled > 0, level_mass / level_filled, 0.0)
        log_density = np.where(density > 0, np.log(density), 0.0)
        last, tail = bins[kept - 1], mass[-1] - mass[kept]
        cross = (level_mass * log_density).sum(1) + tail * log_density[:, -1]
        self_entropy = own[kept] - _x_log_x(last) + _x_log_x(last + tail)
        divergence = (self_entropy - cross) / mass[-1] - np.log(mass[-1]) + np.log(mass[kept])
    divergence[(last == 0) & (tail > 0)] = np.inf  # what is counted there has no level
    best = np.flatnonzero(divergence <= divergence.min() + _ROUNDING)[-1]
    return min(float(kept[best]) * width, statistics.amax)


def _x_log_x(values: np.ndarray) -> np.ndarray:
    return values * np.log(np.where(values > 0, values, 1.0))


def mse(statistics: Statistics) -> float:
    """The range of the least mean squared error, over `FRACTIONS` of the largest magnitude."""
    candidates = statistics.amax * FRACTIONS
    return float(candidates[int(np.argmin(_squared_errors(statistics, candidates)))])


def _squared_errors(statistics: Statistics, candidates: np.ndarray) -> np.ndarray:
    """`squared_error` of many ranges, times the elements, in units of a bin's width squared."""
    counts = statistics.counts.copy()
    counts[BINS] = 0  # taken to be zeros
    scale = candidates[:, None] / 127 / statistics.width
    levels = np.arange(-128, 128)
    # The middle of bin k is k + 1/2.
    begins = np.clip(np.ceil((levels[1:] - 0.5) * scale - 0.5), -BINS, BINS).astype(np.int64) + BINS
    base = np.rint(levels * scale).astype(np.int64)
    zeroth, first, second = _Moments(counts).within(begins, base + BINS)
    shift = base + 0.5 - levels * scale
    return np.asarray((second + 2 * shift * first + shift**2 * zeroth).sum(1))


def squared_error(statistics: Statistics, amax: float) -> float:
    """The mean squared error of int8 with that range, values taken to be as `_middles` has them."""
    counts, values = _middles(statistics)
    scale = amax / 127
    levels = np.clip(np.rint(values / scale), -128, 127)
    return float((counts * (values - levels * scale) ** 2).sum() / statistics.elements)


def _middles(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the bins that are not empty, and their middles; 0 of the bin from 0 on, most of which are zeros."""
    filled = np.flatnonzero(statistics.counts)
    return statistics.counts[filled], np.where(filled == BINS, 0.0, (filled - BINS + 0.5) * statistics.width)


def sqnr_db(statistics: Statistics, amax: float) -> float:
    """Signal to quantization noise of int8 with that range, 10 log10(power / mean squared error)."""
    counts, values = _middles(statistics)
    power = float((counts * values**2).sum() / statistics.elements)
    error = squared_error(statistics, amax)
    return 10 * math.log10(power / error) if power and error else math.inf


def histogram(statistics: Statistics) -> float:
    """torch's HistogramObserver: both ends are moved inwards, the one that passes more empty bins first, for as long as
    the error of 256 levels falls, values taken to be spread evenly over their bins.

    The range that it ends at is symmetric here: the larger magnitude of its two ends.
    """
    filled = np.flatnonzero(statistics.counts)
    first, last = int(filled[0]), int(filled[-1])
    start, end = _shrunk(statistics.counts[first : last + 1])
    low, high = ((first + index - BINS) * statistics.width for index in (start, end + 1))
    return min(max(abs(low), abs(high)), statistics.amax)


def _shrunk(counts: np.ndarray) -> tuple[int, int]:
    """The first and last bin of the range that torch's ``_non_linear_param_search`` ends at: the last before the error
    rises."""
    moments = _Moments(counts)
    path = _inwards(counts)
    best, least = (0, len(counts) - 1), math.inf
    while ranges := list(itertools.islice(path, _AT_ONCE)):
        for following, error in zip(ranges, _spread_errors(counts, moments, np.array(ranges)), strict=True):
            if error > least:
                return best
            best, least = following, error
    return best


def _inwards(counts: np.ndarray, step: float = 1e-5) -> Iterator[tuple[int, int]]:
    """The ranges that torch's search goes through, if it is not stopped."""
    cumulated = np.cumsum(counts).tolist()  # bisect is 20 times as fast on a list
    total = float(cumulated[-1])
    start, end = 0, len(counts) - 1
    alpha, beta = step, 1.0 - step
    left, right = bisect_left(cumulated, alpha * total), bisect_right(cumulated, beta * total) - 1
    while alpha - step < beta + step and start < end:
        low, high = max(start, min(end, left)), min(end, max(start, right))
        following = (start, high)
        if low - start > end - high:
            following, alpha = (low, end), alpha + step
            left = bisect_left(cumulated, alpha * total)
        else:
            beta -= step
            right = bisect_right(cumulated, beta * total) - 1
        if following != (start, end):
            start, end = following
            yield following


class _Moments:
    """Sums over neighbouring bins, as differences of cumulated integers: so they are exact."""

    def __init__(self, counts: np.ndarray) -> None:
        index = np.arange(len(counts))
        self.sums = [np.append(0, np.cumsum(counts * index**power)) for power in range(3)]

    def within(self, begins: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``[N, L] int64`` sums of counts, of the distances of their bins from a near one, and of their squares.

        Args:
            begins: ``[N, L - 1]``, where each level but the first begins; that begins at the first bin.
            base: ``[N, L]``, the bin that distances are taken from.
        """
        ends = [np.full((len(begins), 1), end) for end in (0, len(self.sums[0]) - 1)]
        bounds = np.concatenate([ends[0], begins, ends[1]], axis=1)
        zeroth, first, second = (np.diff(sums[bounds], axis=1) for sums in self.sums)
        return zeroth, first - base * zeroth, second - 2 * base * first + base**2 * zeroth


def _spread_errors(counts: np.ndarray, moments: _Moments, ranges: np.ndarray) -> np.ndarray:
    """``[N] float64``, the squared errors of 256 even levels over ``[N, 2]``, first and last bins.

    As torch's ``_compute_quantization_error``, in units of a bin's width squared: values are spread evenly over their
    bins, and those outside go to the nearest level.  A bin is first taken to belong to the level that it begins in.
    Its part beyond an edge, τ wide, is then nearer to the next middle, which is 2m on:
    ∫ (t − m)² − (t + m)² dt from 0 to τ = −2mτ².
    """
    start, end = ranges[:, :1], ranges[:, 1:]
    wide = (end - start + 1) / 256
    edges = wide * np.arange(1, 256)
    inner = np.ceil(edges).astype(np.int64)
    base = np.concatenate([start, start + inner], axis=1)
    zeroth, first, second = moments.within(start + inner, base)
    # Of a bin's lower edge, as `base` is one, from the level's middle.
    shift = base - start - wide * (np.arange(256) + 0.5)
    whole = second + (2 * shift + 1) * first + (shift * (shift + 1) + 1 / 3) * zeroth
    beyond = counts[start + inner - 1] * (inner - edges) ** 2
    return np.asarray(whole.sum(1) - wide[:, 0] * beyond.sum(1))


METHODS: dict[str, Callable[[Statistics], float]] = {
    function.__name__: function for function in (minmax, moving_average, percentile, histogram, entropy, mse)
}


def amax_of(statistics: Statistics, method: str) -> float:
    """The largest magnitude that int8 is to represent, by one of `METHODS`; 0 for a tensor that is 0 everywhere.

    Raises:
        AlignError: for a method that does not exist.
    """
    if method not in METHODS:
        raise AlignError(f"no method is named {method!r}", f"choose from {', '.join(METHODS)}")
    return METHODS[method](statistics) if statistics.amax else 0.0


def weight_amax(weight: np.ndarray, axis: int, method: Literal["minmax", "mse"] = "minmax") -> np.ndarray:
    """``[C] float32``, the range of each channel of a weight.

    Args:
        weight: float32, C long along `axis`.
        axis: of the output channels.
        method: the largest magnitude, or that of `FRACTIONS` of it with the least squared error.

    Returns:
        A channel that is 0 everywhere, or too small for a scale, gets the range of the whole weight, and 1 if that is
        no larger: any scale will do.
    """
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float32)
    largest = np.abs(rows).max(1)
    whole = largest.max() if largest.max() >= _LEAST_RANGE else np.float32(1)
    largest = np.where(largest >= _LEAST_RANGE, largest, whole).astype(np.float32)
    if method == "minmax":
        return largest
    best, least = largest, np.full(len(rows), np.inf)
    for fraction in FRACTIONS[::-1]:
        amax = (largest * np.float32(fraction)).astype(np.float32)
        error = ((fake_quantize(rows, scale_of(amax), 0, -127) - rows).astype(np.float64) ** 2).sum(1)
        best, least = np.where(error < least, amax, best), np.minimum(error, least)
    return best


@overload
def scale_of(amax: float) -> np.float32: ...
@overload
def scale_of(amax: np.ndarray) -> np.ndarray: ...
def scale_of(amax: float | np.ndarray) -> np.float32 | np.ndarray:
    """amax / 127 in float32."""
    return np.asarray(amax, np.float32) / np.float32(127)


def fake_quantize(
    values: np.ndarray, scale: np.float32 | np.ndarray, axis: int | None = None, low: int = -128, high: int = 127
) -> np.ndarray:
    """Values as int8 keeps them: rint(x / scale), ties to even, clipped, times scale; float32, as ONNX Runtime's
    QuantizeLinear and DequantizeLinear give it.

    Args:
        values: float32.
        scale: float32, of the whole, or ``[C]`` along `axis`.
        axis: of the channels.
        low: least level; -127 for weights.
        high: largest level.
    """
    if axis is not None:
        scale = np.asarray(scale).reshape([-1 if d == axis % values.ndim else 1 for d in range(values.ndim)])
    with np.errstate(over="ignore"):  # it is clipped all the same
        levels = np.clip(np.rint(values / scale), low, high)
    return (levels * scale).astype(np.float32)
