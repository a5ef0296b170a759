"""A RUN as JUnit XML: what CI servers show beside other tests."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from alignment.results import Alignment, CaseResult, Explanation

#: What XML 1.0 has no place for.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(alignment: Alignment) -> str:
    """One ``testsuite`` a variant, one ``testcase`` a case, and one suite for explanations.

    A case that fails has a ``failure`` with the checks that failed; time is that in the backend, in seconds.
    """
    root = Element("testsuites", name="alignment")
    by_variant: dict[str, list[CaseResult]] = {}
    for case in alignment.cases:
        by_variant.setdefault(case.case.variant, []).append(case)
    suites = [_suite(name, [_case(case) for case in cases]) for name, cases in by_variant.items()]
    if alignment.explanations:
        suites.append(_suite("explanations", [_explanation(one) for one in alignment.explanations]))
    for suite in suites:
        suite.set("timestamp", _text(alignment.created[:19]))  # ISO 8601 without a zone, as the schema has it
        root.append(suite)
    for total in ("tests", "failures", "errors", "skipped"):
        root.set(total, str(sum(int(suite.get(total, "0")) for suite in suites)))
    root.set("time", _seconds(sum(float(suite.get("time", "0")) for suite in suites)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(name: str, cases: list[Element]) -> Element:
    suite = Element("testsuite", name=_text(name), tests=str(len(cases)), errors="0")
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))
    suite.set("time", _seconds(sum(float(case.get("time", "0")) for case in cases)))
    suite.extend(cases)
    return suite


def _case(case: CaseResult) -> Element:
    seconds = case.timing.inference_s if case.timing else 0.0
    made = Element("testcase", classname=_text(case.case.variant), name=_text(case.case.id), time=_seconds(seconds))
    if case.status == "skip":
        SubElement(made, "skipped", message=_text(case.reason))
    if case.status == "fail":
        failure = SubElement(made, "failure", message=_text(case.reason), type=case.first_difference or "difference")
        failed = [(stage.name, check) for stage in case.stages for check in stage.checks if not check.ok]
        failure.text = _text("\n".join(f"{stage}: {c.name} {c.value:g}, allowed {c.limit}" for stage, c in failed))
    if case.status != "skip":
        SubElement(made, "system-out").text = _text("\n".join([case.reason, *case.warnings, *case.notes]))
    return made


def _explanation(one: Explanation) -> Element:
    made = Element("testcase", classname="explanations", name=_text(one.id), time="0")
    if one.unexplained or one.wrong_settings:
        message = f"{one.differing} differ, unexplained: {one.unexplained}, by a wrong setting: {one.wrong_settings}"
        SubElement(made, "failure", message=message, type="detections")
    return made


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _text(text: str) -> str:
    return NOT_XML.sub("\ufffd", text)
