"""The CUDA kernels of rotated NMS against the NumPy semantics: on a GPU, and thread by thread on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from rotated_kernels import COMPILER, RUNNERS, attributes, expected, same, scene

from alignment.engine.capabilities import missing
from alignment.errors import AlignError

pytestmark = [pytest.mark.nms, pytest.mark.rotated, pytest.mark.plugin]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def nms(request):
    if request.param == "gpu" and (reason := missing()):
        (pytest.fail if request.config.option.strict_cases else pytest.skip)(reason)
    if request.param == "cpu" and COMPILER is None:
        pytest.skip("no C++ compiler")
    return RUNNERS[request.param]


@pytest.mark.parametrize("seed", range(12))
def test_scenes_of_all_kinds(nms, seed):
    rng = np.random.default_rng(seed)
    batch, classes = int(rng.integers(1, 4)), int(rng.choice([1, 2, 15]))
    count, dtype = int(rng.choice([1, 31, 32, 33, 300])), (np.float16, np.float32)[seed % 3 > 0]
    boxes, scores = scene(seed, batch, count, classes, dtype, float(rng.choice([20, 200])), 8 * (seed % 2))
    asked = attributes(
        score_threshold=float(rng.choice([0.05, 0.25, 0.5])),
        iou_threshold=float(rng.choice([0, 0.1, 1 / 3, 0.5])),
        max_output_boxes=int(rng.choice([1, 7, 100, 1000])),
        background_class=int(rng.choice([-1, 0])),
        class_agnostic=int(rng.integers(0, 2)),
        pre_nms_topk=int(rng.choice([0, 50])),
    )
    assert same(nms(asked, boxes, scores), expected(asked, boxes, scores))


def test_more_than_5000_candidates(nms):
    boxes, scores = scene(1, 2, 1800, 3, side=600)
    asked = attributes(score_threshold=0.0, max_output_boxes=2000)
    found = nms(asked, boxes, scores)
    assert (scores > 0).sum((1, 2)).min() > 5000
    assert same(found, expected(asked, boxes, scores))


@pytest.mark.parametrize("boxes", [0, 3])
def test_nothing_passes(nms, boxes):
    found = nms(attributes(), np.ones((2, boxes, 5), np.float32), np.zeros((2, boxes, 4), np.float32))
    assert not found["num_detections"].any()
    assert not found["detection_boxes"].any()
    assert not found["detection_scores"].any()
    assert (found["detection_classes"] == -1).all()


def test_all_but_the_best_are_suppressed(nms):
    boxes = np.tile(np.float32([50, 50, 40, 20, 0.5]), (1, 400, 1))
    scores = np.linspace(0.1, 0.9, 400, dtype=np.float32)[None, :, None]
    found = nms(attributes(), boxes, scores)
    assert found["num_detections"] == 1
    assert found["detection_scores"][0, 0] == scores.max()


def test_equal_scores_go_by_box_and_class(nms):
    boxes = np.float32([[[100 * i, 0, 10, 10, 0] for i in range(70)]])
    scores = np.full((1, 70, 3), 0.5, np.float32)
    found = nms(attributes(max_output_boxes=300), boxes, scores)
    assert found["num_detections"] == 210
    assert (found["detection_boxes"][0, :210, 0] == np.repeat(boxes[0, :, 0], 3)).all()
    assert (found["detection_classes"][0, :210] == np.tile([0, 1, 2], 70)).all()


@pytest.mark.parametrize(("threshold", "kept"), [(0.49, 1), (1 / 3, 2), (0.34, 2), (0.33, 1)])
def test_an_iou_at_the_threshold_does_not_suppress(nms, threshold, kept):
    # IoU is 1/3: that of half-shifted squares; and 1/2, of one twice as long.
    other = [5, 0, 10, 10, 0] if threshold < 0.4 else [0, 0, 20, 10, 0]
    boxes = np.float32([[[0, 0, 10, 10, 0], other]])
    found = nms(attributes(iou_threshold=threshold), boxes, np.float32([[[0.9], [0.8]]]))
    assert found["num_detections"] == kept


def test_a_score_at_the_threshold_does_not_pass(nms):
    scores = np.float32([[[0.25], [np.nextafter(np.float32(0.25), np.float32(1))]]])
    boxes = np.float32([[[0, 0, 10, 10, 0], [100, 0, 10, 10, 0]]])
    assert nms(attributes(score_threshold=0.25), boxes, scores)["num_detections"] == 1


def test_what_is_no_number_passes_nowhere(nms):
    boxes, scores = scene(3, 1, 200, 2)
    scores[0, 3:9] = np.nan
    scores[0, 20:25] = np.inf
    scores[0, 30:40] = 0.99
    boxes[0, 30:35, range(5)] = np.inf, np.nan, -np.inf, np.nan, np.inf
    boxes[0, 35, 2] = boxes[0, 36, 3] = 0
    boxes[0, 37, 2:4] *= -1  # a box turned inside out is one all the same
    boxes[0, 38, 2] *= -1  # and one of negative area overlaps nothing
    asked = attributes(max_output_boxes=400)
    assert same(nms(asked, boxes, scores), expected(asked, boxes, scores))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_logits(nms, dtype):
    boxes, scores = scene(4, 2, 300, 3, dtype)
    asked = attributes(score_threshold=0.3, score_activation=1)
    logits = (16 * scores.astype(np.float32) - 8).astype(dtype)
    logits[0, :5] = np.inf
    logits[0, 5:9] = -np.inf
    logits[0, 9:12] = 40  # as good as infinite: all of these are 1, and go by their index
    assert same(nms(asked, boxes, logits), expected(asked, boxes, logits))


def test_both_ways_to_write_an_angle_give_the_same(nms):
    """``le90``, an angle in [-pi/2, pi/2) and the long side first, and ``oc``, an angle in (0, pi/2] and any side."""
    boxes, scores = scene(5, 1, 300, 2)
    boxes[..., 2:4] = np.sort(boxes[..., 2:4])[..., ::-1]
    turned = boxes.copy()
    turned[..., 2], turned[..., 3] = boxes[..., 3], boxes[..., 2]
    turned[..., 4] += np.float32(np.pi / 2)
    oc = np.where(boxes[..., 4:] > 0, boxes, turned)
    one, other = nms(attributes(), boxes, scores), nms(attributes(), oc, scores)
    assert (oc[..., 4] > 0).all()
    assert one["num_detections"] > 20
    assert (one["num_detections"] == other["num_detections"]).all()
    assert (one["detection_scores"] == other["detection_scores"]).all()
    assert (one["detection_classes"] == other["detection_classes"]).all()


def test_a_chain_of_boxes_settles_as_if_one_by_one(nms):
    """Each overlaps the next and nothing else: every second one goes, and none is settled before the one ahead."""
    steps = np.arange(700, dtype=np.float32)
    boxes = np.stack([5 * steps, 2 * steps, 0 * steps + 10, 0 * steps + 4, 0 * steps + 0.38], -1)[None]
    scores = (1 - steps / 1400)[None, :, None]
    found = nms(attributes(iou_threshold=0.2, max_output_boxes=700), boxes, scores)
    assert found["num_detections"] == 350
    assert (found["detection_scores"][0, :350] == scores[0, ::2, 0]).all()


def test_runs_are_alike_to_the_bit(nms):
    boxes, scores = scene(6, 2, 900, 2, side=100, steps=20)
    asked = attributes(max_output_boxes=50)
    first = nms(asked, boxes, scores)
    assert all(same(nms(asked, boxes, scores), first) for _ in range(3))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"iou_threshold": 1.5}, "iou_threshold must be from 0 to 1"),
        ({"iou_threshold": np.nan}, "iou_threshold must be from 0 to 1"),
        ({"score_threshold": np.nan}, "score_threshold is not a number"),
        ({"max_output_boxes": 0}, "max_output_boxes must be 1 or more"),
        ({"background_class": -2}, "background_class must be -1"),
        ({"pre_nms_topk": -1}, "pre_nms_topk must be 0"),
        ({"class_agnostic": 2}, "must be 0 or 1"),
    ],
)
def test_wrong_attributes_are_named(wrong, said):
    boxes, scores = scene(7, 1, 10, 2)
    with pytest.raises(AlignError, match=said):
        RUNNERS["cpu"](attributes(**wrong), boxes, scores)
