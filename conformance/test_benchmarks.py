"""The harness of the benchmarks on toy contestants with a clock of their own: turns, ratios, faults, the table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documentation import ROOT
from typer.testing import CliRunner

if not (ROOT / "benchmarks").is_dir():
    pytest.skip("not in a checkout", allow_module_level=True)

from alignment.engine import capabilities
from benchmarks import memory
from benchmarks.__main__ import app, run_one
from benchmarks.cases import CASES, calibration, comparison, mean_ap, nms
from benchmarks.harness import Case, Contestant, Fault, Setting, Work, clock, measure, quiet
from benchmarks.results import CaseResult, Entry, Measured, Memory, Request, Spread, Turn, further, ratio
from benchmarks.table import HEAD, table

GOLDEN = Path(__file__).with_name("benchmarks_table.md")
Costs = Callable[[int, int], tuple[float, float]]


class Toy:
    """A case whose contestants spend known seconds of a clock that only they move.

    Attributes:
        order: the name of each contestant as its work was done, preparing as ``name?``.
    """

    def __init__(self, sizes: tuple[int, ...] = (1, 2, 4), judge: Any = None, missing: str | None = None) -> None:
        self.wall = self.cpu = 0.0
        self.order: list[str] = []
        self.contestants: list[Contestant] = []
        self.sizes, self.judge, self.missing = sizes, judge, missing

    def add(self, name: str, kind: Any, costs: Costs, most: int | None = None) -> Toy:
        """One whose turn at a size costs seconds of wall and processors; the turn that warms up is number 0."""

        def prepare(setting: Setting) -> Work:
            self.order.append(f"{name}?")
            turns = iter(range(100)) if setting.size == self.sizes[0] else iter(range(1, 100))

            def work() -> int:
                self.order.append(name)
                wall, cpu = costs(setting.size, next(turns))
                self.wall, self.cpu = self.wall + wall, self.cpu + cpu
                return setting.size

            return work

        self.contestants.append(Contestant(name, kind, prepare, ("numpy",), most))
        return self

    @property
    def case(self) -> Case:
        return Case(
            "toy", "Toys", "things", self.sizes, tuple(self.contestants), judge=self.judge, missing=lambda: self.missing
        )

    def request(self, repeat: int = 3, **fields: Any) -> Request:
        return Request(case="toy", variant="", repeat=repeat, sizes=list(self.sizes), **fields)

    def measured(self, repeat: int = 3, probe: Any = None, **fields: Any) -> CaseResult:
        return measure(self.case, self.request(repeat, **fields), probe or remembered, lambda: (self.wall, self.cpu))


def remembered(case: Case, contestant: Contestant, setting: Setting) -> Memory:
    """No process: 10 MB a thing."""
    return Memory(before_mb=100, peak_mb=100 + 10 * setting.size)


def steady(wall: float, cpu: float | None = None, power: float = 1.0) -> Costs:
    """The same in every turn, and a hundred times as much in the one that warms up."""
    spent = wall if cpu is None else cpu
    return lambda size, turn: tuple(x * size**power * (1 if turn else 100) for x in (wall, spent))  # type: ignore[return-value]


def broken(size: int, turn: int) -> tuple[float, float]:
    raise RuntimeError("a peer's own\nerror")


def test_turns_are_interleaved_and_the_first_does_not_count():
    toy = Toy(sizes=(1, 2)).add("A", "ours", steady(1)).add("B", "peer", steady(2)).add("C", "floor", steady(0.5))
    found = toy.measured(repeat=2)
    assert "".join(toy.order) == "A?B?C?" + "ABC" * 3 + "A?B?C?" + "ABC" * 2
    assert [[len(one.turns) for one in entry.sizes] for entry in found.entries] == [[2, 2]] * 3
    assert all(turn.wall_s < 5 for entry in found.entries for one in entry.sizes for turn in one.turns)


def test_a_ratio_is_the_median_of_turns_at_the_largest_size():
    slow = {1: 1.0, 2: 10.0, 3: 2.0, 4: 3.0, 5: 4.0}  # what else the machine did in each turn, which both sides feel
    toy = Toy(sizes=(1, 2))
    toy.add("ours", "ours", lambda size, turn: (3 * slow.get(turn, 1) * size, 2 * size))
    toy.add("peer", "peer", lambda size, turn: (slow.get(turn, 1) * size, [1, 1, 2, 4, 8, 16][turn] * size))
    ratios = toy.measured(repeat=5).ratios["peer"]
    assert ratios["wall_s"] == Spread(low=3, median=3, high=3, turns=5)
    assert ratios["cpu_s"] == Spread(low=0.25, median=0.5, high=1, turns=5)


def test_what_each_further_costs_is_without_what_is_done_once():
    toy = Toy(sizes=(1, 2, 4))
    toy.add("ours", "ours", lambda size, turn: (50 + 3 * size, 7 + 2 * size))
    toy.add("peer", "peer", lambda size, turn: (9 + size, 4 * size))
    toy.add("constant", "peer", lambda size, turn: (9, 9))
    ours, peer, constant = toy.measured().entries
    assert further(ours, peer, "wall_s") == Spread(low=3, median=3, high=3, turns=3)
    assert further(ours, peer, "cpu_s") == Spread(low=0.5, median=0.5, high=0.5, turns=3)
    assert further(ours, constant, "cpu_s") is None
    assert further(ours, None, "cpu_s") is None


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_growth_is_the_exponent(power: float):
    toy = Toy().add("ours", "ours", steady(7, 3, power))
    assert toy.measured().entries[0].growth == pytest.approx(power, abs=1e-9)


def test_memory_is_that_of_the_smallest_and_the_largest_size():
    asked = []

    def probe(case: Case, contestant: Contestant, setting: Setting) -> Memory:
        asked.append((contestant.name, setting.size))
        assert not any(setting.folder.iterdir())
        return remembered(case, contestant, setting)

    found = Toy().add("A", "ours", steady(1)).add("B", "peer", steady(1)).measured(probe=probe)
    assert asked == [("A", 1), ("A", 4), ("B", 1), ("B", 4)]
    assert [one.memory and one.memory.peak_mb for one in found.entries[0].sizes] == [110, None, 140]


def test_a_peer_that_fails_in_a_turn_is_shown_and_the_others_go_on():
    toy = Toy().add("ours", "ours", steady(1)).add("bad", "peer", broken).add("good", "peer", steady(2))
    found = toy.measured()
    assert found.entries[1].fault == "1 things: RuntimeError: a peer's own error"
    assert toy.order.count("bad?") == 1
    assert set(found.ratios) == {"bad", "good"}
    assert not found.ratios["bad"]
    assert found.ratios["good"]["cpu_s"].median == 0.5
    assert "| bad | 1 things: RuntimeError: a peer's own error |" in table([found])


def test_a_peer_that_fails_before_its_turns_gets_none():
    def probe(case: Case, contestant: Contestant, setting: Setting) -> Memory:
        if contestant.name == "absent" or (contestant.name == "greedy" and setting.size == 4):
            raise Fault("not installed: it" if contestant.name == "absent" else "ended by signal 9")
        return remembered(case, contestant, setting)

    toy = Toy().add("ours", "ours", steady(6)).add("absent", "peer", steady(1)).add("greedy", "peer", steady(2))
    found = toy.measured(probe=probe)
    assert "absent" not in toy.order
    assert "absent?" not in toy.order
    assert found.entries[1].fault == "not installed: it"
    greedy = found.entries[2]
    assert [one.size for one in greedy.sizes] == [1, 2]
    assert greedy.fault == "4 things: ended by signal 9"
    assert found.ratios["greedy"]["cpu_s"].median == 3  # at size 2, the largest that both have
    page = table([found])
    assert "| absent | not installed: it |" in page
    assert "- greedy: 4 things: ended by signal 9." in page


def test_a_contestant_with_a_limit_says_so():
    found = Toy().add("ours", "ours", steady(1)).add("B", "peer", steady(1), most=2).measured()
    assert [one.size for one in found.entries[1].sizes] == [1, 2]
    assert found.entries[1].fault == "up to 2 things only"


def test_scores_are_of_the_largest_size():
    toy = Toy(judge=lambda setting, results: {name: {"size": float(result)} for name, result in results.items()})
    toy.add("ours", "ours", steady(1)).add("bad", "peer", broken)
    assert [entry.scores for entry in toy.measured().entries] == [{"size": 4.0}, {}]


def test_only_takes_names_and_ours():
    toy = Toy().add("ours", "ours", steady(1)).add("bare", "floor", steady(1)).add("peer", "peer", steady(1))
    assert [entry.name for entry in toy.measured(only=["bar"]).entries] == ["ours", "bare"]


def test_a_case_that_cannot_run_here_says_why():
    toy = Toy(missing="needs TensorRT: none").add("ours", "ours", steady(1))
    found = toy.measured()
    assert (found.skipped, toy.order) == ("needs TensorRT: none", [])
    assert "Not measured: needs TensorRT: none." in table([found])


def test_a_run_goes_on_where_it_was(tmp_path: Path):
    toy = Toy(sizes=(1,)).add("ours", "ours", steady(1))
    assert run_one(toy.case, toy.request(), tmp_path, remembered)
    (path,) = tmp_path.glob("*.json")
    before, done = path.read_bytes(), len(toy.order)
    assert run_one(toy.case, toy.request(), tmp_path, remembered)
    assert (path.read_bytes(), len(toy.order)) == (before, done)
    for changed, again in ((toy.request(repeat=4), False), (toy.request(repeat=4), True)):
        assert run_one(toy.case, changed, tmp_path, remembered, again)
        assert len(toy.order) > done
        done = len(toy.order)
    assert CaseResult.load(path).request.repeat == 4


def test_ours_that_fails_is_no_success(tmp_path: Path):
    toy = Toy(sizes=(1,)).add("ours", "ours", broken).add("peer", "peer", steady(1))
    assert not run_one(toy.case, toy.request(), tmp_path, remembered)


def test_results_are_what_was_saved(tmp_path: Path):
    found = Toy().add("ours", "ours", steady(1)).add("peer", "peer", steady(3)).measured()
    found.save(tmp_path / "toy.json")
    assert CaseResult.load(tmp_path / "toy.json") == found
    assert '"median": 0.33' in (tmp_path / "toy.json").read_text()


def test_the_table_is_as_it_was():
    """After a change that is meant: `python conformance/test_benchmarks.py`."""
    assert page() == GOLDEN.read_text(encoding="utf-8")


def page() -> str:
    """A table of two cases and one that cannot run."""
    turns = {"ours": [2.0, 2.2, 2.4], "a|b <c>": [1.0, 1.0, 1.0], "bare": [0.5, 0.55, 0.6]}
    kinds: dict[str, Any] = {"ours": "ours", "a|b <c>": "peer", "bare": "floor"}
    entries = [
        Entry(
            name=name,
            kind=kinds[name],
            versions={"peer": "1.2"} if name == "a|b <c>" else {},
            sizes=[
                Measured(
                    size=size,
                    turns=[Turn(wall_s=size * s / 2, cpu_s=size * s) for s in seconds],
                    memory=Memory(before_mb=50, peak_mb=50 + size),
                )
                for size in (8, 16)
            ],
            scores={"AP": 0.51234, "kept": 300.0} if name == "ours" else {},
        )
        for name, seconds in turns.items()
    ]
    entries.append(Entry(name="absent", kind="peer", fault="not installed: absent | <here>"))
    facts: dict[str, Any] = {"created": "2025-06-01T12:00:00+00:00", "machine": {"cores": "2"}, "axis": "images"}
    asked = {"repeat": 3, "sizes": [8, 16]}
    whole = CaseResult(request=Request(case="b", variant="v", **asked), title="Work", entries=entries, **facts)
    alone = CaseResult(request=Request(case="a", variant="", **asked), title="Alone", entries=entries[:1], **facts)
    gone = CaseResult(request=Request(case="0", variant="", **asked), title="Gone", skipped="needs a GPU", **facts)
    return table([whole, gone, alone]).removeprefix(HEAD)


def test_nothing_of_what_is_printed_is_seen(capfd: pytest.CaptureFixture[str]):
    with quiet():
        print("loud")
        os.write(1, b"loud")
        os.write(2, b"loud")
    print("said")
    assert capfd.readouterr() == ("said\n", "")


def test_the_clock_counts_processors_and_wall():
    before, total = clock(), 0.0
    while clock()[1] - before[1] < 0.01:
        total += 1.0
    assert clock()[0] > before[0]


def test_memory_of_a_fresh_process_and_what_it_says_of_faults(tmp_path: Path):
    case, probe = CASES["comparison"], memory.probe(100)
    found = {one.name: one for one in case.contestants}
    two, eight = (probe(case, found["ours"], Setting(size, tmp_path)) for size in (1, 8))
    assert 20 < two.before_mb < eight.before_mb - 50  # 15 MB an image
    assert two.peak_mb >= two.before_mb
    nothing = Contestant("nothing of this name", "peer", found["ours"].prepare)
    with pytest.raises(Fault, match="exit status 1: StopIteration"):
        probe(case, nothing, Setting(1, tmp_path))
    with pytest.raises(Fault, match="not done in 0 s"):
        memory.probe(0.01)(case, found["ours"], Setting(1, tmp_path))
    mmcv = next(one for one in CASES["nms"].contestants if one.name.startswith("mmcv"))
    try:
        probe(CASES["nms"], mmcv, Setting(1, tmp_path))  # where mmcv is compiled
    except Fault as fault:
        assert str(fault).startswith("not installed: ")  # noqa: PT017


def test_contestants_of_the_same_work_agree(tmp_path: Path):
    setting = Setting(1, tmp_path)
    kept = [prepare(setting)()[0] for prepare in (nms.each(nms.ours(True)), nms.each(nms.onnx_runtime))]
    np.testing.assert_array_equal(*map(np.sort, kept))
    largest = comparison.largest(setting)()
    assert comparison.ours(setting)() == largest > 0
    few = Setting(30, tmp_path)
    assert mean_ap.ours(few)() == pytest.approx(mean_ap.coco("pycocotools")(few)(), abs=1e-12)
    assert 0.05 < mean_ap.ours(few)() < 0.95


def test_what_a_peer_patches_is_taken_back():
    q = pytest.importorskip("onnxruntime.quantization.calibrate")
    before = q.MinMaxCalibrater.collect_data, q.create_calibrator
    with calibration._as_it_was("onnxruntime.quantization"):
        q.MinMaxCalibrater.collect_data = q.create_calibrator = None
    assert (q.MinMaxCalibrater.collect_data, q.create_calibrator) == before


def test_names_are_of_one_thing():
    for name, case in CASES.items():
        names = [one.name for one in case.contestants]
        assert name == case.name
        assert len(set(names)) == len(names)
        assert case.contestants[0].kind == "ours"
        assert sorted(case.sizes) == list(case.sizes)
        assert re.fullmatch(r"[a-z-]+", name)


def test_no_common_size_is_no_ratio():
    one = Entry(name="a", kind="ours", sizes=[Measured(size=1, turns=[Turn(wall_s=1, cpu_s=1)])])
    other = Entry(name="b", kind="peer", sizes=[Measured(size=2, turns=[Turn(wall_s=1, cpu_s=1)])])
    assert ratio(one, other, "cpu_s") is None
    assert ratio(one, None, "cpu_s") is None


def test_the_command_line(tmp_path: Path):
    def said(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, list(words))
        return done.exit_code, " ".join((done.stdout + done.stderr).split())

    status, text = said("list")
    assert status == 0
    assert all(f"{name}: " in text for name in CASES)
    assert said("run", "--case", "nothing", "--out", str(tmp_path))[0] == 2
    assert said("run", "--case", "nms", "--sizes", "1,x", "--out", str(tmp_path))[0] == 2
    assert said("run", "--case", "nms", "--variant", "nothing", "--out", str(tmp_path))[0] == 2
    assert said("table", str(tmp_path))[0] == 2
    (tmp_path / "nms.json").write_text("{}")
    assert said("table", str(tmp_path))[0] == 2
    Toy().add("ours", "ours", steady(1)).measured().save(tmp_path / "nms.json")
    assert said("table", str(tmp_path), "--out", str(tmp_path / "page.md"))[0] == 0
    assert "## toy" in (tmp_path / "page.md").read_text()


def test_several_cases_are_a_process_each(tmp_path: Path):
    if capabilities.missing() is None:
        pytest.skip("builds engines where TensorRT is")
    command = [sys.executable, "-m", "benchmarks", "run", "--case", "engines,plugin", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {CaseResult.load(path).request.case for path in tmp_path.glob("*.json")} == {"engines", "plugin"}
    assert done.stdout.count("needs TensorRT: ") == 2


def test_the_page_of_the_documentation_is_of_the_committed_results():
    results = [CaseResult.load(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    assert {result.request.case for result in results} == set(CASES)
    assert (ROOT / "docs" / "explanation" / "benchmarks.md").read_text(encoding="utf-8") == table(results)


if __name__ == "__main__":
    GOLDEN.write_text(page(), encoding="utf-8")
