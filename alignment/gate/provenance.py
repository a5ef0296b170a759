"""What changed between two runs, in the order of cause and effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignment.gate.results import Change
from alignment.results import Alignment, CaseResult

#: What may change, causes first: a model, what it is given, how it is exported, what runs it, where, and how.  A field
#: belongs to the first entry that begins it, or that it ends in after a dot.
ORDER = (
    "weights_sha256",
    "dataset.fingerprint",
    "dataset",
    "onnx_sha256",
    "quantization",
    "nms",
    "alignment",
    "torch",
    "onnxruntime",
    "tensorrt",
    "cuda",
    "driver_cuda",
    "pycuda",
    "plugin",
    "gpu",
    "compute_capability",
    "build",
    "providers",
    "graph_optimization",
    "dtype",
    "device",
    "cpu_capability",
    "batch",
    "threads",
    "python",
    "system",
    "cpus",
)
#: What differs between any two runs, and says nothing.
NOTHING = ("engine_from_cache", "engine_sha256")


def changes(run: Alignment, baseline: Alignment) -> list[Change]:
    """Every field that differs, one entry for each pair of values, with the cases that have it."""
    found: dict[tuple[str, str, str], Change] = {}
    before = {case.case.id: case for case in baseline.cases if case.status != "skip"}
    for field, old, new in _differences(_flat(baseline.machine), _flat(run.machine)):
        found[(field, repr(old), repr(new))] = Change(field=field, before=old, after=new)
    for case in run.cases:
        if case.status == "skip" or case.case.id not in before:
            continue
        fields = _papers(before[case.case.id], baseline), _papers(case, run)
        for field, old, new in _differences(*fields):
            change = found.setdefault(
                (field, repr(old), repr(new)), Change(field=field, before=old, after=new, cases=[])
            )
            change.cases.append(case.case.id)
    return sorted(found.values(), key=lambda change: rank(change.field))


def since(case: str, found: list[Change]) -> Change | None:
    """The first change that touches a case."""
    return next((change for change in found if case in change.cases), None) or next(
        (change for change in found if not change.cases), None
    )


def rank(field: str) -> tuple[int, str]:
    """Where a field stands in `ORDER`; those that are not there come last."""
    plain = field.removeprefix("reference.")
    places = (i for i, name in enumerate(ORDER) if plain == name or plain.startswith(f"{name}."))
    return next(places, len(ORDER)), field


def _papers(case: CaseResult, run: Alignment) -> dict[str, Any]:
    """Provenance of a case: its own, that of its reference where it differs in kind, and its images."""
    own = _flat(case.provenance)
    reference = {
        k if k == "weights_sha256" else f"reference.{k}": v
        for k, v in _flat(case.reference_provenance).items()
        if k not in own
    }
    dataset = run.dataset_of(case.case.variant)
    given = {f"dataset.{key}": dataset[key] for key in ("fingerprint", "split") if key in dataset}
    return {**own, **reference, **given, "dataset.images": case.images, "replayed": case.replayed}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for field in {**before, **after}:
        if field not in NOTHING and before.get(field) != after.get(field):
            yield field, before.get(field), after.get(field)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"build": {"fp16": True}}`` → ``{"build.fp16": True}``."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        name = f"{prefix}{key}"
        found.update(_flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return found
