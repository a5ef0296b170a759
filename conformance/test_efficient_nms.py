"""EfficientNMS_TRT: our oracle against what the real plugin said on a GPU."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from nms_scenes import Scene, digest, scenes, to_onnx

from alignment.engine.build import BuildOptions
from alignment.engine.capabilities import Capabilities, missing
from alignment.nms.implementations import FLOOR, efficient_nms, prepared
from alignment.nms.semantics import run
from alignment.variant import golden_dir

pytestmark = [pytest.mark.nms, pytest.mark.plugin]
SCENES = scenes()
FOLDER = golden_dir() / "efficient_nms"
RECORDED = sorted(path.stem for path in FOLDER.glob("*.json"))


def recorded(version: str, name: str) -> list[dict[str, np.ndarray]]:
    """What the plugin of that TensorRT kept of each image of a scene."""
    about = json.loads((FOLDER / f"{version}.json").read_text())["scenes"][name]
    assert about["digest"] == digest(SCENES[name]), "the scene changed: record it again"
    ends = np.cumsum(about["counts"])[:-1]
    with np.load(FOLDER / f"{version}.npz") as arrays:
        columns = {k: np.split(arrays[f"{name}/det_{k}"], ends) for k in ("boxes", "scores", "labels")}
    return [dict(zip(columns, image, strict=True)) for image in zip(*columns.values(), strict=True)]


def pairs_of(seen: dict[str, np.ndarray], boxes: np.ndarray, scores: np.ndarray, exact: bool) -> np.ndarray:
    """Row × C + class of each detection: its box and, where that is `exact`, its score are copies of the row's."""
    classes = scores.shape[1]
    free: dict[Any, list[int]] = {}
    for row, box in enumerate(boxes):
        for label in range(classes):
            key = box.tobytes(), label, scores[row, label].tobytes() if exact else b""
            free.setdefault(key, []).append(row * classes + label)
    found = []
    for box, label, score in zip(seen["boxes"], seen["labels"], seen["scores"], strict=True):
        key = box.tobytes(), int(label), score.tobytes() if exact else b""
        found.append(free[key].pop(0))
    return np.array(found, np.int64)


def assert_equal(scene: Scene, seen: list[dict[str, np.ndarray]], agnostic: bool) -> None:
    """The oracle gives the same detections in the same order, where ties go as they were seen to go."""
    settings = {**scene.settings, "class_agnostic": int(agnostic and scene.settings["class_agnostic"])}
    for image, found in enumerate(seen):
        boxes, scores = prepared(scene.boxes[image], settings["box_coding"]), scene.scores[image]
        exact = not settings["score_activation"] and not (found["scores"] < 0).any()
        first = pairs_of(found, boxes, scores, exact)
        fates = run(efficient_nms(settings), boxes, scores, first=first)
        kept = fates.kept
        np.testing.assert_array_equal(fates.rows[kept] * scores.shape[1] + fates.labels[kept], first)
        given = fates.scores[kept]
        if settings["score_activation"]:
            with np.errstate(over="ignore"):
                given = 1 / (1 + np.exp(-given.astype(np.float32)))
            # The plugin's sigmoid is made of intrinsics, in the scores' own type.
            bound = 4 * np.finfo(boxes.dtype).eps
            np.testing.assert_allclose(found["scores"].astype(np.float32), given, rtol=bound)
        else:
            np.testing.assert_array_equal(found["scores"], given)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("version", RECORDED)
def test_the_oracle_keeps_what_the_plugin_kept(version, name):
    assert_equal(SCENES[name], recorded(version, name), Capabilities.of(version).nms_class_agnostic)


@pytest.mark.parametrize("version", RECORDED)
def test_class_agnostic_is_what_the_capability_says(version):
    agnostic = Capabilities.of(version).nms_class_agnostic
    with pytest.raises(AssertionError):
        assert_equal(SCENES["scattered agnostic"], recorded(version, "scattered agnostic"), not agnostic)


@pytest.mark.parametrize("version", RECORDED)
def test_only_ties_are_in_no_order(version):
    """Where all scores differ three runs gave the same; where they do not, index order is not what they gave."""
    about = json.loads((FOLDER / f"{version}.json").read_text())["scenes"]
    for name, scene in SCENES.items():
        threshold = scene.settings["score_threshold"]
        passing = [image[image >= threshold] for image in scene.scores]
        if all(len(np.unique(values)) == len(values) for values in passing):
            assert about[name]["stable"], name
    assert not about["tied"]["stable"]


@pytest.mark.parametrize("version", RECORDED)
def test_padding_is_zero(version):
    about = json.loads((FOLDER / f"{version}.json").read_text())["scenes"]
    padding = {v for scene in about.values() for k, values in scene.items() if k.endswith("padding") for v in values}
    assert padding == {0.0}


@pytest.mark.parametrize("version", RECORDED)
@pytest.mark.parametrize(
    ("name", "count"), [("few survivors 0.007", 3), ("few survivors 0.0069", 20), ("few survivors 0.001", 20)]
)
def test_below_a_threshold_of_0_007_all_pairs_come_out(version, name, count):
    (found,) = recorded(version, name)
    assert len(found["scores"]) == count
    assert (found["scores"][3:] == FLOOR).all()


@pytest.mark.gpu
def test_a_gpu_says_what_the_record_says(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    from alignment.engine.execute import execute

    for name in ("scattered", "candidates 5001", "few survivors 0.001", "half centres"):
        scene = SCENES[name]
        onnx.save(to_onnx(scene), tmp_path / "nms.onnx")
        options = BuildOptions(precision="fp16" if scene.boxes.dtype == np.float16 else "fp32")
        (out,) = execute(tmp_path / "nms.onnx", options, {"boxes": scene.boxes, "scores": scene.scores})
        seen = [
            {k: out[f"det_{k}"][image, :count] for k in ("boxes", "scores", "labels")}
            for image, count in enumerate(out["num_dets"][:, 0])
        ]
        assert_equal(scene, seen, Capabilities.current().nms_class_agnostic)
