"""How artefacts come into the cache and out of it: made once, by one process; found to be sound, or made anew."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignment.cache import leases, room
from alignment.cache.entry import ENTRY, Entry, Key, RefusedError, shown, write_entry
from alignment.errors import AlignError
from alignment.storage import locked, remove, writing_folder

_VALUE = "value.json"
_log = logging.getLogger("alignment.cache")
#: Kinds of which it was said that entries of other versions lie there.
_said: set[tuple[str, str]] = set()


def kept(key: Key, write: Callable[[Path], object]) -> Path:
    """The folder of an entry, which nothing removes as long as this process lives.

    Args:
        key: what it is known by.
        write: writes the payload into an empty folder; called where there is no sound entry, in one process while
            others wait.
    """
    with holding(key, write) as folder:
        leases.take(folder)
    return folder


def value(key: Key, make: Callable[[], Any]) -> Any:
    """A JSON value: what `make` gives, or gave before."""
    with holding(key, lambda folder: _write_value(folder, make())) as folder:
        return json.loads((folder / _VALUE).read_text(encoding="utf-8"))


@contextmanager
def holding(key: Key, write: Callable[[Path], object]) -> Iterator[Path]:
    """As `kept`, for what is read within the block and not after it."""
    folder, size, added = key.folder, room.allowed(), 0
    with locked(folder):
        if _sound(folder, key) is None:
            with writing_folder(folder) as temporary:
                write(temporary)
                write_entry(temporary, key)
            added = room.size_of(folder)
        _used(folder)
        yield folder
    if added:
        room.limit(size, added)


@contextmanager
def resumable(key: Key, check: Callable[[Path], object]) -> Iterator[Path]:
    """The folder of an entry for work that keeps there what is done, and goes on from it after an interruption.

    The block gets what lies there: nothing, the unfinished work of an earlier one, or all of it.  It must finish the
    work or raise.  Other processes wait meanwhile.

    Args:
        key: what it is known by.
        check: reads what lies in the folder, finished or not, and raises AlignError for what is of no use: it is then
            made anew.
    """
    folder, size, added = key.folder, room.allowed(), 0
    with locked(folder):
        entry = _sound(folder, key, check)
        if entry is None:
            with writing_folder(folder) as temporary:
                write_entry(temporary, key, finished=False)
        _used(folder)
        yield folder
        if entry is None or entry.files is None:
            write_entry(folder, key)
            added = room.size_of(folder)
    if added:
        room.limit(size, added)


@contextmanager
def until_done(key: Key) -> Iterator[Path]:
    """As `resumable`, of what is of use only until the work is done: it goes when the block ends without an error."""
    folder = key.folder
    with locked(folder):
        if _sound(folder, key, lambda _: None) is None:
            with writing_folder(folder) as temporary:
                write_entry(temporary, key, finished=False)
        _used(folder)
        yield folder
        remove(folder)


def discard(key: Key, reason: str) -> None:
    """Removes an entry that is sound but of no use, and says why; the next who asks for it makes it anew."""
    with locked(key.folder):
        if key.folder.exists():
            _refuse(key.folder, reason)


def _sound(folder: Path, key: Key, check: Callable[[Path], object] | None = None) -> Entry | None:
    """The entry, None where none can be used; one that is refused is removed.  The lock is held."""
    if not folder.exists():
        _say_other_versions(key)
        return None
    try:
        entry = Entry.read(folder)
        entry.require(key)
        if entry.files is None:
            _clear(folder)
            if check is None:
                raise RefusedError("not finished")
        entry.verify(folder)
        if check is not None:
            check(folder)
    except (RefusedError, AlignError, OSError) as error:
        what = error.what if isinstance(error, AlignError) else str(error)
        _refuse(folder, what.replace(f"{folder}{os.sep}", ""))
        return None
    return entry


def _refuse(folder: Path, reason: str) -> None:
    _log.warning("cache: %s/%s is refused: %s: it is made anew", folder.parent.name, folder.name, reason)
    remove(folder)


def _say_other_versions(key: Key) -> None:
    """Says once in a process and for a kind why what was kept of the same inputs is of no use."""
    for folder in key.folder.parent.glob(f"{key.inputs_folder.name}-*"):
        try:
            entry = Entry.read(folder)
        except RefusedError:
            continue
        try:
            entry.require(key)
        except RefusedError as reason:
            if (said := (key.kind, str(reason))) not in _said:
                _said.add(said)
                _log.warning("cache: %s %s is made anew: what is kept is %s", key.kind, shown(key.name), reason)
            return


def _clear(folder: Path) -> None:
    """Removes what a writer that was killed has left in an unfinished entry."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            remove(path)


def _used(folder: Path) -> None:
    """Makes it the last that is removed for room."""
    with suppress(OSError):  # of a cache that can only be read
        os.utime(folder / ENTRY)


def _write_value(folder: Path, made: Any) -> None:
    (folder / _VALUE).write_text(json.dumps(made) + "\n", encoding="utf-8")
