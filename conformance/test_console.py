"""What is printed for people: nothing of it is cut, and nothing is said twice."""

from __future__ import annotations

import re

import pytest
from command_line import align

from alignment import cli
from alignment.commands import console
from alignment.results import Alignment, CaseId, CaseResult

STYLE = re.compile(r"\x1b\[[\d;]*m")
NAME = "a_detector_with_a_name_of_its_own"


def case(route: str, status: str, reason: str) -> CaseResult:
    """A case of one long name."""
    name = CaseId(id=f"{NAME}-tensorrt-int8-{route}", variant=NAME, backend="tensorrt", precision="int8", route=route)
    return CaseResult(case=name, status=status, reason=reason)


@pytest.fixture
def printed(capsys):
    """The table of results."""

    def show(*cases: CaseResult) -> str:
        cli._print_results(Alignment(created="", command="", cases=list(cases)))
        return STYLE.sub("", capsys.readouterr().out)

    return show


def terminal(monkeypatch, columns: int | None) -> None:
    """Makes stdout a terminal that wide; None: no terminal, whatever the environment says of its width."""
    monkeypatch.setattr("rich.console.Console.is_terminal", columns is not None)
    # Rich reads COLUMNS once, when a console is made: pytest-xdist's workers have one of 80.
    monkeypatch.setattr(console.out, "_width", columns or 40)
    monkeypatch.setenv("COLUMNS", str(columns or 40))


def joined(table: str) -> str:
    """A table's text as it is without the ends of its lines."""
    return "".join(table.replace("│", "").split())


@pytest.mark.parametrize("columns", [40, 80, None])
def test_results_never_cut_the_name_of_a_case_nor_a_reason(monkeypatch, printed, columns):
    terminal(monkeypatch, columns)
    reason = f"{'word ' * 40}{'letters' * 20}"
    cases = case("implicit_entropy2", "pass", reason), case("qdq", "fail", "[one] reason")
    table = printed(*cases)
    assert all(f"│ {one.case.id} " in table for one in cases)
    assert joined(reason) in joined(table)
    assert (reason in table) == (columns is None)
    assert "[one] reason" in table


@pytest.mark.parametrize("columns", [60, None])
def test_doctor_cuts_no_path(tmp_path, monkeypatch, columns):
    terminal(monkeypatch, columns)
    cache = tmp_path / ("long" * 20) / "cache"
    monkeypatch.setenv("ALIGN_CACHE", str(cache))
    table = STYLE.sub("", align("doctor").stdout)
    assert str(cache) in joined(table)
    assert (str(cache) in table) == (columns is None)
    assert columns is None or max(map(len, table.splitlines())) == columns


def test_cases_that_are_skipped_for_one_reason_share_a_row(monkeypatch, printed):
    terminal(monkeypatch, None)
    skipped = [case(route, "skip", "no [GPU] here") for route in ("qdq", "implicit", "dynamic_range")]
    other, failed = case("implicit_legacy", "skip", "gone from 11"), case("implicit_minmax", "fail", "no [GPU] here")
    table = printed(skipped[0], failed, *skipped[1:], other)
    rows = table.splitlines()
    ids = [one.case.id for one in (*skipped, failed, other)]
    assert [name for row in rows for name in ids if f" {name} " in row] == ids
    assert table.count("3 cases: no [GPU] here") == 1
    assert table.count("no [GPU] here") == 2
    assert "│ gone from 11 " in table
