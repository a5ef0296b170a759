"""``keep_float.yaml``: the nodes of one graph that stay float, each with the reason, and the recipe of the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import yaml

from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.onnx_head import Strict
from alignment.reading import checked, read_yaml
from alignment.storage import writing
from alignment.variant import Quantization

KEEP_FLOAT = "keep_float.yaml"
MEND = "make it anew with `align partial`"


class KeptNode(Strict):
    """A node that stays float, and why."""

    node: str
    reason: str


class KeepFloat(Strict):
    """The file.

    `graph_sha256` is that of the float32 ONNX file whose nodes it names.  `recipe` is what all else was quantized by
    when these nodes were found; a field that it leaves out is the variant's own.
    """

    graph_sha256: str
    variant: str
    recipe: Quantization | None = None
    nodes: list[KeptNode]

    @property
    def names(self) -> list[str]:
        """The nodes."""
        return [kept.node for kept in self.nodes]

    @property
    def said(self) -> dict[str, Any]:
        """The fields of a recipe that the file names; which nodes stay float is for `nodes` to say."""
        return {} if self.recipe is None else self.recipe.model_dump(exclude_unset=True, exclude=BESIDE)


#: Fields of a recipe that are not part of the file.
BESIDE = {"keep_float", "trained"}


def write_keep_float(
    path: Path, variant: str, graph: Path, reasons: Mapping[str, str], recipe: Quantization | None = None
) -> None:
    """Writes the file.

    Args:
        path: where.
        variant: its name.
        graph: the float32 ONNX file.
        reasons: node name → why it stays float.
        recipe: what all else is quantized by.
    """
    fields: dict[str, Any] = {"graph_sha256": file_digest(graph), "variant": variant}
    if recipe is not None:
        fields["recipe"] = recipe.model_dump(mode="json", exclude=BESIDE)
    fields["nodes"] = [{"node": node, "reason": reason} for node, reason in reasons.items()]
    with writing(path) as file:
        file.write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000), encoding="utf-8")


def read_keep_float(path: Path, graph: Path) -> KeepFloat:
    """The file's content.

    Args:
        path: the file.
        graph: the float32 ONNX file that is quantized.

    Raises:
        AlignError: for a file that is not there or not of this form, or was made for another graph.
    """
    found = checked(KeepFloat, read_yaml(path, f"give the path of a keep_float.yaml, or {MEND}", MEND), path, MEND)
    digest = file_digest(graph)
    if found.graph_sha256 != digest:
        what = f"{path}: made for {found.variant}'s graph {found.graph_sha256[:12]}, but {graph} is {digest[:12]}"
        raise AlignError(what, f"{MEND}, or name nodes with --keep-float NODE")
    names = {node.name for node in onnx.load(graph, load_external_data=False).graph.node}
    lost = next((name for name in found.names if name not in names), None)
    if lost is not None:
        raise AlignError(f"{path}: no node of the graph is named {lost!r}", "mend that name")
    return found


def adopted(
    own: Quantization, files: Mapping[Path, KeepFloat], asked: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What becomes of a recipe when nodes stay float that were found with another.

    Args:
        own: the recipe.
        files: where the nodes are named, by path.
        asked: fields that were asked for, which go before those of files.

    Returns:
        The fields that change, and what there is to tell of it, at most a line for each file and kind.

    Raises:
        AlignError: for files whose recipes differ, where what was asked for does not decide.
    """
    changes, source = dict(asked), dict.fromkeys(asked, Path())
    lines = []
    for path, file in files.items():
        known = own.model_dump()
        taken = {field: value for field, value in file.said.items() if field not in asked}
        for field, value in taken.items():
            if changes.setdefault(field, value) != value:
                what = f"{source[field]} and {path}: found with {field} {changes[field]} and {value}"
                raise AlignError(what, "give files of one recipe")
            source[field] = path
        if new := {field: value for field, value in taken.items() if value != known[field]}:
            lines.append(f"{path}: its recipe is taken: {_words(new)} (the variant's own: {_words(known, new)})")
        if other := {field: value for field, value in file.said.items() if asked.get(field, value) != value}:
            lines.append(f"{path}: found with {_words(other)}, but asked for is {_words(asked, other)}")
    return changes, lines


def _words(fields: Mapping[str, Any], names: Mapping[str, Any] | None = None) -> str:
    """``policy full, images 64``."""
    return ", ".join(f"{name} {fields[name]}" for name in names or fields)
