"""torchvision's NMS: our oracle against what the real one said, and against the real one where it is installed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nms_scenes import Scene, digest, torchvision_scenes
from record_torchvision import kept
from test_nms_semantics import THRESHOLDS, images

from alignment.nms.implementations import torchvision_nms
from alignment.nms.semantics import Semantics, run
from alignment.variant import golden_dir

pytestmark = pytest.mark.nms
SCENES = torchvision_scenes()
FILES = sorted((golden_dir() / "torchvision_nms").glob("*.json"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def recorded(request) -> dict[str, np.ndarray]:
    """What one version said: rows of class and box by scene."""
    digests = json.loads(request.param.read_text(encoding="utf-8"))["scenes"]
    assert digests == {name: digest(scene) for name, scene in SCENES.items()}, "the scenes changed: record them again"
    with np.load(request.param.with_suffix(".npz")) as arrays:
        return dict(arrays)


def oracle(scene: Scene) -> Semantics:
    """What we say torchvision does with a scene."""
    asked = scene.settings
    return torchvision_nms(asked["score_threshold"], asked["iou_threshold"], asked["max_output_boxes"])


def assert_equal(scene: Scene, semantics: Semantics, rows: np.ndarray) -> None:
    """The oracle keeps the same in the same order; ties go as they were seen to go."""
    classes = scene.scores.shape[2]
    first = rows[:, 1].astype(np.int64) * classes + rows[:, 0]
    fates = run(semantics, scene.boxes[0], scene.scores[0], first=first)
    found = fates.rows[fates.kept] * classes + fates.labels[fates.kept]
    np.testing.assert_array_equal(found, first)


def test_there_is_a_record():
    assert FILES


@pytest.mark.parametrize("name", SCENES)
def test_the_oracle_keeps_what_torchvision_kept(recorded, name):
    assert_equal(SCENES[name], oracle(SCENES[name]), recorded[name])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("at score threshold", {"score_inclusive": True}),
        ("at iou threshold", {"iou_inclusive": True}),
        ("at iou threshold 0.6", {"iou_threshold": 0.6}),
        ("degenerate", {"reorder": True}),
        ("scattered", {"classes": "together"}),
        ("below zero 1000", {"split": 1000}),
        ("below zero 1001", {"split": 1002}),
    ],
)
def test_another_semantics_is_found_out(recorded, name, wrong):
    with pytest.raises(AssertionError):
        assert_equal(SCENES[name], dataclasses.replace(oracle(SCENES[name]), **wrong), recorded[name])


@settings(max_examples=200, deadline=None)
@given(images(values=st.integers(0, 8).map(lambda i: i / 8)), THRESHOLDS, st.sampled_from([0.0, 0.25, 0.5]))
def test_it_is_torchvisions_where_that_is_installed(image, iou_threshold, score_threshold):
    try:
        from torchvision.ops import batched_nms  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not run here: {str(error)[:80]}")
    boxes, scores = image
    asked = {"iou_threshold": iou_threshold, "score_threshold": score_threshold}
    scene = Scene(boxes[None], scores[None], asked)
    assert_equal(scene, oracle(scene), kept(scene))
