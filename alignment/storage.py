"""Where artefacts are kept, and how they are written: whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock

from alignment.errors import AlignError


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
        with tempfile.TemporaryDirectory(prefix=".align-", dir=nearest):
            pass
    except OSError as error:
        raise AlignError(f"{option} {path}: {error.strerror}", "name a folder that can be written") from None


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path` that becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all.

    Bytes of paths and arguments that Python's locale has no letters for, which it keeps as surrogates, are written as
    they are.
    """
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """As `writing`, for a folder that does not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock between processes that belongs to the artefact `path`; it lies in the cache, not beside it."""
    folder = cache_dir() / "locks"
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    lock = FileLock(folder / f"{path.name}-{digest}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        raise AlignError(f"{cache_dir()}: {reason}", "set ALIGN_CACHE to a folder that can be written") from None
    try:
        yield
    finally:
        lock.release()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
