"""Errors between two tensors, added up image by image in constant memory."""

from __future__ import annotations

import math

import numpy as np

from alignment.results import ErrorStats

# Bits of a non-negative float32, without the low 16, number its magnitude in steps of at most 1/128 (0.8 %).
_SHIFT = 16
_BINS = 1 << (32 - _SHIFT - 1)


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
        a, b = subject.ravel(), reference.ravel()
        error = np.abs(a - b)
        largest = float(error.max(initial=0.0))
        if not math.isfinite(largest):
            a, b, error = self._finite(a, b)
            largest = float(error.max(initial=0.0))
        self._count += len(error)
        self._max = max(self._max, largest)
        self._sum += float(error.sum(dtype=np.float64))
        self._noise += float(np.dot(error, error))
        self._subject += float(np.dot(a, a))
        self._reference += float(np.dot(b, b))
        self._dot += float(np.dot(a, b))
        bits = error.astype(np.float32, copy=False).view(np.uint32) >> _SHIFT
        self._histogram += np.bincount(bits.view(np.int32), minlength=_BINS)
        return largest if not self._nonfinite else math.inf

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

    def _finite(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        both = np.isfinite(a) & np.isfinite(b)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        self._nonfinite += int((~both & ~same).sum())
        self._count += int((~both & same).sum())
        return a[both], b[both], np.abs(a[both] - b[both])

    def _quantile(self, q: float) -> float:
        total = int(self._histogram.sum())
        if not total:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self._histogram), math.ceil(q * total)))
        edges = np.array([index, index + 1], np.uint32) << _SHIFT
        low, high = edges.astype(np.uint32).view(np.float32)
        return min(float((low + high) / 2) if index else 0.0, self._max)
