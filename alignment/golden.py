"""Golden values: the tolerances and scores that a case is held to, each with its origin."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field

from alignment.case import Case
from alignment.errors import AlignError
from alignment.reading import checked, read_yaml
from alignment.results import CaseResult
from alignment.storage import locked, writing

Quantity = Literal[
    "raw", "boxes", "angles", "scores", "agreement", "agreement_ap", "delta_ap", "twin_agreement_ap", "twin_delta_ap"
]
#: Those that are a minimum; the others are a maximum.
MINIMA: tuple[Quantity, ...] = ("agreement", "agreement_ap", "twin_agreement_ap")
RATES: tuple[Quantity, ...] = (*MINIMA, "delta_ap", "twin_delta_ap")
#: Tolerance = measured error × FACTOR: other CPUs and library builds sum in another order.
#: Where nothing differs at all, one detection in a thousand may, by a score on the other side of a threshold.
FACTOR = 3.0
#: Half the width of the band around a golden AP; a result outside it, better or worse, fails.
AP_MARGIN = 0.002
MIN_LOSS, MIN_DELTA_AP = 0.001, 0.0005
#: The same two for int8: rounding to steps is not continuous, so that another CPU's last bits move whole steps.  Torch
#: and ONNX Runtime, computing the same int8 graph, come to AP that differ by up to 0.003.
INT8_AP_MARGIN, INT8_MIN_DELTA_AP = 0.005, 0.005
#: And where much differs, a multiple would allow anything: a rate may be worse by this much at most, and AP by that.
MORE_LOSS, MORE_DELTA_AP = 0.05, 0.01
#: What the project promises by precision: no golden limit is looser, where what was measured keeps the promise.
PROMISED: dict[str, dict[Quantity, float]] = {
    "fp32": {"boxes": 0.02, "scores": 1e-4, "delta_ap": 0.001},
    "fp16": {"delta_ap": 0.003},
}

_UNMEASURED = "default, nothing measured yet"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Tolerance(_Strict):
    """One limit: a minimum for the quantities of `MINIMA`, a maximum for the others."""

    value: Annotated[float, Field(ge=0)]
    origin: str


class GoldenAp(_Strict):
    """An expected AP, on one dataset and number of images."""

    value: float
    margin: Annotated[float, Field(gt=0)] = AP_MARGIN
    images: int
    dataset: str
    origin: str


class GoldenCase(_Strict):
    """What one case is held to."""

    tolerances: dict[Quantity, Tolerance] = {}
    ap: GoldenAp | None = None


class Overlay(_Strict):
    """Values for one place: each entry of `when` must begin the provenance field of that name."""

    when: dict[str, str]
    cases: dict[str, GoldenCase]


class Golden(_Strict):
    """``golden/<variant>.yaml``."""

    schema_version: Literal[1] = 1
    variant: str
    cases: dict[str, GoldenCase] = {}
    overlays: list[Overlay] = []


#: For a case that nobody measured yet.  fp32: half a float32 rounding per layer of a deep network, generously.
#: fp16: about twice the largest that ONNX Runtime showed on 12 models, 48 or 64 images each: raw 2.2, boxes 43 px (of
#: candidates that are no detections), angles 0.015, scores 0.054, agreement 0.994, AP 0.0014.
#: int8: single values move by whole steps, so that only detections are held to limits.  The twin computes the same
#: graph, but rounding to steps is not continuous.
DEFAULTS: dict[str, dict[Quantity, float]] = {
    "fp32": {"raw": 0.01, "boxes": 0.02, "angles": 0.001, "scores": 1e-4, "agreement": 0.999, "delta_ap": 0.0005},
    "tf32": {"raw": 1.0, "boxes": 16.0, "angles": 0.2, "scores": 0.05, "agreement": 0.98, "delta_ap": 0.002},
    "fp16": {"raw": 5.0, "boxes": 100.0, "angles": 0.05, "scores": 0.1, "agreement": 0.98, "delta_ap": 0.003},
    "int8": {
        "agreement": 0.6,
        "agreement_ap": 0.9,
        "delta_ap": 0.01,
        "twin_agreement_ap": 0.95,
        "twin_delta_ap": 0.005,
    },
}


def golden_path(folder: Path, variant: str) -> Path:
    """The golden file of a variant."""
    return folder / f"{variant}.yaml"


def read_golden(folder: Path, variant: str) -> Golden:
    """The golden file of a variant, empty when there is none yet.  Raises AlignError for a file that is not valid."""
    path = golden_path(folder, variant)
    if not path.is_file():
        return Golden(variant=variant)
    mend = "mend it, or delete it and make it anew: --update-golden"
    return checked(Golden, read_yaml(path, mend, mend), path, mend, "not a golden file")


def limits(golden: Golden, case: Case, provenance: dict[str, Any], images: int | None = None) -> GoldenCase:
    """What `case` is held to at the place that `provenance` tells of: defaults, then golden, then its overlays.

    One detection weighs more in a rate, and in AP, on fewer `images` than were measured: those limits widen by the
    ratio of the two counts, and never tighten below the defaults.
    """
    defaults = DEFAULTS[case.precision]
    found = GoldenCase(tolerances={q: Tolerance(value=v, origin=_UNMEASURED) for q, v in defaults.items()})
    layers = [golden.cases] + [o.cases for o in golden.overlays if _applies(o, provenance)]
    for layer in layers:
        if case.id in layer:
            read = layer[case.id].tolerances
            found.tolerances.update({q: _promised(case.precision, q, tolerance) for q, tolerance in read.items()})
            found.ap = layer[case.id].ap or found.ap
    if images and found.ap and images < found.ap.images:
        for name in (rate for rate in RATES if rate in found.tolerances):
            value = _on_fewer(name, found.tolerances[name].value, defaults[name], found.ap.images / images)
            origin = f"{found.tolerances[name].origin}; widened: {images} of the {found.ap.images} measured images"
            found.tolerances[name] = Tolerance(value=value, origin=origin)
    return found


def _promised(precision: str, name: Quantity, tolerance: Tolerance) -> Tolerance:
    """The limit, or what is `PROMISED` where that is less and the measured value, which the origin tells, keeps it."""
    most = PROMISED.get(precision, {}).get(name)
    measured = re.match(r"measured (\S+)", tolerance.origin)
    if most is None or measured is None or tolerance.value <= most or float(measured[1]) > most:
        return tolerance
    return Tolerance(value=most, origin=f"{tolerance.origin}; promised {most:g}")


def _on_fewer(name: Quantity, measured: float, default: float, ratio: float) -> float:
    """A rate's limit where `ratio` times as many images were measured."""
    if name in MINIMA:
        return max(0.0, min(default, 1 - (1 - measured) * ratio))
    return max(default, measured * ratio)


def update(folder: Path, result: CaseResult, dataset: dict[str, Any], reason: str) -> Path:
    """Writes the measured errors × `FACTOR` and the measured AP of one case into its golden file.

    Args:
        folder: the golden folder.
        result: of a live run.
        dataset: fingerprint and number of images.
        reason: why; it becomes part of each origin.

    Raises:
        AlignError: for a replayed result, which measured nothing.
    """
    if result.replayed:
        raise AlignError(f"{result.case.id}: replayed from a record", "update golden values where TensorRT runs")
    path = golden_path(folder, result.case.variant)
    with locked(path):
        golden = read_golden(folder, result.case.variant)
        entry = _measured(result, dataset, reason)
        if result.case.backend == "tensorrt":
            when = {key: str(result.provenance[key]) for key in ("tensorrt", "gpu") if key in result.provenance}
            overlay = next((o for o in golden.overlays if o.when == when), None)
            if overlay is None:
                overlay = Overlay(when=when, cases={})
                golden.overlays.append(overlay)
            overlay.cases[result.case.id] = entry
        else:
            golden.cases[result.case.id] = entry
        with writing(path) as temporary:
            fields = golden.model_dump(mode="json", exclude_none=True)
            temporary.write_text(
                yaml.safe_dump(fields, sort_keys=False, width=110, allow_unicode=True), encoding="utf-8"
            )
    return path


def _applies(overlay: Overlay, provenance: dict[str, Any]) -> bool:
    return all(str(provenance.get(key, "")).startswith(value) for key, value in overlay.when.items())


def _measured(result: CaseResult, dataset: dict[str, Any], reason: str) -> GoldenCase:
    where = ", ".join(
        f"{key} {result.provenance[key]}"
        for key in ("torch", "onnxruntime", "tensorrt", "gpu")
        if result.provenance.get(key)
    )
    stamp = f"({where}, {datetime.date.today()}); {reason}"
    # A reference is held to float64, which ran on fewer images.
    tensors = [t for s in result.stages for t in s.tensors]
    compared = max((t.referee_images for t in tensors), default=0) if result.reference == "float64" else result.images
    values = {c.name: c.value for stage in result.stages for c in stage.checks}
    tolerances: dict[Quantity, Tolerance] = {}
    int8 = result.case.precision == "int8"
    for name in get_args(Quantity):
        if name in values:
            limit, how = _limit(name, values[name], int8)
            over = f"{compared} images" if compared else "the referee's images"
            measured = Tolerance(value=limit, origin=f"{how}, over {over} {stamp}")
            tolerances[name] = _promised(result.case.precision, name, measured)
    ap = None
    if result.scores is not None and result.scores.subject_ap >= 0:  # less where no image has a label
        ap = GoldenAp(
            value=round(result.scores.subject_ap, 4),
            margin=INT8_AP_MARGIN if int8 else AP_MARGIN,
            images=result.images,
            dataset=str(dataset.get("fingerprint", "")),
            origin=f"measured {stamp}",
        )
    return GoldenCase(tolerances=tolerances, ap=ap)


def _limit(name: Quantity, value: float, int8: bool = False) -> tuple[float, str]:
    """The limit that follows from a measured value, and how."""
    if name in MINIMA:
        loss = min(max(FACTOR * (1 - value), MIN_LOSS), 1 - value + MORE_LOSS)
        how = f"measured {value:.5g}, loss × {FACTOR:g}, >= {MIN_LOSS}, at most {MORE_LOSS} more"
        return max(0.0, round(1 - loss, 5)), how
    if name in RATES:
        least = INT8_MIN_DELTA_AP if int8 else MIN_DELTA_AP
        limit = min(max(FACTOR * value, least), value + MORE_DELTA_AP)
        return float(f"{limit:.2g}"), (f"measured {value:.2g} × {FACTOR:g}, >= {least}, at most {MORE_DELTA_AP} more")
    return float(f"{FACTOR * value:.2g}"), f"measured {value:.3g} × {FACTOR:g}"
