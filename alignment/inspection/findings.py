"""What keeps an engine from being int8 throughout: each with the ONNX node that caused it, and the mend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from alignment.engine.inspect import EngineLayer, is_weighted, without_clone
from alignment.inspection.engine_graph import EngineGraph
from alignment.inspection.node_graph import Node
from alignment.inspection.saved import Inspection
from alignment.quantize.graph import ACTIVATIONS, QUANTIZE, QUANTIZING, WEIGHTED

Kind = Literal["reformat", "float-island", "unfused-activation", "not-int8"]
#: What each kind is, in one line.
KINDS: dict[Kind, str] = {
    "reformat": "a kernel that only changes type or layout, or copies",
    "float-island": "float layers that read from int8 layers only, and that only int8 layers read",
    "unfused-activation": "an activation that a kernel of its own computes, behind an int8 convolution",
    "not-int8": "a node that placement wants in int8 and that runs in another precision",
}
FLOATS = ("Half", "BFloat16", "Float")
_QUANTIZED = re.compile(r"(_dequantized|_quantized)$")


@dataclass(frozen=True)
class Finding:
    """One of them.

    Attributes:
        kind: one of `KINDS`.
        place: of the engine layer, in the engine's order.
        layer: its name.
        nodes: the ONNX nodes that it stands for; of a Reformat, those of the layers on its two sides.
        cause: the ONNX node because of which it is there; empty where TensorRT alone chose so.
        why: what was found.
        mend: what to change.
        milliseconds: what the layer takes, where it was measured.
    """

    kind: Kind
    place: int
    layer: str
    nodes: tuple[str, ...]
    cause: str
    why: str
    mend: str
    milliseconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def _plain(name: str) -> str:
    """The tensor that a name of TensorRT's stands for: ``x_quantized_clone_1`` → ``x``."""
    return _QUANTIZED.sub("", without_clone(name))


def find(inspection: Inspection) -> list[Finding]:
    """Everything of `KINDS` in an engine, in its order."""
    finder = _Finder(inspection)
    unfused = list(finder.unfused_activations())
    alone = {finding.place for finding in unfused}
    found = [*finder.reformats(), *unfused, *finder.islands(alone), *finder.not_int8()]
    return sorted(found, key=lambda finding: (finding.place, list(KINDS).index(finding.kind)))


class _Finder:
    """The detectors, on one engine."""

    def __init__(self, inspection: Inspection) -> None:
        self.inspection = inspection
        self.engine_graph: EngineGraph = inspection.engine_graph
        self.layers = self.engine_graph.layers
        self.graph = inspection.graph
        self.wanted = frozenset(inspection.wanted or self.graph.wanted_int8)

    def reformats(self) -> Iterator[Finding]:
        """Layers of kind Reformat.  Those that became a NoOp take no time and are none."""
        for place, one in enumerate(self.layers):
            if one.moves and one.kind != "NoOp":
                source, sink = self._sides(place)
                cause, why, mend = self._reason(place, source, sink)
                nodes = tuple(name for name in (source, sink) if name)
                yield self._finding("reformat", place, nodes, cause, f"{self._change(place)}: {why}", mend)

    def unfused_activations(self) -> Iterator[Finding]:
        """Layers that compute an activation, and no convolution, directly behind an int8 convolution."""
        for place, one in enumerate(self.layers):
            if one.moves or not self._activates(place) or self._weighted(place):
                continue
            before = [source for source in self.engine_graph.computing(place, False) if source >= 0]
            convolution = next((p for p in reversed(before) if self._gives(p, place)), None)
            if convolution is not None:
                cause, why, mend = self._unfused_because(convolution, place)
                yield self._finding("unfused-activation", place, self.engine_graph.nodes[place], cause, why, mend)

    def islands(self, alone: set[int]) -> Iterator[Finding]:
        """Joined float layers, of which every neighbour is an int8 layer; not those that are `alone` told of."""
        left = {p for p, one in enumerate(self.layers) if not one.moves and self._float(p)}
        while left:
            island, edge = self._island(left.pop())
            left -= island
            ends = [edge[forward] for forward in (False, True)]
            if (
                not all(ends)
                or island <= alone
                or any(p < 0 or self.layers[p].runs_in != "Int8" for end in ends for p in end)
            ):
                continue
            first = min(island)
            nodes = tuple(name for place in sorted(island) for name in self.engine_graph.nodes[place])
            cause, why, mend = self._float_because(nodes)
            others = f" and {len(island) - 1} more layers" if len(island) > 1 else ""
            kind = self.layers[first].runs_in
            yield self._finding("float-island", first, nodes, cause, f"{kind}{others} between int8 layers: {why}", mend)

    def not_int8(self) -> Iterator[Finding]:
        """Nodes that are wanted in int8 and run in something else."""
        for name, real in self.engine_graph.precisions.mapped.items():
            if name in self.wanted and real.runs_in in FLOATS:
                place = next(p for p in self.engine_graph.layers_of[name] if self.layers[p] is real.layer)
                why = f"wanted in int8, runs in {real.runs_in}"
                mend = (
                    "build at a higher level, or keep it in float (keep_float), so that its Q/DQ pair goes: TensorRT "
                    "found no int8 kernel that is faster"
                )
                op = self.graph.by_name[name].op
                if op not in WEIGHTED:
                    mend = "give all that it reads, and what reads it, Q/DQ pairs of one scale, or none of them"
                yield self._finding("not-int8", place, (name,), name, why, mend)

    def _finding(self, kind: Kind, place: int, nodes: tuple[str, ...], cause: str, why: str, mend: str) -> Finding:
        one = self.layers[place]
        return Finding(kind, place, one.name, nodes, cause, why, mend, self.inspection.milliseconds(place))

    def _nodes(self, places: list[int]) -> list[str]:
        """The nodes of layers, without quantizers."""
        names = (name for place in places if place >= 0 for name in self.engine_graph.nodes[place])
        return [n for n in names if n not in self.graph.by_name or self.graph.by_name[n].op not in QUANTIZING]

    def _op(self, name: str) -> str:
        return self.graph.by_name[name].op if name in self.graph.by_name else ""

    def _ops(self, place: int) -> set[str]:
        return {self._op(name) for name in self.engine_graph.nodes[place]} - {""}

    def _types(self, place: int) -> tuple[str, str]:
        """Types before and behind a Reformat; those of the layers beside it where its own inputs are not told."""
        one = self.layers[place]
        old = [t.datatype for t in one.inputs] or [
            t for p in self.engine_graph.before[place] for t in self.layers[p].types
        ]
        return old[0] if old else "", one.types[0] if one.types else ""

    def _weighted(self, place: int) -> bool:
        kind = self.layers[place].kind
        return bool(self._ops(place) & {*WEIGHTED}) or is_weighted(kind)

    def _activates(self, place: int) -> bool:
        kind = self.layers[place].kind
        known = self._ops(place)
        return bool(known & {*ACTIVATIONS}) if known else kind.startswith("PointWise") or kind == "Activation"

    def _float(self, place: int) -> bool:
        return self.layers[place].runs_in in FLOATS and self.layers[place].kind != "Constant"

    def _island(self, start: int) -> tuple[set[int], dict[bool, set[int]]]:
        """The float layers joined to one, and what they read from and are read by, −1 being the engine's end."""
        island, waiting = {start}, [start]
        edge: dict[bool, set[int]] = {False: set(), True: set()}
        while waiting:
            here = waiting.pop()
            for forward in (False, True):
                for there in self.engine_graph.computing(here, forward):
                    if there >= 0 and self._float(there):
                        waiting += [] if there in island else [there]
                        island.add(there)
                    elif there < 0 or self.layers[there].kind != "Constant":
                        edge[forward].add(there)
        return island, edge

    def _gives(self, convolution: int, activation: int) -> bool:
        """Whether a layer is an int8 convolution whose own output the activation of another reads."""
        if not self._weighted(convolution) or self.layers[convolution].runs_in != "Int8":
            return False
        nodes = [self.graph.by_name[n] for n in self.engine_graph.nodes[convolution] if n in self.graph.by_name]
        readers = {reader.name for reader in self.graph.data_readers(nodes[-1])} if nodes else set()
        activating = {n for n in self.engine_graph.nodes[activation] if self._op(n) in (*ACTIVATIONS, "Mul", "")}
        return not nodes or bool(readers & activating)

    def _sides(self, place: int) -> tuple[str, str]:
        """The ONNX nodes that write and read what a Reformat moves; empty at the engine's ends, or where not known."""
        quantizer = self._quantizer(place)
        if quantizer is not None:
            makers, readers = self.graph.data_makers(quantizer), self.graph.data_readers(quantizer)
            real = self.engine_graph.precisions.mapped
            kinds = (*FLOATS, "Int8") if quantizer.op == "DequantizeLinear" else ("Int8", *FLOATS)

            def order(node: Node) -> tuple[int, bool]:
                kind = real[node.name].runs_in if node.name in real else ""
                return kinds.index(kind) if kind in kinds else len(kinds), node.op in WEIGHTED

            return makers[-1].name if makers else "", min(readers, key=order).name if readers else ""
        sources, sinks = (self._nodes(self.engine_graph.computing(place, forward)) for forward in (False, True))
        for sink in sinks:
            makers = self.graph.data_makers(self.graph.by_name[sink]) if sink in self.graph.by_name else []
            source = next((maker.name for maker in makers if maker.name in sources), None)
            if source:
                return source, sink
        return sources[-1] if sources else "", sinks[0] if sinks else ""

    def _reason(self, place: int, source: str, sink: str) -> tuple[str, str, str]:
        """Cause, why and mend of a Reformat."""
        if concat := self._concat(place):
            return concat.name, *self._copied_because(self.layers[place], concat)
        quantizer = self._quantizer(place)
        old, new = self._types(place)
        writer, reader = source or "what comes before", sink or "what comes behind"
        if (quantizer and quantizer.op == QUANTIZE) or (old in FLOATS and new == "Int8"):
            mend = f"let {writer} write int8 (a Q/DQ pair on what it reads), or keep {reader} in float"
            if quantizer and quantizer.inputs[0] in self.graph.inputs:
                writer, mend = "the image", "none: the image comes in float, and is quantized once"
            return quantizer.name if quantizer else sink, f"{writer} writes float, {reader} reads int8", mend
        if quantizer or (old == "Int8" and new in FLOATS):
            mend = f"let {reader} read int8 (a Q/DQ pair on what it reads), or keep {writer} in float"
            return sink or source, f"{writer} writes int8, {reader} reads float", mend
        if old in FLOATS and new in FLOATS and old != new:
            mend = "bind both to one float type (float32_nodes), or neither"
            return sink or source, f"{writer} writes {old}, {reader} reads {new}", mend
        mend = "build at a higher level; channels in multiples of 32 leave more kernels that agree on a layout"
        return "", f"the kernels of {writer} and {reader} want different layouts", mend

    def _change(self, place: int) -> str:
        """``Half → Int8``; ``Int8, Row major linear → Thirty-two wide ...``; ``Int8, copy``."""
        one, (old, new) = self.layers[place], self._types(place)
        if old != new:
            return f"{old or '?'} → {new or '?'}"
        if one.inputs and one.inputs[0].layout != one.outputs[0].layout:
            return f"{old}, {one.inputs[0].layout} → {one.outputs[0].layout}"
        return f"{old}, copy"

    def _quantizer(self, place: int) -> Node | None:
        """The QuantizeLinear or DequantizeLinear that a Reformat is."""
        names = (*self.engine_graph.nodes[place], _plain(self.layers[place].name))
        found = (self.graph.by_name[name] for name in names if name in self.graph.by_name)
        return next((node for node in found if node.op in QUANTIZING), None)

    def _concat(self, place: int) -> Node | None:
        found = (self.graph.by_name.get(name) for name in self.engine_graph.nodes[place])
        return next((node for node in found if node is not None and node.op == "Concat"), None)

    def _copied_because(self, one: EngineLayer, concat: Node) -> tuple[str, str]:
        """Why TensorRT copies what a Concat reads, in place of writing it there at once; and the mend."""
        told = one.inputs[0].name if one.inputs else one.name.removeprefix(f"{concat.name}_").removesuffix(" copy")
        tensor = _plain(told)
        maker, place = self.graph.makers.get(tensor), f"its place in {concat.name}"
        if maker is not None and maker.op in ("Split", "Slice"):
            return (
                f"{tensor} is a part of what {maker.name} gives, copied to {place}",
                f"none by quantizers: two convolutions in place of one and {maker.op} would write there at once",
            )
        readers = self.graph.data_readers(maker) if maker is not None else []
        others = [reader.name for reader in readers if reader.name != concat.name]
        if others:
            return f"{tensor} is read by {others[0]} too, and copied to {place}", "none by quantizers"
        return f"{tensor} is copied to {place}", f"none, where all that {concat.name} reads has one scale already"

    def _unfused_because(self, convolution: int, activation: int) -> tuple[str, str, str]:
        """Cause, why and mend of an activation that is not computed with its convolution."""
        inside = [self.graph.by_name[n] for n in self.engine_graph.nodes[activation] if n in self.graph.by_name]
        weighted = [self.graph.by_name[n] for n in self.engine_graph.nodes[convolution] if n in self.graph.by_name]
        if not inside or not weighted:
            return "", "no ONNX graph to tell why", "give the QDQ graph (--onnx)"
        own = {node.name for node in inside}
        between = [reader for tensor in weighted[-1].outputs for reader in self.graph.readers.get(tensor, [])]
        for reader in between:
            if reader.op == QUANTIZE:
                what = f"{reader.name} stands between {weighted[-1].name} and its activation"
                return reader.name, what, "quantize behind the activation, not before it"
        for reader in between:
            if reader.name not in own:
                what = f"{reader.name} reads what {weighted[-1].name} gives before the activation"
                return reader.name, what, f"let {reader.name} read behind the activation, or keep both in float"
        for node in inside:
            if node.op == "Add" and len(self.graph.data_makers(node)) > 1:
                what = f"TensorRT computes it together with {node.name}"
                return node.name, what, f"quantize both inputs of {node.name}, so that the convolution writes int8"
        real = self.engine_graph.precisions.mapped
        for tensor in (t for node in inside for t in node.outputs):
            for reader in self.graph.readers.get(tensor, []):
                if reader.name in own or reader.op in QUANTIZING or reader.name not in real:
                    continue
                if real[reader.name].runs_in in FLOATS:
                    what = f"{reader.name} reads its output in float, so the convolution writes float"
                    return reader.name, what, f"let {reader.name} read int8, or keep {weighted[-1].name} in float"
        channels = next((f" for {t.shape[1]} channels" for t in self.layers[convolution].outputs if t.shape[1:]), "")
        what = f"nothing stands between: TensorRT chose so{channels}"
        return "", what, f"build at a higher level, or keep {weighted[-1].name} in float where that is faster"

    def _float_because(self, nodes: tuple[str, ...]) -> tuple[str, str, str]:
        """Cause, why and mend of layers that stay float."""
        kept = next((name for name in nodes if name in self.inspection.kept), None)
        if kept is not None:
            reason = self.inspection.kept[kept]
            return kept, f"{kept} stays float ({reason})", f"let {kept} run in int8 (keep_float, policy)"
        unwanted = next((name for name in nodes if name not in self.wanted), nodes[0] if nodes else "")
        if not self.wanted:
            return unwanted, "TensorRT chose so", "give it a range, or a Q/DQ pair"
        if unwanted in self.wanted:
            return unwanted, f"{unwanted} is quantized, TensorRT chose so", "keep it in float (keep_float)"
        return unwanted, f"{unwanted} reads no int8", "give it a Q/DQ pair, or a range (policy full)"
