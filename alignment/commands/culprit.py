"""``align culprit``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alignment.commands.console import Data, VariantName, out, require_folders, stage_bars
from alignment.errors import AlignError
from alignment.variant import Variant, load_variant

if TYPE_CHECKING:
    from alignment.engine.culprit import Culprit, Verdict
    from alignment.engine.gap import Comparison
    from alignment.engine.patterns import Suspicion
    from alignment.engine.qdq_backends import QdqBackend
    from alignment.quantize.pairs import QdqGraph


def culprit(
    variant: VariantName,
    qdq: Annotated[Path | None, typer.Option(help="the QDQ graph in question; default: the variant's own")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="what ONNX Runtime runs in its place, of the same nodes; default: the same")
    ] = None,
    backend: Annotated[
        Literal["tensorrt", "simulated"], typer.Option(help="simulated: ONNX Runtime with noise and planted faults")
    ] = "tensorrt",
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND:NODE", help="of simulated: scale, clip or per-tensor at a node; repeatable"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="compare on so many")] = 4,
    level: Annotated[int, typer.Option(min=0, max=5, help="builder optimization level of the search")] = 0,
    deployed_level: Annotated[
        int,
        typer.Option(min=0, max=5, help="the level that the answer is confirmed at; that of the search: not at all"),
    ] = 3,
    threshold: Annotated[float, typer.Option(min=0, help="a larger gap is bad; 1 is what noise explains")] = 3.0,
    blocks: Annotated[
        int, typer.Option(min=1, help="look at so many runs of nodes first, where the whole's noise hides a fault")
    ] = 1,
    limit: Annotated[int, typer.Option(min=1, help="stop after so many sets of nodes")] = 100,
    data: Data = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="folder for the repaired graph and culprit.json")
    ] = None,
) -> None:
    """Find the Q/DQ pairs that make an engine worse than the same QDQ graph in ONNX Runtime, and take them out.

    Exit status: 0 no gap, 1 a gap, 2 wrong input.  A search that was killed goes on where it was.
    """
    from alignment.engine.culprit import find
    from alignment.engine.gap import Comparison, Reference
    from alignment.engine.patterns import find_patterns
    from alignment.engine.qdq_backends import TensorRT
    from alignment.export.onnx_export import exported, modules_of

    require_folders({"--out": out_dir})
    chosen = load_variant(variant)
    candidate = _candidate(chosen, backend, fault or [], level)
    candidate.identity  # noqa: B018 - a backend that is not here is told before anything is computed
    subject, truth = _graphs(chosen, qdq, reference, data)
    _require_planted(candidate, subject)
    modules = modules_of(exported(chosen).onnx)
    asked = Reference(truth, _batch(chosen, data, images))
    with stage_bars(chosen.name) as show:
        total = 2 * math.ceil(math.log2(max(2, len(subject.int8_nodes)))) + 3 + (blocks if blocks > 1 else 0)

        def move(done: int) -> None:
            show("sets", done, max(done + 1, total))

        comparison = Comparison(subject, asked, candidate, threshold, progress=move)
        verdict = find(comparison, blocks, _weights(subject), modules, limit)
        confirms = isinstance(candidate, TensorRT) and verdict.culprits and deployed_level != level
        deployed = _deployed(chosen, comparison, verdict, deployed_level) if confirms else None
    patterns = find_patterns(subject, modules)
    _print(chosen, comparison, verdict, patterns, blocks)
    if deployed:
        what = "confirmed" if deployed["gap"] > threshold >= deployed["mended"] else "not confirmed"
        gaps = f"gap {deployed['gap']:.2f}, without them {deployed['mended']:.2f}"
        out.print(f"{what} at level {deployed_level}: {gaps}", markup=False)
    if out_dir:
        _write(out_dir, chosen, comparison, verdict, patterns, deployed)
    raise typer.Exit(0 if not verdict.culprits and verdict.found.closed else 1)


def _deployed(variant: Variant, searched: Comparison, verdict: Verdict, level: int) -> dict[str, float]:
    """The gap, and what is left of it without the culprits, in engines of another level."""
    from alignment.engine.gap import Comparison
    from alignment.engine.qdq_backends import TensorRT

    backend, threshold = TensorRT(variant, level), searched.threshold
    again = Comparison(searched.subject, searched.reference, backend, threshold, searched.own)
    return {"level": level, "gap": again.gap(again.units), "mended": again.gap(_kept(again, verdict))}


def _candidate(variant: Variant, backend: str, faults: list[str], level: int) -> QdqBackend:
    from alignment.engine.qdq_backends import Fault, Simulated, TensorRT

    if faults and backend != "simulated":
        raise AlignError(f"--fault {faults[0]}: TensorRT has faults of its own", "take --backend simulated")
    return Simulated(tuple(map(Fault.parse, faults))) if backend == "simulated" else TensorRT(variant, level)


def _require_planted(candidate: QdqBackend, graph: QdqGraph) -> None:
    """Raises AlignError for a fault that can never show."""
    for fault in getattr(candidate, "faults", ()):
        if fault.node not in graph.int8_nodes:
            raise AlignError(f"--fault {fault.kind}:{fault.node}: no node of this name reads int8", "mend that name")


def _graphs(variant: Variant, qdq: Path | None, reference: Path | None, data: Path | None) -> tuple[QdqGraph, QdqGraph]:
    """The graph in question, and what it is held to."""
    from alignment.quantize.pairs import QdqGraph
    from alignment.quantize.recipe import quantize

    subject = QdqGraph(quantize(variant, data, every=False).model) if qdq is None else _read(qdq)
    return subject, subject if reference is None else _read(reference)


def _read(path: Path) -> QdqGraph:
    from alignment.export.onnx_export import check_onnx
    from alignment.quantize.pairs import QdqGraph
    from alignment.runners.onnxruntime import open_session

    model = check_onnx(path)
    open_session(model, path, optimize=False)
    try:
        return QdqGraph(model)
    except AlignError as error:
        raise AlignError(f"{path}: {error.what}", error.mend) from None


def _batch(variant: Variant, data: Path | None, images: int) -> Any:
    import numpy as np

    from alignment.data.samples import open_samples

    return np.stack([sample.tensor for sample in open_samples(variant, data, images)])


def _weights(graph: QdqGraph) -> Callable[[str], float]:
    """By node, how many weights it reads: of nodes that are bad only together, the one with fewest goes."""
    counts: dict[str, int] = {}
    for pair in graph.pairs:
        counts[pair.node] = counts.get(pair.node, 0) + (graph.values(pair.tensor).size if pair.stored else 0)
    return lambda node: counts[node]


def _kept(comparison: Comparison, verdict: Verdict) -> list[str]:
    return [unit for unit in comparison.units if unit not in verdict.found.removal]


def _print(variant: Variant, comparison: Comparison, verdict: Verdict, patterns: list[Suspicion], blocks: int) -> None:
    found, backend = verdict.found, comparison.candidate.identity["backend"]
    lines = [
        f"{variant.name}: {len(comparison.units)} nodes read int8; a set of them is bad where {backend} is more than "
        f"{comparison.threshold:g} x as far from ONNX Runtime as noise, or half of what int8 costs, explains",
        f"gap of the whole {verdict.gap:.2f}; without any int8 {verdict.float_gap:.2f} x the noise of float16",
    ]
    for one in verdict.culprits:
        lines += _lines(one)
        lines += [f"  pattern: {finding}" for finding in patterns if finding.node in one.core]
    if verdict.culprits:
        lines.append(f"without them: gap {verdict.mended:.2f}")
    elif found.closed:
        lines.append("no gap" + ("" if blocks > 1 else "; --blocks 8 looks closer, at parts of the graph"))
    if not found.closed:
        lines.append(f"stopped after {found.questions} sets: what is wrong is not at a few nodes; --limit goes on")
    elif not found.needed:
        lines.append("not all of these are needed: the gap does not grow with the set")
    elsewhere = sorted({f.pattern for f in patterns} - {f.pattern for f in patterns if f.node in found.removal})
    if elsewhere:
        lines.append(f"patterns elsewhere: {', '.join(elsewhere)}")
    seconds = sum(one.seconds for one in comparison.measured.values())
    kept = len(comparison.measured) - comparison.builds
    lines.append(
        f"{found.questions} sets asked for, {comparison.builds} measured now, {kept} kept from before; {seconds:.0f} s "
        f"in {backend}"
    )
    out.print("\n".join(lines), markup=False)


def _lines(one: Culprit) -> Iterator[str]:
    module = f", {one.module}" if one.module else ""
    gap = f"gap {one.gap:.2f} alone, at {one.output}"
    shows = f"no engine comes of it alone: {one.failure}" if one.failure else gap
    yield f"culprit: {one.node} ({one.op}{module}): {shows}"
    if len(one.core) > 1:
        yield f"  bad only together: {', '.join(one.core)}"
    for tensor, scale in one.scales.items():
        yield f"  scale of {tensor}: {scale:.4g}"
    if one.weight_scales:
        yield f"  scales of its weights: {one.weight_scales[0]:.4g} to {one.weight_scales[1]:.4g}"
    for seen in one.tensors:
        doubt = "; marking it changed what is fused" if seen.fusion_changed else ""
        yield f"  {seen.role} {seen.tensor}: {seen.error:.2%} from ONNX Runtime, int8 itself {seen.int8:.2%}{doubt}"


def _write(
    folder: Path,
    variant: Variant,
    comparison: Comparison,
    verdict: Verdict,
    patterns: list[Suspicion],
    deployed: dict[str, float] | None,
) -> None:
    """``culprit.json``, and where there are culprits ``<variant>.repaired.onnx``, whose pairs are those that remain."""
    import onnx

    from alignment.storage import writing

    repaired = folder / f"{variant.name}.repaired.onnx"
    if verdict.culprits:
        with writing(repaired) as temporary:
            onnx.save(comparison.subject.without(verdict.found.removal), temporary)
        out.print(f"wrote {repaired}", markup=False)
    fields = {
        "variant": variant.name,
        "identity": comparison.identity,
        "threshold": comparison.threshold,
        "units": comparison.units,
        "verdict": asdict(verdict),
        "deployed": deployed,
        "patterns": [asdict(finding) for finding in patterns],
        "repaired": repaired.name if verdict.culprits else None,
        "measured": [{"gap": comparison.gap(one.units), **asdict(one)} for one in comparison.measured.values()],
    }
    with writing(folder / "culprit.json") as temporary:
        temporary.write_text(json.dumps(_finite(fields), indent=1) + "\n", encoding="utf-8")
    out.print(f"wrote {folder / 'culprit.json'}", markup=False)


def _finite(value: Any) -> Any:
    """The same with infinite numbers as text: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
