"""A share of the fuzzer's inputs, the same each time; ``python conformance/fuzz.py`` takes as many as one likes."""

from __future__ import annotations

from random import Random

import fuzz
import fuzz_mutations
import fuzz_worker
import pytest
from fuzz_surfaces import SURFACES, Input

#: Inputs of each surface.
SHARE = 4


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    pytest.importorskip("mmyolo")
    made = fuzz.Worker(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.close()


@pytest.mark.parametrize("surface", SURFACES)
def test_bad_input_is_refused_in_one_line(worker, surface):
    verdicts = [worker.judge(surface, seed) for seed in range(SHARE)]
    assert [v for v in verdicts if v.fault] == []
    assert all(v.status in (0, 1, 2) for v in verdicts)


ONE = Input(["run"], ["file.yaml"])


@pytest.mark.parametrize(
    ("status", "said", "fault"),
    [
        (2, "align: file.yaml: no: mend it\n", ""),
        (1, "", ""),
        (3, "", "status 3"),
        (0, "cache: score/a-1-2 is refused: value.json has 3 bytes, 4 were written: it is made anew\n", ""),
        (2, "", "silent"),
        (2, "align: file.yaml: no\nand more\n", "not one line"),
        (2, "error: file.yaml\n", "not one line"),
        (2, "align: another.yaml: no\n", "names no file"),
        (2, f"align: file.yaml: {'x' * 2000}\n", "endless line"),
        (2, "align: file.yaml\nTraceback (most recent call last):\n", "traceback in stderr"),
        (0, "RuntimeWarning: overflow\n", "chatter: RuntimeWarning: overflow"),
    ],
)
def test_what_is_said_is_judged(tmp_path, status, said, fault):
    assert fuzz_worker._fault(status, said, ONE, tmp_path) == fault


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("page.html", "<p>&lt;fuzz&gt;</p>", ""),
        ("page.html", "<p><fuzz onload=alert(1)></p>", "markup in page.html"),
        ("junit.xml", "<a>", "bad XML in junit.xml"),
        ("executed", "", "executed"),
        (".report.html.x1", "", "left .report.html.x1"),
        ("out/half", "", "half-written"),
    ],
)
def test_what_is_left_is_judged(tmp_path, name, content, fault):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    assert fuzz_worker._fault(2, "align: file.yaml: no\n", ONE, tmp_path).startswith(fault)
    assert bool(fault) == bool(fuzz_worker._fault(2, "align: file.yaml: no\n", ONE, tmp_path))


ANSWER = 'import sys; [print(\'{"surface": "a", "seed": 1}\', flush=True) for _ in sys.stdin]'


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        (ANSWER, ""),
        (f"import time; {ANSWER.replace('for _', 'if not time.sleep(60) else 0 for _')}", "hang"),
        ("import os; input(); os.abort()", "died: -6"),
        ("input(); raise SystemExit(3)", "died: 3"),
    ],
)
def test_a_process_that_hangs_or_dies_is_told(tmp_path, monkeypatch, program, fault):
    monkeypatch.setattr(fuzz, "FIRST", 3)
    (tmp_path / "program.py").write_text(program)
    worker = fuzz.Worker(tmp_path / "work", tmp_path / "program.py", 1)
    try:
        for _ in range(2):  # the second in a process of its own, where the first was lost
            assert worker.judge("a", 1).fault == fault
    finally:
        worker.close()


def test_an_exception_and_too_much_memory_are_told(tmp_path, monkeypatch):
    import numpy as np

    def raising(*_: object, **__: object) -> None:
        raise KeyError("planted")

    def hungry(*_: object, **__: object) -> None:
        np.ones(2**24)  # more than what the process has freed and kept

    monkeypatch.setitem(SURFACES, "planted", lambda rng, sound, folder: Input(["variants"]))
    monkeypatch.setattr("alignment.cli.app", raising)
    assert fuzz_worker.judged("planted", 0, None, tmp_path).fault.startswith("traceback: KeyError")
    monkeypatch.setattr("alignment.cli.app", hungry)
    monkeypatch.setattr(fuzz_worker, "MEMORY", 2**22)
    assert fuzz_worker.judged("planted", 0, None, tmp_path).fault.startswith("memory: ")


@pytest.mark.parametrize("spoil", ["spoilt_json", "spoilt_yaml"])
def test_an_input_is_the_same_each_time_and_another_for_each_seed(spoil):
    tree = {"a": [1, 2.5, {"b": "c"}], "d": None}
    made = [[getattr(fuzz_mutations, spoil)(Random(f"a/{seed}"), tree) for seed in range(20)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 15
