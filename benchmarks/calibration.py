"""What calibration costs, in one table: time beside that of bare inference, and memory.

    python -m benchmarks.calibration yolov8_n --images 64 --repeats 3

Every contestant runs in a process of its own, in turns, on the same preprocessed images, which lie in files.  Bare is
ONNX Runtime on the graph as it is, with the session options that calibration has; the row below it has ONNX Runtime's
own, whose idle threads spin: that costs time where something else runs.  Ours is `calibrate` for every tensor, and
every range by one method; the others also quantize weights and write a QDQ graph.  Some of them keep all tensors of all
images: they get fewer images, and their ratio is that of the time per image.  modelopt is looked for in an interpreter
of its own, ``--modelopt-python``, as it brings its own ONNX Runtime.

``--accuracy`` adds AP and agreement, as `benchmarks.int8` has them, of the QDQ graphs in ONNX Runtime, node by node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer

from alignment.case import reference_of
from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.data.samples import CALIBRATION_SPLIT, open_samples
from alignment.export.onnx_export import exported
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.open import open_runner
from alignment.variant import Variant, load_variant
from benchmarks.int8 import detect


@dataclass
class Contestant:
    """A row of the table.

    Attributes:
        name: in the table.
        kind, option: what `benchmarks.contestants` is to do.
        greedy: keeps all tensors of all images.
        runs: what it printed, run by run.
        fault: why there are none.
    """

    name: str
    kind: str
    option: str = ""
    greedy: bool = False
    runs: list[dict[str, float]] = field(default_factory=list)
    fault: str = ""


def contestants() -> list[Contestant]:
    """In the order of the table, bare inference first."""
    return [
        Contestant("bare inference", "bare"),
        Contestant("bare inference, threads that spin", "bare", "spinning"),
        Contestant("ours, histogram", "ours", "histogram"),
        Contestant("ours, entropy", "ours", "entropy"),
        Contestant("ours, mse", "ours", "mse"),
        Contestant("ours, histogram, reading and preprocessing too", "ours", "histogram files"),
        Contestant("quantize_static, MinMax", "onnxruntime", "MinMax"),
        Contestant("quantize_static, Entropy", "onnxruntime", "Entropy", greedy=True),
        Contestant("quantize_static, Percentile", "onnxruntime", "Percentile", greedy=True),
        Contestant("modelopt, max", "modelopt", "max"),
        Contestant("modelopt, entropy", "modelopt", "entropy", greedy=True),
    ]


def run(contestant: Contestant, job: dict[str, Any], python: str, timeout: float) -> None:
    """One run; a contestant that fails says why, and is not run again."""
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps({**job, "kind": contestant.kind, "option": contestant.option, "folder": folder})
        command = [python, "-m", "benchmarks.contestants", given]
        root = str(Path(__file__).parent.parent)
        environment = os.environ | {"ALIGN_CACHE": folder, "PYTHONPATH": root}
        try:
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)
        except (OSError, subprocess.TimeoutExpired) as error:
            contestant.fault = str(error) if isinstance(error, OSError) else f"not done in {timeout:.0f} s"
            return
    lines = (done.stdout if not done.returncode else done.stderr).strip().splitlines() or ["nothing was printed"]
    if done.returncode:
        contestant.fault = f"exit status {done.returncode}: {lines[-1][:200]}"
    else:
        contestant.runs.append({**json.loads(lines[-1]), "images": job["count"]})
    print(f"{contestant.name}: {contestant.fault or lines[-1]}", file=sys.stderr, flush=True)


def accuracy(variant: Variant, paths: dict[str, Path]) -> dict[str, tuple[float, float]]:
    """AP and agreement with torch in FP32, by name."""
    samples = open_samples(variant)
    with open_runner(variant, reference_of(variant)) as runner:
        reference = detect(variant, runner)
    found = {}
    for name, path in paths.items():
        with OnnxRuntimeRunner(path, optimize=False) as runner:
            detections = detect(variant, runner)
        found[name] = coco_ap(samples.dataset, detections)[0], agreement_ap(samples.dataset, reference, detections)
    return found


def table(rows: list[Contestant], scores: dict[str, tuple[float, float]]) -> None:
    """Prints Markdown: medians, and of ratios the least and the largest of the runs too."""
    base = np.array([[run["seconds"], run["processor"]] for run in rows[0].runs]) / rows[0].runs[0]["images"]
    print("| contestant | images | s | processor s | s ÷ bare | processor s ÷ bare | peak MB | of it imports |", end="")
    print(f"{' AP | agreement |' if scores else ''}\n|{'-|' * (10 if scores else 8)}")
    for row in rows:
        if not row.runs:
            print(f"| {row.name} | {row.fault or 'not run'} |")
            continue
        images = row.runs[0]["images"]
        taken = np.array([[run["seconds"], run["processor"]] for run in row.runs])
        ratios = taken / images / base[: len(taken)]  # of one turn: what else the machine does slows both
        cells = [f"{images:.0f}", *(f"{value:.1f}" for value in np.median(taken, 0))]
        cells += [f"{np.median(one):.2f} ({one.min():.2f} to {one.max():.2f})" for one in ratios.T]
        cells += [f"{np.median([run[key] for run in row.runs]):.0f}" for key in ("peak", "imports")]
        if scores:
            cells += [f"{value:.4f}" for value in scores[row.name]] if row.name in scores else ["-", "-"]
        print(f"| {row.name} | {' | '.join(cells)} |")


def main(
    variant: str,
    images: int = 64,
    repeats: int = 3,
    greedy_images: Annotated[int, typer.Option(help="of those that keep all tensors of all images")] = 8,
    only: Annotated[str, typer.Option(help="those whose names hold one of these words, and bare inference")] = "",
    modelopt_python: Annotated[Path | None, typer.Option(help="an interpreter that has nvidia-modelopt")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that a run may take")] = 900,
    accuracy_too: Annotated[bool, typer.Option("--accuracy")] = False,
) -> None:
    """Runs all contestants in turns, and prints a table."""
    chosen = load_variant(variant)
    model = exported(chosen).onnx
    rows = [row for row in contestants() if row.kind == "bare" or any(w in row.name for w in only.split(",") or [""])]
    with tempfile.TemporaryDirectory() as folder:
        samples = open_samples(chosen, limit=images, split=CALIBRATION_SPLIT)
        for index, entry in enumerate(samples.dataset.images):
            np.save(Path(folder) / f"{index}.npy", samples.load(entry).tensor)
        name = onnx.load(model, load_external_data=False).graph.input[0].name
        job = {"model": str(model), "variant": variant, "images": folder, "input": name}
        graphs = {}
        for _ in range(repeats):
            for row in rows:
                if row.kind == "modelopt" and modelopt_python is None:
                    row.fault = "skipped: no --modelopt-python"
                if row.fault:
                    continue
                python = str(modelopt_python) if row.kind == "modelopt" else sys.executable
                count = min(images, greedy_images) if row.greedy else len(samples)
                run(row, {**job, "count": count, "out": ""}, python, timeout)
        if accuracy_too:
            for row in (row for row in rows if row.runs and row.kind != "bare" and not row.option.endswith("files")):
                graphs[row.name] = Path(folder) / f"{row.kind}-{row.option}.onnx"
                python = str(modelopt_python) if row.kind == "modelopt" else sys.executable
                given = {**job, "count": int(row.runs[0]["images"]), "out": str(graphs[row.name])}
                run(Contestant(row.name, row.kind, row.option), given, python, timeout)
        there = {name: path for name, path in graphs.items() if path.is_file()}
        scores = accuracy(chosen, there) if there else {}
    table(rows, scores)


if __name__ == "__main__":
    typer.run(main)
