"""INT8 as cases: routes, twins, recipes, agreement, records of detections alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.case import BACKENDS, PRECISIONS, ROUTES, Case, cases_of, twin_of
from alignment.compare.coco_map import agreement_ap
from alignment.data.coco import CocoDataset
from alignment.data.samples import open_samples
from alignment.errors import AlignError
from alignment.golden import Golden, limits
from alignment.nms.multiclass import Detections
from alignment.runners.record import Record
from alignment.variant import Quantization, load_variant, with_quantization


@pytest.fixture(scope="module")
def dataset() -> CocoDataset:
    return open_samples(load_variant("yolov8_embedded"), limit=4).dataset


def some(rng: np.random.Generator, count: int, least: float = 0.3) -> Detections:
    corner, size = rng.uniform(0, 200, (count, 2)), rng.uniform(20, 100, (count, 2))
    scores = np.sort(rng.uniform(least, 1, count))[::-1]
    boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
    labels = rng.integers(0, 3, count).astype(np.int32)
    return Detections(boxes, scores.astype(np.float32), labels, np.arange(count, dtype=np.int32))


def test_each_route_is_a_case_on_tensorrt_and_qdq_one_everywhere():
    found = [case.id for case in cases_of(load_variant("yolov8_embedded"), BACKENDS, ("int8",))]
    assert found == [
        "yolov8_embedded-torch-int8-qdq",
        "yolov8_embedded-onnxruntime-int8-qdq",
        *(f"yolov8_embedded-tensorrt-int8-{route}" for route in ROUTES),
    ]
    assert [Case(*name.split("-")).id for name in found] == found


def test_other_precisions_have_no_route():
    cases = cases_of(load_variant("yolov8_embedded"), BACKENDS, PRECISIONS)
    assert {case.route for case in cases if case.precision != "int8"} == {None}


def test_a_bare_onnx_file_has_no_torch_case():
    assert {c.backend for c in cases_of(load_variant("yolox_nano_onnx"), BACKENDS, ("int8",))} == {
        "onnxruntime",
        "tensorrt",
    }


def test_an_unknown_route_is_named():
    with pytest.raises(AlignError, match="--route qdd: no such route: choose from qdq, dynamic_range"):
        cases_of(load_variant("yolov8_embedded"), BACKENDS, ("int8",), ("qdd",))


def test_qdq_has_its_twin_on_onnx_runtime():
    assert twin_of(Case("v", "tensorrt", "int8", "qdq")) == Case("v", "onnxruntime", "int8", "qdq")
    assert twin_of(Case("v", "onnxruntime", "int8", "qdq")) is None
    assert twin_of(Case("v", "tensorrt", "int8", "implicit")) is None


def test_the_recipe_is_not_part_of_what_float_records_depend_on():
    plain = load_variant("yolov8_embedded")
    other = with_quantization(plain, {"method": "minmax", "keep_float": ["/detector/*"]})
    assert other.fingerprint() == plain.fingerprint()
    assert other.quantization.fingerprint() != plain.quantization.fingerprint()


@pytest.mark.parametrize(("field", "value"), [("method", "best"), ("policy", "all"), ("images", 0)])
def test_a_recipe_that_does_not_exist_is_named(field, value):
    with pytest.raises(AlignError, match=field):
        with_quantization(load_variant("yolov8_embedded"), {field: value})


def test_int8_holds_detections_to_limits_and_no_single_value():
    case = Case("v", "tensorrt", "int8", "qdq")
    assert not {"raw", "boxes", "scores"} & set(limits(Golden(variant="v"), case, {}).tolerances)
    assert {"agreement_ap", "twin_agreement_ap", "delta_ap"} <= set(limits(Golden(variant="v"), case, {}).tolerances)


@given(st.integers(0, 2**32 - 1))
def test_agreement_with_oneself_is_one(dataset, seed):
    rng = np.random.default_rng(seed)
    found = {entry.id: some(rng, 6) for entry in dataset.images}
    assert agreement_ap(dataset, found, found) == pytest.approx(1.0)


def test_agreement_counts_what_is_lost_moved_and_invented(dataset):
    rng = np.random.default_rng(0)
    whole = {entry.id: some(rng, 8) for entry in dataset.images}
    half = {i: Detections(f.boxes[::2], f.scores[::2], f.labels[::2], f.rows[::2]) for i, f in whole.items()}
    moved = {i: Detections(f.boxes + 15, f.scores, f.labels, f.rows) for i, f in whole.items()}
    nothing = {i: Detections(f.boxes[:0], f.scores[:0], f.labels[:0], f.rows[:0]) for i, f in whole.items()}
    assert 0.3 < agreement_ap(dataset, whole, half) < 0.7
    assert agreement_ap(dataset, whole, moved) < 0.7
    assert agreement_ap(dataset, whole, nothing) == 0.0
    assert agreement_ap(dataset, nothing, whole) == 0.0
    assert agreement_ap(dataset, nothing, nothing) == 1.0


def test_a_record_of_detections_alone_gives_them_back_in_sixteenths_of_a_pixel(tmp_path):
    rng = np.random.default_rng(1)
    identity = {"variant_fingerprint": "f" * 16, "weights_sha256": "0" * 64, "quantization": "x"}
    record = Record("v-tensorrt-int8-qdq", identity, compact=True)
    found = {image: some(rng, count, 0.001) for image, count in ((3, 300), (1, 0), (7, 12))}
    for image, detections in found.items():
        record.add(image, "digest", np.zeros((2100, 4)), np.zeros((2100, 3)), detections)
    again = Record.load(record.save(tmp_path))
    assert again.compact
    assert not again.candidates
    for image, detections in found.items():
        np.testing.assert_allclose(again.detections[image].boxes, detections.boxes, atol=2**-5)
        np.testing.assert_allclose(again.detections[image].scores, detections.scores, atol=2**-17)
        np.testing.assert_array_equal(again.detections[image].labels, detections.labels)


def test_recipes_differ_by_what_is_not_at_its_default():
    assert Quantization().fingerprint() == Quantization(images=64).fingerprint()
    assert Quantization(images=32).fingerprint() != Quantization().fingerprint()
