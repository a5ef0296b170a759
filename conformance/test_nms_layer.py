"""INMSLayer, which TensorRT makes of NonMaxSuppression: our oracle against what the real one said on a GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from nms_scenes import Scene, digest, image_of, layer_scenes, to_layer_onnx

from alignment.engine.capabilities import missing
from alignment.nms.implementations import inms_layer, prepared
from alignment.nms.semantics import Semantics, run
from alignment.runners import tensorrt as runner
from alignment.variant import golden_dir

pytestmark = pytest.mark.nms
SCENES = layer_scenes()
FOLDER = golden_dir() / "nms_layer"
FILES = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
RECORDED = sorted({about["tensorrt"] for about in FILES.values()})
#: Where ONNX has another answer than TensorRT: more candidates than the cap, a threshold of 0 where there is none, and
#: scores that are no number.
APART = (
    *("scattered large", "candidates 5001", "candidates 9000", "all equal 6000", "yolo 0.25", "yolo 0.001"),
    "negative scores no threshold",
    "not finite low threshold",
)


@pytest.fixture(params=RECORDED or [None])
def version(request) -> str:
    """Each recorded TensorRT version."""
    if request.param is None:
        pytest.skip("no record: run python conformance/record_nms_layer.py golden/nms_layer on a GPU")
    return request.param


def recorded(version: str, name: str) -> tuple[dict, np.ndarray]:
    """What that TensorRT said of a scene: ``stable`` and the like, and rows of image, class and box."""
    for path, told in FILES.items():
        if told["tensorrt"] == version and name in told["scenes"]:
            about = told["scenes"][name]
            assert about["digest"] == digest(SCENES[name]), "the scene changed: record it again"
            assert "error" not in about, about["error"]
            with np.load(path.with_suffix(".npz")) as arrays:
                return about, arrays[name]
    raise AssertionError(f"not recorded of {version}: record it again")


def oracle(scene: Scene) -> Semantics:
    """What we say the layer does with a scene's node."""
    threshold = scene.settings["score_threshold"]
    return inms_layer(
        0.0 if threshold is None else threshold, scene.settings["iou_threshold"], scene.settings["max_output_boxes"]
    )


def assert_equal(scene: Scene, semantics: Semantics, rows: np.ndarray) -> None:
    """The oracle gives the same rows in the same order, where ties go as they were seen to go."""
    assert (np.diff(rows[:, 0]) >= 0).all(), "images in order"
    boxes, classes = prepared(scene.boxes, scene.settings["box_coding"]), scene.scores.shape[2]
    for image, scores in enumerate(scene.scores):
        _, labels, found = rows[rows[:, 0] == image].T.astype(np.int64)
        first = found * classes + labels
        fates = run(semantics, boxes[image], scores, first=first)
        kept = fates.rows[fates.kept] * classes + fates.labels[fates.kept]
        np.testing.assert_array_equal(kept, first, f"image {image}")


def onnx_runtimes(scene: Scene) -> np.ndarray:
    """What ONNX Runtime makes of a scene's graph, brought into the layer's order: by image, then by falling score."""
    import onnxruntime

    model = to_layer_onnx(scene).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"image": image_of(scene)})
    image, label, row = rows.T
    return rows[np.lexsort([-scene.scores[image, row, label], image])]


@pytest.mark.parametrize("name", SCENES)
def test_the_oracle_keeps_what_the_layer_kept(version, name):
    _, rows = recorded(version, name)
    assert_equal(SCENES[name], oracle(SCENES[name]), rows)


def test_only_ties_may_change_between_runs(version):
    """8.6's header leaves the order of equal scores open; later ones promise that it is the same in every run."""
    for name, scene in SCENES.items():
        passing = [image[image > oracle(scene).score_threshold] for image in scene.scores]
        if all(len(np.unique(values)) == len(values) for values in passing):
            assert recorded(version, name)[0]["stable"], name


@pytest.mark.parametrize("name", [name for name, scene in SCENES.items() if scene.boxes.dtype == np.float32])
def test_below_the_cap_it_is_onnx_runtimes(name):
    scene = SCENES[name]
    rows = onnx_runtimes(scene)
    if name not in APART:
        assert_equal(scene, oracle(scene), rows)
        return
    with pytest.raises(AssertionError):
        assert_equal(scene, oracle(scene), rows)
    threshold = -np.inf if scene.settings["score_threshold"] is None else scene.settings["score_threshold"]
    onnx_says = dataclasses.replace(oracle(scene), score_threshold=threshold, candidate_cap=None, nan_passes=False)
    assert_equal(scene, onnx_says, rows)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("at score threshold", {"score_inclusive": True}),
        ("at iou threshold", {"iou_inclusive": True}),
        ("scattered five a class", {"max_per_class": 4}),
        ("scattered", {"classes": "together", "max_per_class": None}),
        ("degenerate", {"reorder": False}),
        ("not finite low threshold", {"nan_passes": False}),
        ("half at score threshold", {"threshold_float32": False}),
        ("candidates 5001", {"candidate_cap": 5001}),
    ],
)
def test_another_semantics_is_found_out(version, name, wrong):
    scene = SCENES[name]
    _, rows = recorded(version, name)
    with pytest.raises(AssertionError):
        assert_equal(scene, dataclasses.replace(oracle(scene), **wrong), rows)


def test_memory_of_an_output_grows_while_the_engine_runs(monkeypatch):
    """As TensorRT asks for it, with a pretended GPU."""
    given: list[int] = []
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(IOutputAllocator=object))
    allocate = SimpleNamespace(mem_alloc=lambda size: given.append(size) or Block(len(given) * 4096))
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=allocate))
    monkeypatch.setitem(sys.modules, "pycuda.driver", allocate)
    memory, shapes = runner._Memory(), {}
    allocator = runner._allocator(memory, shapes)
    assert [allocator.reallocate_output("kept", 0, size, 256) for size in (12, 1200, 36)] == [4096, 8192, 8192]
    allocator.notify_shape("kept", (3, 3))
    assert (given, shapes, list(memory.held)) == ([12, 1200], {"kept": (3, 3)}, ["kept"])
    memory.free()
    assert not memory.held


class Block(int):
    """Pretended device memory."""

    def free(self) -> None:
        """Nothing to give back."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["scattered", "nothing passes", "candidates 5001", "tied", "half scattered"])
def test_a_gpu_says_what_the_oracle_says(tmp_path, monkeypatch, name):
    if reason := missing():
        pytest.skip(reason)
    from record_nms_layer import selected

    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    for rows in selected(SCENES[name], tmp_path, 2):
        assert_equal(SCENES[name], oracle(SCENES[name]), rows)
