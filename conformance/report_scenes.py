"""RUN folders for tests of the report: one that holds everything, and one as heavy as that of all embedded variants."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from engines import convolution, engine, reformat
from test_report import INJECTION, case, failing, png, stats, worst

from alignment.case import ROUTES
from alignment.gate.judge import gate
from alignment.gate.policy import load_policy
from alignment.gate.results import Change, LayerChange
from alignment.quantize.partial_result import PARTIAL, Goal, PartialResult, Point, Ranking, Reference
from alignment.quantize.sensitivity import LayerSensitivity, Sensitivity
from alignment.report.run_folder import to_json, write_run
from alignment.results import (
    STAGES,
    Alignment,
    CauseCount,
    Check,
    EngineFacts,
    ExplainedBox,
    Explanation,
    Ladder,
    Rung,
    RungScore,
    Scores,
    StageResult,
    TensorResult,
    Timing,
)

VARIANT = "yolov8_n"
FAILS = "yolov8_n-tensorrt-fp16"
MORE = "yolov8_n-onnxruntime-fp32"


def explanation() -> Explanation:
    """Two causes, one box of each, and a crop."""
    told = {"image_id": 3, "label": 0, "label_name": INJECTION, "score": 0.31, "reference": "kept", "subject": "gone"}
    boxes = [
        ExplainedBox(row=7, cause="topk", replay=INJECTION, **told),
        ExplainedBox(row=9, cause="score_threshold", replay="as the reference has it", **told),
    ]
    return Explanation(
        id=f"{VARIANT}-efficient_nms",
        reference="a",
        subject=INJECTION,
        images=4,
        reference_detections=9,
        subject_detections=7,
        differing=2,
        unexplained=0,
        causes=[CauseCount(cause="topk", boxes=1), CauseCount(cause=INJECTION, boxes=1, ap_without=0.5)],
        boxes=boxes,
        worst=[worst("pictures/a.png")],
        notes=[INJECTION],
    )


def ladder() -> Ladder:
    """Three rungs on two backends."""
    rungs = [("FP32", 0.0, 0.37, 1.0), ("PTQ", 0.9, 0.34, 0.9), (f"QAT {INJECTION}", 0.9, 0.36, 0.95)]
    return Ladder(
        variant=VARIANT,
        images=128,
        reference="yolov8_n-torch-fp32",
        rungs=[
            Rung(
                name=name,
                how=INJECTION,
                command=f"align quantize {INJECTION}",
                float_nodes=3,
                int8_macs=share,
                scores=[RungScore(backend=each, ap=ap, agreement_ap=agreed) for each in ("torch", "onnxruntime")],
            )
            for name, share, ap, agreed in rungs
        ],
        missing={"tensorrt": INJECTION},
    )


def sweep() -> Sensitivity:
    """Three layers, the second the most sensitive."""
    costs = {"first": 0.01, f"second {INJECTION}": 0.2, "third": 0.05}
    layers = [
        LayerSensitivity(node=node, module="", macs=10, metrics={"agreement": cost, "sqnr": 9 - 20 * cost})
        for node, cost in costs.items()
    ]
    shared = {"mode": "quantize-one", "part": "both", "identity": {"recipe": INJECTION}, "images": 4}
    return Sensitivity(variant=VARIANT, baseline={"ap": 0.3}, layers=tuple(layers), **shared)


def search() -> PartialResult:
    """Three sets, the second chosen."""
    points = [
        Point([], 1.0, 0.33, 0.04, 0.8),
        Point([INJECTION], 0.9, 0.36, 0.01, 0.95, 1.5),
        Point(["a", "b"], 0.8, 0.37, 0.0, 0.97, 2.5),
    ]
    return PartialResult(
        variant=VARIANT,
        goal=Goal("layers", 1),
        reached=True,
        images=4,
        reference=Reference(ap=0.37, agreement=1.0),
        ranking=Ranking(metric="agreement", mode="quantize-one", nodes=[INJECTION]),
        chosen=points[1],
        ways={"all in int8": points[0], INJECTION: points[1]},
        points=points,
    )


def write_everything(folder: Path) -> Alignment:
    """All that a report can hold, each with markup in its names; one case fails, and the gate stops it."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures/a.png").write_bytes(png())
    run = Alignment(
        created="2025-06-01T12:00:00+00:00",
        command=f"align run {INJECTION}",
        machine={"gpu": INJECTION},
        dataset={VARIANT: {"root": INJECTION, "split": "val", "images": 128}},
        cases=[
            failing().model_copy(update={"command": f"align run {INJECTION}", "engine": facts()}),
            case(MORE, "pass", timing=Timing(inference_s=0.5, images=128, latency_ms=3.5, clock="wall", batch=1)),
            case("<b>other-tensorrt-int8", "skip").model_copy(update={"reason": INJECTION}),
        ],
        explanations=[explanation()],
        ladders=[ladder()],
    )
    sweep().save(folder / "a.sensitivity.json")
    (folder / "partial").mkdir()
    (folder / "partial" / PARTIAL).write_text(search().model_dump_json())
    layers = [convolution("a", "x:Half", "a:Half", weights="Half"), reformat(f"b {INJECTION}", "a:Half", "b:Int8")]
    made = engine(*layers, times={"a": 0.5})
    replace(made, name=f"{FAILS}-level0", provenance={"gpu": INJECTION}).save(folder / f"{FAILS}.engine.json")
    verdict = gate(run, load_policy(None), papers=(INJECTION, ""))
    verdict.layers.append(LayerChange(variant=VARIANT, stage="raw", layer=f"/backbone/{INJECTION}", reason="planted"))
    verdict.changes.append(Change(field="tensorrt", before="8.6.1", after=INJECTION, cases=[FAILS]))
    (folder / "gate.json").write_text(to_json(verdict))
    write_run(run, folder)
    return run


def facts() -> EngineFacts:
    """Of an engine."""
    return EngineFacts(layers=90, reformats=4, size_bytes=7_100_000)


def write_heavy(folder: Path, variants: int = 8) -> Alignment:
    """As many cases, checks, tensors, boxes and bytes of pictures as a run of all embedded variants on every backend.

    Measured: 104 cases, 10 tensors each, 76 pictures of 23 kB, and three worst images of 9 boxes a side for each case
    that was run live: here for all, as on a GPU.
    """
    (folder / "pictures").mkdir(parents=True)
    chance = random.Random(0)
    cases = []
    for number in range(variants):
        name = f"variant{number}_embedded"
        pictures = [f"pictures/{name}-{image}.jpg" for image in range(10)]
        for picture in pictures:
            (folder / picture).write_bytes(b"\xff\xd8\xff" + chance.randbytes(23_000))
        whole = [("torch", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("tensorrt", "fp32")]
        routed = [("torch", "qdq"), ("onnxruntime", "qdq"), *(("tensorrt", route) for route in ROUTES)]
        plan = [*((b, p, None) for b, p in whole), ("tensorrt", "fp16", None), *((b, "int8", r) for b, r in routed)]
        for backend, precision, route in plan:
            cases.append(_heavy_case(name, backend, precision, route, chance.sample(pictures, 3)))
    run = Alignment(created="2025-06-01T12:00:00+00:00", command="align run", cases=cases)
    write_run(run, folder)
    return run


def _heavy_case(name: str, backend: str, precision: str, route: str | None, pictures: list[str]):
    tensors = [
        TensorResult(name=f"tensor{place}", unit="raw", difference=stats(0.1), reference_error=stats(1e-5))
        for place in range(5)
    ]
    origin = "measured 0.00053 × 3, at most 0.02, over 64 images (tensorrt 8.6.1, gpu H200, 2026-11-23)"
    checks = [Check(name=word, value=0.5, limit="<= 1", ok=True, origin=origin) for word in ("boxes", "scores")]
    stages = [
        StageResult(name=stage, status="pass", checks=checks, tensors=tensors if stage in ("raw", "decoded") else [])
        for stage in STAGES
    ]
    image = worst(pictures[0])
    sides = {"reference": image.reference[:1] * 9, "subject": image.subject[:1] * 9}
    papers = {f"field{number}": {"digest": "0123456789abcdef" * 4} for number in range(6)}
    made = case(
        f"{name}-{backend}-{precision}",
        "pass",
        images=64,
        stages=stages,
        scores=Scores(reference_ap=0.7, subject_ap=0.69, subject_ap50=0.9, agreement_ap=0.95),
        timing=Timing(inference_s=0.2, images=64, latency_ms=3.1, clock="gpu", batch=1),
        worst=[image.model_copy(update={"picture": picture, **sides}) for picture in pictures],
        provenance=papers,
        reference_provenance={"digest": "0123456789abcdef" * 4},
    )
    if route:
        own = made.case.model_copy(update={"route": route, "id": f"{made.case.id}-{route}"})
        made = made.model_copy(update={"case": own})
    return made
