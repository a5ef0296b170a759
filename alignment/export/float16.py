"""A graph in float16: what ONNX Runtime runs as FP16, and what TensorRT builds where types come from the graph.

Up to the last convolutions every tensor is float16.  What follows them, decoding, stays float32, as do inputs and
outputs: half of float16's last bit is 0.25 px from 512 on and 0.5 px from 1024 on.  Measured on ONNX Runtime, decoding
in float16 as well moves boxes by up to 0.37 px (yolov8_embedded at 320) and 0.44 px (yolov8_n at 640), on average by
0.07 and 0.12 px, and AP by 0.0016 and 0.0017; it costs next to no time in float32.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from alignment.cache import Key, kept
from alignment.errors import AlignError
from alignment.export.onnx_export import check_onnx
from alignment.export.plugin_nms import plugin_of, with_plugin
from alignment.quantize.graph import reads

# Raise it when the same graph comes to be converted to another one.
RECIPE = 1
WEIGHTED = ("Conv", "ConvTranspose", "Gemm")


def float32_nodes(path: Path, patterns: Sequence[str], decoding: bool = True) -> tuple[str, ...]:
    """The names of the nodes that FP16 leaves in float32: those that decode, and those that `patterns` name.

    Args:
        path: a float32 ONNX file.
        patterns: node names, in which ``*`` and ``?`` stand for others.
        decoding: whether nodes that decode are among them.

    Raises:
        AlignError: for a pattern that no node answers to.
    """
    graph = onnx.load(path, load_external_data=False).graph
    chosen = {node.name for node in split(graph)[1]} if decoding else set()
    names = [node.name for node in graph.node]
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            near = ", ".join(difflib.get_close_matches(pattern, names, 3)) or "`align layers` lists them"
            raise AlignError(f"{path}: no node is named {pattern!r} (float32_nodes)", f"nodes named alike: {near}")
        chosen.update(found)
    return tuple(name for name in names if name in chosen)


def float16_model(path: Path, native: bool = True, keep: Sequence[str] = ()) -> Path:
    """The float16 form of a float32 ONNX file: converted once and kept in the cache by content.  An NMS plugin at its
    end stays as it is, with what decodes.

    Args:
        path: the file.
        keep: names of nodes that stay float32, weights and all; what goes from one to another is not rounded.
        native: nodes take and give float16, as hardware that has it runs them.  Without it every node computes in
            float32 and what it gives is rounded to float16, by casts that are part of the graph.  That is for CPUs:
            ONNX Runtime computes there in float32 anyway, and takes the liberty to round a chain of nodes only at its
            end, so that the native graph shows no overflow and a third of the error.

    Raises:
        AlignError: for a file that is not valid, or cannot be converted.
    """
    import onnxruntime

    model = check_onnx(path, plugin=True)
    whole = onnx.load(path)
    plugin = plugin_of(whole)
    content = [model.SerializeToString(deterministic=True), *([plugin.SerializeToString()] if plugin else [])]
    graph = hashlib.sha256(b"".join(content)).hexdigest()
    inputs = {"graph_sha256": graph, "recipe": RECIPE, "native": native, "keep": sorted(keep)}
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}

    def convert(folder: Path) -> None:
        try:
            half = to_float16(model, native, keep)
            half = half if plugin is None else with_plugin(half, whole)
        except Exception as error:  # converter and checker have error types of their own
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise AlignError(f"{path}: cannot be converted to float16: {reason}", "run it in fp32") from error
        onnx.save(half, folder / path.name)

    return kept(Key("float16", path.stem, inputs, versions), convert) / path.name


def to_float16(model: ModelProto, native: bool, keep: Sequence[str] = ()) -> ModelProto:
    """See `float16_model`.  Nodes, weights, inputs and outputs keep their names, so a node map fits both graphs."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    before, decoding = split(model.graph)
    kept = {node.name for node in before} & set(keep)
    half = convert_float_to_float16(
        _part(model, before, decoding),
        keep_io_types=True,
        op_block_list=DEFAULT_OP_BLOCK_LIST if native else sorted({node.op_type for node in before}),
        node_block_list=sorted(kept),
        force_fp16_initializers=not native,
    )
    _unround(half.graph, model.graph, kept)
    OnnxModel(half).topological_sort(is_deterministic=True)
    whole = _joined(model, half, decoding)
    onnx.checker.check_model(whole, full_check=True)
    return whole


def split(graph: GraphProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """The nodes up to the last convolutions, and those that decode; without any convolution none of these."""
    wanted: set[str] = set()
    before: list[NodeProto] = []
    decoding: list[NodeProto] = []
    for node in reversed(graph.node):
        if node.op_type in WEIGHTED or not wanted.isdisjoint(node.output):
            before.append(node)
            wanted.update(reads(node))
        else:
            decoding.append(node)
    return (before[::-1], decoding[::-1]) if before else (decoding[::-1], [])


def _unround(half: GraphProto, single: GraphProto, kept: set[str]) -> None:
    """Takes float16 out of the way between nodes that are `kept` in float32, and from their weights.

    The converter puts a cast to float16 behind each of them and one back to float32 before each: a pair of these is
    passed over where both its ends are float32.
    """
    makers = {name: node for node in half.node for name in node.output}
    weights = {weight.name: weight for weight in single.initializer}
    present = {weight.name for weight in half.initializer}
    inputs = {value.name for value in half.input}
    outputs = {output.name for output in half.output}

    def exact(name: str) -> str | None:
        """The float32 tensor or weight that tensor `name` is the rounded form of."""
        up = makers.get(name)
        if up is None or up.op_type != "Cast":
            return None
        if up.input[0] in weights and weights[up.input[0]].data_type == TensorProto.FLOAT:
            own = f"{up.input[0]}_exact"
            if own not in present:
                half.initializer.add().CopyFrom(weights[up.input[0]])
                half.initializer[-1].name = own
                present.add(own)
            return own
        down = makers.get(up.input[0])
        if down is None or down.op_type != "Cast":
            return None
        source = down.input[0]
        return source if source in inputs or (source in makers and makers[source].name in kept) else None

    for node in list(half.node):
        if node.name in kept:
            node.input[:] = [exact(name) or name for name in node.input]
        elif node.op_type == "Cast" and node.output[0] in outputs and (found := exact(node.output[0])):
            node.op_type = "Identity"
            node.input[:] = [found]
            del node.attribute[:]
    while True:
        read = _read(half.node) | outputs
        unread = [node for node in half.node if node.op_type == "Cast" and node.output[0] not in read]
        if not unread:
            break
        for node in unread:
            half.node.remove(node)


def _part(model: ModelProto, before: list[NodeProto], decoding: list[NodeProto]) -> ModelProto:
    """The model up to the last convolutions; its outputs are what decoding and the caller read."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = {value.name: value for value in (*inferred.value_info, *inferred.output)}
    asked = _read(decoding) | {output.name for output in model.graph.output}
    names = [name for node in before for name in node.output if name in asked]
    part = _without_nodes(model)
    part.graph.node.extend(before)
    part.graph.initializer.extend(_initializers(model, before))
    del part.graph.output[:]
    part.graph.output.extend(known[name] for name in names)
    return part


def _joined(model: ModelProto, half: ModelProto, decoding: list[NodeProto]) -> ModelProto:
    """The converted part with the nodes that decode behind it, whose constants stay float32."""
    whole = _without_nodes(model)
    whole.graph.node.extend([*half.graph.node, *decoding])
    whole.graph.initializer.extend(half.graph.initializer)
    types = {weight.name: weight.data_type for weight in half.graph.initializer}
    for weight in _initializers(model, decoding):
        if weight.name not in types:
            whole.graph.initializer.append(weight)
        elif types[weight.name] != weight.data_type:
            # Both parts read this constant: decoding gets one of its own.
            own = whole.graph.initializer.add()
            own.CopyFrom(weight)
            own.name = f"{weight.name}_float32"
            for node in whole.graph.node[len(half.graph.node) :]:
                node.input[:] = [own.name if name == weight.name else name for name in node.input]
    return whole


def _without_nodes(model: ModelProto) -> ModelProto:
    copied = ModelProto()
    copied.CopyFrom(model)
    for field in (copied.graph.node, copied.graph.initializer, copied.graph.value_info):
        del field[:]
    return copied


def _initializers(model: ModelProto, nodes: list[NodeProto]) -> list[TensorProto]:
    read = _read(nodes)
    return [weight for weight in model.graph.initializer if weight.name in read]


def _read(nodes: Iterable[NodeProto]) -> set[str]:
    return {name for node in nodes for name in reads(node)}
