"""From what was measured to pass or fail, pinned to the first stage that differs."""

from __future__ import annotations

from typing import Literal

from alignment.compare.measure import Measured
from alignment.golden import MINIMA, GoldenCase, Quantity
from alignment.results import REFERENCE_AP, STAGES, Check, Scores, StageName, StageResult, TensorResult

Side = Literal["subject", "reference", "neither", "unknown"]
#: What a decoded tensor is held to, by its unit.
QUANTITIES: dict[str, Quantity] = {"px": "boxes", "rad": "angles", "probability": "scores"}
#: The check that fails where a side's own values are.
NOT_FINITE = "NaN or infinite"
#: One side is at fault when its float64 error is this many times the other's.
SIDE_FACTOR = 4.0
#: A detector finds more than this of what images hold, on a few images too.
LEAST_AP = 0.01


def judge(measured: Measured, limits: GoldenCase, images: int, dataset: str | None) -> list[StageResult]:
    """Holds each stage to its limits.

    Args:
        measured: see `Measured`.
        limits: what the case is held to.
        images: how many were run; a golden AP binds only a run of as many images of the same dataset.
        dataset: its fingerprint, None without data.

    Returns:
        One result a stage, in the order of `STAGES`.
    """
    decoded = [t for t in measured.tensors if t.unit in QUANTITIES]
    raw = [t for t in measured.tensors if t not in decoded]
    checks: dict[StageName, list[Check]] = {"input": [], "raw": [], "decoded": [], "detections": [], "map": []}
    equal, looked = measured.inputs
    if looked:
        checks["input"] = [
            Check(name="inputs", value=equal, limit=f"= {looked}", ok=equal == looked, origin="the same bytes go in")
        ]
    checks["raw"] = _finite(raw)
    if raw and "raw" in limits.tolerances:
        checks["raw"].append(_at_most("raw", max(raw, key=_severity), limits))
    checks["decoded"] = [
        *_finite(decoded),
        *(_at_most(QUANTITIES[t.unit], t, limits) for t in decoded if QUANTITIES[t.unit] in limits.tolerances),
        *(
            Check(name=name, value=there, limit=f"= {due}", ok=there == due, origin="what a record holds")
            for name, (there, due) in measured.held.items()
        ),
    ]
    if measured.nonfinite:
        checks["detections"].append(_not_finite("detections", measured.nonfinite))
    if "detections" not in measured.notes:
        checks["detections"] += _held({"agreement": measured.agreement}, limits)
    checks["map"] = _ap_checks(measured, limits, images, dataset)
    stages = []
    for name in STAGES:
        status: Literal["pass", "fail", "not_checked"] = "not_checked"
        if checks[name]:
            status = "pass" if all(c.ok for c in checks[name]) else "fail"
        note = measured.notes.get(name, "" if checks[name] else _why_unchecked(name, measured))
        tensors = {"raw": raw, "decoded": decoded}.get(name, [])
        stages.append(StageResult(name=name, status=status, note=note, checks=checks[name], tensors=tensors))
    return stages


def _why_unchecked(name: StageName, measured: Measured) -> str:
    if name == "map" and measured.scores is not None and measured.scores.subject_ap < 0:
        return "the images have no labels"
    if name == "map" and measured.scores is not None:
        return f"AP {measured.scores.subject_ap:.4f}: no golden AP for this dataset and number of images"
    if name in ("raw", "decoded") and measured.tensors:
        return "single values of an int8 network move by whole steps: its detections are held to limits"
    return "the raw outputs of this model are its decoded ones" if name == "raw" else "nothing was measured"


def doubts(scores: Scores | None) -> list[str]:
    """What is to be said where the reference finds next to nothing: both sides then agree on answers that are wrong.

    An AP below 0 is that of images without truth, of which nothing can be said.
    """
    if scores is None:
        return []
    ap = scores.subject_ap if scores.reference_ap is None else scores.reference_ap
    found_nothing = 0 <= ap < LEAST_AP
    return [f"{REFERENCE_AP}{ap:.4f}: preprocess, class order or head layout is likely wrong"] if found_nothing else []


def first_difference(stages: list[StageResult]) -> StageName | None:
    """The first stage that fails."""
    return next((stage.name for stage in stages if stage.status == "fail"), None)


def wrong_side(tensors: list[TensorResult]) -> Side:
    """Which side is further from float64 than the other, by the tensor on which they differ most.

    ``neither`` means that both are as near to float64 as the other: the difference is float32's own.
    """
    judged = [t for t in tensors if t.reference_error and t.subject_error]
    if not judged:
        return "unknown"
    worst = max(judged, key=_ratio)
    return _side(worst) if _side(worst) != "neither" else _side(min(judged, key=_ratio))


def _side(tensor: TensorResult) -> Side:
    ratio = _ratio(tensor)
    return "subject" if ratio > SIDE_FACTOR else "reference" if ratio < 1 / SIDE_FACTOR else "neither"


def _ratio(tensor: TensorResult) -> float:
    assert tensor.reference_error
    assert tensor.subject_error
    if tensor.subject_error.nonfinite != tensor.reference_error.nonfinite:
        return float("inf") if tensor.subject_error.nonfinite > tensor.reference_error.nonfinite else 0.0
    tiny = 1e-12
    return (tensor.subject_error.max_abs + tiny) / (tensor.reference_error.max_abs + tiny)


def _apart(subject: float, other: float | None) -> float | None:
    return None if other is None else abs(subject - other)


def _held(values: dict[Quantity, float], limits: GoldenCase) -> list[Check]:
    """One check for each value that has a limit."""
    checks = []
    for name, value in values.items():
        if name not in limits.tolerances:
            continue
        tolerance = limits.tolerances[name]
        least = name in MINIMA
        checks.append(
            Check(
                name=name,
                value=value,
                limit=f"{'>=' if least else '<='} {tolerance.value:g}",
                ok=value >= tolerance.value if least else value <= tolerance.value,
                origin=tolerance.origin,
            )
        )
    return checks


def _severity(tensor: TensorResult) -> tuple[int, float]:
    return tensor.difference.nonfinite, tensor.difference.max_abs


def _at_most(quantity: Quantity, tensor: TensorResult, limits: GoldenCase) -> Check:
    tolerance = limits.tolerances[quantity]
    value, nonfinite = tensor.difference.max_abs, tensor.difference.nonfinite
    limit = f"<= {tolerance.value:g}" + (f", but {nonfinite} values are finite on one side only" if nonfinite else "")
    return Check(
        name=quantity, value=value, limit=limit, ok=value <= tolerance.value and not nonfinite, origin=tolerance.origin
    )


def _finite(tensors: list[TensorResult]) -> list[Check]:
    """A check that fails for each tensor that is not finite: what equals NaN is NaN, and no answer."""
    return [_not_finite(t.name, t.nonfinite) for t in tensors if t.nonfinite]


def _not_finite(name: str, count: int) -> Check:
    return Check(name=NOT_FINITE, value=count, limit=f"= 0 values of {name}", ok=False, origin="what a detector gives")


def _ap_checks(measured: Measured, limits: GoldenCase, images: int, dataset: str | None) -> list[Check]:
    checks: list[Check] = []
    scores = measured.scores
    if scores is None:
        return checks
    values: dict[Quantity, float | None] = {
        "delta_ap": _apart(scores.subject_ap, scores.reference_ap),
        "agreement_ap": scores.agreement_ap,
        "twin_delta_ap": _apart(scores.subject_ap, scores.twin_ap),
        "twin_agreement_ap": scores.twin_agreement_ap,
    }
    checks += _held({name: value for name, value in values.items() if value is not None}, limits)
    golden = limits.ap
    if golden and golden.images == images and golden.dataset == dataset:
        better = scores.subject_ap > golden.value + golden.margin
        hint = "; better than golden: --update-golden REASON" if better else ""
        checks.append(
            Check(
                name="ap",
                value=scores.subject_ap,
                limit=f"{golden.value:g} ± {golden.margin:g}{hint}",
                ok=abs(scores.subject_ap - golden.value) <= golden.margin,
                origin=golden.origin,
            )
        )
    return checks
