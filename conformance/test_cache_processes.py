"""The cache between processes: made once, whole after a SIGKILL at any moment, and nothing goes that another uses."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.cache import Key, kept, room
from alignment.cache.entry import entries_dir
from alignment.storage import cache_dir

#: What every worker knows: payloads that tell their key, in pieces, so that a kill finds them half written.
PROGRAM = """
import os, random, signal, sys, time
from pathlib import Path
from alignment.cache import Key, holding, kept, resumable, room, value

log = Path(os.environ["ALIGN_CACHE"]).with_name("log")

def tell(word):
    with log.open("a") as file:
        file.write(f"{word}\\n")

def content(key):
    return f"{key.kind} {key.inputs['n']} " * 500

def write(key, pause=0.0005):
    def make(folder):
        tell(f"begin {key.inputs['n']}")
        with (folder / "plan").open("w") as file:
            text = content(key)
            for start in range(0, len(text), 500):
                file.write(text[start : start + 500])
                file.flush()
                time.sleep(pause)
        (folder / "notes").write_text("")
        tell(f"end {key.inputs['n']}")
    return make

def right(key, folder):
    assert (folder / "plan").read_text() == content(key), key

def number(n):
    return Key("engine", "tiny", {"n": n}, {"gpu": "none"})
"""


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(room.VARIABLE, raising=False)
    yield tmp_path / "log"
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


STARTED: list[subprocess.Popen] = []


def start(body: str) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", PROGRAM + body]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    STARTED.append(process)
    return process


def require_well(process: subprocess.Popen) -> str:
    """It ended well; what it said of refused entries."""
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return error


def wait_for(word: str, log: Path, count: int = 1) -> None:
    end = time.monotonic() + 60
    while not log.exists() or log.read_text().splitlines().count(word) < count:
        assert time.monotonic() < end, f"no {word}"
        time.sleep(0.005)


KEEP = "for n in range(6): right(number(n), kept(number(n), write(number(n))))\n"


def test_workers_that_ask_at_once_make_each_entry_once(log):
    for process in [start(KEEP) for _ in range(3)]:
        assert require_well(process) == ""
    told = log.read_text().splitlines()
    assert sorted(told) == sorted(f"{word} {n}" for word in ("begin", "end") for n in range(6))


def test_who_waits_for_a_writer_that_is_killed_writes_itself(log):
    first = start("kept(number(0), write(number(0), pause=10))\n")
    wait_for("begin 0", log)
    second = start("tell('ask'); right(number(0), kept(number(0), write(number(0))))\n")
    wait_for("ask", log)
    assert [item.state for item in room.contents()] == ["leftover"]
    assert room.prune().held, "its writer is at work"
    first.kill()
    assert require_well(second) == ""
    assert log.read_text().splitlines().count("begin 0") == 2
    assert [item.state for item in room.contents()] == ["ok"]


def test_what_a_process_was_given_stays_until_it_ends_however_it_ends(log):
    process = start("kept(number(0), write(number(0))); tell('has'); time.sleep(60)\n")
    wait_for("has", log)
    assert [item.kind for item in room.prune(everything=True).held] == ["engine"]
    (folder,) = entries_dir().glob("*/*")
    process.kill()
    process.wait()
    assert [item.path for item, _ in room.prune(everything=True).removed] == [folder]
    assert list((cache_dir() / "leases").iterdir()) == []


def test_work_that_is_killed_goes_on(log):
    body = """
with resumable(number(9), lambda folder: None) as folder:
    for step in range(8):
        if not (folder / str(step)).exists():
            (folder / str(step)).write_text("done")
            tell(f"step {step}")
            if step == 4 and not log.with_name("killed").exists():
                log.with_name("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
"""
    first = start(body)
    assert first.wait(60) == -signal.SIGKILL
    assert [item.state for item in room.contents()] == ["unfinished"]
    assert require_well(start(body)) == ""
    assert log.read_text().splitlines() == [f"step {step}" for step in range(8)]
    assert [item.state for item in room.contents()] == ["ok"]


KILLS = 8
#: Makes, reads and removes at random; whatever it is given must be right.
AT_RANDOM = """
rng = random.Random({seed})
tell("up {seed}")
while not log.with_name("stop").exists():
    key = number(rng.randrange(8))
    act = rng.randrange(10)
    if act < 5:
        with holding(key, write(key)) as folder:
            right(key, folder)
    elif act < 7:
        right(key, kept(key, write(key)))
    elif act < 9:
        other = Key("score", "tiny", {{"n": rng.randrange(8)}})
        assert value(other, lambda: other.inputs["n"] / 7) == other.inputs["n"] / 7
    else:
        room.prune(everything=rng.random() < 0.5, max_size=30_000)
    tell("step")
"""


def test_workers_that_are_killed_at_any_moment_leave_it_consistent(log, monkeypatch):
    monkeypatch.setenv(room.VARIABLE, "60kB")
    rng = random.Random(10)
    stayed = start(AT_RANDOM.format(seed=0))
    for seed in range(1, KILLS + 1):
        killed = start(AT_RANDOM.format(seed=seed))
        wait_for(f"up {seed}", log)
        time.sleep(rng.random() * 0.4)
        killed.kill()
        # What is renamed into its place is whole: a kill leaves nothing that is to be refused.
        assert "refused" not in killed.communicate()[1]
        assert killed.returncode == -signal.SIGKILL
    log.with_name("stop").touch()
    said = require_well(stayed)
    assert "refused" not in said
    pruned = room.prune()
    assert {item.state for item, _ in pruned.removed} <= {"leftover"}
    assert {item.state for item in room.contents()} <= {"ok"}
    assert pruned.held == []
    assert list((cache_dir() / "locks").iterdir()) == []
    # And it goes on to work.
    room.prune(everything=True)
    assert room.contents() == []
    assert kept(Key("engine", "tiny"), lambda folder: (folder / "plan").write_text("again")).is_dir()
