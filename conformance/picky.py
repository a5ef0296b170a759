"""A detector that is particular about its input, and pictures that show it: what tells guesses about it apart."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx_layouts as layouts
from onnx import helper, numpy_helper

from alignment.data.coco import annotation_file, read_image
from alignment.data.synthetic import synthetic_root
from alignment.guess.preprocess import RANGES

GRAY = 114
#: Side of the black and the white patch of each picture.
PATCH = 24


def pictures(folder: Path, count: int, red: bool = True) -> Path:
    """The first drawn pictures; in red alone: blue and green flat, and a black and a white patch in red."""
    source = synthetic_root()
    truth = json.loads(annotation_file(source, "val2017").read_text())
    truth["images"] = truth["images"][:count]
    known = {image["id"] for image in truth["images"]}
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in known]
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for image in truth["images"]:
        picture = read_image(source / "val2017" / image["file_name"])
        cv2.imwrite(str(folder / "val2017" / image["file_name"]), _in_red(picture) if red else picture)
    annotation_file(folder, "val2017").write_text(json.dumps(truth))
    return folder


def _in_red(picture: np.ndarray) -> np.ndarray:
    red = np.full_like(picture, GRAY)
    red[..., 2] = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    red[:PATCH, :PATCH, 2], red[:PATCH, PATCH : 2 * PATCH, 2] = 0, 255
    return red


def feed(graph: layouts.Graph, kind: str, order: str, red_only: bool = True) -> None:
    """Makes a detector of RGB in 0..1 one that takes pixels of another range and order.

    Args:
        graph: changed in place.
        kind: one of `RANGES`.
        order: ``rgb`` or ``bgr``.
        red_only: it sees red alone, and where that does not reach from black to white, nothing.
    """
    image = graph.model.graph.input[0].name
    before = len(graph.model.graph.node)
    for node in graph.model.graph.node:
        node.input[:] = ["fed" if name == image else name for name in node.input]
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in RANGES[kind])
    if order == "bgr":
        mean, std = mean[::-1].copy(), std[::-1].copy()
    value = graph.add("Add", graph.add("Mul", image, std / 255), mean / 255)
    if order == "bgr":
        value = graph.add("Gather", value, [2, 1, 0], axis=1)
    if red_only:
        value = graph.add("Gather", value, [0, 0, 0], axis=1)
        ends = [graph.add(op, value, axes=[1, 2, 3], keepdims=1) for op in ("ReduceMin", "ReduceMax")]
        off = graph.add("Add", graph.add("Abs", ends[0]), graph.add("Abs", graph.add("Sub", ends[1], np.float32(1))))
        trust = graph.add("Clip", graph.add("Sub", np.float32(1), graph.add("Mul", off, np.float32(8))), np.float32(0))
        flat = np.float32(GRAY / 255)
        value = graph.add("Add", graph.add("Mul", graph.add("Sub", value, flat), trust), flat)
    graph.add("Identity", value)
    nodes = list(graph.model.graph.node)
    nodes[-1].output[0] = "fed"
    del graph.model.graph.node[:]
    graph.model.graph.node.extend([*nodes[before:], *nodes[:before]])
    del graph.model.metadata_props[:]  # what `align export` says of the input


def constant(width: int) -> onnx.ModelProto:
    """A graph that takes an image and gives as many numbers, ``[1, width]``: no detector."""
    image = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 64, 64])
    answer = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, width])
    weights = numpy_helper.from_array(np.ones((3, width), np.float32), "weights")
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "no_detector", [image], [answer], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
