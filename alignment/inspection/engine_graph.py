"""An engine's layers as a graph, and the ONNX nodes that each of them stands for.

Layers are joined by the tensors that the inspector tells.  Where TensorRT left a node out, as a Split that is a view or
a Concat whose inputs are written in place, no layer makes a tensor that another reads: there the ONNX graph tells who.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from alignment.engine.inspect import COPY_NODE, EngineLayer, without_clone
from alignment.inspection.node_graph import Node, NodeGraph
from alignment.quantize.graph import QUANTIZING
from alignment.quantize.placement import MOVING

#: Operators that may vanish from an engine: views, and copies in place.
VANISHING = (*MOVING, "Concat", "Cast", "Expand")


class Real(NamedTuple):
    """Where an ONNX node ended up: an engine layer, and the precision that it computes in."""

    layer: EngineLayer
    runs_in: str


@dataclass(frozen=True)
class NodePrecisions:
    """Every ONNX node of a graph, in one of three parts.

    Attributes:
        mapped: node → its engine layer.  A Concat may have several that copy: it is one of them.
        folded: node → why no layer is to be expected: ``constant`` (shape arithmetic too), ``quantizer``, ``view``.
        unknown: nodes that no layer says it stands for, though it should.
    """

    mapped: dict[str, Real]
    folded: dict[str, str]
    unknown: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Nodes by precision, or by why there is no layer."""
        found: dict[str, int] = {}
        for what in (*(real.runs_in or "?" for real in self.mapped.values()), *self.folded.values()):
            found[what] = found.get(what, 0) + 1
        return found | ({"unknown": len(self.unknown)} if self.unknown else {})


@dataclass(frozen=True)
class EngineGraph:
    """Layers in the engine's order, and the ONNX graph that it was built from; an empty one where that is not known.

    Layers are given by their place in the list: names may occur twice.
    """

    layers: Sequence[EngineLayer]
    graph: NodeGraph = field(default_factory=lambda: NodeGraph((), (), ()))

    @cached_property
    def nodes(self) -> list[tuple[str, ...]]:
        """The ONNX nodes of each layer, in the order of the graph; by its own account where there is no graph."""
        if not self.graph.nodes:
            return [one.nodes for one in self.layers]
        found = [tuple(self.graph.in_order([*one.nodes, *self._copied(one)])) for one in self.layers]
        taken = {name for names in found for name in names}
        for place, one in enumerate(self.layers):
            if not found[place] and one.foreign:
                found[place] = tuple(self.graph.in_order(self._region(one.foreign, taken)))
            elif not found[place] and not one.moves:
                makers = (self.graph.makers.get(without_clone(tensor.name)) for tensor in one.outputs)
                names = {maker.name for maker in makers if maker is not None}
                found[place] = tuple(self.graph.in_order(names - taken))
            taken.update(found[place])
        return found

    @cached_property
    def layers_of(self) -> dict[str, list[int]]:
        """Node → the layers that stand for it."""
        found: dict[str, list[int]] = {}
        for place, names in enumerate(self.nodes):
            for name in names:
                found.setdefault(name, []).append(place)
        return found

    @cached_property
    def before(self) -> list[list[int]]:
        """The layers whose outputs each layer reads, in the engine's order, which is that of execution."""
        found: list[set[int]] = [set() for _ in self.layers]
        if not any(one.inputs for one in self.layers):
            self._join_by_nodes(found)
            return [sorted(places) for places in found]
        for place, one in enumerate(self.layers):
            for tensor in one.inputs:
                sources = self._made.get(tensor.name) or self._sources(tensor.name)
                # Parts of a Concat that are written in place have its name, those too that are written later.
                found[place].update(source for source in sources if source < place)
        behind = _turned(found)
        for place, one in enumerate(self.layers):
            if not one.moves:
                sinks = {sink for tensor in one.outputs for sink in self._sinks(tensor.name) if sink > place}
                for sink in sinks.difference(self._past_copies(place, behind)) if sinks else ():
                    found[sink].add(place)
        return [sorted(places) for places in found]

    @cached_property
    def behind(self) -> list[list[int]]:
        """The layers that read the outputs of each layer."""
        return _turned(self.before)

    def computing(self, place: int, forward: bool) -> list[int]:
        """The layers behind (or before) one that do more than to move its tensors; −1 for the engine's own end."""
        return sorted(self._past_copies(place, self.behind if forward else self.before, forward))

    def _past_copies(self, place: int, edges: Sequence[Iterable[int]], forward: bool = True) -> set[int]:
        ends = set(self.graph.outputs if forward else self.graph.inputs)
        found, visited, waiting = set(), {place}, [place]
        while waiting:
            here = waiting.pop()
            tensors = self.layers[here].outputs if forward else self.layers[here].inputs
            if not edges[here] or not ends.isdisjoint(tensor.name for tensor in tensors):
                found.add(-1)
            for there in edges[here]:
                if there not in visited and self.layers[there].moves:
                    waiting.append(there)
                elif there not in visited:
                    found.add(there)
                visited.add(there)
        return found

    @cached_property
    def precisions(self) -> NodePrecisions:
        """Where every node of the ONNX graph ended up."""
        mapped, folded, unknown = {}, {}, []
        for node in self.graph.nodes:
            places = self.layers_of.get(node.name, [])
            if places:
                best = min(places, key=lambda place: (self.layers[place].moves, place))
                mapped[node.name] = Real(self.layers[best], self.layers[best].runs_in)
            elif node.op in QUANTIZING:
                folded[node.name] = "quantizer"
            elif self.graph.varying.isdisjoint(node.outputs):
                folded[node.name] = "constant"
            elif node.op in VANISHING:
                folded[node.name] = "view"
            else:
                unknown.append(node.name)
        return NodePrecisions(mapped, folded, tuple(unknown))

    @cached_property
    def _made(self) -> dict[str, list[int]]:
        """Tensor → the layers that write it; several write the parts of a Concat."""
        found: dict[str, list[int]] = {}
        for place, one in enumerate(self.layers):
            for tensor in one.outputs:
                found.setdefault(tensor.name, []).append(place)
        return found

    def _sources(self, tensor: str) -> Iterator[int]:
        """The layers that made a tensor which none says it writes, by the ONNX graph."""
        waiting, visited = [without_clone(tensor)], set()
        while waiting:
            name = waiting.pop()
            if name in visited:
                continue
            visited.add(name)
            maker = self.graph.makers.get(name)
            places = self._made.get(name, []) if name != tensor else []
            places = places or (self.layers_of.get(maker.name, []) if maker else [])
            yield from places
            if not places and maker is not None:
                waiting += [source for source in maker.inputs if source in self.graph.varying]

    def _sinks(self, tensor: str) -> Iterator[int]:
        """The layers that read a tensor of which none says so, by the ONNX graph: past views and copies."""
        waiting, visited = [without_clone(tensor)], set()
        while waiting:
            name = waiting.pop()
            if name in visited:
                continue
            visited.add(name)
            for node in self.graph.readers.get(name, ()):
                places = [p for p in self.layers_of.get(node.name, ()) if not self.layers[p].moves]
                yield from places
                if not places and node.op in (*VANISHING, *QUANTIZING):
                    waiting += node.outputs

    def _join_by_nodes(self, found: list[set[int]]) -> None:
        """Edges where the inspector tells of no inputs: by the ONNX graph, and by whom a copy says it is made for."""
        for place, names in enumerate(self.nodes):
            for name in names:
                for tensor in self.graph.by_name[name].inputs if name in self.graph.by_name else ():
                    found[place].update(source for source in self._sources(tensor) if source != place)
        places = {one.name: place for place, one in enumerate(self.layers)}
        for copy, one in enumerate(self.layers):
            side, _, owner = one.name.removeprefix(COPY_NODE).partition(" to ")
            here = places.get(owner) if one.name.startswith(COPY_NODE) else None
            if here is None:
                continue
            if side.startswith("Input"):
                found[copy], found[here] = found[here], {copy}
            else:
                for reader in found:
                    if here in reader:
                        reader -= {here}
                        reader |= {copy}
                found[copy] = {here}

    def _copied(self, one: EngineLayer) -> Iterator[str]:
        """The Concat that a layer ``<node>_<tensor> copy`` writes a part of."""
        if one.name.endswith(" copy") and one.nodes[0] not in self.graph.by_name:
            concats = (node.name for node in self.graph.nodes if node.op == "Concat")
            yield from (name for name in concats if one.name.startswith(f"{name}_"))

    def _region(self, ends: tuple[str, str], taken: Iterable[str]) -> set[str]:
        """The nodes joined to the first and last of a region that no other layer stands for."""
        free = {node.name for node in self.graph.nodes if node.op not in QUANTIZING} - set(taken)
        waiting = [node for end in ends for node in self._at(end) if node.name in free]
        found: set[str] = set()
        while waiting:
            node = waiting.pop()
            if node.name in found:
                continue
            found.add(node.name)
            around = [self.graph.makers.get(tensor) for tensor in node.inputs]
            around += [reader for tensor in node.outputs for reader in self.graph.readers.get(tensor, ())]
            waiting += [other for other in around if other is not None and other.name in free]
        return found

    def _at(self, end: str) -> list[Node]:
        """The node of a name, or those at a tensor of that name."""
        if end in self.graph.by_name:
            return [self.graph.by_name[end]]
        maker = self.graph.makers.get(end)
        return [maker] if maker is not None else self.graph.readers.get(end, [])


def _turned(before: Sequence[Iterable[int]]) -> list[list[int]]:
    """Edges the other way round."""
    found: list[list[int]] = [[] for _ in before]
    for place, places in enumerate(before):
        for source in places:
            found[source].append(place)
    return found
