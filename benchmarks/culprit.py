"""The search for culprits on a real engine, or a simulated one: faults that were planted, and cases as they come.

    python -m benchmarks.culprit plant VARIANT --seeds 5 --out DIR        # one JSON file a fault
    python -m benchmarks.culprit natural VARIANT POLICY ... --out DIR     # one JSON file a policy
    python -m benchmarks.culprit table DIR                                # Markdown

``plant`` multiplies the scale of one layer's activation by 4 in the file that the backend gets; ONNX Runtime runs the
clean file.  A fault is taken where the simulated backend shows it, in the whole graph or in its block; those drawn
before it that the rounding of other layers hides are counted.  ``natural`` holds the engine of a whole QDQ graph to
ONNX Runtime on the same graph, by AP, agreement and gap, and searches where there is a gap.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import typer

from alignment.case import reference_of
from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.data.samples import open_samples
from alignment.engine.culprit import find
from alignment.engine.delta import cut
from alignment.engine.gap import THRESHOLD, Comparison, Reference
from alignment.engine.patterns import find_patterns
from alignment.engine.qdq_backends import Fault, NodeByNode, QdqBackend, Simulated, TensorRT
from alignment.models.outputs import detections_of, to_outputs
from alignment.nms.multiclass import Detections
from alignment.quantize.pairs import QdqGraph
from alignment.quantize.recipe import quantize
from alignment.runners.open import open_runner
from alignment.variant import Variant, load_variant, with_quantization
from benchmarks.int8 import detect

app = typer.Typer()
#: Images that go through a backend at once where AP is taken.
BATCH = 16
Out = Annotated[Path, typer.Option()]
Backend = Annotated[Literal["tensorrt", "simulated"], typer.Option()]
Images = Annotated[int, typer.Option(help="of the search")]
Level = Annotated[int, typer.Option(help="builder optimization level")]
Blocks = Annotated[int, typer.Option(help="runs of nodes that are looked at first")]


def candidate_of(variant: Variant, backend: str, level: int) -> QdqBackend:
    """The backend under test; simulated, it has noise and no faults."""
    return TensorRT(variant, level) if backend == "tensorrt" else Simulated(seed=1)


def reference_for(variant: Variant, model: onnx.ModelProto, images: int) -> Reference:
    """ONNX Runtime on parts of a graph, on the first images."""
    return Reference(QdqGraph(model), np.stack([sample.tensor for sample in open_samples(variant, limit=images)]))


def draw(clean: Reference, seed: int, blocks: int, wanted: float = THRESHOLD) -> tuple[Fault, float, int]:
    """A fault that shows, the gap that the simulated backend has with it, and how many were drawn before it."""
    units = clean.graph.int8_nodes
    own = Comparison(clean.graph, clean, Simulated(seed=2)).own
    quantized = {pair.node for pair in clean.graph.pairs if not pair.stored}
    for hidden, unit in enumerate(np.random.default_rng(seed).permutation([one for one in units if one in quantized])):
        fault = Fault("scale", str(unit))
        comparison = Comparison(clean.graph, clean, Simulated((fault,), seed=2), own=own)
        shown = max(comparison.gap(part) for part in (units, *(b for b in cut(units, blocks) if unit in b)))
        if shown >= wanted:
            return fault, shown, hidden
    raise SystemExit(f"no layer's scale shows when multiplied by 4 (seed {seed}): take more --blocks")


@app.command()
def plant(
    variant: str,
    seeds: Annotated[int, typer.Option(help="so many faults")] = 5,
    first: Annotated[int, typer.Option(help="their first seed")] = 0,
    backend: Backend = "tensorrt",
    images: Images = 4,
    level: Level = 0,
    blocks: Blocks = 8,
    threshold: float = THRESHOLD,
    out: Out = Path("culprit"),
) -> None:
    """One layer's scale × 4 in the backend's file, the clean file in ONNX Runtime: is the layer found."""
    chosen = load_variant(variant)
    clean = reference_for(chosen, quantize(chosen, every=False).model, images)
    candidate = candidate_of(chosen, backend, level)
    healthy = Comparison(clean.graph, clean, candidate, threshold)
    before = {"healthy_gap": healthy.gap(healthy.units), "float_gap": healthy.float_gap}
    for seed in range(first, first + seeds):
        fault, shown, hidden = draw(clean, seed, blocks)
        bad = QdqGraph(fault.planted(clean.graph))
        # The engine where nothing is int8 is that of the clean file.
        comparison = Comparison(bad, clean, candidate, threshold, healthy.own)
        start = time.perf_counter()
        verdict = find(comparison, blocks)
        fields = {
            "planted": fault.node,
            "found": verdict.found.removal,
            "exact": verdict.found.removal == (fault.node,),
            "closed": verdict.found.closed,
            "questions": verdict.found.questions,
            "builds": comparison.builds,
            "seconds": round(time.perf_counter() - start),
            "backend_s": round(sum(one.seconds for one in comparison.measured.values())),
            "gap": verdict.gap,
            "gap_alone": verdict.culprits[0].gap if verdict.culprits else None,
            "mended": verdict.mended,
            "tensors": [asdict(tensor) for culprit in verdict.culprits for tensor in culprit.tensors],
            "simulated_gap": shown,
            "hidden_before": hidden,
            "units": len(comparison.units),
            **before,
        }
        written(out, variant, f"plant-{seed}", backend, fields, threshold, blocks)


@app.command()
def natural(
    variant: str,
    policies: Annotated[list[str], typer.Argument()],
    method: Annotated[str | None, typer.Option(help="of activations; default: the variant's own")] = None,
    backend: Backend = "tensorrt",
    images: Images = 4,
    level: Level = 0,
    blocks: Blocks = 1,
    threshold: float = THRESHOLD,
    always: Annotated[bool, typer.Option(help="search the parts also where the whole has no gap")] = False,
    out: Out = Path("culprit"),
) -> None:
    """The engine of a whole QDQ graph against ONNX Runtime on the same graph; where there is a gap, the search."""
    for policy in policies:
        changes = {"policy": policy} | ({"method": method} if method else {})
        chosen = with_quantization(load_variant(variant), changes)
        model = quantize(chosen, every=False).model
        asked = reference_for(chosen, model, images)
        candidate = candidate_of(chosen, backend, level)
        comparison = Comparison(asked.graph, asked, candidate, threshold)
        whole = comparison.gap(comparison.units)
        fields: dict[str, Any] = {"policy": policy, "method": chosen.quantization.method, "gap": whole}
        fields |= {"float_gap": comparison.float_gap, "gaps": comparison.gaps(comparison.units)}
        fields["patterns"] = [str(finding) for finding in find_patterns(asked.graph)]
        fields["scores"] = scores(chosen, {"onnxruntime": (NodeByNode(), model), backend: (candidate, model)})
        if whole > threshold or always:
            verdict = find(comparison, blocks)
            fields |= {"verdict": asdict(verdict), "builds": comparison.builds}
            fields["backend_s"] = round(sum(one.seconds for one in comparison.measured.values()))
            if verdict.culprits:
                mended = asked.graph.without(verdict.found.removal)
                repaired = {"onnxruntime": (NodeByNode(), mended), backend: (candidate, mended)}
                fields["repaired_scores"] = scores(chosen, repaired)
        name = f"natural-{policy}" + (f"-{method}" if method else "")
        written(out, variant, name, backend, fields, threshold, blocks)


def scores(variant: Variant, sides: dict[str, tuple[QdqBackend | NodeByNode, onnx.ModelProto]]) -> dict[str, Any]:
    """AP, and agreement with FP32, of each side, and how far the second agrees with the first."""
    samples = open_samples(variant)
    with open_runner(variant, reference_of(variant)) as runner:
        reference = detect(variant, runner)
    found = {name: _detections(variant, *side) for name, side in sides.items()}
    measured: dict[str, Any] = {"reference_ap": coco_ap(samples.dataset, reference)[0]}
    for name, detections in found.items():
        agreement = agreement_ap(samples.dataset, reference, detections)
        measured[name] = {"ap": coco_ap(samples.dataset, detections)[0], "agreement": agreement}
    first, second = found.values()
    return measured | {"mutual_agreement": agreement_ap(samples.dataset, first, second)}


def _detections(variant: Variant, backend: QdqBackend | NodeByNode, model: onnx.ModelProto) -> dict[int, Detections]:
    found: dict[int, Detections] = {}
    waiting: list[Any] = []
    samples = open_samples(variant)
    for number, sample in enumerate(samples, 1):
        waiting.append(sample)
        if len(waiting) == BATCH or number == len(samples):
            outputs = backend.outputs(model, np.stack([one.tensor for one in waiting]))
            for one, image in zip(waiting, to_outputs(outputs, variant, len(waiting)).images(), strict=True):
                found[one.entry.id] = detections_of(image, one.transform, variant)
            waiting = []
    return found


def written(
    out: Path, variant: str, name: str, backend: str, fields: dict[str, Any], threshold: float, blocks: int
) -> None:
    """One JSON file, and one line."""
    out.mkdir(parents=True, exist_ok=True)
    known = {"variant": variant, "case": name, "backend": backend, "threshold": threshold, "blocks": blocks}
    (out / f"{variant}-{name}-{backend}.json").write_text(json.dumps(known | fields, indent=1) + "\n", encoding="utf-8")
    shown = ("planted", "found", "exact", "builds", "questions", "seconds", "gap", "mended", "healthy_gap", "scores")
    print(json.dumps(known | {key: fields[key] for key in shown if key in fields}), flush=True)


@app.command()
def table(folder: Path) -> None:
    """What was planted, and how it was found, as Markdown."""
    print("| variant | backend | layer | found | sets | built | s | gap | alone | mended |\n|-|-|-|-|-|-|-|-|-|-|")
    for path in sorted(folder.glob("*-plant-*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        answer = "yes" if one["exact"] else ", ".join(one["found"]) or "no"
        cells = [
            one["variant"],
            one["backend"],
            one["planted"],
            answer,
            one["questions"],
            one["builds"],
            one["seconds"],
        ]
        numbers = ["-" if one[key] is None else f"{one[key]:.2f}" for key in ("gap", "gap_alone", "mended")]
        print(f"| {' | '.join(map(str, [*cells, *numbers]))} |")


if __name__ == "__main__":
    app()
