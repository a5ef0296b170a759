"""What an engine is made of, as TensorRT's own inspector tells it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine: what TensorRT fused of a network.

    Attributes:
        name: made of the names of the network's layers that it stands for.
        kind: ``CaskConvolution``, ``Reformat``, ``PointWiseV2``, ...
        types: of its outputs, ``Int8``, ``Half``, ``FP32``, as the inspector's formats begin.
        metadata: names of the ONNX nodes that it stands for, where this TensorRT tells them.
    """

    name: str
    kind: str
    types: tuple[str, ...]
    metadata: str = ""


def layers_of(engine: Any) -> list[EngineLayer]:
    """The layers of an engine that was built with detailed profiling."""
    import tensorrt as trt

    inspector = engine.create_engine_inspector()
    return parse(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def reformats(layers: list[EngineLayer]) -> int:
    """How many layers only change the format or type of a tensor."""
    return sum(one.kind == "Reformat" or one.name.startswith("Reformatting CopyNode") for one in layers)


def parse(text: str) -> list[EngineLayer]:
    """The layers in the inspector's JSON, in which TensorRT 8.6 leaves raw control characters."""
    listed: list[dict[str, Any] | str] = dict(json.loads(text, strict=False))["Layers"]
    return [_layer(one) for one in listed]


def _layer(listed: dict[str, Any] | str) -> EngineLayer:
    if isinstance(listed, str):  # an engine that was built without detailed profiling has names only
        return EngineLayer(listed, "", ())
    fields: dict[str, Any] = {"Name": "", "LayerType": "", "Metadata": "", "Outputs": [], **listed}
    types = tuple(_type(str(output["Format/Datatype"])) for output in fields["Outputs"])
    return EngineLayer(fields["Name"], fields["LayerType"], types, fields["Metadata"])


def _type(text: str) -> str:
    """``Thirty-two wide channel vectorized row major Int8 format`` → ``Int8``."""
    for word, short in (("Int8", "Int8"), ("FP16", "Half"), ("Half", "Half"), ("FP32", "Float"), ("Float", "Float")):
        if word in text:
            return short
    return text
