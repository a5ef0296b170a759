"""Temporary files, folders and locks of killed processes: none stays for long, and none of the living goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignment.cache import room
from alignment.scratch import PREFIX, scratch_folder
from alignment.storage import locked, writing, writing_folder

pytestmark = pytest.mark.kill
HOLDING = {
    "file": "writing(Path('kept.json'))",
    "folder": "writing_folder(Path('kept'))",
    "scratch": "scratch_folder()",
    "lock": "locked(Path('kept.json'))",
    "sweep": "temporary(Path.cwd(), '.sweep-', '', folder=True)",
}
PROGRAM = """
import sys, time
from pathlib import Path
from alignment.scratch import scratch_folder, temporary
from alignment.storage import locked, writing, writing_folder
with {}:
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holding(what: str, folder: Path) -> Iterator[subprocess.Popen]:
    """A process that is amid a block, in `folder`."""
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    own = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(folder), "ALIGN_CACHE": str(folder)}
    command = [sys.executable, "-c", PROGRAM.format(HOLDING[what])]
    with subprocess.Popen(command, cwd=folder, env=own, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        yield process
        process.send_signal(signal.SIGKILL)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Everything lies in one folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))


def make(what: str, folder: Path) -> None:
    """The same block, from its beginning to its end."""
    if what == "file":
        with writing(folder / "kept.json") as path:
            path.write_text("{}")
    elif what == "folder":
        with writing_folder(folder / "kept"):
            pass
    else:
        with scratch_folder():
            pass


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("what", ["file", "folder", "scratch"])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(what, tmp_path):
    with holding(what, tmp_path):
        (theirs,) = names(tmp_path)
        make(what, tmp_path)
        made = names(tmp_path) - {theirs}
        assert theirs in names(tmp_path)
        for path in tmp_path.glob("kept"):
            path.rmdir()
    assert theirs in names(tmp_path)
    make(what, tmp_path)
    assert names(tmp_path) == made == {"file": {"kept.json"}, "folder": {"kept"}, "scratch": set()}[what]


def test_pruning_the_cache_takes_the_tensors_of_a_killed_sweep_and_leaves_those_of_a_living_one(tmp_path):
    (tmp_path / ".notes").write_text("mine")
    with holding("sweep", tmp_path):
        (theirs,) = tmp_path.glob(".sweep-*")
        (theirs / "tensor.npy").write_bytes(bytes(1000))
        assert not room.prune().scratch
        assert theirs.is_dir()
    assert room.prune(dry_run=True).scratch == {theirs: 1000}
    pruned = room.prune()
    assert (pruned.scratch, pruned.freed) == ({theirs: 1000}, 1000)
    assert names(tmp_path) == {".notes"}


def test_what_only_looks_like_it_stays(tmp_path):
    others = {".kept.json.mine", ".kept.json.abcdefg.json", ".kept.json.ABCDEFGH.json", f"{PREFIX}notes", "kept.json~"}
    for name in others:
        (tmp_path / name).write_text("mine")
    make("file", tmp_path)
    make("scratch", tmp_path)
    assert names(tmp_path) == others | {"kept.json"}


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / f"{PREFIX}abcdefgh").symlink_to(tmp_path / "elsewhere")
    make("scratch", tmp_path)
    assert names(tmp_path / "elsewhere") == {"mine"}


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    with holding("lock", tmp_path):
        pass
    entered = []

    def enter() -> None:
        with locked(tmp_path / "kept.json"):
            entered.append(True)

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    thread.join(30)
    assert entered


def test_many_writers_of_one_file(tmp_path):
    """None takes the temporary file of another for abandoned, and it is always whole."""
    failures = []

    def write(number: int) -> None:
        try:
            for _ in range(50):
                with writing(tmp_path / "kept.json") as path:
                    path.write_text(str(number) * 100)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert names(tmp_path) == {"kept.json"}
    text = (tmp_path / "kept.json").read_text()
    assert text == text[0] * 100
