"""Drawings of engines: every layer once, nothing over anything else, readers below, two engines on one level."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import NamedTuple

import pytest
from command_line import align
from engines import convolution, engine, layer, quantized, simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import graphs, tiny

from alignment.inspection.draw import GAP, STYLES, WIDTH, draw
from alignment.inspection.findings import KINDS, find
from alignment.inspection.saved import Inspection, load_inspection
from alignment.report.engine import render_engines
from alignment.variant import golden_dir

pytestmark = pytest.mark.culprit
SVG = "{http://www.w3.org/2000/svg}"
#: Pixels of a monospaced character of the size of a box's first line, a little more than fonts have.
CHARACTER = 6.8


class Box(NamedTuple):
    """A layer as drawn: its name, place, style, texts and the width of its bar."""

    name: str
    x: float
    y: float
    styles: tuple[str, ...]
    texts: tuple[str, ...]
    bar: float


def lanes(svg: str) -> list[list[Box]]:
    """The boxes of each engine, in the engine's order."""
    root = ET.fromstring(svg)
    found = []
    for lane in root.findall(f"{SVG}g"):
        left, top = (float(number) for number in lane.get("transform")[len("translate(") : -1].split())
        boxes = []
        for group in lane.findall(f"{SVG}g"):
            box, bar = group.findall(f"{SVG}rect")
            texts = tuple(text.text for text in group.findall(f"{SVG}text"))
            name = group.find(f"{SVG}title").text.splitlines()[0]
            place = left + float(box.get("x")), top + float(box.get("y"))
            boxes.append(Box(name, *place, tuple(box.get("class").split()), texts, float(bar.get("width"))))
        found.append(boxes)
    return found


def assert_sound(engines: list[Inspection]) -> None:
    """What holds of every drawing."""
    drawn = lanes(draw(engines))
    assert [[box.name for box in boxes] for boxes in drawn] == [
        [one.name for one in each.engine_graph.layers] for each in engines
    ]
    rows: dict[float, list[Box]] = {}
    for box in (box for boxes in drawn for box in boxes):
        rows.setdefault(box.y, []).append(box)
        assert all(len(text) * CHARACTER <= WIDTH for text in box.texts[:1])
        assert 0 <= box.bar <= WIDTH
    for row in rows.values():
        for left, right in pairwise(sorted(box.x for box in row)):
            assert right - left >= WIDTH + GAP - 0.5
    for boxes, each in zip(drawn, engines, strict=True):
        for place, before in enumerate(each.engine_graph.before):
            assert all(boxes[source].y < boxes[place].y for source in before)


@settings(deadline=None, max_examples=40)
@given(graphs(), st.sampled_from(["tensorrt", "full"]))
def test_any_engine(model, policy):
    assert_sound([simulated(quantized(model, policy))])


@settings(deadline=None, max_examples=40)
@given(graphs())
def test_any_two_engines(model):
    """Beside the float engine; nodes that both have a layer of are on one level."""
    engines = [simulated(quantized(model, "full"), "int8"), simulated(model, "float")]
    assert_sound(engines)
    int8, other = ({box.name: box.y for box in boxes} for boxes in lanes(draw(engines)))
    assert len(other) > 1
    assert all(int8[name] == y for name, y in other.items())


def test_a_fused_layer_begins_where_its_parts_do():
    model = tiny("c = Conv(x, w0); r = Relu(c); d = Conv(r, w1)")
    fused = engine(
        convolution("c + r", "x:Half", "r:Half", ("c", "r"), "Half"),
        convolution("d", "r:Half", "d:Half", weights="Half"),
        graph=model,
    )
    apart = engine(
        convolution("c", "x:Half", "c:Half", weights="Half"),
        layer("Reformatting CopyNode for Input Tensor 0 to r", "Reformat", "c:Half", "t:Half", ()),
        layer("r", "PointWiseV2", "t:Half", "r:Half"),
        convolution("d", "r:Half", "d:Half", weights="Half"),
        graph=model,
    )
    assert_sound([fused, apart])
    left, right = lanes(draw([fused, apart]))
    assert left[0].y == right[0].y < right[1].y < right[2].y
    assert left[1].y == right[3].y


def test_colour_is_precision_and_bar_is_time():
    layers = [
        convolution("a", "x:Int8", "a:Half"),
        convolution("b", "a:Half", "b:Half", weights="Half"),
        convolution("c", "b:Float", "c:Float", weights="Float"),
        layer("d", "Reformat", "c:Float", "d:Int8", ()),
        layer("e", "Gather", "d:Int8", "e:Int8", ()),
        layer("f", "Shape", "", "f:Int32:any", ()),
    ]
    times = {"a": 0.5, "b": 0.25, "c": 1.0}
    (boxes,) = lanes(draw([engine(*layers, times=times)]))
    assert [next(style for style in STYLES if style in box.styles) for box in boxes] == [
        *("int8", "half", "float", "moves", "int8", "other")
    ]
    assert [box.bar for box in boxes[:3]] == [WIDTH / 2, WIDTH / 4, WIDTH]
    assert "0.5000 ms" in boxes[0].texts[1]
    assert "Half→Int8" not in boxes[0].texts[1]
    assert "Int8→Half" in boxes[0].texts[1]  # not by colour alone
    assert [place for place, box in enumerate(boxes) if "finding" in box.styles] == [
        1,
        3,
    ]  # float between int8, and a Reformat


def test_it_stands_alone():
    """No script, no font, no picture from elsewhere; a dark theme; names with markup in them."""
    svg = draw([engine(layer("<a & b>", "Softmax", "x:Half", "y:Half", ()))])
    assert svg.count("http") == 1  # the namespace
    assert "prefers-color-scheme:dark" in svg
    assert "<script" not in svg
    ((box,),) = lanes(svg)
    assert box.name == "<a & b>"
    for style, text in STYLES.items():
        assert f".{style}{{fill" in svg
        assert f">{text}<" in svg


def test_two_files_beside_each_other(tmp_path):
    model = tiny("c = Conv(x, w0); r = Relu(c); d = Conv(r, w1)")
    for name, made in ("int8", quantized(model)), ("float", model):
        simulated(made, name).save(tmp_path / f"{name}.engine.json")
    files = [tmp_path / f"{name}.engine.json" for name in ("int8", "float")]
    result = align("inspect", *files, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    left, right = lanes((tmp_path / "int8-against-float.svg").read_text())
    assert (len(left), len(right)) == (7, 3)


def test_page_of_two_engines(tmp_path):
    """The drawing, every finding, and the nodes that run in another precision; nothing from elsewhere, no script."""
    paths = [path for path in sorted((golden_dir() / "engines").glob("yolov8_n-*.engine.json")) if "int8" in path.name]
    result = align("inspect", *paths, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (page,) = (path.read_text() for path in tmp_path.glob("*.html"))
    made = [load_inspection(path) for path in paths]
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    for one in made:
        found = find(one)
        for kind in KINDS:
            assert page.count(f'<tr><th scope="row">{kind}</th><td class="number">') >= 2
        assert all(html.escape(finding.why, quote=False) in html.unescape(page) for finding in found)
        assert f"{len(one.engine_graph.layers)} layers" in page
    left, right = (one.engine_graph.precisions.mapped for one in made)
    others = {node for node in left if node in right and left[node].runs_in != right[node].runs_in}
    assert others
    assert f"{len(others)} nodes in another precision" in page
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th><td>(\w+)</td><td>(\w+)</td></tr>', page)
    assert {(node, left[node].runs_in, right[node].runs_in) for node in others} == set(rows)


def test_page_with_markup_in_names():
    made = engine(layer("<script>", "Softmax", "x:Half", "y:Half", ()))
    page = render_engines([made])
    assert "<script>" not in page
    assert "nodes in another precision" not in page


def test_recorded_engines_side_by_side():
    engines = [load_inspection(path) for path in sorted((golden_dir() / "engines").glob("yolov8_n-*.engine.json"))]
    drawn = lanes(draw(engines))
    assert [len(lane) for lane in drawn] == [len(made.engine_graph.layers) for made in engines]
    for made, lane in zip(engines, drawn, strict=True):
        for place, before in enumerate(made.engine_graph.before):
            assert all(lane[source].y < lane[place].y for source in before)
