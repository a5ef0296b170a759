"""What `align new` takes an ONNX file for: the layout of its head and how it wants its input, against the truth."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_layouts as layouts
import picky
import pytest
from pydantic import TypeAdapter
from test_onnx_heads import ALL, DECODED

from alignment.data.coco import CocoDataset
from alignment.errors import AlignError
from alignment.export.nms_head import NmsHead, end_in_nms
from alignment.export.onnx_export import ExportOptions, exported
from alignment.guess.bare import guess_onnx, look_at
from alignment.guess.columns import box_coding, grid_of, objectness
from alignment.guess.findings import Asked, Finding, as_fields
from alignment.guess.head import Look, find_head
from alignment.guess.jury import choose, net
from alignment.guess.onnx_facts import find_size, read_onnx
from alignment.guess.preprocess import ORDERS, RANGES, hypothesis
from alignment.nms.multiclass import Detections
from alignment.onnx_head import OnnxHead
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.variant import InputSize, load_variant

pytest.importorskip("mmyolo")

PICTURES = 8
CONVENTIONS = list(itertools.product(RANGES, ORDERS))
# One that says in its YAML what its shape says too is the same file.
LAYOUTS = {name: case for name, case in ALL.items() if name != "yolov8 that says so"}
#: Each layout with a way to feed it, each way with two layouts or so.
PAIRS = [(name, 3 * index % len(CONVENTIONS)) for index, name in enumerate(LAYOUTS)]
HEAD = TypeAdapter(OnnxHead)
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return picky.pictures(tmp_path_factory.mktemp("picky") / "data", PICTURES)


@pytest.fixture(scope="module")
def write(tmp_path_factory) -> Iterator[Write]:
    """Writes the embedded YOLOv8 in a layout, fed in a way."""
    folder = tmp_path_factory.mktemp("guess")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_THREADS", "1")

        def make(layout: Callable, kind: str = "0..1", order: str = "rgb", red_only: bool = True, **how: Any) -> Path:
            batch = how.get("batch", 1)
            path = folder / f"{layout.__name__}-{kind}-{order}-{red_only}-{batch or 'n'}.onnx"
            if not path.is_file():
                graph = layouts.Graph(
                    exported(load_variant("yolov8_embedded"), ExportOptions(17, batch, "decoded")).onnx
                )
                picky.feed(graph, kind, order, red_only)
                graph.save(path, layout(graph))
            return path

        yield make


def guess(path: Path, data: Path | None, **asked: Any) -> Any:
    return guess_onnx(path, "unseen", data, Asked(**asked), lambda *_: None)


def settled(head: OnnxHead) -> dict[str, Any]:
    """A head without what need not be said."""
    return {**head.model_dump(), "output": None, "transposed": None}


def sure(found: Any, field: str) -> str:
    return next(finding.sure for finding in found.findings if finding.field == field)


@pytest.mark.parametrize(("name", "way"), PAIRS, ids=lambda value: str(value))
def test_head_and_input_are_told_of_every_layout(write, data, name, way):
    layout, head = LAYOUTS[name]
    kind, order = CONVENTIONS[way]
    found = guess(write(layout, kind, order), data)
    assert settled(found.variant.source.head) == settled(HEAD.validate_python(head))
    assert (found.variant.classes, found.variant.boxes) == (6, "horizontal")
    assert (found.variant.input.height, found.variant.input.width) == (320, 320)
    wanted = hypothesis(kind, order)
    ours = found.variant.preprocess
    assert (ours.channels, ours.mean, ours.std) == (wanted.channels, wanted.mean, wanted.std)
    assert {sure(found, f"preprocess.{field}") for field in ("channels", "mean", "std")} == {"certain"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_told_in_whatever_way_the_model_is_fed(write, data, name):
    layout, truth = LAYOUTS[name]
    for kind, order in CONVENTIONS:
        facts = read_onnx(write(layout, kind, order))
        size = InputSize(height=320, width=320)
        with OnnxRuntimeRunner(facts.path) as runner:
            entries = CocoDataset.open(data).images
            answers = look_at(runner, entries, size, Asked(), lambda *_: None)
        found = as_fields(find_head(Look(facts, size, answers, Asked(), 6)).findings)
        head = HEAD.validate_python(found["source"]["head"])
        assert settled(head) == settled(HEAD.validate_python(truth))
        assert found["classes"] == 6


def test_maps_are_told_and_their_anchors_found_in_the_graph_or_by_the_labels(tmp_path, data):
    variant = load_variant("yolov5_embedded")
    anchors = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
    paths = {}
    for held in (False, True):
        graph = layouts.Graph(exported(variant, ExportOptions(17, 1, "both")).onnx)
        del graph.model.metadata_props[:]
        outputs = layouts.yolov5_maps(graph)
        path = paths[held] = tmp_path / f"maps-{held}.onnx"
        graph.save(path, outputs)
        model = onnx.load(path)
        kept = [one for one in model.graph.initializer if one.dims != [3, 3, 2] or held]
        if held:
            sizes = np.array(anchors, np.float32).reshape(3, 3, 2) / np.array([8, 16, 32], np.float32)[:, None, None]
            kept.append(onnx.numpy_helper.from_array(sizes, "anchors"))
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        onnx.save(model, path)
    pairs = [[tuple(map(float, level[i : i + 2])) for i in (0, 2, 4)] for level in anchors]
    labelled = picky.pictures(tmp_path / "colours", 24, red=False)
    told = {"range": "0..1", "channels": "rgb", "resize": "letterbox"}
    for held, certainty in ((True, "certain"), (False, "likely")):
        found = guess(paths[held], labelled, **told)
        assert found.variant.source.head.layout == "yolov5_raw"
        assert found.variant.source.head.strides == [8, 16, 32]
        assert np.allclose(found.variant.source.head.anchors, pairs)
        assert sure(found, "source.head.anchors") == certainty
        assert found.variant.classes == 6
    with pytest.raises(AlignError, match="anchors of 1 levels, but strides"):
        guess(paths[False], labelled / "val2017", anchors=[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], **told)
    with pytest.raises(AlignError, match="--anchors yolov5, yolov7"):
        guess(paths[False], labelled / "val2017", **told)
    given = guess(paths[False], labelled / "val2017", anchors="yolov7", **told)
    assert given.variant.source.head.anchors[0][0] == (12.0, 16.0)


def padded(graph: layouts.Graph, *parts: tuple[str, int], width: int) -> str:
    """Columns put together by sums, so that no Concat tells where they end."""
    total, start = "", 0
    for part, columns in parts:
        wide = graph.add("Pad", part, [0, 0, start, 0, 0, width - start - columns])
        total = graph.add("Add", total, wide) if total else wide
        start += columns
    return total


def hidden_yolov8(graph: layouts.Graph) -> dict[str, str]:
    return {"output0": padded(graph, (layouts.centred(graph), 4), ("scores", 6), width=10)}


def hidden_yolov5(graph: layouts.Graph) -> dict[str, str]:
    objectness, classes = layouts.shares(graph)
    return {"output0": padded(graph, (layouts.centred(graph), 4), (objectness, 1), (classes, 6), width=11)}


def faint(graph: layouts.Graph) -> dict[str, str]:
    """Nothing says whether an objectness is there, as no score is high."""
    scores = graph.add("Mul", "scores", np.float32(0.2))
    return {"output0": padded(graph, (layouts.centred(graph), 4), (scores, 6), width=10)}


def split_yolov5(graph: layouts.Graph) -> dict[str, str]:
    """As YOLOv5 and v7 have it: xy, wh, and objectness with classes, put together."""
    boxes, (objectness, classes) = layouts.centred(graph), layouts.shares(graph)
    rest = padded(graph, (objectness, 1), (classes, 6), width=7)
    return {"output0": graph.add("Concat", graph.cut(boxes, 0, 2), graph.cut(boxes, 2, 4), rest, axis=2)}


@pytest.mark.parametrize(
    ("layout", "name"), [(hidden_yolov8, "yolov8"), (hidden_yolov5, "yolov5"), (split_yolov5, "yolov5")]
)
def test_objectness_is_told_by_the_scores_alone(write, data, layout, name):
    found = guess(write(layout), data / "val2017")
    assert (found.variant.source.head.layout, found.variant.classes) == (name, 6)
    assert sure(found, "source.head.layout") == sure(found, "classes") == "likely"
    assert sure(guess(write(layout), data / "val2017", classes=6), "classes") == "certain"


def blind(graph: layouts.Graph) -> dict[str, str]:
    """A detector that finds nothing in anything."""
    return {"boxes_": "boxes", "scores_": graph.add("Mul", "scores", np.float32(1e-3))}


def twice(graph: layouts.Graph) -> dict[str, str]:
    found = layouts.yolov8(graph)["output0"]
    return {"one": found, "two": graph.add("Mul", found, np.float32(1))}


AMBIGUOUS: dict[str, tuple[Callable, str, dict[str, Any]]] = {
    "layout": (faint, ": give --layout yolov8 or --layout yolov5", {"layout": "yolov8"}),
    "range": (blind, "--range 0..1 or --range 0..255", {"range": "0..1", "channels": "rgb"}),
    "output": (twice, "give --output one or --output two", {"output": "two"}),
}


@pytest.mark.parametrize(("layout", "mend", "asked"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_cannot_be_told_is_asked_for_and_then_taken(write, data, layout, mend, asked):
    path = write(layout)
    with pytest.raises(AlignError) as caught:
        guess(path, data / "val2017")
    assert str(caught.value).startswith(f"{path}: ")
    assert mend in str(caught.value)
    assert not str(caught.value).endswith("and ")
    assert "\n" not in str(caught.value)
    found = guess(path, data / "val2017", **{"range": "0..1", "channels": "rgb", **asked})
    assert found.variant.classes == 6


def test_the_order_of_channels_is_open_where_a_model_of_no_known_family_sees_no_colour(write, data):
    path = write(layouts.decoded, "0..1", "rgb", red_only=False)
    gray = data.parent / "gray"
    if not gray.is_dir():
        import cv2

        gray.mkdir()
        for source in sorted((data / "val2017").iterdir()):
            cv2.imwrite(str(gray / source.name), cv2.imread(str(source))[..., 2])
    with pytest.raises(AlignError, match=r"cannot tell preprocess.channels: .* give --channels rgb or --channels bgr"):
        guess(path, gray, range="0..1")
    assert guess(path, gray, range="0..1", channels="bgr").variant.preprocess.channels == "bgr"
    family = guess(write(layouts.yolov8, "0..1", "rgb", red_only=False), gray, range="0..1")
    assert (family.variant.preprocess.channels, sure(family, "preprocess.channels")) == ("rgb", "likely")


def test_anchors_are_for_maps_alone(write, data):
    with pytest.raises(AlignError, match="a head of layout yolov8 takes no anchors"):
        guess(write(layouts.yolov8), data, anchors="yolov5")


def relative(graph: layouts.Graph) -> dict[str, str]:
    boxes = graph.add("Div", layouts.centred(graph), np.float32(320))
    return {"output0": graph.add("Concat", boxes, "scores", axis=2)}


def of_masks(graph: layouts.Graph) -> dict[str, str]:
    """Coefficients of masks after the classes."""
    low = graph.add("Sub", "boxes", np.float32(160))
    coefficients = graph.add("Div", low, np.float32(80))
    return {"output0": graph.add("Concat", layouts.centred(graph), "scores", coefficients, axis=2)}


@pytest.mark.parametrize(
    ("layout", "said"),
    [(relative, "are in 0 to 1"), (of_masks, "head layout is unknown"), (layouts.labels_from_one, "label 6")],
)
def test_what_is_no_such_detector_is_refused_with_what_was_seen(write, data, layout, said):
    path = write(layout)
    with pytest.raises(AlignError, match=said) as caught:
        guess(path, data)
    assert "output0 [1, " in str(caught.value)


def angles(graph: layouts.Graph) -> str:
    """Some angle for each row, in radians."""
    return graph.add("Sub", graph.add("Div", graph.cut("boxes", 0, 1), np.float32(160)), np.float32(1))


def rotated_rows(graph: layouts.Graph) -> dict[str, str]:
    return {
        "output0": layouts.turned(graph, graph.add("Concat", layouts.centred(graph), "scores", angles(graph), axis=2))
    }


def rotated_pair(graph: layouts.Graph) -> dict[str, str]:
    return {"boxes_": graph.add("Concat", layouts.centred(graph), angles(graph), axis=2), "scores_": "scores"}


@pytest.mark.parametrize(("layout", "name"), [(rotated_rows, "yolov8"), (rotated_pair, "decoded")])
def test_an_angle_makes_boxes_rotated(write, data, layout, name):
    found = guess(write(layout), data / "val2017", range="0..1", channels="rgb")
    assert (found.variant.source.head.layout, found.variant.boxes, found.variant.classes) == (name, "rotated", 6)


def test_a_graph_that_ends_in_the_plugin_of_tensorrt_is_told(data, tmp_path):
    variant = load_variant("yolov8_embedded")
    path = Path(shutil.copy(exported(variant, ExportOptions(17, 1, "decoded")).onnx, tmp_path))
    list(end_in_nms(path, NmsHead("efficient_nms", variant.nms), None))
    found = guess(path, data)
    assert (found.variant.ends_in_nms, found.variant.classes) == (True, 6)
    assert found.variant.source.head.labels in {output.name for output in onnx.load(path).graph.output}
    assert found.variant.preprocess == variant.preprocess, "align export wrote it into the metadata"


def test_a_dynamic_size_is_asked_for_and_a_dynamic_batch_is_not(write, data):
    path = write(layouts.yolov8, batch=None)
    assert guess(path, data, range="0..1", channels="rgb").variant.input.height == 320
    model = onnx.load(path)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    dynamic = path.with_name("dynamic.onnx")
    onnx.save(model, dynamic)
    with pytest.raises(AlignError, match="height and width of its input are dynamic: give --size"):
        guess(dynamic, data)
    assert guess(dynamic, data, size=(320, 320), range="0..1", channels="rgb").variant.input.width == 320
    for size in ((320, 300), (320, 0), (320, 100_000)):
        with pytest.raises(AlignError, match=f"320 x {size[1]}, which are no multiples of 32 from 32 to 8192"):
            guess(dynamic, data, size=size)


@pytest.mark.parametrize("text", ["[" * 10_000, "(" * 150 + ")" * 150, "1 +", "{[]: 1}", "1e400", "", "[]"])
def test_metadata_that_are_no_literal_say_nothing(write, data, text):
    model = onnx.load(write(layouts.yolov8))
    for key in ("names", "imgsz"):
        model.metadata_props.add(key=key, value=text)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    path = data.parent / "literal.onnx"
    onnx.save(model, path)
    facts = read_onnx(path)
    assert facts.class_names is None
    with pytest.raises(AlignError, match="height and width of its input are dynamic: give --size"):
        find_size(facts, Asked())


def test_metadata_of_ultralytics_count_classes_and_name_the_family(write, data):
    model = onnx.load(write(hidden_yolov5, red_only=False))
    for key, value in {"names": str({i: f"thing {i}" for i in range(6)}), "stride": "32", "task": "detect"}.items():
        model.metadata_props.add(key=key, value=value)
    path = data.parent / "metadata.onnx"
    onnx.save(model, path)
    found = guess(path, data / "val2017")
    assert (found.variant.source.head.layout, found.variant.classes) == ("yolov5", 6)
    assert "Ultralytics" in next(f.evidence for f in found.findings if f.field == "preprocess.pad_value")
    model.metadata_props[-1].value = "segment"
    onnx.save(model, path)
    with pytest.raises(AlignError, match="no detector: its metadata say task 'segment'"):
        guess(path, data)


def test_data_of_other_classes_are_refused_where_they_were_given(write, data, tmp_path):
    path = write(DECODED["PP-YOLOE"][0])
    other = picky.pictures(tmp_path / "other", 2)
    truth = other / "annotations" / "instances_val2017.json"
    truth.write_text(truth.read_text().replace('{"id": 13, "name": "star"}', '{"id": 13}, {"id": 14}'))
    with pytest.raises(AlignError, match="7 categories, but unseen has 6 classes"):
        guess(path, other)


SIZE = InputSize(height=64, width=96)


def test_cells_and_boxes_of_every_coding():
    """Boxes drawn about the cells of a grid are read as what they were written as."""
    grid = grid_of(3 * (96 + 24 + 6), SIZE)
    assert grid is not None
    assert (grid.strides, grid.anchors) == ((8, 16, 32), 3)
    assert grid_of(101, SIZE) is None
    rng = np.random.default_rng(0)
    for inside in (False, True):
        middles, strides = grid.cells(SIZE, inside)
        centre = middles + rng.normal(size=middles.shape) * strides * 0.3
        size = strides * rng.uniform(1, 5, size=middles.shape)
        written = {
            ("pixels", "cxcywh"): np.concatenate([centre, size], 1),
            ("pixels", "xyxy"): np.concatenate([centre - size / 2, centre + size / 2], 1),
            ("relative", "cxcywh"): np.concatenate([centre, size], 1) / [96, 64, 96, 64],
            ("offsets", "cxcywh"): np.concatenate(
                [centre / strides - (middles / strides - 0.5), np.log(size / strides)], 1
            ),
        }
        for (unit, form), boxes in written.items():
            found = box_coding(boxes[None], grid, SIZE)
            assert (found.unit, found.format) == (unit, form)
        crossed = written["pixels", "xyxy"].copy()
        crossed[::5] = crossed[::5][:, [2, 1, 0, 3]]
        found = box_coding(crossed[None], grid, SIZE)
        assert (found.unit, found.format, found.sure) == ("pixels", "xyxy", "likely")
        assert box_coding(crossed[None], None, SIZE).format == "xyxy"
    noise = rng.normal(size=(1, len(middles), 4)) * 500
    assert box_coding(noise, grid, SIZE).unit == ""


def test_a_network_whose_background_boxes_cross_is_read_as_corners(data):
    """RTMDet's distances to the sides of a box are not held above 0."""
    variant = load_variant("rtmdet_embedded")
    path = exported(variant, ExportOptions(17, 1, "decoded")).onnx
    with OnnxRuntimeRunner(path) as runner:
        answers = look_at(runner, CocoDataset.open(data).images, variant.input, Asked(), lambda *_: None)
    boxes = np.concatenate([answer["boxes"] for answer in answers])
    assert (boxes[..., 2] < boxes[..., 0]).mean() > 0.01
    found = box_coding(boxes, grid_of(boxes.shape[1], variant.input), variant.input)
    assert (found.unit, found.format) == ("pixels", "xyxy")


def test_objectness_has_company_and_a_class_has_none():
    rng = np.random.default_rng(0)
    quiet = rng.uniform(0, 0.05, size=(400, 5))
    lone, together = quiet.copy(), quiet.copy()
    lone[:15, 0] = together[:15, 0] = 0.9
    together[:15, 3] = 0.8
    assert objectness([lone], False)[0] is False
    assert objectness([together], False)[0] is True
    assert objectness([quiet], False)[0] is None
    ones = np.concatenate([np.ones((400, 1)), quiet], 1)
    assert objectness([ones], False)[0] is True


def detections(*rows: tuple[float, int]) -> Detections:
    """Boxes side by side, of these scores and labels."""
    boxes = np.array([[20 * i, 0, 20 * i + 10, 10] for i in range(len(rows))], np.float32).reshape(-1, 4)
    scores, labels = np.array([s for s, _ in rows], np.float32), np.array([c for _, c in rows], np.int32)
    return Detections(boxes, scores, labels, np.arange(len(rows), dtype=np.int32))


def test_confirmed_scores_count_for_and_others_against():
    found = detections((0.9, 1), (0.5, 2), (0.2, 3))
    assert net(found, detections((1, 1), (1, 2)), 0.5) == pytest.approx(1.4)
    assert net(found, detections((1, 1), (1, 0)), 0.5) == pytest.approx(0.4)
    assert net(found, detections(), 0.5) == pytest.approx(-1.4)
    assert net(detections(), found, 0.5) == 0
    again = Detections(*(np.repeat(v[:1], 2, 0) for v in (found.boxes, found.scores, found.labels, found.rows)))
    assert net(again, found, 0.5) == pytest.approx(0), "one counterpart confirms one detection"


def test_a_choice_is_clear_only_where_pictures_agree_about_it():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 32))
    near = {"a": 2 + noise[0], "b": 2 + noise[1]}
    assert (choose(near, "b", "mirror").best, choose(near, "b", "mirror").clear) == ("b", False)
    assert choose(near, None, "mirror").best is None
    far = {"a": 3 + noise[0], "b": 1 + noise[1], "c": 0 * noise[0]}
    assert (choose(far, "b", "labels").best, choose(far, "b", "labels").clear) == ("a", True)
    nothing = {"a": 0 * noise[0], "b": -(noise[1] ** 2)}
    assert (choose(nothing, "b", "labels").best, choose(nothing, None, "labels").best) == ("b", None)


def test_fields_of_findings_nest():
    findings = [Finding("a.b", 1, "certain", ""), Finding("a.c.d", 2, "likely", ""), Finding("e", 3, "open", "")]
    assert as_fields(findings) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_the_planted_detector_is_what_it_is_said_to_be(write, data):
    """It finds what is there in the right way alone, else the other tests would prove nothing."""
    from alignment.data.coco import read_image
    from alignment.data.preprocess import preprocess

    path = write(layouts.decoded, "imagenet", "bgr")
    image = read_image(next((data / "val2017").iterdir()))
    with OnnxRuntimeRunner(path) as runner:
        best = {
            way: runner.run(preprocess(image, InputSize(height=320, width=320), hypothesis(*way))[0][None])[
                "scores_"
            ].max()
            for way in CONVENTIONS
        }
    assert [way for way, score in best.items() if score > 0.5] == [("imagenet", "bgr")]
