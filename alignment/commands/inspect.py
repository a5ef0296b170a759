"""``align inspect``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from alignment.case import Case, cases_of
from alignment.commands.console import Data, out, print_table, require_folders
from alignment.errors import AlignError
from alignment.inspection.findings import KINDS, find
from alignment.inspection.saved import Inspection, load_inspection
from alignment.inspection.summary import Sum, by_finding, by_precision
from alignment.storage import write_text


def inspect(
    what: Annotated[
        list[str], typer.Argument(metavar="VARIANT | FILE.json [FILE.json]", help="files: of --out, or the inspector's")
    ],
    precision: Annotated[str, typer.Option(help="of the engine: fp32, tf32, fp16 or int8")] = "int8",
    route: Annotated[str, typer.Option(help="of int8")] = "qdq",
    against: Annotated[
        str | None, typer.Option(metavar="PRECISION[/ROUTE]", help="a second engine of the variant, drawn beside it")
    ] = None,
    level: Annotated[int, typer.Option(min=0, max=5, help="of the builder; 3 is what is deployed")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="images at once")] = 1,
    times: Annotated[bool, typer.Option("--times/--no-times", help="measure each layer")] = True,
    onnx_file: Annotated[
        Path | None, typer.Option("--onnx", help="the graph behind a file that holds none, as the inspector's own")
    ] = None,
    data: Data = None,
    show: Annotated[int, typer.Option(min=0, help="how many findings of each kind to list")] = 5,
    out_dir: Annotated[
        Path,
        typer.Option("--out", help="folder for NAME.engine.json, NAME.findings.json, the drawing NAME.svg, NAME.html"),
    ] = Path("."),
) -> None:
    """List what keeps an engine from being int8 throughout, node by node, and draw it; a second engine beside it.

    Of a variant, which needs a GPU: builds the engine, measures each layer, and saves NAME.engine.json, from which
    everything else can be made anywhere.
    """
    from alignment.inspection.draw import draw
    from alignment.report.engine import render_engines

    require_folders({"--out": out_dir})
    files = [Path(text) for text in what if text.endswith(".json")]
    if len(what) > 2 or len(files) not in (0, len(what)) or (not files and len(what) > 1):
        raise AlignError(f"{len(what)} arguments", "give one variant, or one or two files that end in .json")
    if files and against is not None:
        raise AlignError("--against: no variant to build it of", "give a second file instead")
    engines = (
        _loaded(files, onnx_file) if files else _built(what[0], precision, route, against, (level, batch, times), data)
    )
    if len({engine.name for engine in engines}) < len(engines):
        raise AlignError(f"two engines are both named {engines[0].name}", "rename one of the files")
    for engine in engines:
        if not files:
            _wrote(out_dir / f"{engine.name}.engine.json", engine)
        _report(engine, show, out_dir)
    name = "-against-".join(engine.name for engine in engines)
    for ending, text in ((".svg", draw(engines)), (".html", render_engines(engines))):
        write_text(out_dir / f"{name}{ending}", text)
        out.print(f"wrote {out_dir / f'{name}{ending}'}", markup=False)


def _loaded(files: list[Path], onnx_file: Path | None) -> list[Inspection]:
    graph = None
    if onnx_file is not None:
        from alignment.export.onnx_export import check_onnx
        from alignment.inspection.node_graph import NodeGraph

        graph = NodeGraph.of(check_onnx(onnx_file))
    # Files of one case, of two GPUs or versions of TensorRT, are told apart by their own names.
    return [replace(load_inspection(path, graph), name=path.stem.removesuffix(".engine")) for path in files]


def _built(
    name: str, precision: str, route: str, against: str | None, how: tuple[int, int, bool], data: Path | None
) -> list[Inspection]:
    """`how`: level of the builder, images at once, whether layers are measured."""
    from alignment.inspection.record import inspect as inspect_engine
    from alignment.session import require_available
    from alignment.variant import load_variant

    variant = load_variant(name)
    require_available(variant, data)
    asked = [(precision, route)]
    if against is not None:
        other, _, other_route = against.partition("/")
        asked.append((other, other_route or route))
    cases: list[Case] = []
    for kind, way in asked:
        cases += cases_of(variant, ("tensorrt",), (kind,), (way,))
    if len(set(cases)) < len(cases):
        raise AlignError(f"--against {against}: the same engine twice", "give another precision or route")
    return [inspect_engine(variant, case, *how, data) for case in cases]


def _wrote(path: Path, engine: Inspection) -> None:
    engine.save(path)
    out.print(f"wrote {path}", markup=False)


def _report(engine: Inspection, show: int, out_dir: Path) -> None:
    """Prints tables of one engine, and writes its findings."""
    found = find(engine)
    layers = engine.engine_graph.layers
    whole = sum(engine.times.values())
    title = f"{engine.name}: {len(layers)} layers" + (f", {whole:.3f} ms" if engine.times else "")
    precisions = Table("runs in", "layers", "ms", "ONNX nodes", title=title)
    for one in by_precision(engine):
        precisions.add_row(one.name, str(one.number or "-"), _time(one), "-" if one.nodes is None else str(one.nodes))
    print_table(precisions)
    if unknown := engine.engine_graph.precisions.unknown:
        out.print(f"no layer stands for {', '.join(unknown[:5])}", markup=False)
    summary = Table("finding", "how many", "ms", "what it is")
    for one, text in zip(by_finding(engine, found), KINDS.values(), strict=True):
        summary.add_row(one.name, str(one.number), _time(one), text)
    print_table(summary)
    for kind in KINDS:
        own = sorted((f for f in found if f.kind == kind), key=lambda f: -(f.milliseconds or 0.0))
        for finding in own[:show]:
            taken = "" if finding.milliseconds is None else f" {finding.milliseconds:.4f} ms"
            out.print(f"{kind}{taken}: {finding.why}; mend: {finding.mend}", markup=False)
        if len(own) > show:
            out.print(f"{kind}: {len(own) - show} more: --show {len(own)}, or the findings' file", markup=False)
    path = out_dir / f"{engine.name}.findings.json"
    write_text(path, json.dumps([f.to_json() for f in found], indent=1) + "\n")
    out.print(f"wrote {path}", markup=False)


def _time(one: Sum) -> str:
    return "-" if one.milliseconds is None else f"{one.milliseconds:.3f}"
