"""``keep_float.yaml``: the nodes of one graph that stay float, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import yaml
from pydantic import ValidationError

from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.onnx_head import Strict
from alignment.storage import writing

MEND = "make it anew with `align partial`"


class KeptNode(Strict):
    """A node that stays float, and why."""

    node: str
    reason: str


class KeepFloat(Strict):
    """The file.  `graph_sha256` is that of the float32 ONNX file whose nodes it names."""

    graph_sha256: str
    variant: str
    nodes: list[KeptNode]


def write_keep_float(path: Path, variant: str, graph: Path, reasons: Mapping[str, str]) -> None:
    """Writes the file.

    Args:
        path: where.
        variant: its name.
        graph: the float32 ONNX file.
        reasons: node name → why it stays float.
    """
    nodes = [KeptNode(node=node, reason=reason) for node, reason in reasons.items()]
    fields = KeepFloat(graph_sha256=file_digest(graph), variant=variant, nodes=nodes).model_dump()
    with writing(path) as file:
        file.write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000), encoding="utf-8")


def read_keep_float(path: Path, graph: Path) -> list[str]:
    """The names of the nodes that stay float.

    Args:
        path: the file.
        graph: the float32 ONNX file that is quantized.

    Raises:
        AlignError: for a file that is not there or not of this form, or was made for another graph.
    """
    try:
        found = KeepFloat.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise AlignError(f"{path}: {error.strerror}", f"give the path of a keep_float.yaml, or {MEND}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AlignError(f"{path}: not YAML: {' '.join(str(error).split())}", MEND) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise AlignError(f"{path}: {place}: {first['msg']}", MEND) from None
    digest = file_digest(graph)
    if found.graph_sha256 != digest:
        what = f"{path}: made for {found.variant}'s graph {found.graph_sha256[:12]}, but {graph} is {digest[:12]}"
        raise AlignError(what, f"{MEND}, or name nodes with --keep-float NODE")
    names = {node.name for node in onnx.load(graph, load_external_data=False).graph.node}
    lost = next((kept.node for kept in found.nodes if kept.node not in names), None)
    if lost is not None:
        raise AlignError(f"{path}: no node of the graph is named {lost!r}", "mend that name")
    return [kept.node for kept in found.nodes]
