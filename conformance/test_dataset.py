"""Datasets: COCO layout, bad input in one line, and the embedded synthetic set, the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from alignment.compare.coco_map import coco_ap
from alignment.data.coco import CocoDataset, read_image
from alignment.data.samples import Samples, dataset_root, open_samples
from alignment.data.synthetic import CATEGORIES, draw, synthetic_root, write_split
from alignment.errors import AlignError
from alignment.nms.multiclass import Detections
from alignment.storage import data_dir
from alignment.variant import load_variant

# SHA-256 (16 digits) of shape and BGR bytes: drawn in float64 NumPy, rounded to uint8.
GOLDEN_IMAGES = {
    ("val2017", 0): "3ec823f0a942f330",
    ("val2017", 1): "df6f03bc0e649f49",
    ("train2017", 0): "7a2882f2038d077a",
}


#: Boxes, scores, labels and rows of nothing.
EMPTY = (((0, 4), np.float32), (0, np.float32), (0, np.int32), (0, np.int32))


def truth_of(count: int = 2) -> dict[str, Any]:
    """Ids with gaps, categories out of order."""
    images = [{"id": 10 * (i + 1), "file_name": f"{i}.png", "height": 8, "width": 8} for i in range(count)]
    annotations = [{"id": i, "image_id": m["id"], "category_id": 7, "bbox": [1, 1, 4, 4]} for i, m in enumerate(images)]
    categories = [{"id": 7, "name": "seven"}, {"id": 2, "name": "two"}, {"id": 90, "name": "ninety"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(root: Path, truth: Any, images: int = 2) -> Path:
    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    text = truth if isinstance(truth, str) else json.dumps(truth)
    (root / "annotations" / "instances_val2017.json").write_text(text)
    for index in range(images):
        cv2.imwrite(str(root / "val2017" / f"{index}.png"), np.full((8, 8, 3), index, np.uint8))
    return root


def complaint(function, *args: Any) -> str:
    with pytest.raises(AlignError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    assert caught.value.mend
    return str(caught.value)


def test_class_indices_follow_sorted_category_ids(tmp_path):
    dataset = CocoDataset.open(write(tmp_path, truth_of()))
    assert dataset.category_ids == [2, 7, 90]
    assert dataset.class_names == ["two", "seven", "ninety"]
    assert [entry.id for entry in dataset.images] == [10, 20]
    assert dataset.truth["annotations"][0]["category_id"] == 7


def test_limit_takes_the_first_images_and_does_not_ask_for_the_others(tmp_path):
    root = write(tmp_path, truth_of(3), images=2)
    assert [entry.file_name for entry in CocoDataset.open(root, limit=2).images] == ["0.png", "1.png"]
    assert "2.png" in complaint(CocoDataset.open, root)


def test_the_fingerprint_follows_the_annotations(tmp_path):
    path = write(tmp_path, truth_of()) / "annotations" / "instances_val2017.json"
    first = CocoDataset.open(tmp_path).fingerprint
    path.write_text(json.dumps(truth_of(), indent=2, sort_keys=True))
    assert CocoDataset.open(tmp_path).fingerprint == first
    moved = truth_of()
    moved["annotations"][1]["bbox"][0] = 2
    path.write_text(json.dumps(moved))
    assert CocoDataset.open(tmp_path).fingerprint != first


def test_the_fingerprint_of_the_content_follows_the_pixels_of_the_images_that_were_asked_for(tmp_path):
    root = write(tmp_path, truth_of())
    first, of_one = CocoDataset.open(root), CocoDataset.open(root, limit=1)
    assert len(first.content_fingerprint) == 16
    assert first.content_fingerprint == CocoDataset.open(root).content_fingerprint != of_one.content_fingerprint
    cv2.imwrite(str(root / "val2017" / "1.png"), np.full((8, 8, 3), 99, np.uint8))
    changed = CocoDataset.open(root)
    assert changed.fingerprint == first.fingerprint
    assert changed.content_fingerprint != first.content_fingerprint
    assert CocoDataset.open(root, limit=1).content_fingerprint == of_one.content_fingerprint
    (root / "val2017" / "1.png").unlink()
    assert changed.content_fingerprint, "read once"
    assert "1.png: No such file" in complaint(lambda: first.__class__.content_fingerprint.func(first))


def test_annotations_may_leave_out_area_and_crowd(tmp_path):
    plain = truth_of()
    plain["annotations"][1].update(iscrowd=1, area=3.5)
    read = CocoDataset.open(write(tmp_path, plain))
    assert [(a["iscrowd"], a["area"]) for a in read.truth["annotations"]] == [(0, 16), (1, 3.5)]
    nothing = {10: Detections(*(np.empty(s, d) for s, d in EMPTY)), 20: Detections(*(np.empty(s, d) for s, d in EMPTY))}
    assert coco_ap(read, nothing) == (0, 0)


def without(*path: str | int) -> dict[str, Any]:
    truth = truth_of()
    place: Any = truth
    for part in path[:-1]:
        place = place[part]
    del place[path[-1]]
    return truth


def with_stray() -> dict[str, Any]:
    truth = truth_of()
    truth["annotations"][1]["image_id"] = 99
    return truth


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    truth = truth_of()
    place: Any = truth
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = to
    return truth


BAD_TRUTH = {
    "empty file": ("", "not JSON"),
    "cut off": (json.dumps(truth_of())[:-9], "not JSON"),
    "a list": ("[]", "not in COCO layout"),
    "no images": (without("images"), "images"),
    "no annotations": (without("annotations"), "annotations"),
    "no categories": (without("categories"), "categories"),
    "image without a name": (without("images", 0, "file_name"), "file_name"),
    "annotation without an image": (without("annotations", 0, "image_id"), "image_id"),
    "annotation of an image that is not listed": (with_stray(), "image id 99"),
    "annotations, but not one image": ({**truth_of(), "images": []}, "image id 10"),
    "annotations of another type": (
        {**truth_of(), "annotations": {}},
        "not in COCO layout: annotations is missing or of another type",
    ),
    "null annotations": ({**truth_of(), "annotations": None}, "annotations is missing or of another type"),
    "an image without any name": (
        changed("images", 0, "file_name", to=None),
        "file_name is missing or of another type",
    ),
    "an annotation of another type": ({**truth_of(), "annotations": ["x"]}, "not in COCO layout"),
    "no box": (without("annotations", 1, "bbox"), "annotation 1: bbox is None, not x, y, width and height"),
    "a null box": (changed("annotations", 1, "bbox", to=None), "annotation 1: bbox is None"),
    "a box of text": (changed("annotations", 1, "bbox", to=[1, 1, "4", 4]), "annotation 1: bbox is [1, 1, '4', 4]"),
    "a box of three": (changed("annotations", 1, "bbox", to=[1, 1, 4]), "annotation 1: bbox is [1, 1, 4]"),
    "a box of NaN": (changed("annotations", 1, "bbox", to=[1, 1, float("nan"), 4]), "annotation 1: bbox is"),
    "no category": (without("annotations", 1, "category_id"), "annotation 1: category_id None is not among"),
    "an unknown category": (changed("annotations", 1, "category_id", to=77), "annotation 1: category_id 77 is not"),
    "a category that is a list": (changed("annotations", 1, "category_id", to=[7]), "annotation 1: category_id [7]"),
    "a box without an id": (
        {**truth_of(), "annotations": [{"image_id": 10, "category_id": 7, "bbox": None}]},
        "annotation number 1: bbox",
    ),
    "an area of text": (changed("annotations", 1, "area", to="large"), "annotation 1: iscrowd is 0 and area large"),
    "a crowd of seven": (changed("annotations", 1, "iscrowd", to=7), "annotation 1: iscrowd is 7"),
    "image ids of text": (changed("images", 0, "id", to="a1"), "image id 'a1' is not a whole number"),
    "an image id twice": (changed("images", 1, "id", to=10), "image id 10 is given twice"),
    "a category id twice": (changed("categories", 1, "id", to=7), "category id 7 is given twice"),
    "a category id of text": (changed("categories", 1, "id", to="2"), "category id '2' is not a whole number"),
    "nothing at all": ({**truth_of(), "images": [], "annotations": []}, "lists no images"),
}


@pytest.mark.parametrize(("truth", "words"), BAD_TRUTH.values(), ids=BAD_TRUTH)
def test_a_bad_annotation_file_is_named(tmp_path, truth, words):
    line = complaint(CocoDataset.open, write(tmp_path, truth))
    assert str(tmp_path / "annotations" / "instances_val2017.json") in line
    assert words in line


def test_a_binary_annotation_file_is_named(tmp_path):
    path = write(tmp_path, "") / "annotations" / "instances_val2017.json"
    path.write_bytes(b"\x89PNG\xff\xfe\x00")
    assert f"{path}: not JSON" in complaint(CocoDataset.open, tmp_path)


def test_what_is_missing_is_named(tmp_path):
    assert "instances_val2017.json: No such file" in complaint(CocoDataset.open, tmp_path)
    root = write(tmp_path, truth_of(), images=1)
    assert str(root / "val2017" / "1.png") in complaint(CocoDataset.open, root)
    assert "instances_test.json" in complaint(CocoDataset.open, root, "test")


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), (b"", "an empty file"), (b"GIF89a but not really", "not an image")]
)
def test_a_bad_image_is_named(tmp_path, content, words):
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    line = complaint(read_image, path)
    assert str(path) in line
    assert words in line


@pytest.mark.parametrize("kind", [".png", ".jpg"])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.95])
def test_an_image_that_is_cut_off_is_named(tmp_path, kind, part):
    path = tmp_path / f"cut{kind}"
    whole = cv2.imencode(kind, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[1].tobytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    assert f"{path}: not an image, or a damaged one" in complaint(read_image, path)


def noise() -> np.ndarray:
    """A picture that a damage of its middle shows in."""
    return cv2.resize(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), (256, 256))


@pytest.mark.parametrize("kind", [".png", ".jpg"])
@pytest.mark.parametrize("fill", [0, 0xD9])
def test_an_image_with_a_damaged_middle_is_named_and_no_decoder_has_a_say_of_its_own(tmp_path, capfd, kind, fill):
    path = tmp_path / f"spoilt{kind}"
    data = cv2.imencode(kind, noise())[1]
    path.write_bytes(data.tobytes())
    np.testing.assert_array_equal(read_image(path), cv2.imdecode(data, cv2.IMREAD_COLOR))
    data[len(data) // 2 :][:2000] = fill
    path.write_bytes(data.tobytes())
    line = complaint(read_image, path)
    assert f"{path}: not an image, or a damaged one (" in line
    assert "Corrupt JPEG data" in line if kind == ".jpg" else "libpng error" in line
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "said",
    [
        b"libpng warning: iCCP: known incorrect sRGB profile\n\n",
        b"[ERROR:0@1.2] global loadsave.cpp:1166 imdecode_ error: (-2:Unspecified error) in function 'readLZW'\n"
        b"> Too long LZW length in GIF.:\n>     'idx + length <= width * height'\n> where\n>     'idx' is 153222\n",
    ],
    ids=["libpng", "OpenCV"],
)
def test_what_others_say_while_an_image_is_decoded_is_not_lost(tmp_path, capfd, monkeypatch, said):
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), noise())
    plain = cv2.imdecode

    def talking(*arguments: Any) -> np.ndarray:
        os.write(2, b"> a thread has something to say\n" + said)
        return plain(*arguments)

    monkeypatch.setattr(cv2, "imdecode", talking)
    assert read_image(path).shape == (256, 256, 3)
    assert capfd.readouterr().err == "> a thread has something to say\n"


@pytest.mark.parametrize("kind", ["grey", "alpha", "jpeg", "turned"])
def test_images_are_read_as_mmcv_reads_them(tmp_path, kind):
    mmcv = pytest.importorskip("mmcv")
    image = np.random.default_rng(1).integers(0, 256, (6, 9, 4), np.uint8)
    path = tmp_path / ("image.png" if kind in ("grey", "alpha") else "image.jpg")
    cv2.imwrite(str(path), {"grey": image[..., 0], "alpha": image}.get(kind, image[..., :3]))
    if kind == "turned":  # an EXIF block whose only tag is Orientation (0x0112) = 6: turn right
        tiff = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
        block = b"Exif\x00\x00" + tiff
        data = path.read_bytes()
        path.write_bytes(data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:])
    ours = read_image(path)
    assert ours.shape == ((9, 6, 3) if kind == "turned" else (6, 9, 3))
    np.testing.assert_array_equal(ours, mmcv.imread(str(path)))


def test_classes_must_fit(tmp_path):
    variant = load_variant("yolov8_embedded")
    line = complaint(open_samples, variant.model_copy(update={"dataset": "coco"}), write(tmp_path, truth_of()))
    assert str(tmp_path) in line
    assert "3 categories, but yolov8_embedded has 6 classes" in line


def test_no_images_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path / "nowhere"))
    variant = load_variant("yolov8_n")
    assert dataset_root(variant) is None
    assert "does not exist: give --data DIR or set ALIGN_DATA" in complaint(open_samples, variant)
    assert dataset_root(variant, tmp_path) == tmp_path


def test_samples_hold_the_same_bytes_one_by_one_and_in_a_row():
    samples = open_samples(load_variant("yolov8_embedded"), limit=3)
    assert len(samples) == 3
    for sample, entry in zip(samples, samples.dataset.images, strict=True):
        again = samples.load(entry)
        assert sample.entry == entry
        assert sample.tensor.dtype == np.float32
        assert sample.tensor.shape == (3, 320, 320)
        assert sample.digest == again.digest == hashlib.sha256(sample.tensor.tobytes()).hexdigest()[:16]
    assert len({sample.digest for sample in samples}) == 3


def test_a_digest_is_that_of_the_bytes_for_which_an_image_is_read_once(monkeypatch):
    samples = open_samples(load_variant("yolov8_embedded"), limit=3)
    entries, digests = samples.dataset.images, [sample.digest for sample in samples]
    assert [samples.digest(entry) for entry in entries] == digests
    monkeypatch.setattr("alignment.data.samples.read_image", None)
    assert [samples.digest(entry) for entry in entries] == digests


def test_a_damaged_image_stops_the_iteration_where_it_stands(tmp_path):
    root = tmp_path / "set"
    write_split(root, "val2017", 3)
    dataset = CocoDataset.open(root)
    dataset.images[1].path.write_bytes(b"")
    samples = iter(Samples(load_variant("yolov8_embedded"), dataset))
    assert next(samples).entry == dataset.images[0]
    assert f"{dataset.images[1].path}: an empty file" in complaint(next, samples)


@pytest.mark.parametrize(("split", "index"), GOLDEN_IMAGES)
def test_synthetic_images_are_the_same_everywhere(split, index):
    image, _, _ = draw(split, index)
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:16]
    assert digest == GOLDEN_IMAGES[split, index]


def test_drawing_is_deterministic_and_splits_differ():
    image, boxes, classes = draw("val2017", 5)
    again = draw("val2017", 5)
    np.testing.assert_array_equal(image, again[0])
    np.testing.assert_array_equal(boxes, again[1])
    assert classes == again[2]
    other = draw("train2017", 5)[0]
    assert image.shape != other.shape or (image != other).any()


def test_two_written_splits_are_equal_and_read_back(tmp_path):
    for name in ("one", "two"):
        write_split(tmp_path / name, "val2017", 3)
    one, two = (CocoDataset.open(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert one.category_ids == sorted(CATEGORIES)
    assert one.category_ids != list(range(1, 7)), "the gaps are the point"
    for index, (a, b) in enumerate(zip(one.images, two.images, strict=True)):
        assert a.path.read_bytes() == b.path.read_bytes()
        np.testing.assert_array_equal(read_image(a.path), draw("val2017", index)[0])


@pytest.mark.parametrize("index", range(6))
def test_synthetic_truth_lies_in_the_image(index):
    image, boxes, classes = draw("val2017", index)
    height, width = image.shape[:2]
    assert len(boxes) == len(classes) > 0
    assert set(classes) <= set(CATEGORIES)
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    assert (boxes >= 0).all()
    assert (boxes <= [width, height, width, height]).all()


def test_the_set_is_drawn_once_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr("alignment.data.synthetic.SPLITS", {"val2017": 2, "train2017": 1})
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imwrite", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            synthetic_root()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert list(tmp_path.glob("entries/*/*")) == []
    root = synthetic_root()
    assert len(CocoDataset.open(root).images) == 2
    assert len(CocoDataset.open(root, "train2017").images) == 1
    drawn = (root / "val2017").stat().st_mtime_ns
    assert synthetic_root() == root
    assert (root / "val2017").stat().st_mtime_ns == drawn, "not drawn again"
    shutil.rmtree(root / "val2017")
    assert synthetic_root() == root
    assert len(CocoDataset.open(root).images) == 2, "drawn again"


@pytest.mark.real_data
def test_the_real_set_opens():
    root = data_dir() / "coco"
    if not root.is_dir():
        pytest.skip(f"{root} is not there: set ALIGN_DATA")
    dataset = CocoDataset.open(root)
    assert len(dataset.images) == 96
    assert len(dataset.category_ids) == 80
    assert (dataset.category_ids[0], dataset.category_ids[-1]) == (1, 90)
    assert CocoDataset.open(root, limit=4).fingerprint == dataset.fingerprint
