"""A RUN held to its golden verdicts, to the policy and to a baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path

from alignment.gate import provenance
from alignment.gate.numbers import comparable_images, numbers_of, place_of
from alignment.gate.policy import LIMITS, Limits, Policy, load_policy
from alignment.gate.results import Change, Finding, GatedCase, GateResult, LayerChange, Numbers, RunPapers
from alignment.results import Alignment, CaseId, CaseResult, Explanation
from alignment.signatures import first_change

#: Differences of decimal numbers are off by some 1e-17.
EPSILON = 1e-9
#: case id → Reformat layers, of engines that were inspected beside the run.
Reformats = Mapping[str, int]


def gate(
    run: Alignment,
    policy: Policy,
    baseline: Alignment | None = None,
    papers: tuple[str, str] = ("", ""),
    reformats: Reformats | None = None,
) -> GateResult:
    """The verdict on a release.

    Args:
        run: to be released.
        policy: beside the golden values, which `run` was already held to.
        baseline: the last release; None leaves regressions unlooked at.
        papers: where the two were read from.
        reformats: of engines that were inspected apart from the run.
    """
    found = _Gate(run, policy, baseline, reformats or {})
    cases = [found.case(case) for case in run.cases]
    cases += found.missing()
    found.whole_run()
    stops = {finding.case for finding in found.findings if finding.stops}
    for case in cases:
        if case.id in stops:
            case.verdict = "missing" if case.verdict == "missing" else "stop"
    return GateResult(
        verdict="stopped" if stops else "passed",
        run=_papers(run, papers[0]),
        baseline=_papers(baseline, papers[1]) if baseline else None,
        cases=cases,
        findings=sorted(found.findings, key=lambda finding: not finding.stops),
        changes=found.changes,
        layers=list(found.layers.values()),
        notes=found.notes,
    )


def _papers(run: Alignment, path: str) -> RunPapers:
    return RunPapers(path=path, created=run.created, command=run.command, machine=run.machine)


class _Gate:
    """One run against its policy and baseline; `findings` and `notes` fill up on the way."""

    def __init__(self, run: Alignment, policy: Policy, baseline: Alignment | None, reformats: Reformats) -> None:
        self.run, self.policy, self.baseline, self.reformats = run, policy, baseline, reformats
        known = baseline.cases if baseline else []
        self.before = {case.case.id: case for case in known if case.status != "skip"}
        self.changes: list[Change] = provenance.changes(run, baseline) if baseline else []
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.layers = self._layers() if baseline else {}

    def case(self, case: CaseResult) -> GatedCase:
        """One case of the run, what it came to, and what there is to say about it."""
        limits = self.policy.limits(case.case)
        before = self.before.get(case.case.id)
        now = numbers_of(case, self.reformats.get(case.case.id))
        gated = GatedCase(id=case.case.id, verdict="skip" if case.status == "skip" else "pass", now=now)
        if case.status == "skip":
            return gated
        gated.limits = {name: value for name in LIMITS if (value := getattr(limits, name)) is not None}
        if case.status == "fail":
            self._say(case.case.id, "golden", case.reason, stage=case.first_difference)
        self._hold(case, now, limits)
        if before:
            gated.before = numbers_of(before)
            self._compare(case, before, now, gated.before, limits)
        elif self.baseline:
            gated.new = True
            self._say(case.case.id, "missing", "the baseline has no such case", stops=False)
        return gated

    def missing(self) -> list[GatedCase]:
        """The cases that only the baseline has; explanations that only it has are said."""
        run = {case.case.id: case for case in self.run.cases}
        found = []
        for name, before in self.before.items():
            if name in run and run[name].status != "skip":
                continue
            reason = f"skipped here ({run[name].reason})" if name in run else "not in this run"
            what = f"the baseline has this case, and it is {reason}"
            self._say(name, "missing", what, stops=self.policy.missing == "stop", explained=False)
            if name not in run:
                found.append(GatedCase(id=name, verdict="missing", before=numbers_of(before)))
        explained = {one.id for one in self.run.explanations}
        for one in self.baseline.explanations if self.baseline else ():
            if one.id not in explained:
                what = "the baseline has this explanation, and this run has not: make it by `align explain`"
                self._say(one.id, "missing", what, stops=self.policy.missing == "stop", explained=False)
        return found

    def whole_run(self) -> None:
        """What is to be said of no case alone."""
        done = [case.case for case in self.run.cases if case.status != "skip"]
        if not done and not self.run.explanations:
            self._say("", "unchecked", "nothing was checked: every case was skipped", explained=False)
        for pattern in self.policy.require:
            if not any(pattern.fits(case) for case in done):
                self._say("", "missing", f"the policy requires {pattern.words}: no such case was run", explained=False)
        packaged = load_policy().rules  # for every precision, of which a run has a few
        for rule in self.policy.rules:
            if rule not in packaged and not any(rule.fits(case.case) for case in self.run.cases):
                self.notes.append(f"a rule of the policy fits no case of the run: {rule.words}")
        for one in self.run.explanations:
            self._explanation(one)
        for change in self.layers.values() if self.policy.layers == "stop" else ():
            signed = next(c.case.id for c in self.run.cases if c.case.variant == change.variant and c.signature)
            self._say(signed, "regression", f"another model: {change.reason}", stage=change.stage)
        if not self.run.explanations:
            self.notes.append("max_unexplained: the run holds no explanation; `align explain` makes them")

    def _explanation(self, one: Explanation) -> None:
        limit = self.policy.limits(_case_of(one, self.run)).max_unexplained
        if limit is not None and one.unexplained > limit:
            what = f"{one.unexplained} of {one.differing} differences have no proven cause, allowed {limit}"
            self._say(one.id, "policy", what, stage="detections", explained=False)
        if one.wrong_settings:
            what = f"{one.wrong_settings} differences come from a setting that nobody asked for"
            self._say(one.id, "policy", what, stage="detections", explained=False)

    def _hold(self, case: CaseResult, now: Numbers, limits: Limits) -> None:
        """To the limits that need no baseline."""
        reference = case.reference == "float64"
        for name, value, stage in (
            ("max_delta_ap", None if now.delta_ap is None else abs(now.delta_ap), "map"),
            ("min_agreement", now.agreement, "detections"),
            ("min_agreement_ap", now.agreement_ap, "detections"),
            ("max_reformats", None if now.reformats is None else float(now.reformats), None),
        ):
            limit = getattr(limits, name)
            if limit is None or (value is None and reference):
                continue
            least, _, quantity = name.partition("_")
            if value is None:
                self._say(case.case.id, "unchecked", f"{name} not applied: {_WHY_NOT[name]}", stops=False)
            elif not (value >= limit - EPSILON if least == "min" else value <= limit + EPSILON):  # NaN keeps no limit
                sign = ">=" if least == "min" else "<="
                self._say(case.case.id, "policy", f"{quantity} {value:.4g}, allowed {sign} {limit:g}", stage=stage)

    def _compare(self, case: CaseResult, before: CaseResult, now: Numbers, then: Numbers, limits: Limits) -> None:
        """With the baseline."""
        assert self.baseline
        why = comparable_images(case, self.run, before, self.baseline)
        if why:
            self._say(case.case.id, "unchecked", f"AP and agreement cannot be compared: {why}; run both on one set")
        else:
            for name, what, drop in _drops(now, then):
                least = limits.max_ap_drop if name == "AP" else limits.max_agreement_drop
                if least is not None and not drop <= least + EPSILON:  # NaN keeps no limit
                    stage = case.first_difference or ("map" if name == "AP" else "detections")
                    self._say(case.case.id, "regression", f"{what}, allowed -{least:g}", stage=stage)
                if name == "AP" and limits.max_ap_rise is not None and -drop > limits.max_ap_rise + EPSILON:
                    what += f", expected +{limits.max_ap_rise:g} at most: make it the baseline, or allow improvements"
                    self._say(case.case.id, "improvement", what, stops=self.policy.improvements == "stop")
        self._latency(case, before, now, then, limits.max_latency_ratio)

    def _latency(self, case: CaseResult, before: CaseResult, now: Numbers, then: Numbers, limit: float | None) -> None:
        assert self.baseline
        if limit is None:
            return
        places = place_of(case, self.run), place_of(before, self.baseline)
        if now.latency_ms is None or not then.latency_ms:
            which = "this run" if now.latency_ms is None else "the baseline"
            self._say(case.case.id, "unchecked", f"max_latency_ratio not applied: {which} has no latency", stops=False)
        elif places[0] != places[1]:
            what = f"max_latency_ratio not applied: taken on {places[0]}, the baseline on {places[1]}"
            self._say(case.case.id, "unchecked", what, stops=False)
        elif not now.latency_ms <= limit * then.latency_ms + EPSILON:  # NaN keeps no limit
            ratio = now.latency_ms / then.latency_ms
            what = f"latency {then.latency_ms:.3g} -> {now.latency_ms:.3g} ms, {ratio:.2f} x, allowed {limit:g} x"
            self._say(case.case.id, "regression", what)

    def _layers(self) -> dict[str, LayerChange]:
        """The first layer of each variant that answers otherwise, where both runs looked at the same image."""
        assert self.baseline
        signed = [{c.case.variant: c.signature for c in run.cases if c.signature} for run in (self.run, self.baseline)]
        found = {}
        for variant in dict.fromkeys(c.case.variant for c in self.run.cases if c.status != "skip"):
            if not (variant in signed[0] and variant in signed[1]):
                if variant in signed[1]:
                    self._unsigned(variant, "this run has no signature of its graph")
                continue
            try:
                change = first_change(signed[0][variant], signed[1][variant])
            except ValueError as error:
                self._unsigned(variant, str(error))
                continue
            if change:
                found[variant] = LayerChange(
                    variant=variant, stage=change.stage, layer=change.layer, reason=change.reason
                )
        return found

    def _unsigned(self, variant: str, why: str) -> None:
        what = f"{variant}: layers not compared: {why}"
        if self.policy.layers == "stop":
            self._say("", "unchecked", what, explained=False)
        else:
            self.notes.append(what)

    def _say(
        self, case: str, kind: str, what: str, stops: bool = True, stage: str | None = None, explained: bool = True
    ) -> None:
        """Adds a finding; one that stops and is `explained` gets the first layer and the first change behind it."""
        finding = Finding.model_validate({"kind": kind, "stops": stops, "case": case, "what": what, "stage": stage})
        if stops and explained and self.baseline:
            variant = next((c.case.variant for c in self.run.cases if c.case.id == case), "")
            if stage and (layer := self.layers.get(variant)):
                finding.layer = layer.layer
                if kind == "regression":  # a layer comes before all that follows from it
                    finding.stage = layer.stage
            if cause := provenance.since(case, self.changes):
                finding.since = cause.field
        self.findings.append(finding)


_WHY_NOT = {
    "max_delta_ap": "no AP of the reference",
    "min_agreement": "no detections were compared",
    "min_agreement_ap": "no detections were compared",
    "max_reformats": "the run does not tell the engine's layers; put what `align inspect` writes beside it",
}


def _drops(now: Numbers, then: Numbers) -> Iterator[tuple[str, str, float]]:
    """Name, words and loss of each rate that the baseline has: one that is unknown now is lost without bound.

    That of a single agreement in INT8 is no measure.
    """
    int8 = now.agreement_ap is not None
    pairs = {
        "AP": (then.ap, now.ap),
        "agreement": (None, None) if int8 else (then.agreement, now.agreement),
        "agreement_ap": (then.agreement_ap, now.agreement_ap),
    }
    for name, (old, new) in pairs.items():
        if old is not None and new is not None:
            yield name, f"{name} {old:.4f} -> {new:.4f} ({new - old:+.4f})", old - new
        elif old is not None:
            yield name, f"{name} {old:.4f} -> unknown", inf


def _case_of(one: Explanation, run: Alignment) -> CaseId:
    """The case whose limits bind an explanation: its id begins with that case's, or with a variant's."""
    fitting = [case.case for case in run.cases if one.id.startswith((f"{case.case.id}-", f"{case.case.variant}-"))]
    exact = [case for case in fitting if one.id.startswith(f"{case.id}-")]
    if exact:
        return max(exact, key=lambda case: len(case.id))
    variant = fitting[0].variant if fitting else one.id.partition("-")[0]
    return CaseId(id=one.id, variant=variant, backend="", precision="")


def inspected_reformats(folders: list[Path], run: Alignment) -> dict[str, int]:
    """Reformat layers of the engines in ``*.engine.json`` files, as `align inspect` writes them, by case.

    An engine counts for the case whose id its name begins with, where both were made from the same ONNX file.

    Raises:
        AlignError: for a file that is no inspected engine.
    """
    from alignment.engine.inspect import parse, reformats
    from alignment.inspection.saved import load_inspection

    made = {case.case.id: case.provenance.get("onnx_sha256") for case in run.cases}
    found: dict[str, int] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*.engine.json")):
        inspection = load_inspection(path)
        case = inspection.name.partition("-level")[0]
        if case in made and made[case] and made[case] == inspection.provenance.get("onnx_sha256"):
            found[case] = reformats(parse(inspection.text))
    return found
