"""Ways to spoil an ONNX file: its bytes, or the graph that it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
import onnx
from fuzz_mutations import MARKUP, spoilt_bytes
from onnx import TensorProto, helper


def spoilt_onnx(rng: Random, model: onnx.ModelProto) -> bytes:
    """An ONNX file whose bytes or graph are spoilt."""
    if rng.random() < 0.2:
        return spoilt_bytes(rng, model.SerializeToString())
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(model)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_GRAPH)(rng, spoilt)
    return spoilt.SerializeToString()


def _node(rng: Random, model: onnx.ModelProto) -> onnx.NodeProto:
    if not model.graph.node:
        model.graph.node.add(op_type="Relu")
    return rng.choice(model.graph.node)


def _weight(rng: Random, model: onnx.ModelProto) -> TensorProto:
    if not model.graph.initializer:
        model.graph.initializer.add(name="w", data_type=1)
    return rng.choice(model.graph.initializer)


def _gone(rng: Random, model: onnx.ModelProto) -> None:
    graph = model.graph
    held = rng.choice((graph.initializer, graph.node, graph.input, graph.output, model.opset_import, graph.value_info))
    if len(held):
        del held[rng.randrange(len(held))]


def _dims(rng: Random, model: onnx.ModelProto) -> None:
    weight = _weight(rng, model)
    sizes = (0, -1, 1, 2, 7, 2**31, 2**40, 2**62)
    if rng.random() < 0.5 and len(weight.dims):
        weight.dims[rng.randrange(len(weight.dims))] = rng.choice(sizes)
    else:
        del weight.dims[:]
        weight.dims.extend(rng.choice(sizes) for _ in range(rng.randrange(6)))


def _type(rng: Random, model: onnx.ModelProto) -> None:
    _weight(rng, model).data_type = rng.choice((0, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 22, 99))


def _raw(rng: Random, model: onnx.ModelProto) -> None:
    weight = _weight(rng, model)
    weight.raw_data = spoilt_bytes(rng, weight.raw_data)


def _values(rng: Random, model: onnx.ModelProto) -> None:
    weight = _weight(rng, model)
    if weight.data_type == TensorProto.FLOAT and weight.raw_data:
        array = np.frombuffer(weight.raw_data, np.float32).copy()
        array[:: rng.choice((1, 2, 10))] = rng.choice((np.nan, np.inf, -np.inf, 3e38, 0, 1e-45, -1))
        weight.raw_data = array.tobytes()
    elif weight.data_type == TensorProto.INT64 and weight.raw_data:
        array = np.frombuffer(weight.raw_data, np.int64).copy()
        array[rng.randrange(len(array))] = rng.choice((0, -1, -2, 1, 3, 10**5, 10**9, 2**40, 2**62, -(2**63)))
        weight.raw_data = array.tobytes()


def _external(rng: Random, model: onnx.ModelProto) -> None:
    weight = _weight(rng, model)
    where = (
        "../outside.bin",
        "/etc/passwd",
        "/dev/zero",
        "nowhere.bin",
        "model.onnx",
        "",
        ".",
        "../../../../etc/passwd",
    )
    weight.data_location = TensorProto.EXTERNAL
    del weight.external_data[:]
    weight.external_data.add(key="location", value=rng.choice((*where, "link.bin", "sub/../../outside.bin")))
    if rng.random() < 0.5:
        weight.external_data.add(key="offset", value=rng.choice(("0", "-1", "x", "999999999999", "")))
        weight.external_data.add(key="length", value=rng.choice(("0", "-1", "8", "999999999999", "")))
    if rng.random() < 0.7:
        weight.ClearField("raw_data")


def _operator(rng: Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    ops = (
        "Relu",
        "Frobnicate",
        "",
        "Loop",
        "If",
        "Reshape",
        "Concat",
        "Split",
        "Gather",
        "Resize",
        "TopK",
        "Einsum",
        "NonMaxSuppression",
        "EfficientNMS_TRT",
        "QuantizeLinear",
        "MatMul",
        "Transpose",
        "Squeeze",
        "LSTM",
        "Cast",
    )
    if rng.random() < 0.7:
        node.op_type = rng.choice(ops)
    else:
        node.domain = rng.choice(("", "com.microsoft", "nowhere", "ai.onnx.ml", MARKUP))


def _wires(rng: Random, model: onnx.ModelProto) -> None:
    node, other = _node(rng, model), _node(rng, model)
    ends = rng.choice((node.input, node.output))
    choices = ["", "nowhere", MARKUP, *other.output, *other.input, *node.output, *(i.name for i in model.graph.input)]
    match rng.randrange(3):
        case 0 if len(ends):
            ends[rng.randrange(len(ends))] = rng.choice(choices)
        case 1 if len(ends):
            ends.pop()
        case _:
            ends.append(rng.choice(choices))


def _order(rng: Random, model: onnx.ModelProto) -> None:
    nodes = [*model.graph.node]
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes + nodes[: rng.choice((0, 0, 1))])


def _attribute(rng: Random, model: onnx.ModelProto) -> None:
    node = rng.choice([n for n in model.graph.node if n.attribute] or [_node(rng, model)])
    numbers = (0, -1, 1, 2, 99, -99, 2**31 - 1, 2**31, 2**62, -(2**63))
    if not node.attribute:
        name = rng.choice(("axis", "to", "group", "strides", "perm", "mode", "blocksize", "num_outputs"))
        node.attribute.append(helper.make_attribute(name, rng.choice(numbers)))
        return
    place = rng.randrange(len(node.attribute))
    attribute = node.attribute[place]
    match rng.randrange(5):
        case 0:
            del node.attribute[place]
        case 1 if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(numbers)
        case 2 if attribute.ints:
            attribute.ints.extend([rng.choice(numbers)])
        case 3:
            attribute.type = rng.choice((0, 1, 2, 3, 4, 6, 7, 8))
        case _:
            attribute.i, attribute.f = rng.choice(numbers), rng.choice((math.nan, math.inf, 0.0, -1.0))
            attribute.s = MARKUP.encode()


def _ends(rng: Random, model: onnx.ModelProto) -> None:
    held = rng.choice((model.graph.input, model.graph.output))
    if not len(held):
        return
    value = rng.choice(held)
    kind = value.type.tensor_type
    match rng.randrange(6):
        case 0:
            value.name = rng.choice(("", "nowhere", MARKUP))
        case 1:
            kind.elem_type = rng.choice((0, 2, 7, 8, 10, 11, 99))
        case 2:
            kind.ClearField("shape")
        case 3:
            value.ClearField("type")
        case 4:
            held.add().CopyFrom(value)
        case _:
            dim = rng.choice(kind.shape.dim) if len(kind.shape.dim) else kind.shape.dim.add()
            if rng.random() < 0.3:
                dim.dim_param = rng.choice(("n", "", MARKUP))
            else:
                dim.dim_value = rng.choice((0, -1, 1, 2, 31, 33, 64, 10**5, 2**31, 2**62))


def _papers(rng: Random, model: onnx.ModelProto) -> None:
    texts = (
        "(" * 5000,
        "-" * 5000 + "1",
        "9" * 5000,
        "[" * 100,
        "{0: 'a', 'b': 1}",
        "{}",
        "[]",
        "None",
        "'x'",
        MARKUP,
        "{'a': " * 90,
        "[1e999, 3]",
        "[-1, 3]",
        "{0: []}",
        "[64, 64, 64]",
        "10**10",
        "\0",
        "detect",
        "obb",
        "{1, 2}",
    )
    names = ("names", "imgsz", "task", "stride", "alignment.preprocess", "kpt_shape", "author", "", MARKUP)
    for _ in range(rng.choice((1, 3))):
        model.metadata_props.add(key=rng.choice(names), value=rng.choice(texts))


def _versions(rng: Random, model: onnx.ModelProto) -> None:
    if rng.random() < 0.4:
        model.ir_version = rng.choice((0, 1, 3, 99, 2**40))
    elif len(model.opset_import):
        model.opset_import[0].version = rng.choice((0, 1, 10, 11, 13, 21, 99, -1, 2**40))
        model.opset_import[0].domain = rng.choice(("", "", "nowhere"))


def _large(rng: Random, model: onnx.ModelProto) -> None:
    """A node that makes something large out of little, before the graph's first output."""
    graph = model.graph
    size = rng.choice((10**3, 10**5, 10**7, 10**10, 2**62, -(2**40)))
    shape = helper.make_tensor("large_shape", TensorProto.INT64, [2], [size, rng.choice((1, 1000))])
    graph.initializer.append(shape)
    graph.node.insert(0, helper.make_node(rng.choice(("ConstantOfShape", "RandomNormal")), ["large_shape"], ["large"]))
    if rng.random() < 0.5:
        del graph.node[0].input[:]
        graph.node[0].op_type = "RandomNormal"
        graph.node[0].attribute.append(helper.make_attribute("shape", [size, 1000]))
    graph.node.insert(1, helper.make_node("ReduceMean", ["large"], ["mean"], keepdims=0))
    if graph.output and (maker := next((n for n in graph.node if graph.output[0].name in n.output), None)):
        name = graph.output[0].name
        maker.output[list(maker.output).index(name)] = "before_large"
        graph.node.append(helper.make_node("Add", ["before_large", "mean"], [name]))


def _nested(rng: Random, model: onnx.ModelProto) -> None:
    """Subgraphs in subgraphs."""
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "inner", [], [])
    for _ in range(rng.choice((1, 20, 29))):
        node = (
            helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
            if rng.random() < 0.05
            else (helper.make_node("If", ["x"], ["y"], then_branch=inner))
        )
        inner = helper.make_graph([node], "outer", [], [])
    model.graph.node.extend(inner.node)


_GRAPH: tuple[Callable[[Random, onnx.ModelProto], None], ...] = (
    *(_gone, _gone, _dims, _dims, _type, _raw, _values, _values, _external, _external, _operator, _wires, _wires),
    *(_order, _attribute, _attribute, _attribute, _ends, _ends, _ends, _papers, _versions, _large, _nested),
)
