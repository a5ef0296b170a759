"""Which torch module stands behind an ONNX node: quantization puts scales and weights back through it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

_WEIGHTED = {"Conv", "ConvTranspose", "Gemm"}
_REPEATED = re.compile(r"_\d+$")


def build_node_map(model: onnx.ModelProto, detector: Any) -> dict[str, dict[str, str]]:
    """Maps every node to the module whose scope it was traced in.

    Args:
        model: as exported by torch, whose node names begin with the module path, simplified or not.
        detector: the `Detector` that was traced.

    Returns:
        ONNX node name → ``{"op": ..., "module": dotted path below the detector, "weight": initializer name}``; the
        module path is empty for decoding, ``weight`` is there for nodes that have one.

    Raises:
        RuntimeError: when a node with weights is not that of its module, which would be a fault of export.
    """
    modules = dict(detector.named_modules())
    initializers = {i.name: i for i in model.graph.initializer}
    _name_nameless(model)
    entries: dict[str, dict[str, str]] = {}
    for node in model.graph.node:
        path = _module_path(node.name, modules)
        entry = {"op": node.op_type, "module": path}
        if node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in initializers:
            entry["weight"] = node.input[1]
            found = numpy_helper.to_array(initializers[node.input[1]])
            weight = getattr(modules.get(path), "weight", None)
            # A Conv without a module of its own is the DFL's fixed projection at most: mmyolo has none in ONNX.
            if weight is None or not np.array_equal(found, weight.detach().numpy(), equal_nan=True):
                raise RuntimeError(f"export: node {node.name} does not hold the weights of module {path!r}")
        entries[node.name] = entry
    return entries


def _module_path(name: str, modules: dict[str, Any]) -> str:
    """``/detector/backbone/stem/conv/Conv`` to ``model.backbone.stem.conv``: the longest path that exists.

    The scope lacks ``model``, whose parts are called one by one.
    """
    path = "model"
    for part in _joined(name.strip("/").split("/")[1:-1]):
        # A module that is called again gets scopes that end in _1, _2, ...
        found = next((p for p in (part, _REPEATED.sub("", part)) if f"{path}.{p}" in modules), None)
        if found is None:
            break
        path = f"{path}.{found}"
    return "" if path == "model" else path


def _joined(parts: list[str]) -> list[str]:
    """Scopes of a Sequential's children read ``blocks/blocks.0``; the module path is ``blocks.0``."""
    joined: list[str] = []
    for part in parts:
        head = part.split(".")[0]
        if joined and "." in part and _REPEATED.sub("", joined[-1].split(".")[0]) == head:
            joined[-1] = part
        else:
            joined.append(part)
    return joined


def _name_nameless(model: onnx.ModelProto) -> None:
    """Gives a name to the nodes that simplification made without one."""
    used = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            name = f"/{node.op_type}_{index}"
            while name in used:
                name += "_"
            node.name = name
            used.add(name)
