"""Ways to spoil a file: its bytes, its text, the tree of values that it holds, the graph or the arrays that it is."""

from __future__ import annotations

import copy
import io
import json
import math
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper

#: No page may come to hold an element of this name.
TAG = "fuzz"
MARKUP = f"</script></style>\"'><{TAG} onload=alert(1)>]]>--><![CDATA[&amp;[red]{{{{7*7}}}}"
#: Values that a field may not expect.
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(math.nan, math.inf, -math.inf, "", " ", "0", "-1", "nan", "NaN", "Infinity", "true", "null", "~", "\0", "\n"),
    *("\x1b[31m\x07", "\ufeff", "\u202e", "é" * 50, "x" * 100_000, MARKUP, "*", "[", "**/[", "(" * 200, "%s{0}"),
    *("../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "a/../../b", "C:\\x", "${HOME}"),
    *("${ALIGN_NOWHERE}", "~root", "file:///etc/passwd", "2024-13-45", "\ud800", "\U0001f600"),
    *([], {}, [[]], [{}], {"": ""}, {"a": {"b": {"c": []}}}, [None], ["x", 1, None], [0, 0, 0, 0], [1e308] * 4),
    *([math.nan] * 4, [-5, -5, -5, -5], list(range(2000)), {str(number): number for number in range(500)}),
)
_YAML = (
    "!!python/object/apply:os.system ['touch executed']\n",
    "!!python/name:os.system\n",
    *("&a [*a]\n", "*nowhere\n", "%YAML 9.9\n---\n", "--- 1\n--- 2\n", "\t- x\n", "? [a, b]\n: c\n", "<<: [1]\n"),
    *(
        "2024-13-45\n",
        "!!int x\n",
        "!!float x\n",
        "!!timestamp x\n",
        "!!binary '*'\n",
        "0x\n",
        "1:99:9\n",
        "!!set {a}\n",
    ),
    *("[" * 3000, "{a: " * 3000, "- " * 3000, "&a " * 5, "'" * 3, '"\\x', "!<", "|9\n", "=\n", "!!bool maybe\n"),
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(c)}: &{chr(c)} [{', '.join([f'*{chr(c - 1)}'] * 9)}]\n" for c in range(ord("b"), ord("k"))),
)
_JSON = (
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 600 + "]" * 600,
    "NaN",
    "1e999",
    "9" * 5000,
    '"\\ud800"',
    "// x",
    "{}{}",
)


def spoilt_bytes(rng: Random, data: bytes) -> bytes:
    """A file of which something is lost, changed, added, or everything is something else."""
    at, much = rng.randrange(len(data) + 1), 1 + int(2 ** (rng.random() * 12))
    some = bytearray(data)
    match rng.randrange(10):
        case 0 | 1:
            return data[:at]
        case 2 | 3:
            for _ in range(rng.choice((1, 1, 3, 20))):
                if some:
                    some[rng.randrange(len(some))] ^= 1 << rng.randrange(8)
        case 4:
            some[at : at + much] = rng.randbytes(much)
        case 5:
            del some[at : at + much]
        case 6:
            some[at:at] = data[at : at + much] or b"\0"
        case 7:
            some[at : at + much] = rng.choice((b"\0", b"\xff", b"\x80")) * much
        case 8:
            some[at:at] = rng.choice((b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\0", b"\r", MARKUP.encode()))
        case _:
            head = rng.choice(
                (b"", b"\0", b"PK\x03\x04", b"\x80\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"<html>")
            )
            return head + rng.randbytes(rng.choice((0, 1, 100, 5000)))
    return bytes(some)


def spoilt_tree(rng: Random, content: Any) -> Any:
    """A tree of lists, mappings and values, in which one to three are others, gone, doubled or misnamed."""
    root = [copy.deepcopy(content)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place, key = rng.choice(_places(root)) if rng.random() < 0.5 else _walked(rng, root)
        old = place[key]
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                place[key] = copy.deepcopy(rng.choice(HOSTILE))
            case 4:
                place[key] = _other(rng, old)
            case 5 if place is not root:
                del place[key]
            case 6 if isinstance(place, list):
                place[key:key] = [copy.deepcopy(old)] * rng.choice((1, 3))
            case 6:
                place[rng.choice((f"{key}_", MARKUP, "", str(key).upper()))] = place.pop(key)
            case _:
                other_place, other = rng.choice(_places(root))
                place[key] = copy.deepcopy(other_place[other])
    return root[0]


def _other(rng: Random, value: Any) -> Any:
    """What is near to `value`."""
    match value:
        case bool():
            return not value
        case int() | float():
            return rng.choice((-value, value * 1000, str(value), [value], value + 0.5, value * 1e-9, int(value) + 1))
        case str():
            return rng.choice(
                (value * 2, value.upper(), value[:-1], value + "\n", [value], {value: value}, value + "/..")
            )
        case list():
            return rng.choice(
                (value[::-1], value * 2, value[:-1], dict(enumerate(map(str, value))), value[:1], [value])
            )
        case dict():
            return rng.choice((list(value), list(value.values()), {**value, MARKUP: 1}, [value], list(value.items())))
    return [value]


def _walked(rng: Random, root: list[Any]) -> tuple[Any, Any]:
    """A place of a tree, those of a large branch no more likely than others."""
    place: Any = root
    key: Any = 0
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.75:
        place = place[key]
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    return place, key


def _places(content: Any, most: int = 4000) -> list[tuple[Any, Any]]:
    """Places of a tree, each as a list or mapping and the key in it, from the root down."""
    found, level = [], [content]
    while level and len(found) < most:
        following = []
        for holder in level:
            pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
            for key, value in pairs:
                found.append((holder, key))
                if isinstance(value, dict | list) and value:
                    following.append(value)
        level = following
    return found


def spoilt_yaml(rng: Random, content: Any) -> bytes:
    """YAML of a spoilt tree, or spoilt YAML."""
    match rng.randrange(8):
        case 0:
            return spoilt_bytes(rng, yaml.safe_dump(content).encode())
        case 1:
            text, planted = yaml.safe_dump(content, sort_keys=False), rng.choice(_YAML)
            lines = text.splitlines(keepends=True)
            at = rng.randrange(len(lines) + 1)
            if rng.random() < 0.6 and at < len(lines) and ":" in lines[at]:
                lines[at] = f"{lines[at].partition(':')[0]}: {planted}"
            else:
                lines.insert(at, planted)
            return "".join(lines).encode()
        case 2:
            return rng.choice(_YAML).encode()
    return yaml.safe_dump(spoilt_tree(rng, content), allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def spoilt_json(rng: Random, content: Any) -> bytes:
    """JSON of a spoilt tree, or spoilt JSON."""
    match rng.randrange(8):
        case 0:
            return spoilt_bytes(rng, json.dumps(content).encode())
        case 1:
            text = json.dumps(spoilt_tree(rng, {"planted": content} if rng.random() < 0.1 else content))
            at = rng.choice([place for place, letter in enumerate(text) if letter in ":,["] or [0]) + 1
            return f"{text[:at]}{rng.choice(_JSON)}{text[at:]}".encode("utf-8", "surrogatepass")
        case 2 if rng.random() < 0.3:
            return rng.choice(_JSON).encode()
    return json.dumps(spoilt_tree(rng, content), ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")


def spoilt_arrays(rng: Random, data: bytes) -> bytes:
    """An ``.npz`` whose bytes or arrays are spoilt."""
    if rng.random() < 0.3:
        return spoilt_bytes(rng, data)
    with np.load(io.BytesIO(data)) as stored:
        arrays = dict(stored)
    name = rng.choice(list(arrays))
    extra: dict[str, bytes] = {}
    match rng.randrange(9):
        case 0:
            del arrays[name]
        case 1:
            arrays[name] = _object_array()
        case 2:
            arrays[name] = rng.choice(
                (arrays[name].reshape(-1)[:-1], arrays[name].reshape(-1, 1), arrays[name][..., None])
            )
        case 3:
            kind = rng.choice(("f2", "f8", "i8", "u1", "c8", "?", "U3", "M8[s]", "S2"))
            with np.errstate(all="ignore"):
                arrays[name] = _as_type(arrays[name], kind)
        case 4:
            whole = np.array(arrays[name], copy=True).reshape(-1)
            if whole.size and whole.dtype.kind in "fiu":
                kind = np.float64 if whole.dtype.kind == "f" else whole.dtype
                worst = (
                    (np.nan, np.inf, -np.inf, 1e38)
                    if whole.dtype.kind == "f"
                    else tuple((np.iinfo(kind).max, np.iinfo(kind).min, 0))
                )
                for _ in range(rng.choice((1, 5, whole.size))):
                    whole[rng.randrange(whole.size)] = rng.choice(worst)
            arrays[name] = whole.reshape(arrays[name].shape)
        case 5:
            arrays[rng.choice(("../../escaped", "extra", MARKUP, "full_7_boxes", "about"))] = np.arange(3)
        case 6:
            extra[f"{name}.npy"] = _declared(rng.choice(((10**12,), (2**31, 2**31), (-3,), (2**62, 4), (10**9,))))
        case 7:
            extra[f"{name}.npy"] = rng.choice((b"", b"\x93NUMPY", spoilt_bytes(rng, _declared((3,)))))
        case _:
            extra[rng.choice((f"{name}.npy", "large.npy"))] = _bomb()
    return _zipped(arrays, extra)


def _as_type(array: np.ndarray, kind: str) -> np.ndarray:
    try:
        return array.astype(kind)
    except (ValueError, TypeError):
        return np.zeros(array.shape, kind)


class Executed:
    """Unpickled, it makes a file ``executed`` in the folder that the command runs in."""

    def __reduce__(self) -> tuple:
        return open, ("executed", "w")


def _object_array() -> np.ndarray:
    array = np.empty(2, object)
    array[:] = [Executed(), None]
    return array


def _declared(shape: tuple[int, ...]) -> bytes:
    """A ``.npy`` that says it is much larger than it is."""
    text = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 24


def _bomb() -> bytes:
    """A ``.npy`` of 3 GB of zeros is what this one becomes: see `_zipped`."""
    return b"bomb"


def _zipped(arrays: dict[str, np.ndarray], extra: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            if f"{name}.npy" not in extra:
                with file.open(f"{name}.npy", "w") as part:
                    np.lib.format.write_array(part, array, allow_pickle=True)
        for name, content in extra.items():
            with file.open(name, "w", force_zip64=True) as part:
                if content == b"bomb":
                    size = 3 * 2**27
                    part.write(_declared((size,))[:-24])
                    for _ in range(size * 8 >> 24):
                        part.write(bytes(1 << 24))
                else:
                    part.write(content)
    return stream.getvalue()


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
