"""Errors between two tensors, added up image by image in constant memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from alignment.results import ErrorStats

# Bits of a non-negative float32, without the low 16, number its magnitude in steps of at most 1/128 (0.8 %).
_SHIFT = 16
_BINS = 1 << (32 - _SHIFT - 1)
# Below this a float32 sum of products may have lost what underflowed.
_TINY = 1e-30
_BLOCK = 1 << 16
#: Values of a dot product: of more than 10000 OpenBLAS makes threads, which wait longer than they work.
_PIECE = 1 << 13
# The quantile of a large tensor comes from every 11th element: coprime to the widths of heads (80 classes, 4 x 16
# bins), so that no column is left out.
_SAMPLE_STEP = 11
_SAMPLED_FROM = 1 << 14

# What `ErrorAccumulator` adds up beside its histogram; counts stay below 2^53.
_SUMS = ("_count", "_nonfinite", "_max", "_sum", "_noise", "_subject", "_reference", "_dot")


class ErrorAccumulator:
    """Adds up errors of a subject against a reference.

    Element counts, not images, weigh: `mean_abs` is over all elements.  A pair that is equal counts as no error even
    where it is infinite or NaN on both sides; one that is finite on one side only counts in `nonfinite` alone.
    """

    def __init__(self) -> None:
        self._count = self._nonfinite = 0
        self._max = self._sum = self._noise = 0.0
        self._subject = self._reference = self._dot = 0.0
        self._histogram = np.zeros(_BINS, np.int64)

    def add(self, subject: np.ndarray, reference: np.ndarray) -> float:
        """Adds one pair of equal shape; returns the largest error of this pair.

        Raises:
            ValueError: for different shapes.
        """
        if subject.shape != reference.shape:
            raise ValueError(f"shapes {subject.shape} and {reference.shape} differ")
        a, b, before = subject.ravel(), reference.ravel(), self._nonfinite
        step = _SAMPLE_STEP if len(a) > _SAMPLED_FROM else 1
        # Blocks that stay in the CPU's cache, as does the one buffer for their errors: several times faster than one
        # pass a statistic.
        buffer = np.empty(min(len(a), _BLOCK), np.result_type(a, b))
        with np.errstate(over="ignore", invalid="ignore"):
            blocks = [
                self._add_block(a[i : i + _BLOCK], b[i : i + _BLOCK], buffer, step) for i in range(0, len(a), _BLOCK)
            ]
        bits = np.concatenate([sample for _, sample in blocks] or [np.empty(0, np.float32)]).view(np.uint32) >> _SHIFT
        counts = np.bincount(bits.view(np.int32))
        self._histogram[: len(counts)] += counts
        return max((largest for largest, _ in blocks), default=0.0) if self._nonfinite == before else math.inf

    def _add_block(self, a: np.ndarray, b: np.ndarray, buffer: np.ndarray, step: int) -> tuple[float, np.ndarray]:
        error = np.subtract(a, b, out=buffer[: len(a)])
        largest = float(np.abs(error, out=error).max(initial=0.0))
        if not math.isfinite(largest):
            a, b, error = self._finite(a, b)
            largest = float(error.max(initial=0.0))
        self._count += len(error)
        self._max = max(self._max, largest)
        if largest:
            self._sum += _sum(error)
            self._noise += _dot(error, error)
        self._subject += _dot(a, a)
        self._reference += _dot(b, b)
        self._dot += _dot(a, b)
        return largest, error[::step].astype(np.float32)

    def stats(self) -> ErrorStats | None:
        """What came together so far; None before anything was added."""
        if not self._count and not self._nonfinite:
            return None
        norm = math.sqrt(self._subject * self._reference)
        cosine = min(1.0, max(-1.0, self._dot / norm)) if norm else float(self._subject == self._reference)
        sqnr = 10 * math.log10(self._reference / self._noise) if self._noise and self._reference else None
        return ErrorStats(
            count=self._count,
            max_abs=self._max,
            mean_abs=self._sum / max(self._count, 1),
            p99_abs=self._quantile(0.99),
            cosine=cosine,
            sqnr_db=sqnr,
            nonfinite=self._nonfinite,
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it, for `from_arrays`."""
        bins = np.flatnonzero(self._histogram)
        sums = np.array([getattr(self, name) for name in _SUMS], np.float64)
        return {"sums": sums, "bins": bins, "counts": self._histogram[bins]}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ErrorAccumulator:
        """What `to_arrays` gave."""
        found = cls()
        for name, value in zip(_SUMS, arrays["sums"].tolist(), strict=True):
            setattr(found, name, type(getattr(found, name))(value))
        found._histogram[arrays["bins"]] = arrays["counts"]
        return found

    def _finite(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        both = np.isfinite(a) & np.isfinite(b)
        kept = both | (a == b) | (np.isnan(a) & np.isnan(b))
        self._nonfinite += int((~kept).sum())
        # What is equal and not finite stays, as a pair of zeros.
        a, b = (np.where(both, x, x.dtype.type(0))[kept] for x in (a, b))
        return a, b, np.abs(a - b)

    def _quantile(self, q: float) -> float:
        total = int(self._histogram.sum())
        if not total:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self._histogram), math.ceil(q * total)))
        edges = np.array([index, index + 1], np.uint32) << _SHIFT
        low, high = edges.astype(np.uint32).view(np.float32)
        return min(float((low + high) / 2) if index else 0.0, self._max)


def count_nonfinite(*arrays: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is several times faster than to look at each, and finite where they all are, overflow aside.
        spoilt = [array for array in arrays if not math.isfinite(float(array.sum()))]
    return sum(int(np.count_nonzero(~np.isfinite(array))) for array in spoilt)


def _sum(values: np.ndarray) -> float:
    """In the array's own dtype, which NumPy sums pairwise; in float64 where float32 overflows."""
    value = float(values.sum())
    return value if math.isfinite(value) else float(values.sum(dtype=np.float64))


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """In the arrays' own dtype, which is fast; in float64 where float32 over- or underflows."""
    value = _pieces_dot(a, b)
    if math.isfinite(value) and (abs(value) > _TINY or a.dtype == np.float64):
        return value
    return _pieces_dot(a.astype(np.float64), b.astype(np.float64))


def _pieces_dot(a: np.ndarray, b: np.ndarray) -> float:
    whole = len(a) // _PIECE * _PIECE
    pieces = np.vecdot(a[:whole].reshape(-1, _PIECE), b[:whole].reshape(-1, _PIECE))
    return float(pieces.sum(dtype=np.float64)) + float(np.dot(a[whole:], b[whole:]))
