"""An inspected engine as one file: the inspector's own text, times by layer, the ONNX graph, and where it was built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from alignment.engine.inspect import parse
from alignment.errors import AlignError
from alignment.inspection.engine_graph import EngineGraph
from alignment.inspection.node_graph import NodeGraph
from alignment.reading import cut, parse_json, read_text, require_plain
from alignment.storage import writing

FORMAT = 1
MEND = "give what `align inspect` wrote, or the inspector's JSON of an engine built with detailed profiling"


@dataclass(frozen=True)
class Inspection:
    """One engine.

    Attributes:
        name: of the case that it was built for, or of the file.
        text: the JSON that TensorRT's inspector gave.
        times: milliseconds by layer name, medians; empty where they were not measured.
        graph: the ONNX graph that it was built from; without nodes where that is not known.
        wanted: the ONNX nodes that are to run in int8, by placement.
        kept: node → why it stays float, by placement.
        provenance: of the build: versions, GPU, options, digests, and the builder's level and batch.
    """

    name: str
    text: str
    times: dict[str, float] = field(default_factory=dict)
    graph: NodeGraph = field(default_factory=lambda: NodeGraph((), (), ()))
    wanted: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def engine_graph(self) -> EngineGraph:
        """Its layers, joined, with the ONNX nodes that they stand for."""
        return EngineGraph(parse(self.text), self.graph)

    def milliseconds(self, place: int) -> float | None:
        """The time of a layer; None where it was not measured."""
        return self.times.get(self.engine_graph.layers[place].name)

    def save(self, path: Path) -> None:
        """Writes it whole or not at all."""
        fields = {
            "format": FORMAT,
            "name": self.name,
            "provenance": self.provenance,
            "wanted": self.wanted,
            "kept": self.kept,
            "times": self.times,
            "graph": self.graph.to_json(),
            "inspector": self.text,
        }
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items())
        with writing(path) as temporary:
            temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def load_inspection(path: Path, graph: NodeGraph | None = None) -> Inspection:
    """Reads a file of `Inspection.save`, or the inspector's JSON as TensorRT gives it.

    Args:
        path: the file.
        graph: the ONNX graph behind it, for a file that holds none.

    Raises:
        AlignError: for a file that is neither.
    """
    text = read_text(path, MEND, MEND, "not JSON")
    try:
        fields = parse_json(text, strict=False)
    except ValueError as error:
        raise AlignError(f"{path}: not JSON: {cut(error)}", MEND) from None
    try:
        require_plain(fields)
        found = _plain(path.stem, text, fields) if "Layers" in fields else _saved(fields)
        if not found.engine_graph.layers:
            raise AlignError(f"{path}: no layer in it", MEND)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise AlignError(f"{path}: no inspected engine: {cut(f'{type(error).__name__}: {error}')}", MEND) from None
    if graph is None or found.graph.nodes:
        return found
    return Inspection(found.name, found.text, found.times, graph, graph.wanted_int8, {}, found.provenance)


def _plain(name: str, text: str, fields: Mapping[str, Any]) -> Inspection:
    if not isinstance(fields["Layers"], list):
        raise TypeError("Layers is no list")
    return Inspection(name, text)


def _saved(fields: Mapping[str, Any]) -> Inspection:
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']}, this version reads {FORMAT}")
    return Inspection(
        str(fields["name"]),
        str(fields["inspector"]),
        {str(name): float(value) for name, value in fields["times"].items()},
        NodeGraph.from_json(fields["graph"]),
        tuple(map(str, fields["wanted"])),
        {str(node): str(why) for node, why in fields["kept"].items()},
        dict(fields["provenance"]),
    )
