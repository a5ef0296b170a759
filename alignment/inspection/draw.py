"""Engines as a picture: a box a layer, its colour the precision, its bar the time; two engines side by side.

Rows go by longest path, as in layered drawings (Sugiyama, Tagawa and Toda 1981), places within a row by the mean of
what a box is joined to.  Of two engines, layers that stand for the same ONNX nodes begin in the same row.
"""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from html import escape
from itertools import takewhile

from alignment.inspection.engine_graph import EngineGraph
from alignment.inspection.findings import Finding, find
from alignment.inspection.saved import Inspection
from alignment.report.junit import NOT_XML

WIDTH, HEIGHT, PITCH, GAP, MARGIN, TOP = 240, 40, 62, 14, 24, 92
LINE = 34  # monospaced characters that fit into a box
SWEEPS = 8
#: Style of a box → what the legend says of it.
STYLES = {
    "int8": "Int8",
    "half": "Half",
    "float": "Float",
    "moves": "moves: Reformat, copy",
    "other": "another type, or not told",
}
STYLE = """
.engine-graph{--paper:#fff;--ink:#1b1f24;--faint:#57606a;--edge:#8c96a3;--int8:#a7dfba;--half:#b4d2f7;--float:#fbcf9b;
--moves:#e3e6ea;--other:#f6f8fa;--finding:#c2141f;background:var(--paper)}
@media screen and (prefers-color-scheme:dark){.engine-graph{--paper:#14181d;--ink:#eef1f4;--faint:#a5afba;
--edge:#6b7683;--int8:#1f6b3c;--half:#24508a;--float:#8a5212;--moves:#3a424c;--other:#22282f;--finding:#ff7b72}}
.engine-graph text{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:var(--ink)}
.engine-graph .small{font-size:10px;fill:var(--ink);opacity:.85}.engine-graph .head{font-size:14px;font-weight:600}
.engine-graph .paper{fill:var(--paper)}.engine-graph rect.box{stroke:var(--edge)}
.engine-graph rect.finding{stroke:var(--finding);stroke-width:2.5}
.engine-graph .bar{fill:var(--ink)}.engine-graph path{fill:none;stroke:var(--edge);stroke-width:1.2}
.engine-graph .int8{fill:var(--int8)}.engine-graph .half{fill:var(--half)}.engine-graph .float{fill:var(--float)}
.engine-graph .moves{fill:var(--moves);stroke-dasharray:4 2}.engine-graph .other{fill:var(--other)}
"""
Vertex = tuple[int, int]


def draw(engines: Sequence[Inspection]) -> str:
    """One engine, or several beside each other, as an SVG that needs nothing else.

    Args:
        engines: inspected; their times are drawn to one scale.
    """
    rows = _rows([engine.engine_graph for engine in engines])
    slowest = max((time for engine in engines for time in engine.times.values()), default=0.0)
    parts, left = [], float(MARGIN)
    for index, engine in enumerate(engines):
        lane = _Lane(engine, [rows[index, place] for place in range(len(engine.engine_graph.layers))], slowest)
        parts.append(f'<g transform="translate({left:.0f} {TOP})">{lane.svg()}</g>')
        parts.append(f'<text class="head" x="{left:.0f}" y="30">{escape(lane.title)}</text>')
        left += max(lane.width, 7.5 * len(lane.title)) + 2 * MARGIN
    width = max(left, 900.0)
    height = TOP + PITCH * (max(rows.values(), default=0) + 1) + MARGIN
    # Names may hold anything, control characters of a terminal too.
    return NOT_XML.sub(
        "\ufffd",
        f'<svg xmlns="http://www.w3.org/2000/svg" class="engine-graph" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}"><style>{STYLE}</style>'
        f'<rect class="paper" width="100%" height="100%"/>{_legend(slowest)}{"".join(parts)}</svg>\n',
    )


def _legend(slowest: float) -> str:
    parts, left = [], float(MARGIN)
    for style, text in STYLES.items():
        parts.append(f'<rect class="box {style}" x="{left:.0f}" y="48" width="18" height="14" rx="3"/>')
        parts.append(f'<text x="{left + 24:.0f}" y="59">{escape(text)}</text>')
        left += 24 + 6.7 * len(text) + 20
    bar = f"bar: time, the longest {slowest:.4f} ms" if slowest else "times were not measured"
    parts.append(f'<rect class="box finding other" x="{MARGIN}" y="69" width="18" height="14" rx="3"/>')
    parts.append(f'<text x="{MARGIN + 24}" y="80">a finding; point at a box for what it is. {bar}</text>')
    return "".join(parts)


def _rows(graphs: Sequence[EngineGraph]) -> dict[Vertex, int]:
    """The row of each layer: below all that it reads, and where its ONNX nodes are in the other engine."""
    vertices = [(index, place) for index, graph in enumerate(graphs) for place in range(len(graph.layers))]
    edges = [
        ((i, p), (i, s)) for i, graph in enumerate(graphs) for p, places in enumerate(graph.before) for s in places
    ]
    group = {vertex: vertex for vertex in vertices}

    def root(vertex: Vertex) -> Vertex:
        while group[vertex] != vertex:
            vertex = group[vertex]
        return vertex

    if len(graphs) > 1:
        first: dict[str, Vertex] = {}
        for index, place in vertices:
            for name in graphs[index].nodes[place]:
                group[root((index, place))] = root(first.setdefault(name, (index, place)))
    while True:
        below: dict[Vertex, set[Vertex]] = {root(vertex): set() for vertex in vertices}
        for reader, source in edges:
            if root(reader) != root(source):
                below[root(reader)].add(root(source))
        try:
            order = list(TopologicalSorter(below).static_order())
            break
        except CycleError as error:  # what one engine computes in between belongs to the group too
            for vertex in error.args[1]:
                group[root(vertex)] = root(error.args[1][0])
    inside = _depths(vertices, [edge for edge in edges if root(edge[0]) == root(edge[1])])
    height: dict[Vertex, int] = {}
    for vertex in vertices:
        height[root(vertex)] = max(height.get(root(vertex), 0), inside[vertex] + 1)
    start: dict[Vertex, int] = {}
    for one in order:
        start[one] = max((start[source] + height[source] for source in below[one]), default=0)
    return {vertex: start[root(vertex)] + inside[vertex] for vertex in vertices}


def _depths(vertices: Sequence[Vertex], edges: Sequence[tuple[Vertex, Vertex]]) -> dict[Vertex, int]:
    """Longest path to each vertex."""
    below: dict[Vertex, set[Vertex]] = {vertex: set() for vertex in vertices}
    for reader, source in edges:
        below[reader].add(source)
    depth: dict[Vertex, int] = {}
    for vertex in TopologicalSorter(below).static_order():
        depth[vertex] = max((depth[source] + 1 for source in below[vertex]), default=0)
    return depth


class _Lane:
    """One engine.  Its points are boxes, one a layer, and bends, where a line passes a row on its way down."""

    def __init__(self, engine: Inspection, rows: list[int], slowest: float) -> None:
        self.engine, self.graph, self.row, self.slowest = engine, engine.engine_graph, list(rows), slowest
        self.boxes = len(rows)
        self.lines: list[tuple[int, int]] = []
        bends: dict[Vertex, int] = {}
        for reader, sources in enumerate(self.graph.before):
            for source in sources:
                above = source
                for row in range(rows[source] + 1, rows[reader]):
                    if (source, row) not in bends:
                        bends[source, row] = len(self.row)
                        self.row.append(row)
                        self.lines.append((above, bends[source, row]))
                    above = bends[source, row]
                self.lines.append((above, reader))
        self.x = self._placed()
        self.width = max(self.x[: self.boxes], default=0.0) + WIDTH / 2
        self.findings: dict[int, list[Finding]] = {}
        for finding in find(engine):
            self.findings.setdefault(finding.place, []).append(finding)
        whole = f", {sum(engine.times.values()):.3f} ms" if engine.times else ""
        self.title = f"{engine.name}: {self.boxes} layers{whole}"

    def svg(self) -> str:
        """Lines first, boxes over them."""
        lines = [self._line(source, target) for source, target in self.lines]
        return "".join([*dict.fromkeys(lines), *(self._box(place) for place in range(self.boxes))])

    def _placed(self) -> list[float]:
        """The middle of each point, from the left edge of the lane."""
        x = [0.0] * len(self.row)
        levels: dict[int, list[int]] = {}
        for point, row in enumerate(self.row):
            x[point] = len(levels.setdefault(row, [])) * (WIDTH + GAP)
            levels[row].append(point)
        above: list[list[int]] = [[] for _ in x]
        below: list[list[int]] = [[] for _ in x]
        for source, target in self.lines:
            above[target].append(source)
            below[source].append(target)
        for sweep in range(SWEEPS):
            joined = above if sweep % 2 == 0 else below
            for row in sorted(levels, reverse=sweep % 2 == 1):
                wish = {p: sum(x[q] for q in joined[p]) / len(joined[p]) if joined[p] else x[p] for p in levels[row]}
                points = sorted(levels[row], key=wish.__getitem__)
                for before, point in zip([-1, *points], points, strict=False):
                    apart = (self._wide(before) + self._wide(point)) / 2 + GAP
                    x[point] = wish[point] if before < 0 else max(wish[point], x[before] + apart)
                drift = sum(x[p] - wish[p] for p in points) / len(points)
                for point in points:
                    x[point] -= drift
        left = min((x[p] - self._wide(p) / 2 for p in range(len(x))), default=0.0)
        return [value - left for value in x]

    def _wide(self, point: int) -> float:
        return WIDTH if point < self.boxes else 0

    def _line(self, source: int, target: int) -> str:
        top = PITCH * self.row[source] + HEIGHT
        bottom = PITCH * self.row[target] + (0 if target < self.boxes else HEIGHT)
        a, b, bend = self.x[source], self.x[target], PITCH * self.row[target]
        middle = (top + bend) / 2
        curve = f"M{a:.0f} {top}C{a:.0f} {middle:.0f} {b:.0f} {middle:.0f} {b:.0f} {bend}"
        return f'<path d="{curve}{f"V{bottom}" if bottom != bend else ""}"/>'

    def _box(self, place: int) -> str:
        one, found, time = self.graph.layers[place], self.findings.get(place, []), self.engine.milliseconds(place)
        x, y = self.x[place] - WIDTH / 2, PITCH * self.row[place]
        style = "moves" if one.moves else one.runs_in.lower()
        style = style if style in STYLES else "other"
        upper, lower = self._label(place)
        if time is not None:
            lower += f" {time:.4f} ms"
        told = [one.name, f"{one.kind} {one.kernel}".strip(), *self.graph.nodes[place]]
        told += [f"{finding.kind}: {finding.why}; mend: {finding.mend}" for finding in found]
        bar = WIDTH * (time or 0.0) / self.slowest if self.slowest else 0.0
        return (
            f"<g><title>{escape(chr(10).join(told))}</title>"
            f'<rect class="box {style}{" finding" if found else ""}" x="{x:.1f}" y="{y}" width="{WIDTH}" '
            f'height="{HEIGHT}" rx="4"/><text x="{x + 6:.1f}" y="{y + 14}">{escape(upper)}</text>'
            f'<text class="small" x="{x + 6:.1f}" y="{y + 28}">{escape(lower[: LINE + 3])}</text>'
            f'<rect class="bar" x="{x:.1f}" y="{y + HEIGHT - 5}" width="{bar:.1f}" height="4"/></g>'
        )

    def _label(self, place: int) -> tuple[str, str]:
        """Where in the network a layer is, and what it computes."""
        one, names = self.graph.layers[place], self.graph.nodes[place]
        types = "/".join(dict.fromkeys(filter(None, one.types)))
        read = one.inputs[0].datatype if one.inputs else ""
        types = f"{read}→{types}" if read and read != types else types
        if one.moves or not names:
            return _tail(names[0] if names else one.name), f"{one.kind} {types}"
        folders = zip(*(name.split("/")[:-1] for name in names), strict=False)
        scope = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, folders)]
        operators = [self.graph.graph.by_name[n].op if n in self.graph.graph.by_name else _tail(n) for n in names]
        text = "+".join(operators) if len(operators) < 4 else f"{operators[0]}+…+{operators[-1]}"
        return _tail("/".join(scope) or names[0]), f"{text} {types}"


def _tail(text: str) -> str:
    """The end of a long name."""
    return text if len(text) <= LINE else f"…{text[1 - LINE :]}"
