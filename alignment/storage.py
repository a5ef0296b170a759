"""Where artefacts are kept, and how they are written: whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from alignment.errors import AlignError
from alignment.scratch import temporary


def cache_dir() -> Path:
    """Folder of exported graphs, engines and generated datasets (``ALIGN_CACHE`` or the user's cache folder)."""
    return Path(os.environ.get("ALIGN_CACHE") or platformdirs.user_cache_dir("alignment"))


def data_dir() -> Path:
    """Folder of real images and checkpoints (``ALIGN_DATA``, default ``../shared/data``); it may not exist."""
    return Path(os.environ.get("ALIGN_DATA") or "../shared/data")


def require_folder(path: Path, option: str) -> None:
    """Raises AlignError when `path`, which `option` names, is no folder to write into and cannot become one.

    Nothing is left behind, the folder itself included.
    """
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    try:
        with temporary(nearest, ".align-", "", folder=True):
            pass
    except OSError as error:
        raise AlignError(f"{option} {path}: {error.strerror}", "name a folder that can be written") from None


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path` that becomes `path` when the block ends without an error.

    What a process that was killed has left of an earlier one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path.parent, f".{path.name}.", path.suffix) as made:
        yield made
        made.chmod(0o666 & ~_umask())
        made.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all.

    Bytes of paths and arguments that Python's locale has no letters for, which it keeps as surrogates, are written as
    they are.
    """
    with writing(path) as made:
        made.write_text(text, encoding="utf-8", errors="surrogateescape")


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """As `writing`, for a folder that does not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path.parent, f".{path.name}.", "", folder=True) as made:
        yield made
        made.chmod(0o777 & ~_umask())
        made.rename(path)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder; a folder is gone at once or not at all."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    with temporary(path.parent, f".{path.name}.", "", folder=True) as doomed:
        path.rename(doomed)


def lock_of(path: Path) -> Path:
    """The lock file between processes that belongs to the artefact `path`; it lies in the cache, not beside it."""
    whole, root = path.absolute(), cache_dir().absolute()
    # Another process may know the cache by another name.
    known = whole.relative_to(root) if whole.is_relative_to(root) else whole
    digest = hashlib.sha256(str(known).encode()).hexdigest()[:16]
    return cache_dir() / "locks" / f"{path.name}-{digest}.lock"


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of the artefact `path`; gives whether it is held, which without `wait` it may not be."""
    with acquired(lock_of(path), wait) as held:
        yield held


@contextmanager
def acquired(file: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file, see `locked`."""
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        pass
    except OSError as error:
        reason = error.strerror or error
        raise AlignError(f"{cache_dir()}: {reason}", "set ALIGN_CACHE to a folder that can be written") from None
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
