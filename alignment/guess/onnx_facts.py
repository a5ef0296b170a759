"""What an ONNX file says of itself before it is run: input, metadata, the widths of what it concatenates."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from alignment.errors import AlignError
from alignment.export.onnx_export import check_onnx
from alignment.export.plugin_nms import plugin_of
from alignment.guess.findings import Asked, Finding, found_size, given

EXPORT_MEND = "export it with one float32 image input [B, 3, H, W]"


@dataclass(frozen=True)
class OnnxFacts:
    """An ONNX file as it is read.

    Attributes:
        path: the file.
        model: its graph; of one that ends in EfficientNMS_TRT, the whole.
        metadata: ``metadata_props``.
        shapes: the shape of each tensor that shape inference finds, 0 where a side is dynamic.
    """

    path: Path
    model: onnx.ModelProto
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @property
    def class_names(self) -> list[str] | None:
        """Those that Ultralytics' exporter writes, by index."""
        try:
            names = self.literal("names")
            named = [names[key] for key in sorted(names)] if isinstance(names, dict) else names
            return [str(name) for name in named] or None
        except (KeyError, ValueError, TypeError):
            return None

    def literal(self, key: str) -> Any:
        """A value of the metadata that is written as Python writes it.

        Raises:
            KeyError: it is not there.
            ValueError: it is something else.
        """
        try:
            return ast.literal_eval(self.metadata[key])
        except (SyntaxError, RecursionError, MemoryError, TypeError) as error:  # Python's parser has all of them
            raise ValueError(f"{key} of the metadata: {type(error).__name__}") from None

    def concatenated(self, width: int) -> list[list[int]]:
        """How the parts of each Concat that makes `width` of something are wide, where that is known."""
        found = []
        for node in self.model.graph.node:
            if node.op_type == "Concat":
                axis = next(a.i for a in node.attribute if a.name == "axis")
                shapes = [self.shapes.get(name, ()) for name in node.input]
                if all(-len(shape) <= axis < len(shape) for shape in shapes):
                    parts = [shape[axis] for shape in shapes]
                    if sum(parts) == width and 0 not in parts:
                        found.append(parts)
        return found

    def constants(self) -> dict[str, onnx.TensorProto]:
        """Initializers and Constant nodes by the name of the tensor."""
        found = {one.name: one for one in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type == "Constant":
                values = [a.t for a in node.attribute if a.name == "value"]
                found |= dict.fromkeys(node.output, values[0]) if values else {}
        return found


def read_onnx(path: Path) -> OnnxFacts:
    """Reads and checks a file.

    Raises:
        AlignError: for what is no ONNX file, of more or another input than one image, or a model of another task.
    """
    if not path.is_file():
        raise AlignError(f"{path}: no such file", "give --onnx the path of an ONNX file")
    check_onnx(path, plugin=True)
    model = onnx.load(path)
    facts = OnnxFacts(path, model, {p.key: p.value for p in model.metadata_props}, _shapes(model))
    task = facts.metadata.get("task", "detect")
    if task not in ("detect", "obb"):
        raise AlignError(f"{path}: no detector: its metadata say task {task!r}", "give a model that detects boxes")
    _input(facts)
    return facts


def find_size(facts: OnnxFacts, asked: Asked) -> list[Finding]:
    """``input.height`` and ``input.width``.

    Raises:
        AlignError: for a size that is not a multiple of 32 or that the graph does not take, and where a dynamic input
            leaves it open.
    """
    shape = _input(facts)
    fixed = [side or None for side in shape[2:]]
    if asked.size is not None:
        if any(side not in (None, wanted) for side, wanted in zip(fixed, asked.size, strict=True)):
            raise AlignError(f"{facts.path}: input {list(shape)} is fixed", "leave out --size, or export it anew")
        sides, evidence = asked.size, "given as --size"
    elif None not in fixed:
        shown = ", ".join(str(side or "any") for side in shape)
        sides, evidence = (shape[2], shape[3]), f"the graph's input is [{shown}]"
    else:
        sides, evidence = _imgsz(facts), f"the graph's metadata say imgsz {facts.metadata.get('imgsz')}"
    return found_size(facts.path, sides, evidence, "export it for such a size")


def find_classes_of_nms(facts: OnnxFacts, asked: Asked, categories: int | None) -> Finding:
    """``classes`` of a graph that ends in NMS, whose outputs do not say it."""
    option = "--classes N"
    if asked.classes is not None:
        return given("classes", asked.classes, "--classes")
    if facts.class_names is not None:
        return Finding("classes", len(facts.class_names), "certain", "the graph's metadata name so many")
    for node in facts.model.graph.node:
        if node.op_type in ("NonMaxSuppression", "EfficientNMS_TRT") and len(node.input) > 1:
            shape = facts.shapes.get(node.input[1], ())
            axis = 1 if node.op_type == "NonMaxSuppression" else 2
            if len(shape) == 3 and shape[axis]:
                evidence = f"{node.op_type} reads scores of {list(shape)}"
                return Finding("classes", shape[axis], "certain", evidence)
    divisor = _label_divisor(facts)
    if divisor is not None:
        return Finding("classes", divisor, "likely", "labels are what is left of an index divided by that")
    if categories is not None:
        return Finding("classes", categories, "likely", "the data have so many categories", option)
    return Finding("classes", None, "open", "the graph ends in NMS and nothing in it says how many there are", option)


def _label_divisor(facts: OnnxFacts) -> int | None:
    """What all Mod nodes of a graph divide by: YOLOv10 takes the class out of a flat index so."""
    known = facts.constants()
    divisors = set()
    for node in facts.model.graph.node:
        if node.op_type == "Mod" and node.input[1] in known:
            value = numpy_helper.to_array(known[node.input[1]])
            divisors |= {int(value.reshape(-1)[0])} if value.size == 1 else set()
    return divisors.pop() if len(divisors) == 1 else None


def _imgsz(facts: OnnxFacts) -> tuple[int, int]:
    try:
        sides = facts.literal("imgsz")
        height, width = (sides, sides) if isinstance(sides, int) else sides
        return int(height), int(width)
    except (KeyError, ValueError, TypeError, OverflowError):
        what = f"{facts.path}: height and width of its input are dynamic"
        raise AlignError(what, "give --size, such as 640 or 384x640") from None


def _input(facts: OnnxFacts) -> tuple[int, ...]:
    """The shape of the one image that goes in, 0 where it is dynamic."""
    graph = facts.model.graph
    constants = {one.name for one in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    described = ", ".join(f"{v.name} {_type(v)} {list(_shape(v))}" for v in inputs)
    if len(inputs) != 1 or len(_shape(inputs[0])) != 4 or _type(inputs[0]) != "FLOAT":
        raise AlignError(f"{facts.path}: inputs {described or 'none'}", EXPORT_MEND)
    shape = _shape(inputs[0])
    if shape[1] not in (0, 3):
        last = ", its channels last" if shape[3] == 3 else ""
        raise AlignError(f"{facts.path}: input {described} is no image of three channels{last}", EXPORT_MEND)
    return shape


def _type(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    return onnx.TensorProto.DataType.Name(kind) if kind in onnx.TensorProto.DataType.values() else f"type {kind}"


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(side.dim_value for side in value.type.tensor_type.shape.dim)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    if plugin_of(whole) is not None:  # unknown to shape inference, which then stops where it stands
        kept = [node for node in whole.graph.node if not node.op_type.endswith("_TRT")]
        del whole.graph.node[:]
        whole.graph.node.extend(kept)
    try:
        whole = onnx.shape_inference.infer_shapes(whole, data_prop=True)
    except Exception:  # what cannot be inferred is only evidence that is missing
        return {}
    values = [*whole.graph.value_info, *whole.graph.output, *whole.graph.input]
    return {value.name: _shape(value) for value in values if value.type.tensor_type.HasField("shape")}
