"""The policy file: what a release is held to beside golden values."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from alignment.reading import checked, read_yaml
from alignment.results import CaseId

PACKAGED = Path(__file__).with_name("policy.yaml")
LIMITS = (
    "max_delta_ap",
    "min_agreement",
    "min_agreement_ap",
    "max_ap_drop",
    "max_ap_rise",
    "max_agreement_drop",
    "max_latency_ratio",
    "max_unexplained",
    "max_reformats",
)
Rate = Annotated[float, Field(ge=0, le=1)] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Pattern(_Strict):
    """Which cases: a shell's wildcards for each part of a case; the route of a case without one is empty."""

    variant: str = "*"
    backend: str = "*"
    precision: str = "*"
    route: str = "*"

    def fits(self, case: CaseId) -> bool:
        """Whether `case` is one of them."""
        return all(
            fnmatchcase(getattr(case, part) or "", getattr(self, part))
            for part in ("variant", "backend", "precision", "route")
        )

    @property
    def words(self) -> str:
        """``precision: int8, route: qdq``."""
        named = {part: getattr(self, part) for part in Pattern.model_fields if getattr(self, part) != "*"}
        return ", ".join(f"{part}: {value}" for part, value in named.items()) or "every case"


class Limits(_Strict):
    """What one case is held to; None is no limit.

    Attributes:
        max_delta_ap: |AP − AP of the reference|, 0..1.
        min_agreement: share of the detections of both sides that have a match on the other, 0..1.
        min_agreement_ap: AP against the detections of the reference, 0..1; of int8.
        max_ap_drop, max_ap_rise: of AP since the baseline.
        max_agreement_drop: of `agreement`, and in int8 of `agreement_ap`, since the baseline.
        max_latency_ratio: latency / latency of the baseline, where both were taken in one place.
        max_unexplained: differences of `align explain` without a proven cause.
        max_reformats: layers of the engine that only change type or layout.
    """

    max_delta_ap: Rate = None
    min_agreement: Rate = None
    min_agreement_ap: Rate = None
    max_ap_drop: Rate = None
    max_ap_rise: Rate = None
    max_agreement_drop: Rate = None
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = None
    max_unexplained: Annotated[int, Field(ge=0)] | None = None
    max_reformats: Annotated[int, Field(ge=0)] | None = None


class Rule(Pattern, Limits):
    """Limits for the cases that fit."""


class Policy(_Strict):
    """See ``policy.yaml`` of this package for what each field means."""

    schema_version: Literal[1] = 1
    rules: list[Rule] = []
    require: list[Pattern] = []
    missing: Literal["stop", "allow"] = "stop"
    improvements: Literal["stop", "allow"] = "stop"
    layers: Literal["stop", "allow"] = "allow"

    def limits(self, case: CaseId) -> Limits:
        """What `case` is held to: of the rules that fit, the last word on each limit."""
        found: dict[str, Any] = {}
        for rule in self.rules:
            if rule.fits(case):
                found.update({name: getattr(rule, name) for name in LIMITS if name in rule.model_fields_set})
        return Limits(**found)


def load_policy(path: Path | None = None) -> Policy:
    """The packaged policy, with the file laid over it: its rules come last, its other fields replace.

    Raises:
        AlignError: naming file and field, for what is no policy.
    """
    packaged = _read(PACKAGED)
    if path is None:
        return packaged
    given = _read(path)
    fields = {name: getattr(given, name) for name in given.model_fields_set if name != "rules"}
    return packaged.model_copy(update={**fields, "rules": [*packaged.rules, *given.rules]})


def _read(path: Path) -> Policy:
    mend = f"write it as {PACKAGED} is written, or see `align gate --print-policy`"
    fields = read_yaml(path, "give a policy file", mend)
    return checked(Policy, {} if fields is None else fields, path, mend, whole="policy")
