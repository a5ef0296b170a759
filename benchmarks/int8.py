"""Every way to INT8 on TensorRT, in one table: accuracy, agreement with FP32, latency, reformats.

    python -m benchmarks.int8 measure VARIANT ROW ... --out DIR     # one JSON file a row
    python -m benchmarks.int8 latency VARIANT ROW ... --out DIR     # alone on the GPU, nothing else running
    python -m benchmarks.int8 floor VARIANT ROW ... --out DIR       # one int8 graph, torch and ONNX Runtime
    python -m benchmarks.int8 table DIR                             # Markdown

Rows are ``fp32``, ``fp16``, or ``ROUTE`` with changes to the variant's recipe: ``qdq:method=mse,policy=full``,
``dynamic_range``, ``implicit_entropy2:plain`` (plain: no layer is bound to float, as most people use calibrators).
Agreement is the AP with the detections of torch in FP32 of score >= 0.3 as truth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from alignment.case import Case, reference_of
from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.data.samples import open_samples
from alignment.engine.inspect import reformats
from alignment.models import outputs
from alignment.nms.multiclass import Detections
from alignment.runners.base import Runner
from alignment.runners.int8 import TensorRTBuild, quantized_for, tensorrt_build
from alignment.runners.open import open_runner, tensorrt_float
from alignment.variant import Variant, load_variant, with_quantization

app = typer.Typer()
REPEATS = 200
Rows = Annotated[list[str], typer.Argument()]
Out = Annotated[Path, typer.Option()]
Level = Annotated[int, typer.Option(help="builder optimization level")]


def parse(variant: Variant, row: str) -> tuple[Variant, str, bool]:
    """The variant with the row's recipe, the route or precision, and whether no layer is bound to float."""
    route, _, text = row.partition(":")
    words = [word for word in text.split(",") if word]
    changes: dict[str, Any] = dict(word.split("=") for word in words if "=" in word)
    if "keep_float" in changes:
        changes["keep_float"] = [pattern for pattern in changes["keep_float"].split("|") if pattern]
    return with_quantization(variant, changes), route, "plain" in words


def build_of(variant: Variant, row: str, level: int, batch: int = 1) -> TensorRTBuild:
    """What TensorRT is given for a row."""
    changed, route, plain = parse(variant, row)
    if route in ("fp32", "fp16", "tf32"):
        path, options = tensorrt_float(changed, Case(variant.name, "tensorrt", route), batch)  # type: ignore[arg-type]
        given = TensorRTBuild(path, options, None)
    else:
        case = Case(variant.name, "tensorrt", "int8", route)  # type: ignore[arg-type]
        given = tensorrt_build(changed, case, quantized_for(changed, case), batch)
    options = dataclasses.replace(given.options, optimization_level=level)
    if plain:
        options = dataclasses.replace(options, float16_nodes=(), float32_nodes=())
    return given._replace(options=options)


def detect(variant: Variant, runner: Runner) -> dict[int, Detections]:
    """Detections of all images."""
    return outputs.detect(open_samples(variant), runner.run)


def written(out: Path, variant: str, row: str, kind: str, fields: dict[str, Any]) -> None:
    """One JSON file, and one line."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = row.replace("/", "_").replace("*", "+")
    if len(recipe) > 100:  # names of files end at 255 bytes
        recipe = f"{recipe[:80]}-{hashlib.sha256(row.encode()).hexdigest()[:8]}"
    name = f"{variant}-{recipe}-{kind}"
    text = json.dumps({"variant": variant, "row": row, "kind": kind, **fields})
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


@app.command()
def measure(variant: str, rows: Rows, out: Out = Path("int8"), level: Level = 0) -> None:
    """AP and agreement with torch in FP32, on TensorRT."""
    from alignment.runners.tensorrt import TensorRTRunner

    chosen = load_variant(variant)
    samples = open_samples(chosen)
    with open_runner(chosen, reference_of(chosen)) as runner:
        reference = detect(chosen, runner)
    truth = coco_ap(samples.dataset, reference)[0]
    for row in rows:
        start = time.perf_counter()
        given = build_of(chosen, row, level)
        quantized = time.perf_counter() - start
        with TensorRTRunner(*given) as runner:
            built = time.perf_counter() - start - quantized
            found = detect(chosen, runner)
            fields = {
                "ap": coco_ap(samples.dataset, found)[0],
                "reference_ap": truth,
                "agreement": agreement_ap(samples.dataset, reference, found),
                "level": level,
                "reformats": reformats(runner.layers()),
                "layers": len(runner.layers()),
                "quantize_s": round(quantized),
                "build_s": round(built),
            }
        written(out, variant, row, "accuracy", fields)


@app.command()
def cpu(variant: str, rows: Rows, out: Out = Path("int8")) -> None:
    """AP and agreement with torch in FP32 of the QDQ graph in ONNX Runtime, node by node."""
    chosen = load_variant(variant)
    samples = open_samples(chosen)
    with open_runner(chosen, reference_of(chosen)) as runner:
        reference = detect(chosen, runner)
    truth = coco_ap(samples.dataset, reference)[0]
    for row in rows:
        with open_runner(parse(chosen, row)[0], Case(variant, "onnxruntime", "int8", "qdq")) as runner:
            found = detect(chosen, runner)
        ap, agreement = coco_ap(samples.dataset, found)[0], agreement_ap(samples.dataset, reference, found)
        written(out, variant, row, "onnxruntime", {"ap": ap, "reference_ap": truth, "agreement": agreement})


@app.command()
def floor(variant: str, rows: Rows, out: Out = Path("int8")) -> None:
    """How near one int8 graph is to itself: torch to ONNX Runtime, and torch to torch without oneDNN's convolutions.

    Where two float32 sums end on two sides of a rounding step, a whole step follows: two implementations cannot be
    nearer to each other than one is to itself when it sums in another order.
    """
    import torch

    chosen = load_variant(variant)
    samples = open_samples(chosen)
    for row in rows:
        recipe = parse(chosen, row)[0]
        found = {}
        for backend in ("onnxruntime", "torch"):
            with open_runner(recipe, Case(variant, backend, "int8", "qdq")) as runner:  # type: ignore[arg-type]
                found[backend] = detect(recipe, runner)
        other = open_runner(recipe, Case(variant, "torch", "int8", "qdq"))
        with other as runner, torch.backends.mkldnn.flags(enabled=False):
            found["torch, other sums"] = detect(recipe, runner)
        fields: dict[str, Any] = {f"ap_{side}": coco_ap(samples.dataset, boxes)[0] for side, boxes in found.items()}
        for side in ("onnxruntime", "torch, other sums"):
            fields[f"torch - {side}"] = agreement_ap(samples.dataset, found["torch"], found[side])
        written(out, variant, row, "floor", fields)


@app.command()
def build(variant: str, rows: Rows, level: Level = 3, batch: int = 1, out: Out = Path("int8")) -> None:
    """Fills the cache of engines, so that `latency` has nothing to build."""
    from alignment.runners.tensorrt import TensorRTRunner

    for row in rows:
        start = time.perf_counter()
        with TensorRTRunner(*build_of(load_variant(variant), row, level, batch)) as runner:
            layers = runner.layers()
        fields = {"seconds": round(time.perf_counter() - start), "level": level, "batch": batch}
        text = [[layer.name, layer.kind, layer.types, layer.metadata] for layer in layers]
        written(out, variant, row, f"layers-{batch}", {**fields, "reformats": reformats(layers), "layers": text})


@app.command()
def latency(variant: str, rows: Rows, level: Level = 3, batch: int = 1, out: Out = Path("int8")) -> None:
    """Median of `REPEATS` runs of one batch, milliseconds on the GPU."""
    from alignment.runners.tensorrt import TensorRTRunner

    chosen = load_variant(variant)
    images = np.stack([sample.tensor for _, sample in zip(range(batch), open_samples(chosen), strict=False)])
    for row in rows:
        with TensorRTRunner(*build_of(chosen, row, level, batch)) as runner:
            times = runner.latency(images, REPEATS, 50)
            layers = runner.layers()
        fields = {"ms": float(np.median(times)), "level": level, "batch": batch, "layers": len(layers)}
        written(out, variant, row, f"latency-{batch}", {**fields, "reformats": reformats(layers)})


@app.command()
def table(folder: Path) -> None:
    """All that was measured, as Markdown."""
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows.setdefault((found["variant"], found["row"]), {})[found["kind"]] = found
    print("| variant | row | AP | ΔAP | agreement | ms, batch 1 | ms, batch 16 | reformats |\n|-|-|-|-|-|-|-|-|")
    for (variant, row), kinds in rows.items():
        score = kinds.get("accuracy") or kinds.get("onnxruntime") or {}
        one, many = (kinds.get(f"latency-{batch}", {}) for batch in (1, 16))
        cells = [
            _cell(score.get("ap"), "{:.4f}"),
            _cell(score["ap"] - score["reference_ap"] if score else None, "{:+.4f}"),
            _cell(score.get("agreement"), "{:.4f}"),
            _cell(one.get("ms"), "{:.3f}"),
            _cell(many.get("ms"), "{:.3f}"),
            _cell(one.get("reformats", score.get("reformats")), "{}"),
        ]
        print(f"| {variant} | {row} | {' | '.join(cells)} |")


def _cell(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)


if __name__ == "__main__":
    app()
