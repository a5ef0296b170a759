"""Statistics of a tensor's values, from which every method takes its range: one pass, in constant memory."""

from __future__ import annotations

import math
import threading

import cv2
import numpy as np

#: Bins of a histogram for each sign.
BINS = 4096
#: Weight of an image in the moving average, as in torch's MovingAverageMinMaxObserver.
AVERAGING = 0.01
#: Values that cv2.calcHist is given at once: many, as a call has its price, and less than float32 counts exactly.
_PIECE = 1 << 19
#: The least exponent of a bin's width: the inverse is within float32.
_LEAST = -126
#: Values that are worked on at once, so that they stay in a core's own cache.
_CACHED = 1 << 16


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

    def add(self, values: np.ndarray) -> list[tuple[float, float]]:
        """Adds ``[B, ...] float32``, B images.

        Returns:
            The least and the largest value of each image, where it has any.

        Raises:
            ValueError: for values that are not finite.
        """
        if not values.size:
            return []
        rows = values.shape[1] if values.ndim == 4 else 1
        images = values.reshape(len(values), rows, -1) if values.ndim else values.reshape(1, 1, 1)
        return [self._add_image(image) for image in images]

    def join(self, parts: list[Statistics], channels: np.ndarray) -> None:
        """Becomes what it would be had it seen the values of all `parts`; but for the average, see `add_range`."""
        self.elements = sum(part.elements for part in parts)
        self.minimum, self.maximum = min(p.minimum for p in parts), max(p.maximum for p in parts)
        self.channels = channels
        self.exponent = max((part.exponent for part in parts if part.exponent is not None), default=None)
        self.counts = np.zeros(2 * BINS, np.int64)
        for part in parts:
            widened = Statistics()
            widened.exponent, widened.counts = part.exponent, part.counts.copy()
            if part.exponent is not None and self.exponent is not None:
                widened._widen(self.exponent)
            self.counts += widened.counts

    def add_range(self, low: float, high: float) -> None:
        """Moves the average by an image with these ends."""
        if self.average is None:
            self.average = (low, high)
        else:
            before_low, before_high = self.average
            self.average = before_low + AVERAGING * (low - before_low), before_high + AVERAGING * (high - before_high)

    def _add_image(self, image: np.ndarray) -> tuple[float, float]:
        """Adds ``[C, n]``.  One pass, unless the image has values that the ones before it gave no reason to expect."""
        exponent, signed = self.exponent, self.minimum < 0
        lows, highs, counts = _observed(image, exponent, signed)
        low, high = float(lows.min()) + 0.0, float(highs.max()) + 0.0  # -0 becomes 0: else it is as the order has it
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("holds values that are not finite")
        self.add_range(low, high)
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        magnitudes = np.maximum(np.abs(lows), np.abs(highs))
        self.channels = magnitudes if self.channels is None else np.maximum(self.channels, magnitudes)
        self.elements += image.size
        if not self.amax:
            self.counts[BINS] += image.size  # nothing but zeros: they are in bin 0, whatever its width
            return low, high
        self._widen(max(math.frexp(self.amax)[1] - int(math.log2(BINS)), _LEAST))
        if self.exponent != exponent or signed != (self.minimum < 0):
            counts = _observed(image, self.exponent, self.minimum < 0)[2]
        self.counts += counts
        return low, high

    def _widen(self, exponent: int) -> None:
        """Joins bins until they are 2^exponent wide."""
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent:
            pairs = self.counts.reshape(BINS, 2).sum(1)
            self.counts[:] = 0
            self.counts[BINS // 2 : BINS // 2 + BINS] = pairs
            self.exponent += 1

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
        found.elements = int(arrays["elements"].item())
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


class _Scratch(threading.local):
    """Of each thread, as memory that is new to the process costs more than what is done in it."""

    def __init__(self) -> None:
        self.bins = np.empty(_CACHED, np.float32)
        self.index = np.empty(_PIECE, np.int16)


_scratch = _Scratch()


def _observed(image: np.ndarray, exponent: int | None, signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minima and maxima of the rows of ``[C, n]``, and counts of the values in bins of width 2^exponent.

    Args:
        image: float32.
        exponent: None: nothing is counted.
        signed: whether values below 0 are looked for.

    Returns:
        The counts are of no use where a value is not finite, beyond the last bin, or below 0 and not looked for.
    """
    rows, length = image.shape
    lows, highs = np.full(rows, np.inf, np.float32), np.full(rows, -np.inf, np.float32)
    counts = np.zeros(2 * BINS, np.int64)
    index, used = _scratch.index, 0
    high, wide = max(_CACHED // length, 1), -(-length // -(-length // _CACHED))  # rows and columns at once
    with np.errstate(invalid="ignore", over="ignore"):
        for top in range(0, rows, high):
            for left in range(0, length, wide):
                part = image[top : top + high, left : left + wide]
                low, most = lows[top : top + high], highs[top : top + high]
                np.minimum(low, np.minimum.reduce(part, 1), out=low)
                np.maximum(most, np.maximum.reduce(part, 1), out=most)
                if exponent is None:
                    continue
                if used + part.size > len(index):
                    _count(index[:used], counts)
                    used = 0
                _to_bins(part, exponent, signed, index[used : used + part.size])
                used += part.size
    if used:
        _count(index[:used], counts)
    return lows, highs, counts


def _to_bins(part: np.ndarray, exponent: int, signed: bool, index: np.ndarray) -> None:
    """Writes floor(x / 2^exponent) to `index`, int16."""
    bins = _scratch.bins[: part.size].reshape(part.shape)
    # A power of two: the product is exact, or less than float32 has.
    np.multiply(part, np.float32(2.0**-exponent), out=bins)
    if signed:
        np.floor(bins, out=bins)
        if exponent > 0:  # there a product may become -0
            np.minimum(bins, -1, out=bins, where=part < 0)
    np.copyto(index.reshape(part.shape), bins, casting="unsafe")


def _count(index: np.ndarray, counts: np.ndarray) -> None:
    index += BINS
    # One row: OpenCV counts a column at half the speed, and would spread many over threads of its own.
    found = cv2.calcHist([index.view(np.uint16).reshape(1, -1)], [0], None, [2 * BINS], [0, 2 * BINS])
    counts += found.ravel().astype(np.int64)
