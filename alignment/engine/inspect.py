"""What an engine is made of, as TensorRT's own inspector tells it: layers, their tensors, and the ONNX nodes they are.

TensorRT 8.6 writes ``Format/Datatype``: ``Thirty-two wide channel vectorized row major Int8 format``; 10 and 11 write
``Int8`` there, or ``Format`` and ``Datatype`` apart.  What a version does not tell is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alignment.reading import parse_json

#: Types as the inspector calls them → one name each; the first that occurs counts.
DATATYPES = (
    *(("UInt8", "UInt8"), ("Int8", "Int8"), ("Int4", "Int4"), ("FP8", "FP8"), ("BFloat16", "BFloat16")),
    *(("BF16", "BFloat16"), ("FP16", "Half"), ("Half", "Half"), ("FP32", "Float"), ("Float", "Float")),
    *(("Int32", "Int32"), ("Int64", "Int64"), ("Bool", "Bool")),
)
#: Types of numbers that are computed with, from narrow to wide.
PRECISIONS = ("Int8", "FP8", "Half", "BFloat16", "Float")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|$)", re.DOTALL)
_FOREIGN = re.compile(r"\{ForeignNode\[(.*)\]\}", re.DOTALL)
_CLONE = re.compile(r"(_clone_\d+)+$")
COPY_NODE = "Reformatting CopyNode for "


@dataclass(frozen=True)
class EngineTensor:
    """A tensor between two layers.

    Attributes:
        name: the ONNX tensor's, or one that TensorRT made up.
        shape: dimensions; −1 where they are dynamic.
        datatype: ``Int8``, ``Half``, ``Float``, ...
        layout: how it lies in memory, in the inspector's words without the type: ``Row major linear``.
    """

    name: str
    shape: tuple[int, ...] = ()
    datatype: str = ""
    layout: str = ""


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine: what TensorRT fused of a network.

    Attributes:
        name: made of the names of the network's layers that it stands for.
        kind: ``CaskConvolution``, ``Reformat``, ``PointWiseV2``, ...
        inputs: tensors that are computed by other layers; no weights.
        outputs: tensors that it computes.
        weights: type of its weights, where it has any.
        bias: type of its bias.
        kernel: name of the tactic, or its number in hexadecimal.
        origin: of a Reformat: ``QDQ`` where it is a QuantizeLinear or DequantizeLinear, else ``REFORMAT``.
        metadata: names of the ONNX nodes that it stands for, where this TensorRT tells them.
    """

    name: str
    kind: str
    inputs: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    weights: str = ""
    bias: str = ""
    kernel: str = ""
    origin: str = ""
    metadata: str = ""

    @property
    def types(self) -> tuple[str, ...]:
        """Datatypes of its outputs."""
        return tuple(output.datatype for output in self.outputs)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The ONNX nodes that it stands for, by its metadata, else by its name."""
        return tuple(_ONNX_LAYER.findall(self.metadata)) or tuple(dict.fromkeys(_named(self.name)))

    @property
    def foreign(self) -> tuple[str, str] | None:
        """First and last node, or tensor, of a region that Myelin compiled as a whole and 8.6 tells no more of."""
        found = _FOREIGN.search(self.name)
        if found is None:
            return None
        first, _, last = found[1].partition("...")
        return first, last or first

    @property
    def moves(self) -> bool:
        """Whether it only changes type or layout of a tensor, or copies it to where it is read."""
        return self.kind == "Reformat" or self.name.startswith(COPY_NODE)

    @property
    def runs_in(self) -> str:
        """The precision that it computes in, one of `PRECISIONS`, or empty.

        A convolution computes in the type of its weights, which int8 weights stay even where it writes float16.
        Anything else computes in the widest type that it reads or writes.
        """
        if self.weights in PRECISIONS:
            return self.weights
        if is_weighted(self.kind):
            if any(tensor.datatype == "Int8" for tensor in self.inputs):
                return "Int8"
            # Without inputs told: a layer that reads quantized weights bears their quantizer in its name.
            if not self.inputs and "QuantizeLinear + " in self.name:
                return "Int8"
        types = {tensor.datatype for tensor in (*self.inputs, *self.outputs)}
        return next((name for name in reversed(PRECISIONS) if name in types), "")


def is_weighted(kind: str) -> bool:
    """Whether layers of a kind are convolutions, forward or transposed, or matrix products."""
    return any(word in kind.lower() for word in ("conv", "gemm", "matrixmultiply", "matmul"))


def reformats(layers: list[EngineLayer]) -> int:
    """How many layers only change the format or type of a tensor."""
    return sum(one.moves for one in layers)


def parse(text: str) -> list[EngineLayer]:
    """The layers in the inspector's JSON, in which TensorRT 8.6 leaves raw control characters."""
    listed: list[dict[str, Any] | str] = dict(parse_json(text, strict=False))["Layers"]
    return [_layer(one) for one in listed]


def _layer(listed: dict[str, Any] | str) -> EngineLayer:
    if isinstance(listed, str):  # an engine that was built without detailed profiling has names only
        return EngineLayer(listed, "")
    fields: dict[str, Any] = {"Name": "", "LayerType": "", "Metadata": "", "Inputs": [], "Outputs": [], **listed}
    return EngineLayer(
        name=str(fields["Name"]),
        kind=str(fields["LayerType"]),
        inputs=tuple(map(_tensor, fields["Inputs"])),
        outputs=tuple(map(_tensor, fields["Outputs"])),
        weights=_weights(fields.get("Weights")),
        bias=_weights(fields.get("Bias")),
        kernel=str(fields.get("TacticName") or fields.get("TacticValue") or ""),
        origin=str(fields.get("Origin", "")),
        metadata=str(fields["Metadata"]),
    )


def _tensor(listed: dict[str, Any]) -> EngineTensor:
    told = str(listed.get("Format/Datatype") or f"{listed.get('Format', '')} {listed.get('Datatype', '')}")
    word, datatype = next((pair for pair in DATATYPES if pair[0] in told), ("", ""))
    layout = " ".join(part for part in re.split(r"[\s.]+", told) if part and part != word)
    shape = tuple(int(size) for size in listed.get("Dimensions", ()))
    return EngineTensor(str(listed.get("Name", "")), shape, datatype, layout.replace(" format", ""))


def _weights(listed: Any) -> str:
    """``{"Type": "Int8", "Count": 432}`` → ``Int8``; nothing where there are none."""
    if not isinstance(listed, dict) or not listed.get("Count", 1):
        return ""
    told = str(listed.get("Type", ""))
    return next((name for word, name in DATATYPES if word in told), told)


def _named(name: str) -> Iterator[str]:
    """The nodes in a layer's name: ``/a/Conv + PWN(PWN(/a/act/Sigmoid), /a/act/Mul)``."""
    if name.startswith(COPY_NODE) or _FOREIGN.search(name):
        return
    for part in _split(name):
        if part.startswith("PWN(") and part.endswith(")"):
            yield from _named(part[4:-1])
        elif part:
            yield without_clone(part)


def without_clone(name: str) -> str:
    """The node or tensor that TensorRT has copied: ``x_clone_0`` → ``x``."""
    return _CLONE.sub("", name)


def _split(name: str) -> list[str]:
    """Parts between `` + ``, `` || `` and ``, `` outside of parentheses."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(name):
        depth += {"(": 1, ")": -1}.get(name[place], 0)
        separator = next((s for s in (" + ", " || ", ", ") if name.startswith(s, place)), "") if depth == 0 else ""
        if separator:
            parts.append(name[start:place])
            start = place + len(separator)
        place += len(separator) or 1
    return [*parts, name[start:]]
