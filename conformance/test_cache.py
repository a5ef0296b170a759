"""The cache: what it gives is what was made, whatever happened to it on the disk, and it stays within its size."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import align, one_line
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from alignment.cache import Key, discard, holding, kept, leases, resumable, room, value
from alignment.cache.entry import ENTRY, entries_dir
from alignment.errors import AlignError
from alignment.storage import locked

KEY = Key("engine", "tiny", {"onnx_sha256": "ab" * 32, "level": 3}, {"tensorrt": "8.6.1", "gpu": "H100"})
DAY = 86400


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ALIGN_CACHE", str(folder))
    monkeypatch.delenv(room.VARIABLE, raising=False)
    monkeypatch.setattr("alignment.cache.keep._said", set())
    return folder


def writer(text: str = "payload") -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "plan").write_text(text)
        (folder / "notes").write_text("")

    return write


def never(folder: Path) -> None:
    raise AssertionError("it is made again")


def put(key: Key, size: int = 100, used: float | None = None) -> Path:
    """An entry that nobody works with, used so many seconds ago."""
    with holding(key, lambda folder: (folder / "plan").write_bytes(b"x" * size)):
        pass
    if used is not None:
        os.utime(key.folder / ENTRY, (time.time() - used,) * 2)
    return key.folder


def names() -> set[str]:
    return {item.name for item in room.contents() if item.state != "leftover"}


def said(caplog) -> str:
    """The one line that was logged."""
    (record,) = caplog.records
    assert record.name == "alignment.cache"
    assert "\n" not in record.getMessage()
    return record.getMessage()


class TestEntry:
    def test_it_is_made_once_and_says_what_it_is(self):
        folder = kept(KEY, writer())
        assert kept(KEY, never) == folder == KEY.folder
        assert (folder / "deep" / "plan").read_text() == "payload"
        about = json.loads((folder / ENTRY).read_text())
        assert (about["kind"], about["name"], about["size"]) == ("engine", "tiny", 7)
        assert about["inputs"] == KEY.inputs
        assert about["versions"] == KEY.versions
        assert about["files"]["deep/plan"] == {
            "size": 7,
            "sha256": "239f59ed55e737c77147cf55ad0c1b030b6d7ee748a7426952f9b852d5a935e5",
        }

    def test_a_failure_leaves_nothing(self):
        def fail(folder: Path) -> None:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            kept(KEY, fail)
        assert list(entries_dir().glob("*/*")) == []

    @pytest.mark.parametrize("name", ["../../up", ".hidden", "a/b", "ä" * 300, "", "a\nb"])
    def test_any_name_has_a_place_of_its_own_within(self, name):
        folder = kept(Key("graph", name), writer())
        assert folder.parent == entries_dir() / "graph"
        assert folder.resolve().parent == (entries_dir() / "graph").resolve()
        assert [item.name for item in room.contents()] == [name]

    @pytest.mark.parametrize("change", ["kind", "name", "input", "version"])
    def test_another_key_is_another_entry(self, change):
        other = {
            "kind": Key("onnx", KEY.name, KEY.inputs, KEY.versions),
            "name": Key(KEY.kind, "other", KEY.inputs, KEY.versions),
            "input": Key(KEY.kind, KEY.name, {**KEY.inputs, "level": 4}, KEY.versions),
            "version": Key(KEY.kind, KEY.name, KEY.inputs, {**KEY.versions, "gpu": "H200"}),
        }[change]
        assert kept(KEY, writer()) != kept(other, writer())
        assert len(room.contents()) == 2

    def test_a_value(self):
        made = {"ap": 0.1 + 0.2, "far": float("inf")}
        assert value(KEY, lambda: made) == made
        assert value(KEY, lambda: never(Path())) == made

    def test_a_link_is_kept_as_a_link(self, tmp_path):
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "a.png").write_text("not ours")
        folder = kept(KEY, lambda folder: (folder / "val").symlink_to(tmp_path / "pictures"))
        assert kept(KEY, never) == folder
        discard(KEY, "no use")
        assert not folder.exists()
        assert (tmp_path / "pictures" / "a.png").read_text() == "not ours"


def tamper(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        about = json.loads((folder / ENTRY).read_text())
        change(about)
        (folder / ENTRY).write_text(json.dumps(about))

    return write


def later(path: Path, text: str) -> None:
    path.write_text(text)


# What happens to an entry, and what is said of it.
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: later(f / "deep" / "plan", "pay"), "deep/plan has 3 bytes, 7 were written"),
    "longer": (lambda f: later(f / "deep" / "plan", "payload "), "deep/plan has 8 bytes, 7 were written"),
    "a bit": (lambda f: later(f / "deep" / "plan", "paylaod"), "deep/plan has changed since it was written"),
    "missing": (lambda f: (f / "notes").unlink(), "notes is missing"),
    "a link": (
        lambda f: ((f / "notes").unlink(), (f / "notes").symlink_to("/dev/null")),
        "notes is another link",
    ),
    "no entry.json": (lambda f: (f / ENTRY).unlink(), "no entry.json"),
    "half of entry.json": (lambda f: later(f / ENTRY, (f / ENTRY).read_text()[:40]), "entry.json: "),
    "garbage": (lambda f: (f / ENTRY).write_bytes(b"\xff\x00\xfe"), "entry.json: "),
    "other JSON": (lambda f: later(f / ENTRY, "[]"), "entry.json: "),
    "deep JSON": (lambda f: later(f / ENTRY, "[" * 100_000), "entry.json: "),
    "a field": (tamper(lambda about: about.pop("made")), "entry.json: made: Field required"),
    "layout": (tamper(lambda about: about.update(layout=0)), "of another layout: 0, here 1"),
    "stale": (tamper(lambda about: about["inputs"].update(level=0)), "of another inputs.level: 0, here 3"),
    "of lines": (tamper(lambda about: about["inputs"].update(level="a\nb")), "of another inputs.level: a b, here 3"),
    "another TensorRT": (
        tamper(lambda about: about["versions"].update(tensorrt="10.16.1")),
        "of another versions.tensorrt: 10.16.1, here 8.6.1",
    ),
    "another GPU": (
        tamper(lambda about: about["versions"].update(gpu="H200")),
        "of another versions.gpu: H200, here H100",
    ),
    "unfinished": (tamper(lambda about: about.update(files=None)), "not finished"),
    "a file in its place": (lambda f: (shutil.rmtree(f), later(f, "")), "entry.json: "),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_not_sound_is_refused_with_its_reason_and_made_anew(how, caplog):
    spoil, reason = SPOILED[how]
    folder = kept(KEY, writer())
    spoil(folder)
    assert kept(KEY, writer()) == folder
    assert said(caplog).startswith(f"cache: engine/{folder.name} is refused: {reason}")
    assert (folder / "deep" / "plan").read_text() == "payload"
    caplog.clear()
    assert kept(KEY, never) == folder
    assert not caplog.records


@pytest.mark.parametrize("how", SPOILED)
def test_prune_removes_what_is_not_sound_alone(how):
    (spoil, reason), sound = SPOILED[how], put(Key("engine", "sound"))
    put(KEY)
    shutil.rmtree(KEY.folder)
    with holding(KEY, writer()) as folder:
        pass
    spoil(folder)
    pruned = room.prune()
    # By itself an entry does not know what is asked for; unfinished work may be gone on with.
    own = how not in ("layout", "stale", "of lines", "another TensorRT", "another GPU", "unfinished")
    assert [why.startswith(reason) for _, why in pruned.removed] == [True] * own
    assert folder.exists() != own
    assert sound.exists()


def test_entries_of_other_versions_are_told_once_and_stay(caplog):
    with caplog.at_level(logging.WARNING):
        kept(Key(KEY.kind, KEY.name, KEY.inputs, {**KEY.versions, "tensorrt": "8.5.3"}), writer())
        for level in (3, 4):
            kept(Key(KEY.kind, KEY.name, {**KEY.inputs, "level": level}, KEY.versions), writer())
    assert said(caplog) == (
        "cache: engine tiny is made anew: what is kept is of another versions.tensorrt: 8.5.3, here 8.6.1"
    )
    assert len(room.contents()) == 3


class TestResumable:
    """Work that adds a line for each of three steps, and may be stopped before any."""

    def work(self, stop: int = 3) -> int:
        """Returns how many steps were done before."""
        with resumable(KEY, self.check) as folder:
            path = folder / "steps"
            before = len(path.read_text().splitlines()) if path.exists() else 0
            for step in range(before, 3):
                if step == stop:
                    (folder / ".scratch").mkdir()
                    (folder / ".scratch" / "big").write_text("x" * 1000)
                    raise KeyboardInterrupt
                path.write_text("done\n" * (step + 1))
        return before

    def check(self, folder: Path) -> None:
        if (folder / "steps").exists() and "done" not in (folder / "steps").read_text():
            raise AlignError(f"{folder / 'steps'}: not steps", "delete it")

    def test_finished_work_of_no_use_is_made_anew(self, caplog):
        self.work()

        def check(folder: Path) -> None:
            if len((folder / "steps").read_text().splitlines()) < 4:
                raise AlignError(f"{folder / 'steps'}: too few", "make more")

        with resumable(KEY, check) as folder:
            assert not (folder / "steps").exists()
            (folder / "steps").write_text("done\n" * 4)
        assert said(caplog) == f"cache: engine/{KEY.folder.name} is refused: steps: too few: it is made anew"
        with resumable(KEY, check) as folder:
            assert (folder / "steps").exists()
        assert self.work() == 4

    @pytest.mark.parametrize("stop", [0, 1, 2])
    def test_it_goes_on_where_it_was(self, stop):
        with pytest.raises(KeyboardInterrupt):
            self.work(stop)
        (item,) = (item for item in room.contents() if item.state == "unfinished")
        assert item.size < 1000
        assert self.work() == stop
        assert not (KEY.folder / ".scratch").exists()
        assert self.work() == 3
        (item,) = room.contents()
        assert item.state == "ok"

    def test_what_cannot_be_gone_on_with_is_refused(self, caplog):
        with pytest.raises(KeyboardInterrupt):
            self.work(2)
        (KEY.folder / "steps").write_text("garbage")
        assert self.work() == 0
        assert "is refused: steps: not steps" in said(caplog)

    def test_finished_work_is_held_to_its_digest(self, caplog):
        self.work()
        (KEY.folder / "steps").write_text("done\n" * 2)
        assert self.work() == 0
        assert "is refused: steps has 10 bytes, 15 were written" in said(caplog)

    def test_it_goes_last_and_its_leftovers_first(self):
        with pytest.raises(KeyboardInterrupt):
            self.work(2)
        os.utime(KEY.folder / ENTRY, (1, 1))
        put(Key("onnx", "young"), 5000)
        pruned = room.prune(max_size=3000)
        assert [item.path.name for item, _ in pruned.removed] == [".scratch", Key("onnx", "young").folder.name]
        assert self.work() == 2


class TestPrune:
    def test_by_age_kind_and_size(self):
        for kind, name, days in (("onnx", "old", 9), ("onnx", "new", 1), ("score", "old", 9), ("score", "new", 1)):
            put(Key(kind, f"{kind} {name}"), 1000, days * DAY)
        assert {item.name for item, _ in room.prune(older_than=8 * DAY, kind="onnx").removed} == {"onnx old"}
        total = sum(item.size for item in room.contents())
        assert {item.name for item, _ in room.prune(max_size=total - 1).removed} == {"score old"}
        assert room.prune(max_size=total).removed == []
        pruned = room.prune(everything=True, dry_run=True)
        assert {item.name for item, _ in pruned.removed} == names() == {"onnx new", "score new"}
        assert pruned.left == 0
        assert pruned.freed == room.prune(everything=True).freed > 2000
        assert names() == set()

    def test_what_is_held_stays(self):
        with holding(KEY, writer()) as folder:
            pruned = room.prune(older_than=0, max_size=0, everything=True)
        assert [item.path for item in pruned.held] == [folder]
        assert folder.exists()
        assert pruned.left > 0
        room.prune(everything=True)
        assert not folder.exists()

    def test_what_this_process_was_given_stays(self, cache):
        folder = kept(KEY, writer())
        assert [item.path for item in room.prune(everything=True).held] == [folder]
        assert leases.leased() == {folder}
        assert folder.exists()

    @pytest.mark.parametrize("given", ["a link", "a relative path"])
    def test_it_stays_for_who_knows_the_cache_by_another_name(self, cache, monkeypatch, given):
        kept(KEY, writer())
        other = cache.with_name("other")
        other.symlink_to(cache)
        monkeypatch.chdir(cache.parent)
        monkeypatch.setenv("ALIGN_CACHE", str(other) if given == "a link" else cache.name)
        assert len(room.prune(everything=True).held) == 1
        with holding(Key("score", "s"), writer()):
            monkeypatch.setenv("ALIGN_CACHE", str(cache))
            assert len(room.prune(everything=True).held) == 2

    def test_leftovers_go_unless_their_writer_is_at_work(self):
        left = KEY.folder.with_name(f".{KEY.folder.name}.abcd_123")
        left.mkdir(parents=True)
        (left / "half").write_text("half")
        with locked(KEY.folder):
            assert [item.path for item in room.prune().held] == [left]
        assert [item.path for item, _ in room.prune().removed] == [left]
        assert not left.exists()

    def test_locks_go_unless_they_are_held(self, cache):
        put(KEY)
        with locked(cache / "held"):
            room.prune()
            (lock,) = (cache / "locks").iterdir()
            assert lock.name.startswith("held-")
        assert room.prune(dry_run=True).locks == 1
        assert room.prune().locks == 1
        assert list((cache / "locks").iterdir()) == []

    def test_other_files_of_the_folder_stay(self, cache):
        put(KEY)
        (cache / "onnx").mkdir()
        (cache / "onnx" / "mine.onnx").write_text("not an entry")
        room.prune(everything=True)
        assert (cache / "onnx" / "mine.onnx").exists()


class TestSize:
    def test_the_least_recently_used_go(self, monkeypatch, caplog):
        one = room.size_of(put(Key("onnx", "0"), 1000, 3 * DAY))
        monkeypatch.setenv(room.VARIABLE, str(3 * one + 50))
        put(Key("onnx", "1"), 1000, 2 * DAY)
        put(Key("onnx", "2"), 1000, 1 * DAY)
        put(Key("onnx", "0"))  # used again
        put(Key("onnx", "3"), 1000)
        assert names() == {"0", "2", "3"}
        assert "1 entries" in said(caplog)

    def test_one_that_is_too_large_by_itself_is_made_and_given(self, monkeypatch):
        monkeypatch.setenv(room.VARIABLE, "10")
        folder = kept(KEY, writer("x" * 1000))
        assert (folder / "deep" / "plan").stat().st_size == 1000
        assert value(Key("score", "s"), lambda: 1) == 1
        assert names() == {"tiny"}, "a value was read, and is of no more use"

    @pytest.mark.parametrize("text", ["much", "-1", "10 parsecs", "GB"])
    def test_what_is_no_size_is_refused_before_any_work(self, monkeypatch, text):
        monkeypatch.setenv(room.VARIABLE, text)
        with pytest.raises(AlignError, match=r"ALIGN_CACHE_SIZE .*: not a size: give one such as 20GB"):
            kept(KEY, never)


class Machine(RuleBasedStateMachine):
    """Any sequence of making, spoiling, holding, and pruning, on a cache of 4 kB."""

    KEYS = st.builds(
        Key, st.sampled_from(("onnx", "score")), st.sampled_from("ab"), st.fixed_dictionaries({"n": st.integers(0, 2)})
    )
    SIZE = 4000

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("ALIGN_CACHE", str(self.folder))
        self.patch.setenv(room.VARIABLE, str(self.SIZE))
        self.patch.setattr(logging.getLogger("alignment.cache"), "disabled", True)
        self.spoiled: set[Path] = set()
        self.held: dict[Path, object] = {}
        self.taken: set[Path] = set()
        self.made = False

    def teardown(self):
        if hasattr(self, "folder"):
            for lock in self.held.values():
                lock.__exit__(None, None, None)
            self.patch.undo()
            shutil.rmtree(self.folder)

    def content(self, key: Key) -> bytes:
        return repr((key.kind, key.name, key.inputs)).encode() * 9

    def make(self, key: Key, folder: Path) -> None:
        assert key.folder not in self.taken - self.spoiled, "a sound entry that is in use is made again"
        self.made = True
        (folder / "plan").write_bytes(self.content(key))

    def require(self, key: Key, content: bytes) -> None:
        """What is there is what was made; and the cache is within its size, but for what is in use."""
        assert content == self.content(key)
        self.spoiled.discard(key.folder)
        found = set(entries_dir().glob("*/*"))
        if self.made and found - self.taken - set(self.held):
            assert sum(map(room.size_of, found)) <= self.SIZE
        self.made = False

    @rule(key=KEYS)
    def get(self, key):
        if key.folder in self.held:
            return
        with holding(key, lambda folder: self.make(key, folder)) as folder:
            content = (folder / "plan").read_bytes()
        self.require(key, content)

    @precondition(lambda self: len(self.taken) < 2)
    @rule(key=KEYS)
    def take(self, key):
        if key.folder in self.held:
            return
        folder = kept(key, lambda folder: self.make(key, folder))
        self.taken.add(folder)
        self.require(key, (folder / "plan").read_bytes())

    @precondition(lambda self: len(self.held) < 2)
    @rule(key=KEYS)
    def hold(self, key):
        if key.folder not in self.held:
            self.held[key.folder] = lock = locked(key.folder)
            lock.__enter__()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data):
        self.held.pop(data.draw(st.sampled_from(sorted(self.held)))).__exit__(None, None, None)

    @rule(data=st.data(), how=st.sampled_from(["cut", "bit", "unlink", "json", "rmtree"]))
    def spoil(self, data, how):
        found = sorted(path.parent for path in entries_dir().glob("*/*/plan") if path.stat().st_size)
        if not found:
            return
        path = data.draw(st.sampled_from(found))
        if how == "rmtree":
            shutil.rmtree(path)
        elif how == "json":
            (path / ENTRY).write_text(data.draw(st.text(max_size=20)))
        elif how == "unlink":
            (path / "plan").unlink()
        else:
            content = (path / "plan").read_bytes()
            at = data.draw(st.integers(0, len(content) - 1))
            changed = content[:at] + (b"" if how == "cut" else bytes([content[at] ^ 1]) + content[at + 1 :])
            (path / "plan").write_bytes(changed)
        self.spoiled.add(path)

    @rule(options=st.sampled_from([{}, {"everything": True}, {"older_than": 0}, {"max_size": 1500}, {"kind": "onnx"}]))
    def prune(self, options):
        before = {path for path in entries_dir().glob("*/*")}
        pruned = room.prune(**options)
        after = {path for path in entries_dir().glob("*/*")}
        assert {item.path for item, _ in pruned.removed} == before - after
        stay = set(self.held) | self.taken
        assert before & stay <= after
        if "kind" not in options:
            assert after & self.spoiled <= stay
        if options.get("everything"):
            assert after <= stay


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestMachine = Machine.TestCase


class TestCommand:
    def test_ls(self):
        put(KEY, 1234, 3 * DAY)
        put(Key("score", "[red]yolo[/]"))
        shown = align("cache", "ls").stdout
        assert "tiny" in shown
        assert "3 days" in shown
        assert "[red]yolo[/]" in shown
        assert "2 entries" in shown
        (found,) = json.loads(align("cache", "ls", "--json", "--kind", "engine").stdout)
        assert found["size"] >= 1234
        assert found["inputs"] == KEY.inputs
        assert found["versions"] == KEY.versions
        assert found["state"] == "ok"
        assert json.loads(align("cache", "ls", "--json", "--kind", "none").stdout) == []

    def test_ls_of_no_cache(self):
        result = align("cache", "ls")
        assert result.exit_code == 0
        assert "0 entries, 0 B of 20.0 GB" in result.stdout

    def test_prune(self):
        put(KEY, 2_000_000, 3 * DAY)
        put(Key("score", "new"))
        dry = align("cache", "prune", "--older-than", "2d", "--dry-run").stdout
        assert "last used 3 days ago" in dry
        assert "would free 2.0 MB: 1 entries" in dry
        assert names() == {"tiny", "new"}
        assert "freed 2.0 MB: 1 entries" in align("cache", "prune", "--max-size", "1kB").stdout
        assert names() == {"new"}
        with locked(Key("score", "new").folder):
            assert "stays, it is in use" in align("cache", "prune", "--all").stdout
        assert "0 B stay" in align("cache", "prune", "--all").stdout

    @pytest.mark.parametrize("option", ["--older-than", "--max-size"])
    @pytest.mark.parametrize("text", ["much", "-3d", "", "1e999d", "nan"])
    def test_what_is_no_age_or_size_is_one_line(self, option, text):
        put(KEY)
        result = align("cache", "prune", option, text)
        assert result.exit_code == 2
        assert one_line(result.stderr).startswith(f"align: {option} {text!r}: not a ")
        assert names() == {"tiny"}

    def test_a_cache_of_a_size_that_is_none(self, monkeypatch):
        monkeypatch.setenv(room.VARIABLE, "much")
        assert one_line(align("cache", "ls").stderr).startswith("align: ALIGN_CACHE_SIZE 'much': not a size")
