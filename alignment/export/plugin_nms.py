"""ONNX files that end in an NMS plugin, TensorRT's EfficientNMS_TRT or this project's EfficientNMSRotated_TRT: what
comes before it runs anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, helper

from alignment.errors import AlignError
from alignment.nms.plugins import ROTATED, UPRIGHT, WIDTH

PLUGINS = tuple(WIDTH)
#: Without these the plugin takes defaults of its own, which differ between its sources and their README.
NEEDED = ("score_threshold", "iou_threshold", "max_output_boxes")
#: Attributes by name: type, least, most.
_Taken = dict[str, tuple[type[float], float, float]]
_BOTH: _Taken = {
    "score_threshold": (float, -math.inf, math.inf),
    "iou_threshold": (float, 0, 1),
    "max_output_boxes": (int, 1, math.inf),
    "background_class": (int, -1, math.inf),
    "score_activation": (int, 0, 1),
    "class_agnostic": (int, 0, 1),
}
#: By plugin; those of EfficientNMSRotated_TRT are what `enr_check` takes.
_TAKEN: dict[str, _Taken] = {
    ROTATED: {**_BOTH, "pre_nms_topk": (int, 0, math.inf)},
    UPRIGHT: {**_BOTH, "background_class": (int, -math.inf, math.inf), "box_coding": (int, 0, 1)},
}


def plugin_of(model: ModelProto) -> NodeProto | None:
    """The plugin's node, None where the graph has none."""
    return next((node for node in model.graph.node if node.op_type in PLUGINS), None)


def plugin_in(path: Path) -> str | None:
    """The plugin that an ONNX file has, None without.  What is no ONNX file has none: whoever loads it says so."""
    try:
        node = plugin_of(onnx.load(path, load_external_data=False))
    except (DecodeError, OSError):
        return None
    return None if node is None else node.op_type


def require_boxes_of(path: Path, rotated: bool) -> None:
    """Raises AlignError for a file that ends in a plugin for other boxes than `rotated` ones, or than upright ones."""
    plugin = plugin_in(path)
    if plugin is not None and (WIDTH[plugin] == WIDTH[ROTATED]) != rotated:
        other = "horizontal" if rotated else "rotated"
        raise AlignError(f"{path}: ends in {plugin}, whose boxes are {other}", f"set `boxes: {other}` in its YAML")


def refuse_plugin(path: Path, purpose: str) -> Path:
    """The path itself, of a file without the plugin.  Raises AlignError for another, with what it is of no use for."""
    if plugin := plugin_in(path):
        raise AlignError(f"{path}: ends in {plugin}: {purpose}", "give the file up to its NMS (head layout decoded)")
    return path


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def before_plugin(model: ModelProto, path: Path) -> ModelProto:
    """A copy of a graph that ends where the plugin begins: its outputs are what that reads, boxes and scores, and those
    of the graph that are not the plugin's.

    Args:
        model: the graph.
        path: its file, for errors.

    Raises:
        AlignError: for a node that is not one alone at the end, lacks what `NEEDED` names, or has an attribute that the
            plugin does not take.
    """
    cut = ModelProto()
    cut.CopyFrom(model)
    graph, node = cut.graph, plugin_of(cut)
    assert node is not None
    if reason := _unknown(cut, node):
        raise AlignError(
            f"{path}: holds {node.op_type}, which only TensorRT runs, in a form that is unknown here: {reason}",
            "export it up to its NMS (head layout decoded, yolov5 or yolov8), with ONNX's own NonMaxSuppression, or as "
            "`align export --nms efficient_nms` does",
        )
    graph.node.remove(node)
    others = [output for output in graph.output if output.name not in node.output]
    del graph.output[:]
    graph.output.extend(others)
    imports = [one for one in cut.opset_import if one.domain != node.domain or not node.domain]
    del cut.opset_import[:]
    cut.opset_import.extend(imports)
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(cut).graph.value_info}
    for name in (one for one in node.input if one not in {output.name for output in others}):
        value = known.get(name) or helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        graph.output.append(value)
    return cut


def with_plugin(cut: ModelProto, whole: ModelProto) -> ModelProto:
    """The graph `cut`, made of what `before_plugin` gave of `whole`, with plugin and outputs of `whole` again."""
    ended, node = ModelProto(), plugin_of(whole)
    assert node is not None
    ended.CopyFrom(cut)
    ended.graph.node.append(node)
    del ended.graph.output[:]
    ended.graph.output.extend(whole.graph.output)
    if node.domain:
        ended.opset_import.extend(one for one in whole.opset_import if one.domain == node.domain)
    return ended


def _unknown(model: ModelProto, node: NodeProto) -> str:
    """What is unknown of the node's form; empty where nothing is."""
    read = {name for other in model.graph.node for name in other.input}
    given = {output.name for output in model.graph.output}
    attributes = attributes_of(node)
    missing = [name for name in NEEDED if name not in attributes]
    if sum(other.op_type.endswith("_TRT") for other in model.graph.node) > 1:
        return "it is not the only plugin"
    if len(node.input) != 2 or len(node.output) != 4:
        return f"{len(node.input)} inputs and {len(node.output)} outputs, not 2 and 4"
    if missing:
        return f"no attribute {', '.join(missing)}"
    for name, (kind, least, most) in _TAKEN[node.op_type].items():
        if name in attributes and not (isinstance(value := attributes[name], kind) and least <= value <= most):
            return f"{name} is {value}, not one {kind.__name__}{_between(least, most)}"
    if read & set(node.output) or not set(node.output) <= given:
        return "its outputs are not those of the graph"
    return ""


def _between(least: float, most: float) -> str:
    """``of 1 or more``, ``from 0 to 1``; empty where any number is taken."""
    if most < math.inf:
        return f" from {least:g} to {most:g}"
    return f" of {least:g} or more" if least > -math.inf else ""
