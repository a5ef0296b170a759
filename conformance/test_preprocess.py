"""Our preprocessing against mmyolo's own test pipelines, to the bit, and the geometry it hands on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alignment.data.preprocess import Transform, preprocess
from alignment.variant import InputSize, Preprocess, Variant, load_variant, zoo

MMYOLO_VARIANTS = [path.stem for path in zoo() if load_variant(path).has_torch]
LOADERS = ("LoadImageFromFile", "LoadAnnotations", "ConvertBoxType")
# (height, width): exact, one off, tall, wide, thin, tiny, smaller and larger than any input, real COCO sizes
SIZES = [(640, 640), (416, 416), (320, 320), (641, 639), (319, 320), (480, 640), (640, 427), (375, 500), (33, 701)]
SIZES += [(700, 5), (3, 900), (1, 1), (1, 3), (2, 1), (640, 2), (1301, 1299), (1000, 37), (17, 16), (321, 1283)]
LETTERBOX = {"resize": "letterbox"}


def image_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)


def boxes_in(height: int, width: int) -> np.ndarray:
    """The whole image, and random boxes inside it: ``[9, 4] float32``."""
    corners = np.random.default_rng([width, height]).uniform(0, 1, (8, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    return np.concatenate([[[0, 0, width, height]], boxes]).astype(np.float32)


class MMYoloPipeline:
    """The config's test pipeline without the steps that read files, at the variant's one input size."""

    def __init__(self, variant: Variant, size: InputSize) -> None:
        from alignment.models.mmyolo_source import load_config

        config = load_config(variant)
        from mmcv.transforms import Compose
        from mmyolo.registry import MODELS

        steps = [dict(step) for step in config.test_pipeline if step["type"].split(".")[-1] not in LOADERS]
        for step in steps:
            if "scale" in step:
                step["scale"] = (size.width, size.height)
            if step.pop("pad_to_square", False) or "size" in step:
                step["size"] = (size.width, size.height)
            if "width" in step:
                step.update(width=size.width, height=size.height)
        self.compose = Compose(steps)
        self.preprocessor = MODELS.build(config.model.data_preprocessor).eval()

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
        """Input tensor ``[3, H, W]``, meta data, and the boxes in the input's pixels."""
        from mmdet.structures.bbox import HorizontalBoxes

        packed = self.compose(
            {
                "img": image,
                "img_id": 1,
                "img_path": "",
                "img_shape": image.shape[:2],
                "ori_shape": image.shape[:2],
                "gt_bboxes": HorizontalBoxes(boxes.copy()),
                "gt_bboxes_labels": np.zeros(len(boxes), np.int64),
                "gt_ignore_flags": np.zeros(len(boxes), bool),
            }
        )
        batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
        done = self.preprocessor(batch, training=False)
        sample = done["data_samples"][0]
        return done["inputs"][0].numpy(), sample.metainfo, sample.gt_instances.bboxes.numpy()


def back_as_mmyolo(boxes: np.ndarray, meta: dict[str, Any]) -> np.ndarray:
    """The lines of ``YOLOv5Head.predict_by_feat`` (mmyolo 0.6.0) that bring boxes to the original image."""
    import torch

    tensor = torch.from_numpy(boxes.copy())
    if "pad_param" in meta:
        pad = meta["pad_param"]
        tensor -= tensor.new_tensor([pad[2], pad[0], pad[2], pad[0]])
    tensor /= tensor.new_tensor(meta["scale_factor"]).repeat((1, 2))
    return tensor.numpy()


def assert_equal(variant: Variant, size: InputSize, pipeline: MMYoloPipeline, shape: tuple[int, int]) -> None:
    image, boxes = image_of(*shape), boxes_in(*shape)
    theirs, meta, placed = pipeline(image, boxes)
    ours, transform = preprocess(image, size, variant.preprocess)
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape == (3, size.height, size.width)
    assert ours.tobytes() == theirs.tobytes()
    assert transform.scale == tuple(meta["scale_factor"])
    pad = meta.get("pad_param", np.zeros(4))
    assert transform.offset == (pad[2], pad[0])
    np.testing.assert_array_equal(transform.to_original(placed), back_as_mmyolo(placed, meta))
    # the round trip is float32: 2^-24 of an input coordinate, divided by the scale
    tolerance = 4 * 2**-24 * max(size.height, size.width) / min(transform.scale)
    np.testing.assert_allclose(transform.to_original(placed), boxes, rtol=1e-6, atol=tolerance)


@pytest.fixture(scope="module", params=MMYOLO_VARIANTS)
def mmyolo_case(request) -> tuple[Variant, MMYoloPipeline]:
    pytest.importorskip("mmyolo")
    variant = load_variant(request.param)
    return variant, MMYoloPipeline(variant, variant.input)


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
def test_bits_and_geometry_equal_mmyolos(mmyolo_case, shape):
    variant, pipeline = mmyolo_case
    assert_equal(variant, variant.input, pipeline, shape)


@pytest.mark.parametrize("size", [(320, 640), (640, 320), (96, 416)], ids=lambda size: "x".join(map(str, size)))
def test_letterbox_into_a_rectangle_equals_mmyolos(size):
    """Images that lie across the input are shrunk twice, in mmyolo too."""
    pytest.importorskip("mmyolo")
    variant = load_variant("yolov8_embedded")
    rectangle = InputSize(height=size[0], width=size[1])
    pipeline = MMYoloPipeline(variant, rectangle)
    for shape in [(480, 640), (640, 480), (320, 640), (640, 320), (100, 50), (50, 100), (900, 901), (37, 500)]:
        assert_equal(variant, rectangle, pipeline, shape)


@pytest.mark.parametrize(("size", "shapes"), [((320, 640), [(300, 500), (31, 700)]), ((640, 320), [(500, 300)])])
def test_top_left_into_a_rectangle_equals_mmdets(size, shapes):
    """mmdet fits long edge to long edge, so an image that lies across does not fit at all and is not compared."""
    pytest.importorskip("mmyolo")
    variant = load_variant("yolox_nano")
    rectangle = InputSize(height=size[0], width=size[1])
    pipeline = MMYoloPipeline(variant, rectangle)
    for shape in shapes:
        assert_equal(variant, rectangle, pipeline, shape)


def test_yolov5_differs_from_its_rectangular_batch_shapes():
    """What the variant's square input gives up: with mmyolo's batch shapes the same image has another input."""
    pytest.importorskip("mmyolo")
    variant = load_variant("yolov5_n")
    pipeline = MMYoloPipeline(variant, variant.input)
    from alignment.models.mmyolo_source import load_config

    assert load_config(variant).val_dataloader.dataset.batch_shapes_cfg.type == "BatchShapePolicy"
    image = image_of(427, 640)
    resized = pipeline.compose.transforms[0]({"img": image})
    rectangular = pipeline.compose.transforms[1]({**resized, "batch_shape": np.array([448, 672])})
    assert rectangular["img"].shape == (448, 672, 3)
    assert preprocess(image, variant.input, variant.preprocess)[0].shape == (3, 640, 640)


@pytest.mark.parametrize("shape", [(480, 640), (100, 30), (1, 1), (320, 640)])
def test_stretch_equals_mmdets_resize(shape):
    pytest.importorskip("mmyolo")
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from mmdet.datasets.transforms import Resize

    theirs = Resize(scale=(640, 320), keep_ratio=False)({"img": image_of(*shape)})
    plain = Preprocess(resize="stretch", interpolation="bilinear", channels="bgr", std=(1, 1, 1))
    ours, transform = preprocess(image_of(*shape), InputSize(height=320, width=640), plain)
    np.testing.assert_array_equal(ours, theirs["img"].transpose(2, 0, 1))
    assert transform.scale == tuple(theirs["scale_factor"])


def test_mean_and_std_are_in_the_order_of_the_channels():
    image = np.empty((32, 32, 3), np.uint8)
    image[:] = (10, 20, 30)  # B, G, R
    size = InputSize(height=32, width=32)
    rgb = Preprocess(channels="rgb", mean=(1, 2, 3), std=(2, 4, 8))
    tensor, _ = preprocess(image, size, rgb)
    np.testing.assert_array_equal(tensor[:, 0, 0], np.float32([29 / 2, 18 / 4, 7 / 8]))
    tensor, _ = preprocess(image, size, rgb.model_copy(update={"channels": "bgr"}))
    np.testing.assert_array_equal(tensor[:, 0, 0], np.float32([9 / 2, 18 / 4, 27 / 8]))
    assert tensor.flags.c_contiguous


multiples_of_32 = st.integers(1, 8).map(lambda n: 32 * n)
sides = st.one_of(st.integers(1, 4), st.integers(1, 700))


@settings(max_examples=150, deadline=None)
@example(shape=(700, 1), size=InputSize(height=128, width=256), resize="letterbox")
@example(shape=(700, 1), size=InputSize(height=128, width=256), resize="letterbox_top_left")
@given(
    shape=st.tuples(sides, sides),
    size=st.builds(InputSize, height=multiples_of_32, width=multiples_of_32),
    resize=st.sampled_from(["letterbox", "letterbox_top_left", "stretch"]),
)
def test_the_transform_says_where_the_image_lies(shape, size, resize):
    """The pixels that are not padding are exactly those that the transform maps the image to, however thin it is."""
    image = np.full((*shape, 3), 200, np.uint8)
    tensor, transform = preprocess(image, size, Preprocess(resize=resize, std=(1, 1, 1)))
    assert tensor.shape == (3, size.height, size.width)
    assert set(np.unique(tensor)) <= {114, 200}
    rows, columns = np.nonzero(tensor[0] == 200)
    content = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], float)
    whole = [[0, 0, shape[1], shape[0]]]
    np.testing.assert_allclose(transform.to_original(content), whole, rtol=1e-9, atol=1e-9)


coordinates = st.floats(-1e4, 1e4)


@given(
    scale=st.tuples(st.floats(1e-2, 1e2), st.floats(1e-2, 1e2)),
    offset=st.tuples(st.integers(0, 640).map(float), st.integers(0, 640).map(float)),
    boxes=st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=5),
)
def test_to_original_inverts_the_mapping(scale, offset, boxes):
    original = np.array(boxes, float).reshape(-1, 4)
    placed = original * np.array(scale * 2) + np.array(offset * 2)
    transform = Transform(scale, offset, (480, 640))
    # cancellation against the offset: 2^-53 of it, over the scale
    atol = 8 * 2**-53 * (640 + np.abs(placed).max(initial=0)) / min(scale)
    np.testing.assert_allclose(transform.to_original(placed), original, rtol=1e-12, atol=atol)
    assert transform.to_original(placed.astype(np.float32)).dtype == np.float32


@given(st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=5))
def test_clip_keeps_boxes_in_the_image_and_those_inside_unchanged(boxes):
    transform = Transform((1.0, 1.0), (0.0, 0.0), (480, 640))
    given_boxes = np.array(boxes, np.float32).reshape(-1, 4)
    clipped = transform.clip(given_boxes)
    inside = (given_boxes >= 0) & (given_boxes <= [640, 480, 640, 480])
    np.testing.assert_array_equal(clipped[inside], given_boxes[inside])
    assert ((clipped >= 0) & (clipped <= [640, 480, 640, 480])).all()
