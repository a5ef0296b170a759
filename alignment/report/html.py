"""The report as one HTML file that needs nothing else: no network, no server, no second file."""

from __future__ import annotations

from collections import Counter

from alignment.case import BACKENDS
from alignment.inspection.draw import STYLE
from alignment.inspection.findings import KINDS
from alignment.quantize.sensitivity import METRICS
from alignment.report import gate_markdown
from alignment.report.boxes import Pictures
from alignment.report.engine import drawing, engine_part
from alignment.report.gather import Gathered
from alignment.report.page import environment
from alignment.report.pareto import charts, letters
from alignment.report.shown import plural, verb
from alignment.report.variants import order, parts, step
from alignment.results import Alignment

STATUSES = ("fail", "pass", "skip")
#: Of a verdict, the class that colours it; ``skip`` for the rest.
TONES = {
    "Aligned": "pass",
    "Explained": "pass",
    "Not aligned": "fail",
    "Not explained": "fail",
    "Wrong setting": "fail",
}


def render(found: Gathered) -> str:
    """The whole page.

    All text from the results is escaped, and a content security policy lets only the page's own script and styles run.
    A picture that is missing is named in its place.
    """
    cases = sorted(
        found.alignment.cases, key=lambda case: (STATUSES.index(case.status), case.case.variant, order(case))
    )
    verdict, tone, summary = _opening(found)
    template = environment().get_template("report.html.j2")
    page = template.render(
        run=found.alignment,
        found=found,
        cases=cases,
        parts=parts(found),
        columns=_columns(found.alignment),
        step=step,
        verdict=verdict,
        tone=tone,
        summary=summary,
        pictures=Pictures(found.folder_of),
        engine_part=engine_part,
        drawing=drawing,
        drawing_style=STYLE,
        kinds=KINDS,
        metrics=METRICS,
        pareto_charts=charts,
        letters=letters,
        gate_headline=gate_markdown.headline,
    )
    return page.lstrip()


def headline(alignment: Alignment) -> tuple[str, str]:
    """The verdict in two words and in one line; a run in which no case ran is not called aligned."""
    counts = Counter(case.status for case in alignment.cases)
    total = len(alignment.cases)
    if counts["fail"]:
        return "Not aligned", f"{counts['fail']} of {plural(total, 'case')} {verb(counts['fail'], 'fail')}"
    if alignment.explanations:
        unexplained = sum(one.unexplained for one in alignment.explanations)
        differing = sum(one.differing for one in alignment.explanations)
        wrong = sum(one.wrong_settings for one in alignment.explanations)
        found = f"{unexplained} of {plural(differing, 'difference')} after NMS unexplained"
        if wrong:
            found += f", {wrong} by a wrong setting"
        if unexplained or wrong or not total:
            return ("Not explained" if unexplained else "Wrong setting" if wrong else "Explained"), found
    if alignment.ladders and not total:
        rungs = sum(len(ladder.rungs) for ladder in alignment.ladders)
        return "Measured", f"{plural(rungs, 'rung')} from float to int8"
    if counts["pass"]:
        return "Aligned", f"{counts['pass']} of {plural(total, 'case')} {verb(counts['pass'], 'pass')}"
    return "Nothing checked", "every case was skipped" if total else "the run holds no case"


def _opening(found: Gathered) -> tuple[str, str, str]:
    """Verdict, its colour's class, and one line; a gate that stopped the release comes first."""
    verdict, summary = headline(found.alignment)
    others = (("sweep", found.sensitivities), ("search", found.partials), ("engine", found.engines))
    counts = [plural(len(each), noun) for noun, each in others if each]
    if verdict == "Nothing checked" and not found.alignment.cases and counts:
        verdict, summary = "Measured", ", ".join(counts)
    for gate in found.gates:
        if gate.verdict == "stopped":
            return "Stopped", "fail", f"release gate {gate_markdown.headline(gate)}; {summary}"
    return verdict, TONES.get(verdict, "skip"), summary


def _columns(alignment: Alignment) -> list[tuple[str, list[str]]]:
    """Backend → the steps that any case has on it, each in order: the columns of the verdicts."""
    columns: dict[str, list[str]] = {}
    for case in sorted(alignment.cases, key=order):
        steps = columns.setdefault(case.case.backend, [])
        if step(case) not in steps:
            steps.append(step(case))
    return [(backend, columns[backend]) for backend in dict.fromkeys((*BACKENDS, *columns)) if backend in columns]
