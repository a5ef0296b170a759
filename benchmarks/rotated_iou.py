"""IoU of the rotated NMS kernels, in float32, against float64: 10^6 random pairs of each kind.

    python -m benchmarks.rotated_iou

The code is that of the GPU, compiled for the CPU.  Float64 is `alignment.nms.rotated`; how far that is from shapely on
the first pairs of each kind is shown.  A pair whose IoU is nearer to the threshold than float32's error bound is
decided in float64: the last columns say how many are, and how many decisions are not float64's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alignment.engine.plugins import IOU_ERROR, Kernels, build_for_cpu
from alignment.nms.rotated import corners, rotated_iou

PAIRS, CHUNK, BY_SHAPELY = 10**6, 1 << 15, 20_000
THRESHOLDS = (0.1, 0.3, 0.5, 0.9)
Pairs = tuple[np.ndarray, np.ndarray]


def boxes(
    rng: np.random.Generator, count: int, sides: tuple[float, float], span: float, aspect: float = 0, offset: float = 0
) -> np.ndarray:
    """Rotated boxes ``[count, 5] float32``, sides log-uniform in `sides`, the second within `aspect` of the first."""
    low, high = np.log(sides)
    w = rng.uniform(low, high, count)
    h = w + rng.uniform(-1, 1, count) * np.log(aspect) if aspect else rng.uniform(low, high, count)
    centres = offset + rng.uniform(-span, span, (2, count))
    angles = rng.uniform(-np.pi / 2, np.pi / 2, count)
    return np.stack([*centres, np.exp(w), np.exp(h), angles], 1).astype(np.float32)


def beside(rng: np.random.Generator, first: np.ndarray) -> np.ndarray:
    """For each box one much like it, turned by 1e-8 to 1 radian or so, half of them written in another way."""
    count, other = len(first), first.astype(np.float64)
    other[:, :2] += rng.normal(0, 0.2, (count, 2)) * first[:, 2:4].min(1)[:, None]
    other[:, 2:4] *= np.exp(rng.normal(0, 0.2, (count, 2)))
    other[:, 4] += rng.normal(0, 1, count) * 10 ** rng.uniform(-8, 0, count)
    swapped = rng.random(count) < 0.5
    other[swapped, 2], other[swapped, 3] = other[swapped, 3], other[swapped, 2].copy()
    other[swapped, 4] += np.pi / 2
    return other.astype(np.float32)


def near(sides: tuple[float, float], span: float, aspect: float = 0, offset: float = 0) -> Callable[..., Pairs]:
    """Pairs of boxes that are much alike."""

    def make(rng: np.random.Generator, count: int) -> Pairs:
        first = boxes(rng, count, sides, span, aspect, offset)
        return first, beside(rng, first)

    return make


def unrelated(sides: tuple[float, float], span: float, aspect: float = 0) -> Callable[..., Pairs]:
    """Pairs of boxes that were drawn each on its own."""
    return lambda rng, count: (boxes(rng, count, sides, span, aspect), boxes(rng, count, sides, span, aspect))


def identical(rng: np.random.Generator, count: int) -> Pairs:
    """Each box with itself."""
    first = boxes(rng, count, (1, 1e4), 1e3)
    return first, first


def touching(rng: np.random.Generator, count: int) -> Pairs:
    """Each box with one of the same size that shares a side, or a corner, with it."""
    first = boxes(rng, count, (4, 400), 512, 8)
    other, (_, _, w, h, angle) = first.copy(), first.T
    along, across = w * rng.integers(-1, 2, count), h * rng.choice([-1, 1], count)
    other[:, 0] += along * np.cos(angle) - across * np.sin(angle)
    other[:, 1] += along * np.sin(angle) + across * np.cos(angle)
    return first, other


def half_precision(rng: np.random.Generator, count: int) -> Pairs:
    """As `near`, of numbers that half precision has."""
    first = boxes(rng, count, (4, 400), 512, 8, 512).astype(np.float16).astype(np.float32)
    return first, beside(rng, first).astype(np.float16).astype(np.float32)


KINDS: dict[str, Callable[[np.random.Generator, int], Pairs]] = {
    "detections of 1024 px, alike": near((4, 400), 512, 8, 512),
    "the same in float16": half_precision,
    "crowded, unrelated": unrelated((4, 400), 100, 8),
    "sides 1e-3 to 1e4, alike": near((1e-3, 1e4), 100),
    "sides 1e-3 to 1e4, unrelated": unrelated((1e-3, 1e4), 100),
    "aspect ratio to 1000, alike": near((1, 100), 512, 1000),
    "far from the origin, alike": near((1, 10), 10, 4, 1e6),
    "identical": identical,
    "touching": touching,
}


@dataclass
class Errors:
    """What was found of the pairs of one kind; errors are absolute, of IoU.

    Attributes:
        overlap: share of pairs that overlap.
        error: the largest of the kernels' IoU, float32 or float64 as they choose.
        error32: the largest of float32 alone.
        ratio: the largest of float32 alone, in units of its bound.
        bound: the median bound of float32 alone.
        from_shapely: the largest distance of float64 from shapely.
        doubled: share of pairs that the kernels decide in float64, of the worst threshold.
        wrong: decisions that are not float64's, over all thresholds.
    """

    overlap: float
    error: float
    error32: float
    ratio: float
    bound: float
    from_shapely: float
    doubled: float
    wrong: int


def measure(kernels: Kernels, make: Callable[..., Pairs], count: int = PAIRS, seed: int = 0) -> Errors:
    """Draws `count` pairs and compares; shapely gets the first `BY_SHAPELY`."""
    a, b = make(np.random.default_rng(seed), count)
    reference = np.concatenate([rotated_iou(a[i : i + CHUNK], b[i : i + CHUNK]) for i in range(0, count, CHUNK)])
    found = [kernels.ious(a, b, threshold) for threshold in THRESHOLDS]
    error32 = np.abs(found[0].float32 - reference)
    thresholds = np.array(THRESHOLDS, np.float32)
    doubled = [np.mean(~(np.abs(found[0].float32 - threshold) > found[0].bound)) for threshold in thresholds]
    wrong = [
        np.count_nonzero((reference.astype(np.float32) > threshold) != one.suppressed)
        for threshold, one in zip(thresholds, found, strict=True)
    ]
    few = slice(0, BY_SHAPELY)
    return Errors(
        overlap=float(np.mean(reference > 0)),
        error=float(np.abs(found[0].iou - reference).max()),
        error32=float(error32.max()),
        ratio=float(np.nanmax(error32 / found[0].bound)),
        bound=float(np.median(found[0].bound)),
        from_shapely=float(np.abs(by_shapely(a[few], b[few]) - reference[few]).max()),
        doubled=float(max(doubled)),
        wrong=int(sum(wrong)),
    )


def by_shapely(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU ``[n]`` of pairs by shapely, about the first box and in units of the smallest side, where it loses least."""
    import shapely

    a, b = a.astype(np.float64), b.astype(np.float64)
    origin, unit = np.pad(a[:, :2], ((0, 0), (0, 3))), np.ones((len(a), 5))
    unit[:, :4] = np.minimum(a[:, 2:4].min(1), b[:, 2:4].min(1))[:, None]
    one, other = (shapely.polygons(corners((boxes - origin) / unit)) for boxes in (a, b))
    common = shapely.area(shapely.intersection(one, other))
    return common / (shapely.area(one) + shapely.area(other) - common)


def main() -> int:
    """Prints the table; 1 where a bound is broken or a decision is wrong."""
    kernels = Kernels(build_for_cpu())
    print(f"{PAIRS} pairs of each kind; thresholds {', '.join(map(str, THRESHOLDS))}")
    head = "overlap", "error", "float32's", "of its bound", "median bound", "- shapely", "by float64", "wrong"
    print(f"| {'pairs':29} | {' | '.join(head)} |\n|-|{'-|' * len(head)}")
    broken = False
    for name, make in KINDS.items():
        e = measure(kernels, make)
        errors = f"{e.error:.1e} | {e.error32:.1e} | {e.ratio:.0%} | {e.bound:.1e} | {e.from_shapely:.0e}"
        print(f"| {name:29} | {e.overlap:.0%} | {errors} | {e.doubled:.3%} | {e.wrong} |", flush=True)
        broken |= e.error > IOU_ERROR or e.ratio > 1 or e.wrong > 0
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
