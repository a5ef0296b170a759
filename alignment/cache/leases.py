"""Which entries living processes work with: a process holds the lock of a list of its own for as long as it lives.

A lock per entry would hold a file open for each; and the system frees the locks of a process however it ends, so that
the list of one that was killed counts for nothing.
"""

from __future__ import annotations

import atexit
import os
import threading
import uuid
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from alignment.storage import acquired, cache_dir, lock_of

_FOLDER = "leases"
#: Of this process, by the folder that they are in; a fork begins its own.
_own: dict[tuple[int, Path], tuple[Path, FileLock, set[str]]] = {}
_guard = threading.Lock()


def take(folder: Path) -> None:
    """Keeps an entry from removal until this process ends; its lock is held by the caller."""
    place = cache_dir() / _FOLDER
    with _guard:
        if (os.getpid(), place) not in _own:
            path = place / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
            lock = FileLock(lock_of(path), thread_local=False)
            lock.acquire()
            place.mkdir(parents=True, exist_ok=True)
            _own[os.getpid(), place] = path, lock, set()
        path, _, names = _own[os.getpid(), place]
        # Within the cache, which another process may know by another name.
        name = folder.relative_to(cache_dir()).as_posix()
        if name not in names:
            names.add(name)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{name}\n")


def leased() -> set[Path]:
    """The entries that living processes have taken; lists of dead ones are removed."""
    found: set[Path] = set()
    for path in (cache_dir() / _FOLDER).glob("*"):
        with acquired(lock_of(path), wait=False) as dead:
            if dead:
                path.unlink(missing_ok=True)
            else:
                found.update(cache_dir() / name for name in path.read_text(encoding="utf-8").splitlines())
    return found


@atexit.register
def _end() -> None:
    for (process, _), (path, lock, _) in _own.items():
        if process == os.getpid():
            with suppress(OSError):
                path.unlink()
                Path(lock.lock_file).unlink()
            lock.release()
