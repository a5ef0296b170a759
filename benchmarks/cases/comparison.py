"""Two sets of outputs of a detector, held to each other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import Case, Contestant, Setting, Work

Named = list[dict[str, np.ndarray]]
ROWS, CLASSES = 8400, 80


def outputs(count: int) -> tuple[Named, Named]:
    """What two backends give for each of `count` images of 640 x 640: boxes, scores and raw outputs of three levels."""
    rng = np.random.default_rng(0)
    sides: tuple[Named, Named] = [], []
    shapes: dict[str, tuple[int, ...]] = {"boxes": (1, ROWS, 4), "scores": (1, ROWS, CLASSES)}
    shapes |= {f"cls{i}": (1, CLASSES, size, size) for i, size in enumerate((80, 40, 20))}
    shapes |= {f"box{i}": (1, 64, size, size) for i, size in enumerate((80, 40, 20))}
    for _ in range(count):
        one = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        sides[0].append(one)
        sides[1].append({name: value + np.float32(1e-5) * value for name, value in one.items()})
    return sides


def ours(setting: Setting) -> Work:
    """Largest, mean and 99 % error, cosine, SQNR and what is not finite."""
    from alignment.compare.measure import TensorErrors
    from alignment.models.outputs import Outputs

    def named(one: dict[str, np.ndarray]) -> Outputs:
        raw = {name: value for name, value in one.items() if name not in ("boxes", "scores")}
        return Outputs(raw, one["boxes"], one["scores"])

    pairs = [(named(one), named(other)) for one, other in zip(*outputs(setting.size), strict=True)]

    def work() -> float:
        errors = TensorErrors()
        for subject, reference in pairs:
            errors.add(subject, reference, None)
        return max(result.difference.max_abs for result in errors.results())

    return work


def polygraphy(**options: Any) -> Callable[[Setting], Work]:
    """polygraphy's comparator, quiet, on results that are there."""

    def prepare(setting: Setting) -> Work:
        from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER

        G_LOGGER.module_severity = G_LOGGER.CRITICAL
        results = RunResults()
        for name, side in zip(("a", "b"), outputs(setting.size), strict=True):
            iterations = [IterationResult(OrderedDict(one), runner_name=name) for one in side]
            results.append((name, iterations))
        compare = SimpleCompareFunc(atol=1e-3, rtol=1e-3, **options)
        return lambda: Comparator.compare_accuracy(results, compare_func=compare)

    return prepare


def largest(setting: Setting) -> Work:
    """The largest error of each tensor and nothing else, in NumPy."""
    one, other = outputs(setting.size)
    return lambda: max(float(np.abs(a[n] - b[n]).max()) for a, b in zip(one, other, strict=True) for n in a)


def allclose(setting: Setting) -> Work:
    """numpy.testing.assert_allclose."""
    one, other = outputs(setting.size)

    def work() -> None:
        for a, b in zip(one, other, strict=True):
            for name, value in a.items():
                np.testing.assert_allclose(value, b[name], rtol=1e-3, atol=1e-3)

    return work


CASE = Case(
    name="comparison",
    title="Outputs of a detector of 640 x 640 and 80 classes, eight tensors and 1.9 million numbers an image, from two "
    "backends; ours takes seven statistics, polygraphy with `max` four",
    axis="images",
    sizes=(2, 4, 8),
    contestants=(
        Contestant("ours", "ours", ours),
        Contestant("polygraphy, elemwise", "peer", polygraphy(check_error_stat="elemwise"), ("polygraphy",)),
        Contestant("polygraphy, max", "peer", polygraphy(check_error_stat="max"), ("polygraphy",)),
        Contestant("numpy.testing.assert_allclose", "peer", allclose),
        Contestant("numpy, the largest error alone", "peer", largest, ("numpy",)),
    ),
)
