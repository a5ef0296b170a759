"""The pure-torch stand-in for mmcv's compiled ops: each op against an independent oracle, and how it is found."""

from __future__ import annotations

import ctypes
import importlib.machinery
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from alignment.models import mmcv_finder

torch = pytest.importorskip("torch")
mmcv = pytest.importorskip("mmcv", reason="needs mmcv-lite or mmcv")
shapely = pytest.importorskip("shapely")
mmcv_ext = pytest.importorskip("alignment.models.mmcv_ext")

mmcv_finder.install()

ROOT = Path(__file__).resolve().parents[1]
CHEAP = settings(max_examples=60, deadline=None, database=None)
COMPILED = importlib.machinery.PathFinder.find_spec("mmcv._ext", list(mmcv.__path__))


def number(low, high):
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


centres, sizes, angles = number(-30, 30), number(0.05, 60), number(-7, 7)
rotated_boxes = st.tuples(centres, centres, sizes, sizes, angles)


@st.composite
def rotated_pairs(draw):
    """Unrelated boxes, and ones whose edges nearly or exactly coincide."""
    first = np.array(draw(rotated_boxes))
    if draw(st.booleans()):
        return first, np.array(draw(rotated_boxes))
    x, y, width, height, angle = first
    nudge = draw(st.sampled_from([0.0, 1e-12, 1e-9, 1e-6, 1e-3]))
    step = draw(st.sampled_from([0, 0.5, 1])) * width
    scale = draw(st.sampled_from([0.25, 0.5, 1, 2]))
    turn = draw(st.sampled_from([0, np.pi / 2, np.pi, -np.pi / 2]))
    second = x + step * np.cos(angle), y + step * np.sin(angle), width * scale, height + nudge, angle + turn + nudge
    return first, np.array(second)


def polygons(boxes):
    """Shapely polygons of (N, 5) rotated boxes."""
    x, y, width, height, angle = np.asarray(boxes, np.float64).T[..., None]
    u, v = width / 2 * [-1, 1, 1, -1], height / 2 * [-1, -1, 1, 1]
    cos, sin = np.cos(angle), np.sin(angle)
    return shapely.polygons(np.stack([x + cos * u - sin * v, y + sin * u + cos * v], axis=-1))


def shapely_iou(first, second, mode="iou"):
    """In coordinates about the first box, so that the oracle loses nothing far from the origin."""
    origin = np.array([*first[:2], 0, 0, 0])
    a, b = polygons([first - origin, second - origin])
    common = a.intersection(b).area
    return common / (a.area + b.area - common if mode == "iou" else a.area)


def rotated_iou(first, second, mode="iou", aligned=True, dtype=torch.float64):
    first, second = (torch.as_tensor(np.atleast_2d(boxes), dtype=dtype) for boxes in (first, second))
    out = torch.full((len(first) if aligned else len(first) * len(second),), torch.nan, dtype=dtype)
    mmcv_ext.box_iou_rotated(first, second, out, mode_flag={"iou": 0, "iof": 1}[mode], aligned=aligned)
    return (out if aligned else out.view(len(first), len(second))).numpy()


def random_rotated(count, seed, span=100.0):
    rng = np.random.default_rng(seed)
    return np.hstack([rng.uniform(0, span, (count, 2)), rng.uniform(1, 40, (count, 2)), rng.uniform(-4, 4, (count, 1))])


# ---- rotated IoU ----


@CHEAP
@given(rotated_pairs(), st.sampled_from(["iou", "iof"]))
def test_rotated_iou_equals_shapely(pair, mode):
    assert rotated_iou(*pair, mode)[0] == pytest.approx(shapely_iou(*pair, mode), abs=1e-9)


@CHEAP
@given(st.lists(rotated_boxes, max_size=6), st.lists(rotated_boxes, max_size=6))
def test_rotated_iou_of_all_pairs(first, second):
    first, second = np.array(first).reshape(-1, 5), np.array(second).reshape(-1, 5)
    expected = [[shapely_iou(a, b) for b in second] for a in first]
    expected = np.array(expected).reshape(len(first), len(second))
    np.testing.assert_allclose(rotated_iou(first, second, aligned=False), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "iou", "iof"),
    [
        pytest.param((3, 4, 5, 2, 0.7), (3, 4, 5, 2, 0.7), 1, 1, id="identical"),
        pytest.param((3, 4, 5, 2, 0.7), (3, 4, 2, 5, 0.7 + np.pi / 2), 1, 1, id="identical-other-description"),
        pytest.param((0, 0, 2, 2, 0), (2, 0, 2, 2, 0), 0, 0, id="touching-edge"),
        pytest.param((0, 0, 2, 2, 0), (2, 2, 2, 2, 0), 0, 0, id="touching-corner"),
        pytest.param((0, 0, 2, 2, 0), (1 + 2**0.5, 0, 2, 2, np.pi / 4), 0, 0, id="corner-touches-edge"),
        pytest.param((0, 0, 2, 2, 1), (0, 0, 4, 4, 1), 1 / 4, 1, id="contained"),
        pytest.param((0, 0, 4, 4, 1), (0, 0, 2, 2, 1), 1 / 4, 1 / 4, id="containing"),
        pytest.param((0, 0, 4, 4, 0), (1, 1, 2, 2, 0), 1 / 4, 1 / 4, id="contained-in-the-corner"),
        pytest.param((0, 0, 6, 2, 0), (0, 0, 6, 2, np.pi / 2), 4 / 20, 4 / 12, id="cross"),
        pytest.param((0, 0, 2, 2, 0), (0, 0, 2, 2, np.pi / 4), 2**-0.5, 2 * 2**0.5 - 2, id="octagon"),
        pytest.param((0, 0, 0, 5, 0.3), (0, 0, 5, 5, 0), 0, 0, id="no-width"),
        pytest.param((0, 0, 5, 5, 0), (0, 0, 5, 0, 0.3), 0, 0, id="no-height"),
        pytest.param((0, 0, 1e-8, 1e-8, 0), (0, 0, 1e-8, 1e-8, 0), 0, 0, id="below-the-least-area"),
        pytest.param((0, 0, -2, 2, 0), (0, 0, 2, 2, 0), 0, 0, id="negative-area"),
        pytest.param((1e6, 1e6, 2e-2, 1e-2, 0), (1e6, 1e6, 1e-2, 1e-2, 0), 1 / 2, 1 / 2, id="small-and-far-away"),
        pytest.param((0, 0, 1e9, 1e9, 0.2), (0, 0, 1, 1, 0.4), 1e-18, 1e-18, id="huge-and-small"),
        pytest.param((3e8, 1e8, 1, 2, 0.2), (0, 0, 1e9, 1e9, 0.4), 2e-18, 1, id="small-and-huge"),
    ],
)
def test_rotated_iou_of_special_boxes(first, second, iou, iof):
    for matrix in (False, True):
        assert rotated_iou(first, second, "iou", not matrix).item() == pytest.approx(iou, rel=1e-9, abs=1e-15)
        assert rotated_iou(first, second, "iof", not matrix).item() == pytest.approx(iof, rel=1e-9, abs=1e-15)


@CHEAP
@given(rotated_pairs(), st.integers(-5, 15))
def test_rotated_iou_has_no_unit(pair, exponent):
    scale = np.array([10.0**exponent] * 4 + [1.0])
    scaled = [box * scale for box in pair]
    assume(all(box[2] * box[3] > 1e-13 for box in (*pair, *scaled)))
    assert rotated_iou(*scaled)[0] == pytest.approx(rotated_iou(*pair)[0], abs=1e-9)


def test_rotated_boxes_apart_overlap_by_exactly_nothing():
    first, second = random_rotated(200_000, 7), random_rotated(200_000, 8)
    apart = shapely.disjoint(polygons(first), polygons(second))
    assert 0.5 < apart.mean() < 0.95
    assert not rotated_iou(first, second)[apart].any()


def test_rotated_iou_of_many_small_boxes_far_away():
    boxes = random_rotated(40, 9) * [1e-4, 1e-4, 1e-4, 1e-4, 1] + [1e6, 1e6, 0, 0, 0]
    pairs = np.repeat(boxes, 40, axis=0), np.tile(boxes, (40, 1))
    np.testing.assert_array_equal(rotated_iou(boxes, boxes, aligned=False).ravel(), rotated_iou(*pairs))


def test_rotated_iou_in_chunks_and_in_float32(monkeypatch):
    first, second = random_rotated(57, 0), random_rotated(31, 1)
    whole = rotated_iou(first, second, aligned=False)
    monkeypatch.setattr(mmcv_ext, "PAIR_CHUNK", 10)
    monkeypatch.setattr(mmcv_ext, "MATRIX_ELEMENTS", 100)
    np.testing.assert_array_equal(rotated_iou(first, second, aligned=False), whole)
    np.testing.assert_allclose(rotated_iou(first[:31], second), whole[range(31), range(31)], rtol=1e-12)
    np.testing.assert_allclose(rotated_iou(first, second, aligned=False, dtype=torch.float32), whole, atol=1e-5)


# ---- NMS ----


def greedy(order, overlaps):
    """Brute force: `overlaps(kept, candidate)` decides."""
    kept = []
    for candidate in order:
        if not any(overlaps(index, candidate) for index in kept):
            kept.append(int(candidate))
    return kept


def falling(scores):
    return np.argsort(-np.asarray(scores), kind="stable")


def brute_force_nms(boxes, scores, threshold, offset):
    boxes, threshold, one = np.asarray(boxes, np.float32), np.float32(threshold), np.float32(offset)

    def iou_exceeds(i, j):
        extent = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2]) + one
        common = np.prod(np.maximum(extent, 0))
        areas = [np.prod(boxes[k, 2:] - boxes[k, :2] + one) for k in (i, j)]
        with np.errstate(invalid="ignore"):
            return common / (areas[0] + areas[1] - common) > threshold

    return greedy(falling(scores), iou_exceeds)


# Whole coordinates and few score levels: ties of both, and overlaps that equal the threshold.
whole_boxes = st.tuples(*[st.integers(0, 8)] * 2, *[st.integers(0, 6)] * 2, st.integers(1, 4))


@CHEAP
@given(st.lists(whole_boxes, max_size=40), st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.7]), st.integers(0, 1))
def test_nms_equals_brute_force(rows, threshold, offset):
    rows = np.array(rows, np.float32).reshape(-1, 5)
    boxes, scores = np.hstack([rows[:, :2], rows[:, :2] + rows[:, 2:4]]), rows[:, 4] / 4
    kept = mmcv_ext.nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold, offset)
    assert kept.dtype == torch.int64
    assert kept.tolist() == brute_force_nms(boxes, scores, threshold, offset)


@CHEAP
@given(st.lists(rotated_boxes, max_size=12), st.sampled_from([0.1, 0.3, 0.5]), st.booleans(), st.randoms())
def test_rotated_nms_equals_brute_force(rows, threshold, multi_label, random):
    boxes = np.array(rows).reshape(-1, 5)
    scores = np.array([random.choice([0.25, 0.5, 0.75]) for _ in boxes])
    labels = np.array([random.choice([0, 1]) for _ in boxes])
    overlap = np.array([[shapely_iou(a, b) for b in boxes] for a in boxes]).reshape(len(boxes), len(boxes))
    assume((abs(overlap - threshold) > 1e-6).all())
    same = labels[:, None] == labels if multi_label else np.True_ | (labels[:, None] == labels)
    expected = greedy(falling(scores), lambda i, j: same[i, j] and overlap[i, j] >= threshold)

    dets = torch.from_numpy(np.hstack([boxes, labels[:, None]]) if multi_label else boxes)
    kept = mmcv_ext.nms_rotated(dets, torch.from_numpy(scores), None, None, None, threshold, multi_label)
    assert kept.tolist() == expected


@pytest.mark.parametrize("count", [1, 127, 128, 129, 700])
def test_nms_over_several_blocks(count):
    boxes, scores = random_rotated(count, 2, span=150), np.random.default_rng(3).permutation(count) / count
    tensor = torch.from_numpy(boxes)
    ious = rotated_iou(boxes, boxes, aligned=False)
    kept = mmcv_ext.nms_rotated(tensor, torch.from_numpy(scores), None, None, None, 0.2, False)
    assert kept.tolist() == greedy(falling(scores), lambda i, j: ious[i, j] >= np.float32(0.2))

    upright = np.hstack([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2])
    kept = mmcv_ext.nms(torch.from_numpy(upright), torch.from_numpy(scores), 0.2)
    assert kept.tolist() == brute_force_nms(upright, scores, 0.2, 0)


def test_only_rotated_nms_suppresses_at_the_threshold():
    scores = torch.tensor([0.9, 0.8])
    upright = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1]])
    rotated = torch.tensor([[1.0, 1, 2, 2, 0], [1, 0.5, 2, 1, 0]])
    assert mmcv_ext.nms(upright, scores, 0.5).tolist() == [0, 1]
    assert mmcv_ext.nms_rotated(rotated, scores, None, None, None, 0.5, False).tolist() == [0]


def test_equal_scores_are_taken_in_index_order():
    boxes = torch.arange(100.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    assert mmcv_ext.nms(boxes, torch.full((100,), 0.5), 0.5).tolist() == list(range(100))


# ---- focal loss ----


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.5), (0.0, 0.75)])
def test_focal_loss_equals_mmdet_and_autograd(gamma, alpha):
    pytest.importorskip("mmdet")
    from mmcv.ops import sigmoid_focal_loss
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(50, 4, generator=generator, dtype=torch.float64) * 4).requires_grad_()
    target = torch.randint(0, 5, (50,), generator=generator)
    weight = torch.rand(4, generator=generator, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4]
    per_box = torch.cat([weight, weight[-1:]])[target]

    loss = sigmoid_focal_loss(logits, target, gamma, alpha, weight, "sum")
    expected = py_sigmoid_focal_loss(logits, one_hot, per_box, gamma=gamma, alpha=alpha, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_focal_loss_of_extreme_logits():
    logits = torch.tensor([[-200.0, 200.0, 0.0]])
    loss, gradient = torch.empty_like(logits), torch.empty_like(logits)
    for target, wrong in ((0, [0, 1]), (1, []), (3, [1])):
        arguments = logits, torch.tensor([target]), torch.empty(0)
        mmcv_ext.sigmoid_focal_loss_forward(*arguments, loss, 2.0, 0.25)
        mmcv_ext.sigmoid_focal_loss_backward(*arguments, gradient, 2.0, 0.25)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()
        assert [i for i in range(2) if loss[0, i] > 1] == wrong, "200 * alpha where the class is certain and wrong"


# ---- the vertices of rotated intersections, through mmcv's differentiable IoU ----


def differentiable_iou(first, second):
    """IoU and its gradient by the first box."""
    from mmcv.ops import diff_iou_rotated_2d

    first = torch.tensor(np.array(first))[None, None].requires_grad_()
    iou = diff_iou_rotated_2d(first, torch.tensor(np.array(second))[None, None])
    (gradient,) = torch.autograd.grad(iou.sum(), first)
    return iou.item(), gradient[0, 0].numpy()


@CHEAP
@example((0.0, 0.0, 4.0, 4.0, 0.0), (9.0, 0.0, 4.0, 4.0, 1.0))  # no vertex is valid
@given(rotated_boxes, rotated_boxes)
def test_differentiable_iou_equals_shapely(first, second):
    # mmcv divides by a determinant + 1e-8: of parallel edges on one line it makes vertices that are not there.
    assume(abs(np.sin(2 * (first[4] - second[4]))) > 1e-2)
    iou, gradient = differentiable_iou(first, second)
    # It also takes points within 1e-6 of the box as inside.
    assert iou == pytest.approx(shapely_iou(np.array(first), np.array(second)), abs=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("seed", range(5))
def test_gradient_of_differentiable_iou(seed):
    first, second = random_rotated(2, seed, span=10)
    _, gradient = differentiable_iou(first, second)
    step = 1e-6 * np.eye(5)
    numeric = [(shapely_iou(first + d, second) - shapely_iou(first - d, second)) / 2e-6 for d in step]
    np.testing.assert_allclose(gradient, numeric, atol=1e-5)


@pytest.mark.parametrize("turn", [0, 1e-9, 1e-8, 1e-7, 1e-6])
def test_differentiable_iou_of_almost_equal_boxes(turn):
    iou, gradient = differentiable_iou([5, 7, 4, 2, 0.3], [5, 7, 4, 2, 0.3 + turn])
    assert iou == pytest.approx(1, abs=1e-5)
    # One-sided derivatives: 1/2 by a shift across 2, 1/2 by a height of 2, 5/4 by the angle.
    assert abs(gradient).max() < 1.3


# ---- how it is found ----


def run_script(folder, source, *arguments):
    script = folder / "script.py"
    script.write_text(source)
    command = [sys.executable, str(script), str(ROOT), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_op_raises_and_says_what_to_install():
    with pytest.raises(NotImplementedError, match=r"'softnms'.*install the package mmcv .*instead of mmcv-lite"):
        mmcv_ext.softnms(torch.zeros(1, 4))
    assert not hasattr(mmcv_ext, "__wrapped__")


def test_install_again_does_nothing():
    import multiprocessing.spawn

    before = list(sys.meta_path), multiprocessing.spawn.get_preparation_data
    mmcv_finder.install()
    assert (list(sys.meta_path), multiprocessing.spawn.get_preparation_data) == before
    finders = [type(finder) for finder in sys.meta_path]
    assert finders.index(mmcv_finder.MmcvExtFinder) > sys.meta_path.index(importlib.machinery.PathFinder)
    assert mmcv_finder.MmcvExtFinder().find_spec("mmcv.ops") is None


POOL = """
import sys
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])  # the child starts without the package on its path
    from alignment.models.mmcv_finder import install
    install()
    import multiprocessing
    import numpy as np
    from mmcv.ops import nms
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 3], [9, 9, 12, 12]], np.float32)
    with multiprocessing.get_context(sys.argv[2]).Pool(1) as pool:
        print(pool.apply(nms, (boxes, np.array([0.5, 0.9, 0.7], np.float32), 0.5))[1].tolist())
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_child_processes_find_it(tmp_path, method):
    assert run_script(tmp_path, POOL, method) == "[1, 2]"


COMPILED_ONE = """
import sys
sys.path.insert(0, sys.argv[1])
from alignment.models.mmcv_finder import install
install()
import mmcv
mmcv.__path__.insert(0, sys.argv[2])
import mmcv._ext
print(mmcv._ext.__file__)
"""


def test_a_compiled_module_wins(tmp_path):
    compiled = tmp_path / "compiled" / "_ext.py"
    compiled.parent.mkdir()
    compiled.touch()
    assert run_script(tmp_path, COMPILED_ONE, compiled.parent) == str(compiled)


# ---- against mmcv's own C++ ----


@pytest.mark.skipif(COMPILED is None, reason="mmcv-lite: there is no compiled mmcv._ext to compare with")
def test_equals_the_compiled_module():
    from mmcv.ops import box_iou_rotated, nms, nms_rotated

    boxes, scores = torch.from_numpy(random_rotated(400, 4)).float(), torch.randperm(400) / 400
    upright = torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1)
    ious = rotated_iou(boxes.numpy(), boxes.numpy(), aligned=False, dtype=torch.float32)
    np.testing.assert_allclose(ious, box_iou_rotated(boxes, boxes).numpy(), atol=2e-6)
    assert mmcv_ext.nms(upright, scores, 0.3).tolist() == nms(upright, scores, 0.3)[1].tolist()
    rotated = mmcv_ext.nms_rotated(boxes, scores, None, None, None, 0.3, False)
    assert rotated.tolist() == nms_rotated(boxes, scores, 0.3)[1].tolist()


HEADER = Path(mmcv.__path__[0], "ops/csrc/common/box_iou_rotated_utils.hpp")


@pytest.mark.skipif(not HEADER.is_file(), reason="this mmcv ships no C++ sources")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile mmcv's header")
def test_rotated_iou_equals_the_header_that_mmcv_ships(tmp_path):
    arguments = "const double* a, const double* b, double* out, int n, int mode"
    body = "for (int i = 0; i < n; i++) out[i] = single_box_iou_rotated<double>(a + 5 * i, b + 5 * i, mode);"
    source = tmp_path / "iou.cpp"
    source.write_text(f'#include "{HEADER}"\nextern "C" void iou({arguments}) {{ {body} }}\n')
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", source, "-o", tmp_path / "iou.so"], check=True)
    library = ctypes.CDLL(str(tmp_path / "iou.so"))
    first, second = random_rotated(5000, 5), random_rotated(5000, 6)
    for flag, mode in enumerate(["iou", "iof"]):
        expected = np.empty(5000)
        library.iou(*(ctypes.c_void_p(array.ctypes.data) for array in (first, second, expected)), 5000, flag)
        np.testing.assert_allclose(rotated_iou(first, second, mode), expected, atol=1e-8)
