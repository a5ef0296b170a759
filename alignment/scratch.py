"""Temporary files and folders of which a process that was killed leaves none for long: the next one removes them.

Who makes one holds a lock on it (flock, which the kernel releases at death), and looks for those of its kind whose lock
is free.  On a file system without such locks nothing is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Of a folder below the system's one for temporary files.
PREFIX = "alignment-scratch-"
#: What `tempfile` puts in the middle of a name.
_RANDOM = "[a-z0-9_]{8}"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what nobody needs afterwards."""
    with temporary(Path(tempfile.gettempdir()), PREFIX, "", folder=True) as path:
        yield path


@contextmanager
def temporary(parent: Path, prefix: str, suffix: str, *, folder: bool = False) -> Iterator[Path]:
    """A file, or a folder, of a name that nobody else has; it may be renamed, and is removed else.

    Args:
        parent: where; it exists.
        prefix: of its name; what of the same prefix and suffix belongs to no living process is removed before.
        suffix: of its name.
        folder: whether it is one.
    """
    for _ in abandoned(parent, f"{re.escape(prefix)}{_RANDOM}{re.escape(suffix)}"):
        pass
    handle, path = _made(parent, prefix, suffix, folder)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True) if folder else path.unlink(missing_ok=True)
        os.close(handle)


def _made(parent: Path, prefix: str, suffix: str, folder: bool) -> tuple[int, Path]:
    """What was made, locked; once more where it was taken for abandoned before it was."""
    while True:
        if folder:
            name = tempfile.mkdtemp(suffix, prefix, parent)
            try:
                handle = os.open(name, os.O_RDONLY)
            except FileNotFoundError:
                continue
        else:
            handle, name = tempfile.mkstemp(suffix, prefix, parent)
        with suppress(OSError):  # no locks here: then it is not removed either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(name):
            return handle, Path(name)
        os.close(handle)


def abandoned(parent: Path, pattern: str = rf"\.[a-z]+-{_RANDOM}", remove: bool = True) -> Iterator[Path]:
    """What belongs to no living process, each before it is removed.

    Args:
        parent: where it is looked for.
        pattern: of whole names; default: of what lies in the cache beside entries and locks.
        remove: or leave it.
    """
    found: list[os.DirEntry[str]] = []
    with suppress(OSError):  # a folder that may be written, but not read
        found = [entry for entry in os.scandir(parent) if re.fullmatch(pattern, entry.name)]
    for entry in found:
        with suppress(OSError):  # somebody else's, or gone meanwhile
            folder = entry.is_dir(follow_symlinks=False)
            handle = os.open(entry.path, (os.O_RDONLY if folder else os.O_RDWR) | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield Path(entry.path)
                if remove:
                    shutil.rmtree(entry.path, ignore_errors=True) if folder else os.unlink(entry.path)
            finally:
                os.close(handle)
