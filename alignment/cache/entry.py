"""What an entry of the cache is made of, and whether it is sound.

Beside its payload lies ``entry.json``: kind, name, what went in, the versions that made it, size and SHA-256 of every
file, and the date.  A file that is named there and is missing, shorter or of another digest, a key that is another
than was asked for, or JSON that cannot be read, is a reason to refuse the entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from alignment.reading import cut
from alignment.storage import cache_dir, writing

ENTRY = "entry.json"
#: Raise it when entries come to be laid out in another way.
LAYOUT = 1
#: Characters of a name in the name of its folder, which a file system limits to 255.
_NAME = 120
#: Of a value in a message.
_SHOWN = 40


class RefusedError(Exception):
    """Why an entry is not taken."""


@dataclass(frozen=True)
class Key:
    """What an entry is known by.

    Attributes:
        kind: what it is: "onnx", "engine", ...
        name: of what, for people.
        inputs: what went into it, JSON values by name; of long ones a digest.
        versions: what made it: programs, the GPU.  An entry of the same inputs and other versions is stale or foreign.
    """

    kind: str
    name: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the entry lies, or would."""
        return self.inputs_folder.with_name(f"{self.inputs_folder.name}-{digest_of(self.versions)[:8]}")

    @property
    def inputs_folder(self) -> Path:
        """The same without the versions: what the names of all entries of these inputs begin with."""
        name = re.sub(r"[^a-zA-Z0-9_.-]", "_", self.name).lstrip(".")[:_NAME]
        return entries_dir() / self.kind / f"{name}-{digest_of(self.inputs)[:16]}"


class File(BaseModel):
    """A file of a payload; of a symbolic link, where it points to, which is not followed."""

    model_config = ConfigDict(extra="forbid")

    size: int = 0
    sha256: str = ""
    link: str = ""


class Entry(BaseModel):
    """What ``entry.json`` says.

    Attributes:
        files: by path within the entry; None of work that is not finished, which a program of its own goes on with.
        made: date and time in UTC.
    """

    model_config = ConfigDict(extra="forbid")

    layout: int
    kind: str
    name: str
    inputs: dict[str, Any]
    versions: dict[str, Any]
    files: dict[str, File] | None
    size: int
    made: datetime

    @classmethod
    def read(cls, folder: Path) -> Entry:
        """Raises RefusedError for what is none."""
        try:
            return cls.model_validate(json.loads((folder / ENTRY).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RefusedError(f"no {ENTRY}") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise RefusedError(f"{ENTRY}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise RefusedError(f"{ENTRY}: {' '.join(str(error).split())[:120]}") from None

    def require(self, key: Key) -> None:
        """Raises RefusedError where it is of another key, and names the first field that differs."""
        asked: dict[str, Any] = {"layout": LAYOUT, "kind": key.kind, "name": key.name}
        asked |= _flat("inputs", key.inputs) | _flat("versions", key.versions)
        found: dict[str, Any] = {"layout": self.layout, "kind": self.kind, "name": self.name}
        found |= _flat("inputs", self.inputs) | _flat("versions", self.versions)
        for name in dict.fromkeys([*asked, *found]):
            if found.get(name) != asked.get(name):
                raise RefusedError(f"of another {name}: {shown(found.get(name))}, here {shown(asked.get(name))}")

    def verify(self, folder: Path, content: bool = True) -> None:
        """Holds the files to what was written of them.

        Args:
            folder: of the entry.
            content: by their digests too; an unchanged file is read once in a process.

        Raises:
            RefusedError: for one that is missing or has changed.
        """
        found = dict(_files(folder))
        for name, file in (self.files or {}).items():
            path = found.get(name)
            if path is None:
                raise RefusedError(f"{name} is missing")
            stat = path.lstat()
            if file.link != (os.readlink(path) if path.is_symlink() else ""):
                raise RefusedError(f"{name} is another link")
            if not file.link and stat.st_size != file.size:
                raise RefusedError(f"{name} has {stat.st_size} bytes, {file.size} were written")
            if content and not file.link and _digest(path, stat) != file.sha256:
                raise RefusedError(f"{name} has changed since it was written")


def write_entry(folder: Path, key: Key, finished: bool = True) -> None:
    """Writes ``entry.json`` for what lies in `folder`; it is a promise, so it comes last."""
    files = {name: _file(path) for name, path in sorted(_files(folder))} if finished else None
    entry = Entry(
        layout=LAYOUT,
        kind=key.kind,
        name=key.name,
        inputs=_plain(key.inputs),
        versions=_plain(key.versions),
        files=files,
        size=sum(file.size for file in (files or {}).values()),
        made=datetime.now(UTC).replace(microsecond=0),
    )
    with writing(folder / ENTRY) as temporary:
        # Not pydantic's JSON, which has no words for paths that Python's locale has no letters for.
        fields = entry.model_dump(mode="json", exclude_defaults=True)
        temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def entries_dir() -> Path:
    """Where entries lie, a folder for each kind."""
    return cache_dir() / "entries"


def digest_of(fields: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, 64 hex digits."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def shown(value: Any) -> str:
    """A value in a message: on one line, of a long one its beginning."""
    return cut(value if isinstance(value, str) else json.dumps(value), _SHOWN)


def _flat(group: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in _plain(fields).items()}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: tuples are lists there."""
    return json.loads(json.dumps(dict(fields)))  # type: ignore[no-any-return]


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files and links of a payload, links to folders included, by their path within it."""
    for place, folders, names in os.walk(folder):
        for name in (*names, *(name for name in folders if Path(place, name).is_symlink())):
            path = Path(place, name)
            if path != folder / ENTRY:
                yield path.relative_to(folder).as_posix(), path


def _file(path: Path) -> File:
    if path.is_symlink():
        return File(link=os.readlink(path))
    stat = path.stat()
    return File(size=stat.st_size, sha256=_digest(path, stat))


_digests: dict[tuple[int, ...], str] = {}


def _digest(path: Path, stat: os.stat_result) -> str:
    """SHA-256 of a file, computed once in a process as long as it is not written to."""
    known = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if known not in _digests:
        with path.open("rb") as stream:
            _digests[known] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[known]
