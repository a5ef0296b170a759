"""Errors of tensors: `ErrorAccumulator` against plain NumPy, and our verdict against polygraphy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.compare.measure import Measured
from alignment.compare.tensors import ErrorAccumulator, count_nonfinite
from alignment.compare.verdict import judge
from alignment.golden import GoldenCase, Tolerance
from alignment.results import ErrorStats, StageResult, TensorResult

pytestmark = pytest.mark.filterwarnings("ignore:CompareFunc.simple is deprecated")
SEEDS = st.integers(0, 2**32 - 1)


def stats_of(*pairs: tuple[np.ndarray, np.ndarray]) -> ErrorStats:
    errors = ErrorAccumulator()
    for subject, reference in pairs:
        errors.add(subject, reference)
    found = errors.stats()
    assert found is not None
    return found


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def pair(seed: int, size: int, magnitude: float, noise: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = (rng.normal(size=size) * magnitude).astype(dtype)
    # Errors over several orders of magnitude, as those of a network are, and some that are none.
    error = rng.normal(size=size) * magnitude * noise * 10.0 ** rng.uniform(-3, 0, size) * (rng.random(size) > 0.1)
    return (reference + error).astype(dtype), reference


@settings(max_examples=80, deadline=None)
@given(
    seed=SEEDS,
    size=st.integers(1, 400),
    magnitude=st.sampled_from([1e-4, 1.0, 640.0]),
    noise=st.sampled_from([0.0, 1e-6, 1e-2, 2.0]),
    dtype=st.sampled_from(["float32", "float64"]),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
def test_statistics_are_those_of_plain_numpy_however_the_tensor_is_split(seed, size, magnitude, noise, dtype, cuts):
    subject, reference = pair(seed, size, magnitude, noise, dtype)
    found = stats_of(
        *zip(*(np.split(x, sorted(min(c, size) for c in cuts)) for x in (subject, reference)), strict=True)
    )

    error = np.abs(subject - reference).astype(np.float64)
    a, b = subject.astype(np.float64), reference.astype(np.float64)
    assert (found.count, found.nonfinite) == (size, 0)
    assert found.max_abs == error.max()
    assert found.mean_abs == pytest.approx(error.mean(), rel=1e-5)
    assert found.p99_abs == pytest.approx(np.quantile(error, 0.99, method="inverted_cdf"), rel=0.01)
    assert found.cosine == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)), abs=1e-5)
    if error.any():
        assert found.sqnr_db == pytest.approx(10 * math.log10((b @ b) / (error @ error)), abs=1e-3)
    else:
        assert found.sqnr_db is None


def test_nothing_added_is_no_statistics_and_an_empty_tensor_adds_nothing():
    errors = ErrorAccumulator()
    errors.add(floats(), floats())
    assert errors.stats() is None
    errors.add(floats(1, 2), floats(1, 4))
    errors.add(floats(), floats())
    found = errors.stats()
    assert found is not None
    assert (found.count, found.max_abs, found.mean_abs) == (2, 2.0, 1.0)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        ErrorAccumulator().add(np.zeros((2, 3)), np.zeros((3, 2)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["subject", "reference"])
def test_a_value_that_is_finite_on_one_side_only_is_counted_and_spoils_no_other_number(value, side):
    broken, whole = floats(1, value, 3, 4), floats(1, 2, 3, 4.5)
    found = stats_of((broken, whole) if side == "subject" else (whole, broken))
    assert (found.nonfinite, found.count) == (1, 3)
    assert (found.max_abs, found.mean_abs) == (0.5, pytest.approx(0.5 / 3))
    assert math.isfinite(found.cosine)
    assert found.sqnr_db is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_same_non_finite_value_on_both_sides_is_no_error(value):
    found = stats_of((floats(value, 1, 2), floats(value, 1, 2)))
    assert (found.nonfinite, found.count, found.max_abs, found.sqnr_db) == (0, 3, 0.0, None)
    assert found.cosine == pytest.approx(1)


def test_infinities_of_opposite_sign_and_nan_against_infinity_are_errors():
    assert stats_of((floats(math.inf, math.nan), floats(-math.inf, math.inf))).nonfinite == 2


def test_equal_non_finite_values_count_in_the_quantile_as_zeros_too():
    # 1 error among 200 elements: the 99th percentile is 0, whatever the equal ones are.
    subject, reference = np.full(200, np.inf, np.float32), np.full(200, np.inf, np.float32)
    subject[0], reference[0] = 1.0, 2.0
    assert stats_of((subject, reference)).p99_abs == 0.0


def test_add_returns_the_largest_error_of_that_pair_alone():
    errors = ErrorAccumulator()
    assert errors.add(floats(1), floats(3)) == 2.0
    assert errors.add(floats(math.nan), floats(3)) == math.inf
    assert errors.add(floats(1), floats(1.5)) == 0.5


@pytest.mark.parametrize("magnitude", [1e25, 1e-30])
def test_squares_beyond_the_range_of_float32_do_not_spoil_cosine_and_sqnr(magnitude):
    reference = floats(1, 2, 3) * np.float32(magnitude)
    found = stats_of((-reference, reference))
    assert found.cosine == pytest.approx(-1)
    assert found.sqnr_db == pytest.approx(-20 * math.log10(2), abs=1e-3)


def decoded_stage(subject: np.ndarray, reference: np.ndarray, limit: float) -> StageResult:
    names: dict = {name: Tolerance(value=limit, origin="test") for name in ("raw", "boxes", "scores", "agreement")}
    tensor = TensorResult(name="boxes", unit="px", difference=stats_of((subject, reference)))
    stages = judge(Measured(tensors=[tensor]), GoldenCase(tolerances=names), 1, None)
    return next(stage for stage in stages if stage.name == "decoded")


@settings(max_examples=50, deadline=None)
@given(
    seed=SEEDS,
    size=st.integers(1, 200),
    noise=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2]),
    atol=st.sampled_from([1e-6, 1e-4, 1e-2]),
    broken=st.sampled_from([None, None, "subject", "reference"]),
)
def test_the_verdict_on_a_pair_of_outputs_is_that_of_polygraphy(seed, size, noise, atol, broken):
    comparator = pytest.importorskip("polygraphy.comparator")
    logger = pytest.importorskip("polygraphy.logger").G_LOGGER
    subject, reference = pair(seed, size, 1.0, noise, "float32")
    if broken:
        (subject if broken == "subject" else reference)[seed % size] = np.nan
    with logger.verbosity(logger.CRITICAL):
        theirs = comparator.CompareFunc.simple(atol=atol, rtol=0, check_error_stat="max")(
            comparator.IterationResult({"boxes": subject}), comparator.IterationResult({"boxes": reference})
        )["boxes"]
    ours = decoded_stage(subject, reference, atol)
    assert (ours.status == "pass") == bool(theirs)


@pytest.mark.parametrize(("distance", "status"), [(0.5, "pass"), (0.5 + 2**-10, "fail")])
def test_a_difference_of_exactly_the_tolerance_passes(distance, status):
    assert decoded_stage(floats(1 + distance, 7), floats(1, 7), 0.5).status == status


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted(bad):
    values = np.ones((4, 5), np.float32)
    assert count_nonfinite(values, values * np.float32(3e38)) == 0, "their sum overflows"
    values[1, 2:4] = bad
    assert count_nonfinite(values, np.zeros((0, 4), np.float32)) == 2
