"""The cases of ``python -m benchmarks``, by name."""

from __future__ import annotations

from benchmarks.cases import (
    calibration,
    comparison,
    detection,
    explanation,
    export,
    mean_ap,
    nms,
    report,
    rotated,
    run,
    sensitivity,
    tensorrt,
)
from benchmarks.harness import Case

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        calibration.CASE,
        comparison.CASE,
        nms.CASE,
        mean_ap.CASE,
        sensitivity.BY_LAYERS,
        sensitivity.BY_IMAGES,
        explanation.CASE,
        export.CASE,
        report.CASE,
        rotated.CASE,
        detection.CASE,
        run.CASE,
        tensorrt.ENGINES,
        tensorrt.DETECTION,
        tensorrt.PLUGIN,
    )
}
