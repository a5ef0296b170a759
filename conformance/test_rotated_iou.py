"""The kernels' IoU, compiled for the CPU, against shapely and float64; and the numbers that order candidates."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rotated_kernels import COMPILER, emulated
from test_rotated_nms import MANY, by_shapely, number, pairs, rounding

from alignment.engine.plugins import IOU_ERROR, source_dir
from alignment.nms.rotated import rotated_iou
from benchmarks.rotated_iou import KINDS, measure

pytestmark = [
    pytest.mark.nms,
    pytest.mark.rotated,
    pytest.mark.plugin,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]
SOME = 120_000  # pairs of each of nine kinds: more than 10^6
HALF = np.pi / 2


def ious(a, b, threshold: float = 0.5):
    return emulated().ious(np.atleast_2d(np.float32(a)), np.atleast_2d(np.float32(b)), threshold)


def as_kernels_see(pair) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.float32(box).astype(np.float64) for box in pair)


@MANY
@given(pairs())
def test_iou_equals_shapely(pair):
    a, b = as_kernels_see(pair)
    found, expected, slack = ious(a, b), by_shapely(a, b), 1e-9 + rounding(a, b)
    assert found.iou[0] == pytest.approx(expected, abs=IOU_ERROR + slack)
    assert found.float32[0] == pytest.approx(expected, abs=float(found.bound[0]) + slack)


@MANY
@given(pairs(), number(-8, -2), number(0, 1))
def test_a_box_is_suppressed_as_float64_says(pair, step, threshold):
    """Also where the threshold is the IoU itself, a step of float32 below it, or up to 10^-2 of it."""
    a, b = as_kernels_see(pair)
    exact, slack = rotated_iou(a[None], b[None])[0], rounding(a, b)
    expected = np.float32(exact)
    for at in (threshold, expected, max(np.nextafter(expected, np.float32(-1)), 0), expected * (1 - 10**step)):
        decisions = {bool(np.float32(value) > np.float32(at)) for value in (exact - slack, exact, exact + slack)}
        assert bool(ious(a, b, at).suppressed[0]) in decisions


@pytest.mark.parametrize("name", KINDS)
def test_a_million_random_pairs_stay_within_the_bound(name):
    errors = measure(emulated(), KINDS[name], SOME)
    assert errors.error <= IOU_ERROR
    assert errors.ratio <= 1
    assert errors.wrong == 0
    assert errors.from_shapely < 1e-8
    assert errors.overlap > 0.2
    # Float32 does the work wherever boxes are not a thousand times as long as wide.
    assert errors.doubled < (0.15 if "1e-3" in name else 0.01)


def test_a_wrong_iou_and_a_bound_too_small_are_seen():
    class Faulty:
        def __init__(self, **scales):
            self.scales = scales

        def ious(self, *asked):
            found = emulated().ious(*asked)
            scaled = {name: np.float32(getattr(found, name) * scale) for name, scale in self.scales.items()}
            return replace(found, suppressed=found.iou > asked[2], **scaled)

    make = KINDS["detections of 1024 px, alike"]
    good, off, tight = (
        measure(Faulty(**scales), make, 20_000)
        for scales in ({}, {"iou": 1 + 1e-4, "float32": 1.0001}, {"bound": 1e-2})
    )
    assert (good.error <= IOU_ERROR, good.ratio <= 1) == (True, True)
    assert (off.error > IOU_ERROR, off.ratio > 1) == (True, True)
    assert tight.ratio > 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        # Corners that lie on sides and sides that lie on sides: what an algorithm of intersection points, as mmcv's,
        # sorts and counts by rounding errors.
        pytest.param((3, 4, 5, 2, 0.7), (3, 4, 5, 2, 0.7), id="identical"),
        pytest.param((1e4, -1e4, 5, 2, 0.7), (1e4, -1e4, 5, 2, 0.7), id="identical, far away"),
        pytest.param((3, 4, 5, 2, 0.7), (3, 4, 5, 2, 0.7 + 1e-7), id="turned by 1e-7"),
        pytest.param((3, 4, 5, 2, 1e-6), (3, 4, 5, 2, -1e-6), id="turned by 2e-6"),
        pytest.param((3, 4, 5, 2, 0), (3, 4, 5, 2, 1e-30), id="turned by 1e-30"),
        pytest.param((3, 4, 500, 2, 0), (3, 4, 500, 2, 1e-4), id="long, turned by 1e-4"),
        pytest.param((3, 4, 5, 2, 0.7), (3, 4, 5, 2, 0.7 + np.pi), id="turned by half a turn"),
        pytest.param((3, 4, 5, 2, 0.7), (3, 4, 2, 5, 0.7 + HALF), id="written the other way"),
        pytest.param((3, 4, 5, 2, 0.7), (3, 4, 5, 2, 0.7 + HALF), id="across"),
        pytest.param((0, 0, 5, 2, 0), (1e-6, 0, 5, 2, 0), id="moved by 1e-6"),
        pytest.param((0, 0, 4, 4, 0.3), (0, 0, 2, 2, 0.3), id="contained, parallel"),
        pytest.param((0, 0, 4, 4, 0), (1, 1, 2, 2, 0), id="contained, sides shared"),
        pytest.param((0, 0, 2, 2, 0), (0, 0, 2**0.5, 2**0.5, np.pi / 4), id="corners on sides"),
        pytest.param((0, 0, 2, 2, 0), (2, 0, 2, 2, 0), id="touching sides"),
        pytest.param((0, 0, 2, 2, 0), (2, 2, 2, 2, 0), id="touching corners"),
        pytest.param((0, 0, 2, 2, 0), (1 + 2**0.5, 0, 2, 2, np.pi / 4), id="a corner on a side"),
        pytest.param((1e4, 1e4, 1e-3, 1e-3, 0.3), (0, 0, 4e4, 4e4, 0), id="small in huge"),
        pytest.param((0, 0, 1e4, 1e-3, 0.5), (0, 0, 1e4, 1e-3, 0.5 + 1e-7), id="needles"),
    ],
)
def test_boxes_whose_outlines_meet(a, b):
    a, b = as_kernels_see((a, b))
    expected = by_shapely(a, b)
    for one, other in ((a, b), (b, a)):
        found = ious(one, other)
        assert found.iou[0] == pytest.approx(expected, abs=1e-6)
        assert found.float32[0] == pytest.approx(expected, abs=float(found.bound[0]))
    assert float(rotated_iou(a[None], b[None])[0]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "box",
    [(0, 0, 0, 5, 0.3), (0, 0, 0, 0, 0), (0, 0, -2, 2, 0), (0, 0, 1e-8, 1e-7, 0), (0, 0, 0, np.inf, 0)]
    + [
        tuple(np.where(np.arange(5) == i, odd, [0.0, 0, 5, 5, 0]))
        for i in range(5)
        for odd in (np.nan, np.inf, -np.inf)
    ],
)
def test_boxes_that_overlap_nothing(box):
    usual = 0, 0, 5, 5, 0.3
    for one, other in ((box, usual), (usual, box), (box, box), (box, (0, 0, 3e38, 3e38, 0))):
        found = ious(one, other, 0.0)
        assert found.iou[0] == 0
        assert not found.suppressed[0]


@pytest.mark.parametrize("box", [(3e38, -3e38, 5, 2, 1), (0, 0, 3e38, 2e38, 1), (3, 4, 5, 2, 3e8), (3, 4, -5, -2, 1)])
def test_extreme_numbers_overlap_themselves(box):
    found = ious(box, box, 0.999)
    assert found.iou[0] == 1
    assert found.suppressed[0]


def test_both_ways_to_write_an_angle_give_the_same():
    """``le90``: the long side first, the angle in [-pi/2, pi/2); ``oc``: the angle in (0, pi/2], any side first."""
    a, b = KINDS["detections of 1024 px, alike"](np.random.default_rng(5), 50_000)
    one, other = ious(le90(a), le90(b)), ious(oc(a), oc(b))
    assert ((oc(a)[:, 4] > 0) & (oc(a)[:, 4] <= np.float32(HALF))).all()
    assert (le90(a)[:, 2] >= le90(a)[:, 3]).all()
    # Angles are rounded, by 6e-8 of a radian, and sides are up to 8 times as long as wide.
    np.testing.assert_allclose(one.iou, other.iou, rtol=0, atol=3e-6)
    unlike = one.suppressed != other.suppressed
    assert (np.abs(one.iou[unlike] - 0.5) < 3e-6).all()
    assert unlike.mean() < 1e-4
    assert 0.1 < one.suppressed.mean() < 0.9


def le90(boxes: np.ndarray) -> np.ndarray:
    return turned(boxes, boxes[:, 2] < boxes[:, 3], -HALF)


def oc(boxes: np.ndarray) -> np.ndarray:
    turns = np.ceil(boxes[:, 4].astype(np.float64) / HALF) - 1  # that bring the angle into (0, pi/2]
    return turned(boxes, turns % 2 == 1, 0)


def turned(boxes: np.ndarray, which: np.ndarray, low: float) -> np.ndarray:
    """Boxes of which some are written with their sides swapped; angles lie within half a turn, from `low` on."""
    exact = boxes.astype(np.float64)
    exact[which] = exact[which][:, [0, 1, 3, 2, 4]] + [0, 0, 0, 0, HALF]
    exact[:, 4] = np.mod(exact[:, 4] - low, np.pi) + low
    return exact.astype(np.float32)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Functions of tests/numbers.cpp, over arrays."""
    library = tmp_path_factory.mktemp("numbers") / "numbers.so"
    source = source_dir() / "tests" / "numbers.cpp"
    subprocess.run([COMPILER, "-std=c++17", "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))

    def call(name: str, *arrays: np.ndarray) -> None:
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        getattr(functions, name)(*pointers, ctypes.c_size_t(len(arrays[0])))

    return call


def test_all_halves_are_the_floats_of_numpy_and_come_back(numbers):
    halves = np.arange(1 << 16, dtype=np.uint16)
    floats, again = np.empty(1 << 16, np.float32), np.empty_like(halves)
    numbers("floats_of_halves", halves, floats)
    numbers("halves_of_floats", floats, again)
    real = ~np.isnan(floats)
    np.testing.assert_array_equal(floats, halves.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(floats), halves >> 15 == 1)
    np.testing.assert_array_equal(again[real], halves[real])
    assert np.isnan(again[~real].view(np.float16)).all()


def test_floats_round_to_halves_as_numpy_has_it(numbers):
    """At every half, between it and the next one, and a step beside these; and anywhere."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-2] + halves[1:-1]) / 2
    between = np.append(between, np.float32(65520))
    at = np.concatenate([halves, between])
    at = np.concatenate([at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(np.inf))])
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32).view(np.float32)
    floats = np.concatenate([at, -at, bits])
    found = np.empty(len(floats), np.uint16)
    numbers("halves_of_floats", floats, found)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = floats.astype(np.float16)
    np.testing.assert_array_equal(found.view(np.float16), expected)
    real = ~np.isnan(floats)
    np.testing.assert_array_equal(found[real], expected.view(np.uint16)[real])


@MANY
@given(st.floats(-1.5, 1.5, width=32), st.integers(0, 2**32 - 1))
def test_no_logit_is_passed_over_whose_sigmoid_passes(numbers, threshold, seed):
    """Logits of all sizes, most of them just where the sigmoid crosses the threshold."""
    rng = np.random.default_rng(seed)
    middle = np.log(threshold / (1 - threshold)) if 0 < threshold < 1 else rng.choice([-100.0, 17.0, 100.0])
    around = middle * (1 + rng.normal(0, 1, 200) * 10 ** rng.uniform(-8, -3, 200)) + rng.normal(0, 1e-6, 200)
    logits = np.concatenate([around, rng.normal(0, 30, 50), [-np.inf, np.inf, 0, -0.0, 3e38, -3e38]]).astype(np.float32)
    least, scores = np.empty(1, np.float32), np.empty_like(logits)
    numbers("least_logits", np.float32([threshold]), least)
    numbers("sigmoids", logits, scores)
    with np.errstate(over="ignore"):
        np.testing.assert_array_max_ulp(scores, (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32), 1)
    passes = scores > np.float32(threshold)
    assert (logits[passes] >= least[0]).all()
    # It is worth its while: it lets through little that fails.
    if 1e-6 < threshold < 1 - 1e-6:
        assert (logits >= least[0]).sum() <= passes.sum() + (np.abs(logits - middle) < 1e-3 * (1 + abs(middle))).sum()


def test_keys_order_scores_and_then_indices(numbers):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 1 << 32, 20_000, np.uint32).view(np.float32)
    scores = np.concatenate([scores[~np.isnan(scores)], [0, -0.0, np.inf, -np.inf, 1e-45, -1e-45], np.full(500, 0.5)])
    scores = scores.astype(np.float32)
    indices = rng.integers(0, 1 << 30, len(scores), np.uint32)
    keys, again = np.empty(len(scores), np.uint64), np.empty_like(scores)
    numbers("score_keys", scores, indices, keys, again)
    np.testing.assert_array_equal(np.argsort(keys), np.lexsort((indices, -scores)))
    np.testing.assert_array_equal(again, scores)
    assert keys.max() < np.uint64(2**64 - 1)
