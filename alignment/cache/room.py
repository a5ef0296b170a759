"""What lies in the cache, and how room is made: entries that were not used for longest go first.

Nothing goes that a process holds locked or has taken (`alignment.cache.leases`).  What a killed writer has left goes
before all else, and unfinished work that can be resumed after all else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

from alignment.cache.entry import ENTRY, Entry, RefusedError, entries_dir
from alignment.cache.leases import leased
from alignment.errors import AlignError
from alignment.scratch import abandoned
from alignment.storage import acquired, cache_dir, locked, remove

VARIABLE = "ALIGN_CACHE_SIZE"
DEFAULT = "20GB"
#: A process looks at the size of the cache when it has written so much of what is allowed since it last looked.
_LOOK = 1 / 100
_log = logging.getLogger("alignment.cache")
_written: dict[Path, int] = {}


@dataclass(frozen=True)
class Item:
    """Something that lies among the entries.

    Attributes:
        size: bytes of all its files.
        used: when an entry was last asked for; UTC.
        state: ``leftover``, of a writer that is at work or was killed; ``broken``, an entry that will be refused, for
            `reason`; ``unfinished`` work; or ``ok``.
        entry: what it says it is; None where that cannot be read.
    """

    path: Path
    size: int
    used: datetime
    state: Literal["leftover", "broken", "ok", "unfinished"]
    entry: Entry | None = None
    reason: str = ""

    @property
    def kind(self) -> str:
        """By its place."""
        return self.path.relative_to(entries_dir()).parts[0]

    @property
    def name(self) -> str:
        """By its entry, or that of its folder."""
        return self.entry.name if self.entry else self.path.name

    @property
    def target(self) -> Path:
        """The entry that it is or was to become, whose lock counts."""
        if self.state != "leftover":
            return self.path
        if self.path.parent.parent != entries_dir():  # within unfinished work
            return self.path.parent
        return self.path.with_name(self.path.name[1:].rpartition(".")[0] or self.path.name)


@dataclass
class Pruned:
    """What `prune` removed, or would.

    Attributes:
        removed: each with why.
        held: what was to go and is in use.
        scratch: what processes that were killed have left beside the entries, and its bytes.
        locks: number of lock files that nobody holds.
        left: bytes of what stays.
    """

    removed: list[tuple[Item, str]] = field(default_factory=list)
    held: list[Item] = field(default_factory=list)
    scratch: dict[Path, int] = field(default_factory=dict)
    locks: int = 0
    left: int = 0

    @property
    def freed(self) -> int:
        """Bytes."""
        return sum(item.size for item, _ in self.removed) + sum(self.scratch.values())


def parse_size(text: str, source: str) -> int:
    """Bytes of ``20GB``, ``512MiB`` or a number.  Raises AlignError, which names `source`, for anything else."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text.strip()))
    except (ValidationError, ValueError, OverflowError):
        size = -1
    if size < 0:
        raise AlignError(f"{source} {text!r}: not a size", "give one such as 20GB or 512MiB")
    return size


def allowed() -> int:
    """Bytes that the cache may take, by ``ALIGN_CACHE_SIZE``."""
    return parse_size(os.environ.get(VARIABLE) or DEFAULT, VARIABLE)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed; of a file its own."""
    if not folder.is_dir():
        return folder.lstat().st_size
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # somebody else's, who is at work
                size += os.lstat(os.path.join(place, name)).st_size
    return size


def contents(describe: bool = True) -> list[Item]:
    """All that lies there.

    Args:
        describe: with what each entry says; without, as it takes less time, sizes, dates, and states that names tell.
    """
    found = []
    for path in entries_dir().glob("*/*"):
        with suppress(FileNotFoundError):  # it was removed meanwhile
            item = _item(path, describe)
            inside = [_item(one, describe) for one in path.glob(".*")] if item.state == "unfinished" else []
            found += [replace(item, size=item.size - sum(one.size for one in inside)), *inside]
    return sorted(found, key=lambda item: (item.kind, item.name, item.path))


def limit(size: int, added: int) -> None:
    """Removes what was not used for longest where the cache has grown beyond what it may take.

    Args:
        size: bytes that it may take, see `allowed`.
        added: bytes that were just written.
    """
    root = cache_dir()
    _written[root] = _written.get(root, size) + added
    if _written[root] < size * _LOOK:
        return
    _written[root] = 0
    pruned = Pruned()
    with suppress(OSError):  # of somebody else's files: whoever made an entry is not stopped by that
        if sum(item.size for item in contents(describe=False)) > size:
            _shrink(contents(), size, pruned, dry_run=False)
    if pruned.removed:
        _log.warning(
            "cache: %s entries, %s, not used for longest, removed: %s is %s",
            len(pruned.removed),
            human(pruned.freed),
            VARIABLE,
            human(size),
        )


def prune(
    older_than: float | None = None,
    max_size: int | None = None,
    kind: str | None = None,
    everything: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Removes what killed processes have left, broken entries, unused lock files, and what the arguments name.

    Args:
        older_than: entries that were last used so many seconds ago, or more.
        max_size: entries that were not used for longest, until those that stay take so many bytes.
        kind: of this kind alone, as is the size.
        everything: all entries.
        dry_run: remove nothing.
        progress: called with the number of entries looked at, and all: every byte is read.
    """
    pruned, stay = Pruned(), []
    items = [item for item in contents() if kind in (None, item.kind)]
    now = datetime.now(UTC)
    for index, item in enumerate(map(_verified, items), 1):
        reason = {"leftover": "left by a writer that ended early", "broken": item.reason}.get(item.state, "")
        if not reason and everything:
            reason = "all"
        if not reason and older_than is not None and (now - item.used).total_seconds() >= older_than:
            reason = f"last used {age(item.used)} ago"
        if not (reason and _remove(item, reason, pruned, dry_run)):
            stay.append(item)
        if progress:
            progress(index, len(items))
    if max_size is not None:
        stay = _shrink(stay, max_size, pruned, dry_run)
    pruned.left = sum(item.size for item in stay)
    if kind is None:
        pruned.scratch = {path: size_of(path) for path in abandoned(cache_dir(), remove=not dry_run)}
    pruned.locks = _prune_locks(dry_run)
    return pruned


def human(size: float) -> str:
    """Bytes for people, ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def age(then: datetime) -> str:
    """How long ago, for people, in the largest unit of which it is two or more: ``3 days``."""
    seconds = max(0.0, (datetime.now(UTC) - then).total_seconds())
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _item(path: Path, describe: bool) -> Item:
    about = path / ENTRY
    used = datetime.fromtimestamp((about if about.is_file() else path).lstat().st_mtime, UTC)
    size = size_of(path)
    if path.name.startswith("."):
        return Item(path, size, used, "leftover")
    if not describe:
        return Item(path, size, used, "ok")
    try:
        entry = Entry.read(path)
    except RefusedError as error:
        return Item(path, size, used, "broken", reason=str(error))
    item = Item(path, size, used, "ok" if entry.files is not None else "unfinished", entry)
    return _verified(item, content=False)


def _verified(item: Item, content: bool = True) -> Item:
    if item.entry is None:
        return item
    try:
        item.entry.verify(item.path, content)
    except (RefusedError, OSError) as error:
        return replace(item, state="broken", reason=str(error))
    return item


def _shrink(items: list[Item], size: int, pruned: Pruned, dry_run: bool) -> list[Item]:
    """Removes items until they take `size` bytes; returns those that stay."""
    total = sum(item.size for item in items)
    stay = sorted(items, key=_order)
    for item in list(stay):
        if total <= size:
            break
        if _remove(item, f"not used for {age(item.used)}", pruned, dry_run):
            total -= item.size
            stay.remove(item)
    return stay


def _order(item: Item) -> tuple[int, datetime]:
    return ("leftover", "broken", "ok", "unfinished").index(item.state), item.used


def _remove(item: Item, reason: str, pruned: Pruned, dry_run: bool) -> bool:
    with _free(item.target) as free:
        if not free:
            if item not in pruned.held:
                pruned.held.append(item)
            return False
        if not dry_run:
            remove(item.path)
    pruned.removed.append((item, reason))
    return True


@contextmanager
def _free(folder: Path) -> Iterator[bool]:
    """Whether nobody else works with an entry, who cannot begin to within the block."""
    with locked(folder, wait=False) as held:
        yield held and folder not in leased()


def _prune_locks(dry_run: bool) -> int:
    """Removes lock files that nobody holds; who waits for one meanwhile sees that it is gone, and makes another."""
    leased()
    count = 0
    for path in (cache_dir() / "locks").glob("*.lock"):
        with acquired(path, wait=False) as free:
            if free:
                count += 1
                if not dry_run:
                    path.unlink(missing_ok=True)
    return count
