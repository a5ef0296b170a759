"""What range int8 is to represent of a tensor: statistics in one pass over the data, and the methods that read them.

int8 is symmetric: a tensor's largest magnitude `amax` goes to 127, so that scale = amax / 127.  Activations are
quantized to [-128, 127], weights to [-127, 127].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, overload

import cv2
import numpy as np

from alignment.errors import AlignError

#: Bins of a histogram for each sign.
BINS = 4096
#: Weight of an image in the moving average, as in torch's MovingAverageMinMaxObserver.
AVERAGING = 0.01
#: Of the magnitudes, how many in a hundred `percentile` keeps.
PERCENTILE = 99.99
#: Bins of the entropy method, and levels of int8 without its sign: as in TensorRT and pytorch-quantization.
ENTROPY_BINS, LEVELS = 2048, 128
#: Divergences that are nearer to each other than this are equal: sums over 10^10 values leave less.
_ROUNDING = 1e-11
#: Ranges that the mse methods try, as fractions of the largest magnitude.
FRACTIONS = np.arange(16, 129) / np.float64(128)
#: The least range of a weight's channel: at all of `FRACTIONS` its scale is a normal float32, as int8 needs it.
_LEAST_RANGE = np.float32(1024 * np.finfo(np.float32).tiny)
#: cv2.calcHist counts in float32, which is exact up to here.
_PIECE = 1 << 24
#: The least exponent of a bin's width: the inverse is within float32.
_LEAST = -126
#: Values that are worked on at once, so that they stay in a core's own cache.
_CACHED = 1 << 15


class Statistics:
    """What a tensor's values are like, in constant memory however many there are.

    The histogram has bins [k·2^e, (k+1)·2^e) for k from −`BINS` to `BINS` − 1, with the least e that holds all values
    so far: when a larger one comes, bins are joined in pairs.  So it is the same, to the bit, in whatever order and
    batches the values come.  The moving average depends on the order of the images, not on the batches.

    Attributes:
        elements: how many values were seen.
        minimum, maximum: of all values; inf and −inf before the first.
        average: moving average of each image's minimum and maximum.
        channels: ``[C] float32``, the largest magnitude of each channel of ``[B, C, H, W]``, of others ``[1]``.
        exponent: e.
        counts: ``[2 * BINS] int64``.
    """

    def __init__(self) -> None:
        self.elements = 0
        self.minimum, self.maximum = math.inf, -math.inf
        self.average: tuple[float, float] | None = None
        self.channels: np.ndarray | None = None
        self.exponent: int | None = None
        self.counts = np.zeros(2 * BINS, np.int64)

    @property
    def amax(self) -> float:
        """The largest magnitude; 0 before the first value."""
        return max(abs(self.minimum), abs(self.maximum)) if self.elements else 0.0

    def add(self, values: np.ndarray) -> None:
        """Adds ``[B, ...] float32``, B images.  Raises ValueError for values that are not finite."""
        if not values.size:
            return
        rows = values.shape[1] if values.ndim == 4 else 1
        for image in values.reshape(len(values), rows, -1) if values.ndim else values.reshape(1, 1, 1):
            self._add_image(image)

    def _add_image(self, image: np.ndarray) -> None:
        lows, highs = image.min(1), image.max(1)
        low, high = float(lows.min()) + 0.0, float(highs.max()) + 0.0  # -0 becomes 0: else it is as the order has it
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("holds values that are not finite")
        if self.average is None:
            self.average = (low, high)
        else:
            before_low, before_high = self.average
            self.average = before_low + AVERAGING * (low - before_low), before_high + AVERAGING * (high - before_high)
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        magnitudes = np.maximum(np.abs(lows), np.abs(highs))
        self.channels = magnitudes if self.channels is None else np.maximum(self.channels, magnitudes)
        values = image.reshape(-1)
        self.elements += values.size
        if self.amax > 0:
            self._widen(max(math.frexp(self.amax)[1] - int(math.log2(BINS)), _LEAST))
            for start in range(0, values.size, _PIECE):
                self._count(values[start : start + _PIECE])
        else:
            self.counts[BINS] += values.size  # nothing but zeros: they are in bin 0, whatever its width

    def _widen(self, exponent: int) -> None:
        """Joins bins until they are 2^exponent wide."""
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent:
            pairs = self.counts.reshape(BINS, 2).sum(1)
            self.counts[:] = 0
            self.counts[BINS // 2 : BINS // 2 + BINS] = pairs
            self.exponent += 1

    def _count(self, values: np.ndarray) -> None:
        assert self.exponent is not None
        factor = np.float32(2.0**-self.exponent)  # a power of two: the product is exact, or less than float32 has
        index = np.empty(values.size, np.int16)
        bins = np.empty(min(values.size, _CACHED), np.float32)
        for start in range(0, values.size, _CACHED):
            bins = bins[: values.size - start]
            part = values[start : start + _CACHED]
            np.multiply(part, factor, out=bins)
            np.floor(bins, out=bins)
            if self.exponent > 0:  # there a product may become -0
                np.minimum(bins, -1, out=bins, where=part < 0)
            np.copyto(index[start : start + _CACHED], bins, casting="unsafe")
        index += BINS
        # One row: OpenCV counts a column at half the speed.
        found = cv2.calcHist([index.view(np.uint16).reshape(1, -1)], [0], None, [2 * BINS], [0, 2 * BINS])
        self.counts += found.ravel().astype(np.int64)

    def magnitudes(self) -> tuple[np.ndarray, float]:
        """``[n] float64`` counts of |x| in bins from 0 on, the last of which is not empty, and the width of a bin."""
        both = self.counts[BINS:] + self.counts[:BINS][::-1]
        filled = np.flatnonzero(both)
        return both[: filled[-1] + 1 if len(filled) else 0].astype(np.float64), self.width

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self.exponent or 0)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` takes."""
        exponent = [] if self.exponent is None else [self.exponent]
        return {
            "elements": np.array(self.elements, np.int64),
            "range": np.array([self.minimum, self.maximum]),
            "average": np.array(self.average or []),
            "channels": np.zeros(0, np.float32) if self.channels is None else self.channels,
            "exponent": np.array(exponent, np.int64),
            "counts": self.counts,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Statistics:
        """The statistics that `to_arrays` wrote.  Raises KeyError or ValueError for others."""
        found = cls()
        found.elements = int(arrays["elements"])
        found.minimum, found.maximum = map(float, arrays["range"])
        if len(arrays["average"]):
            low, high = map(float, arrays["average"])
            found.average = (low, high)
        found.channels = arrays["channels"] if len(arrays["channels"]) else None
        found.exponent = int(arrays["exponent"][0]) if len(arrays["exponent"]) else None
        if arrays["counts"].shape != (2 * BINS,):
            raise ValueError(f"a histogram of {arrays['counts'].shape} bins")
        found.counts = arrays["counts"].astype(np.int64)
        return found


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
    errors = [squared_error(statistics, candidate) for candidate in candidates]
    return float(candidates[int(np.argmin(errors))])


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
    counts = statistics.counts[first : last + 1].astype(np.float64)
    start, end = _shrunk(counts)
    low, high = ((first + index - BINS) * statistics.width for index in (start, end + 1))
    return min(max(abs(low), abs(high)), statistics.amax)


def _shrunk(counts: np.ndarray, step: float = 1e-5) -> tuple[int, int]:
    """The first and last bin of the range that torch's ``_non_linear_param_search`` ends at."""
    cumulated = np.cumsum(counts)
    total = cumulated[-1]
    start, end = 0, len(counts) - 1
    alpha, beta, least = 0.0, 1.0, math.inf
    while alpha < beta and start < end:
        left = max(start, min(end, int(np.searchsorted(cumulated, (alpha + step) * total))))
        right = min(end, max(start, int(np.searchsorted(cumulated, (beta - step) * total, side="right")) - 1))
        following = (start, end)
        if left - start > end - right:
            following, alpha = (left, end), alpha + step
        else:
            following, beta = (start, right), beta - step
        if following == (start, end):
            continue
        error = _spread_error(counts, *following)
        if error > least:
            break
        least, (start, end) = error, following
    return start, end


def _spread_error(counts: np.ndarray, start: int, end: int) -> float:
    """The squared error of 256 even levels over the bins `start` to `end`, in units of a bin's width squared.

    As torch's ``_compute_quantization_error``: values are spread evenly over their bins, and those outside go to the
    nearest level.
    """
    wide = (end - start + 1) / 256
    begins = np.arange(len(counts)) - float(start)
    ends = begins + 1
    first = np.clip(np.floor_divide(begins, wide), 0, 255)
    last = np.clip(np.floor_divide(ends, wide), 0, 255)
    middle = wide / 2

    def cubes(begin: np.ndarray, end: np.ndarray | float) -> np.ndarray:
        return (np.asarray(end) ** 3 - begin**3) / 3

    one = first == last
    whole = cubes(begins - (first * wide + middle), ends - (first * wide + middle))
    head = cubes(begins - (first * wide + middle), np.full(len(counts), middle))
    body = (last - first - 1) * cubes(np.array(-middle), middle)
    tail = cubes(np.full(len(counts), -middle), ends - (last * wide + middle))
    return float((counts * np.where(one, whole, head + body + tail)).sum())


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
