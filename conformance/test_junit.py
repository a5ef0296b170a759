"""``junit.xml`` of a run: as CI servers' schema has it, and saying what the typed results say."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from test_report import INJECTION, alignment, case, folder  # noqa: F401 - fixtures

from alignment.report.junit import to_junit
from alignment.results import Alignment, Explanation

COUNTS = {"tests", "failures", "errors", "skipped"}
#: Of each element: attributes that it must have, that it may have, and the elements that it may hold.
GRAMMAR: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (COUNTS | {"name", "time"}, set(), {"testsuite"}),
    "testsuite": (COUNTS | {"name", "time", "timestamp"}, set(), {"testcase"}),
    "testcase": ({"classname", "name", "time"}, set(), {"failure", "error", "skipped", "system-out"}),
    "failure": ({"message", "type"}, set(), set()),
    "skipped": ({"message"}, set(), set()),
    "system-out": (set(), set(), set()),
}


def require_valid(element: Element) -> None:
    """What the JUnit schemas of Jenkins and GitLab have in common."""
    must, may, inside = GRAMMAR[element.tag]
    assert must <= set(element.keys()) <= must | may, element.tag
    assert {child.tag for child in element} <= inside
    for name in COUNTS & must:
        assert int(element.attrib[name]) >= 0
    if "time" in must:
        assert float(element.attrib["time"]) >= 0
    if element.tag.startswith("testsuite"):
        cases = list(element.iter("testcase"))
        assert int(element.attrib["tests"]) == len(cases)
        assert int(element.attrib["failures"]) == len(list(element.iter("failure")))
        assert int(element.attrib["skipped"]) == len(list(element.iter("skipped")))
    if element.tag == "testcase":
        assert len([child for child in element if child.tag in ("failure", "skipped")]) <= 1
    for child in element:
        require_valid(child)


def test_the_run_folder_holds_it_valid_and_with_every_case(folder: Path, alignment: Alignment):  # noqa: F811
    root = ElementTree.parse(folder / "junit.xml").getroot()
    require_valid(root)
    found = {each.attrib["name"]: each for each in root.iter("testcase")}
    assert set(found) == {one.case.id for one in alignment.cases}
    for one in alignment.cases:
        told = found[one.case.id]
        assert (told.find("failure") is not None) == (one.status == "fail")
        assert (told.find("skipped") is not None) == (one.status == "skip")
    assert root.attrib["time"] == "2.100"  # 1.6 s and 0.5 s


def test_a_failure_names_stage_and_checks_that_failed_and_text_stays_text(alignment: Alignment):  # noqa: F811
    root = ElementTree.fromstring(to_junit(alignment))
    (failure,) = root.iter("failure")
    assert (failure.attrib["type"], failure.attrib["message"]) == ("decoded", "why yolov8_n-tensorrt-fp16")
    assert failure.text == "decoded: boxes 2.5, allowed <= 0.01"
    assert any(INJECTION in (said.text or "") for said in root.iter("system-out"))
    assert not list(root.iter("script"))


def test_what_xml_cannot_hold_is_replaced():
    bad = Alignment(created="2026-01-01T00:00:00+00:00", command="")
    bad.cases = [case("v-torch-fp32", "fail").model_copy(update={"reason": "\x00 \x1b[31m \ud800 end"})]
    (failure,) = ElementTree.fromstring(to_junit(bad)).iter("failure")
    assert failure.attrib["message"] == "\ufffd \ufffd[31m \ufffd end"


@pytest.mark.parametrize(("unexplained", "wrong", "fails"), [(0, 0, False), (2, 0, True), (0, 1, True)])
def test_an_explanation_is_a_test_too(unexplained: int, wrong: int, fails: bool):
    one = Explanation(
        id="v-efficient_nms",
        reference="a",
        subject="b",
        images=1,
        reference_detections=9,
        subject_detections=9,
        differing=4,
        unexplained=unexplained,
        wrong_settings=wrong,
    )
    root = ElementTree.fromstring(to_junit(Alignment(created="2026-01-01", command="", explanations=[one])))
    require_valid(root)
    assert bool(list(root.iter("failure"))) == fails
