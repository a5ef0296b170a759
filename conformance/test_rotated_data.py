"""Variants with rotated boxes and their data: what is refused, and where truth with angles comes from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.case import Case
from alignment.data.dota import open_dota, smallest_rectangle
from alignment.data.samples import Samples, dataset_root, open_samples
from alignment.errors import AlignError
from alignment.golden import read_golden, update
from alignment.nms.rotated import corners, rotated_iou
from alignment.pipeline import RunOptions, align_live
from alignment.storage import data_dir
from alignment.variant import ZOO, load_variant

pytestmark = pytest.mark.rotated
NAME = "rtmdet_r_embedded"


def test_stretching_rotated_boxes_is_refused(tmp_path):
    text = (ZOO / f"{NAME}.yaml").read_text()
    path = tmp_path / "stretched.yaml"
    path.write_text(text.replace("letterbox_top_left", "stretch"))
    with pytest.raises(AlignError, match=r"preprocess\.resize must be letterbox or letterbox_top_left with rotated"):
        load_variant(path)
    path.write_text(text.replace("letterbox_top_left", "letterbox"))
    assert load_variant(path).rotated


def test_each_dataset_has_its_root_and_data_stands_for_coco_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    rotated = load_variant(NAME)
    dota = rotated.model_copy(update={"dataset": "dota"})
    assert dataset_root(rotated, tmp_path).name.startswith("synthetic-rotated")
    assert dataset_root(dota, tmp_path) is None
    with pytest.raises(AlignError, match=r"no images: .*dota8 does not exist: set ALIGN_DATA"):
        open_samples(dota, tmp_path)
    (tmp_path / "dota8").mkdir()
    assert dataset_root(dota, tmp_path / "other") == tmp_path / "dota8"


def test_the_synthetic_set_has_rotated_truth():
    samples = open_samples(load_variant(NAME), None, 2)
    assert len(samples) == 2
    boxes = np.array([entry["rbox"] for entry in samples.dataset.truth["annotations"]])
    assert boxes.shape[1] == 5
    assert (boxes[:, 2] >= boxes[:, 3]).all()
    assert (np.abs(boxes[:, 4]) <= np.pi / 2).all()


def test_truth_without_angles_is_refused_for_rotated_boxes():
    variant = load_variant(NAME)
    dataset = open_samples(variant, None, 1).dataset
    assert len(Samples(variant, dataset)) == 1
    del dataset.truth["annotations"][3]["rbox"]
    with pytest.raises(AlignError, match=r"json: annotation 4 has no rbox .* but rtmdet_r_embedded has rotated boxes"):
        Samples(variant, dataset)


angles = st.floats(-np.pi / 2, np.pi / 2 - 1e-3)


@given(st.floats(0, 900), st.floats(0, 900), st.floats(5, 200), st.floats(1.1, 4), angles)
def test_the_smallest_rectangle_of_a_rectangle_is_itself(x, y, short, ratio, angle):
    box = np.array([x, y, short * ratio, short, angle])
    found = np.array(smallest_rectangle(corners(box).astype(np.float32)))
    np.testing.assert_allclose(found[:4], box[:4], rtol=1e-4, atol=1e-2)
    assert -np.pi / 2 <= found[4] < np.pi / 2
    assert rotated_iou(found[None], box[None])[0] > 0.99


def dota(root: Path, poly: object = (0, 0, 8, 0, 8, 4, 0, 4)) -> Path:
    import cv2

    (root / "images").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(root / "images" / name), np.zeros((64, 64, 3), np.uint8))
    truth = {
        "images": [{"id": i, "file_name": f"{n}.png", "width": 64, "height": 64} for i, n in enumerate("ab")],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 2, "poly": poly, "bbox": [0, 0, 8, 4], "area": 32}],
        "categories": [{"id": 2, "name": "ship"}],
    }
    (root / "dota8.json").write_text(json.dumps(truth))
    return root


def test_dota_gets_rotated_boxes_from_its_quadrilaterals(tmp_path):
    dataset = open_dota(dota(tmp_path), 1)
    assert [entry.path for entry in dataset.images] == [tmp_path / "images" / "a.png"]
    assert dataset.class_names == ["ship"]
    np.testing.assert_allclose(dataset.truth["annotations"][0]["rbox"], [4, 2, 8, 4, 0], atol=1e-6)


def test_tiles_stand_for_the_images_of_any_rotated_variant(tmp_path):
    root, rotated, upright = dota(tmp_path), load_variant(NAME), load_variant("rtmdet_embedded")
    assert dataset_root(rotated, root) == root
    assert dataset_root(upright, root) != root
    samples = open_samples(rotated, root, 1)
    assert [entry.file_name for entry in samples.dataset.images] == ["a.png"]
    assert samples.dataset.split == "dota8"
    assert (len(samples.dataset.category_ids), samples.dataset.truth["annotations"]) == (6, [])
    of_one = open_samples(rotated.model_copy(update={"classes": 1}), root)
    assert len(of_one.dataset.truth["annotations"]) == 1, "its classes may be DOTA's"
    with pytest.raises(AlignError, match="json: 1 categories, but rtmdet_r_embedded has 6 classes"):
        open_samples(rotated.model_copy(update={"dataset": "dota"}), root)


def test_a_run_on_images_without_truth_scores_nothing(tmp_path):
    pytest.importorskip("mmyolo")
    pytest.importorskip("mmrotate")
    variant, samples = load_variant(NAME), open_samples(load_variant(NAME), dota(tmp_path))
    case = Case(NAME, "onnxruntime", "fp32")
    ((result,), _) = align_live(variant, [case], samples, RunOptions(golden=tmp_path / "golden", referee_images=1))
    assert result.status == "pass", result.reason
    assert "no truth, so no AP" in result.reason
    (stage,) = (stage for stage in result.stages if stage.name == "map")
    assert (stage.status, stage.note, stage.checks) == ("not_checked", "no truth to score detections against", [])
    assert result.doubts == []
    update(tmp_path / "golden", result, {"fingerprint": "f"}, "a try")
    (written,) = read_golden(tmp_path / "golden", NAME).cases.values()
    assert written.ap is None
    assert "boxes" in written.tolerances


@pytest.mark.parametrize("poly", [[1, 2, 3], "none", None, [[1, 2], [3]], [0] * 7 + [np.nan], [1e300] * 8])
def test_a_quadrilateral_that_is_none_is_named(tmp_path, poly):
    with pytest.raises(AlignError, match=r"dota8\.json: annotation 7: poly is not x and y of four corners: give a"):
        open_dota(dota(tmp_path, poly))


@pytest.mark.parametrize("missing", ["dota8.json", "images/b.png"])
def test_a_missing_file_of_dota_is_named(tmp_path, missing):
    dota(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(AlignError, match=missing):
        open_dota(tmp_path)


@pytest.mark.real_data
def test_the_real_tiles_open():
    root = data_dir() / "dota8"
    if not root.is_dir():
        pytest.skip(f"{root} is not there: set ALIGN_DATA")
    dataset = open_dota(root)
    assert (len(dataset.images), len(dataset.category_ids)) == (8, 15)
    boxes = np.array([entry["rbox"] for entry in dataset.truth["annotations"]])
    polygons = np.array([entry["poly"] for entry in dataset.truth["annotations"]]).reshape(-1, 4, 2)
    assert (boxes[:, 2] >= boxes[:, 3]).all()
    np.testing.assert_allclose(boxes[:, :2], polygons.mean(1), atol=5)
