"""What the gate found: the typed content of ``gate.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from alignment.reading import read_model
from alignment.results import StageName

SCHEMA_VERSION = 1
#: ``golden``: a case fails its golden values; ``policy``: a limit of the policy; ``regression`` and ``improvement``:
#: against the baseline; ``missing``: a case that is in one run only; ``unchecked``: a limit that could not be applied.
Kind = Literal["golden", "policy", "regression", "improvement", "missing", "unchecked"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")


class Finding(_Model):
    """One thing that the gate has to say; `stops` when it stops the release.

    `case` is the id of a case or of an explanation, empty for the whole run.  `stage` is the first that differs,
    `layer` the first layer of the variant's graph that answers otherwise than in the baseline, and `since` the first
    field of the provenance, in the order of cause and effect, that changed since then.
    """

    kind: Kind
    stops: bool
    case: str
    what: str
    stage: StageName | None = None
    layer: str = ""
    since: str = ""


class Numbers(_Model):
    """What a case came to.  AP and agreement 0..1, `latency_ms` of one batch."""

    ap: float | None = None
    delta_ap: float | None = None
    agreement: float | None = None
    agreement_ap: float | None = None
    latency_ms: float | None = None
    reformats: int | None = None


class GatedCase(_Model):
    """One case in the run and in the baseline; ``skip`` and ``new`` say that one side has nothing to compare."""

    id: str
    verdict: Literal["pass", "stop", "skip", "missing"]
    new: bool = False
    now: Numbers = Numbers()
    before: Numbers | None = None
    limits: dict[str, float] = {}


class Change(_Model):
    """A field of the provenance that is another than in the baseline, and in which cases; empty for the whole run."""

    field: str
    before: Any = None
    after: Any = None
    cases: list[str] = []


class LayerChange(_Model):
    """Where the graph of a variant first answers otherwise than in the baseline."""

    variant: str
    stage: StageName
    layer: str
    reason: str


class RunPapers(_Model):
    """Which run."""

    path: str
    created: str
    command: str
    machine: dict[str, Any] = {}


class GateResult(_Model):
    """The verdict on a release.  `changes` are in the order of cause and effect."""

    schema_version: Literal[1] = 1
    verdict: Literal["passed", "stopped"]
    run: RunPapers
    baseline: RunPapers | None = None
    cases: list[GatedCase] = []
    findings: list[Finding] = []
    changes: list[Change] = []
    layers: list[LayerChange] = []
    notes: list[str] = []

    @property
    def stopping(self) -> list[Finding]:
        """The findings that stop the release."""
        return [finding for finding in self.findings if finding.stops]

    @classmethod
    def load(cls, path: Path) -> GateResult:
        """Reads what `align gate --json` wrote.  Raises AlignError for a file that is missing, damaged or another."""
        return read_model(
            cls,
            path,
            "no verdict of the gate",
            "write one by `align gate --json`",
            "make it anew with `align gate --json`",
        )
