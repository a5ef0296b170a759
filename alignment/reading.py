"""Files from outside, each read whole or refused in one line: JSON, YAML and NumPy's archives.

What such a file can do is bounded here: nothing in it is run, and it takes no more memory or time than one of its kind
has reason to.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ValidationError

from alignment.errors import AlignError

Model = TypeVar("Model", bound=BaseModel)
#: Bytes of a text.
MOST_TEXT = 64 * 2**20
#: Of a YAML file: people write them, and a megabyte takes seconds.
MOST_YAML = 2**20
#: Bytes of all arrays of an archive, unpacked.
MOST_ARRAYS = 2**30
#: Values of a tree, those that YAML's aliases repeat counted each time, and how many hold each other.
MOST_VALUES, MOST_DEPTH = 5_000_000, 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, absent: str, damaged: str, what: str = "not text", most: int = MOST_TEXT) -> str:
    """A file in UTF-8.

    Args:
        path: the file.
        absent: the mend for a file that cannot be read.
        damaged: the mend for one that holds something else.
        what: what that is said to be.
        most: bytes that it may have.

    Raises:
        AlignError: for either.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) <= most:
            return content.decode("utf-8")
        reason = f"larger than {most >> 20} MB"
    except UnicodeDecodeError as error:
        reason = str(error)
    except (OSError, ValueError) as error:  # ValueError: of a path that holds a NUL
        raise AlignError(f"{path}: {getattr(error, 'strerror', None) or error}", absent) from None
    raise AlignError(f"{path}: {what}: {reason}", damaged)


def read_json(path: Path, absent: str, damaged: str, what: str = "not JSON", most: int = MOST_TEXT) -> Any:
    """What a JSON file holds; arguments and errors as of `read_text`."""
    try:
        return parse_json(read_text(path, absent, damaged, what, most))
    except ValueError as error:
        raise AlignError(f"{path}: {what}: {cut(error)}", damaged) from None


def parse_json(text: str, strict: bool = True) -> Any:
    """What JSON holds.  Raises ValueError for what is none, and for strings that are no text.

    Args:
        text: the JSON.
        strict: without, strings may hold control characters.
    """
    try:
        content = json.loads(text, strict=strict)
    except RecursionError:
        raise ValueError("too many values in each other") from None
    if _SURROGATE.search(text):
        require_plain(content)
    return content


def read_yaml(path: Path, absent: str, damaged: str) -> Any:
    """What a YAML file holds: plain values, lists and mappings; arguments and errors as of `read_text`."""
    text = read_text(path, absent, damaged, "not YAML", MOST_YAML)
    try:
        content = yaml.safe_load(text)
        require_plain(content)
        return content
    except RecursionError:
        reason = "too many values in each other"
    except Exception as error:  # beside YAMLError whatever its constructors meet: ValueError of `!!int x`, and others
        reason = cut(error) or type(error).__name__
    raise AlignError(f"{path}: not YAML: {reason}", damaged)


def require_plain(content: Any) -> None:
    """Raises ValueError for what JSON could not say: dates, bytes, endless or huge trees, numbers beyond 64 bits."""
    level, count = [content], 0
    for _ in range(MOST_DEPTH):
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                following += [*value, *value.values()]
            elif isinstance(value, list):
                following += value
            elif isinstance(value, str):
                if not value.isascii():
                    value.encode()
            elif isinstance(value, int):
                if not -(2**63) <= value < 2**64:
                    raise ValueError("a number of more than 64 bits")
            elif value is not None and not isinstance(value, float):
                raise ValueError(f"{cut(value, 40)} is no number, text, list or mapping, but a {type(value).__name__}")
            if len(following) > MOST_VALUES:
                break
        count += len(following)
        if count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values, aliases written out")
        if not following:
            return
        level = following
    raise ValueError(f"more than {MOST_DEPTH} values in each other")


def read_model(model: type[Model], path: Path, what: str, absent: str, damaged: str) -> Model:
    """Reads a typed result that a command wrote as JSON.

    Args:
        model: its type.
        path: its file.
        what: what the file is said not to be.
        absent: the mend for a file that cannot be read.
        damaged: the mend for one that holds something else.

    Raises:
        AlignError: for either.
    """
    return checked(model, read_json(path, absent, damaged, what), path, damaged, what)


def checked(
    model: type[Model], content: Any, origin: Path | str, damaged: str, what: str = "", whole: str = "file"
) -> Model:
    """A typed result.

    Args:
        model: its type.
        content: as JSON or YAML hold it.
        origin: where it is from, for errors.
        damaged: the mend for what is of another type.
        what: what it is then said not to be.
        whole: what the outermost value is called.

    Raises:
        AlignError: naming origin and field.
    """
    try:
        require_plain(content)
        return model.model_validate(content)
    except ValidationError as error:
        reason = first_error(error, whole)
    except ValueError as error:
        reason = cut(error)
    raise AlignError(": ".join(filter(None, (str(origin), what, reason))), damaged) from None


def first_error(
    error: ValidationError,
    whole: str,
    hidden: Collection[Any] = (),
    siblings: Callable[[tuple[int | str, ...]], list[str]] | None = None,
) -> str:
    """The first of pydantic's errors in words, and how many more there are.

    Args:
        error: of a model.
        whole: what the outermost value is called.
        hidden: parts of a place that are no fields: the tags of unions.
        siblings: what fields there may be at a place.
    """
    first, more = error.errors(include_url=False)[0], error.error_count() - 1
    place = [str(part) for part in first["loc"] if part not in hidden]
    if first["type"].startswith("union_tag"):
        place.append(first["ctx"]["discriminator"].strip("'"))
    given = first.get("input")
    shown = f" (given: {cut(repr(given), 60)})" if isinstance(given, str | int | float | bool) else ""
    if first["type"] == "extra_forbidden" and siblings:
        shown = f"; allowed are {', '.join(siblings(first['loc']))}"
    field = cut(".".join(place), 100) or whole
    return f"{field}: {cut(first['msg'])}{shown}" + (f"; and {more} more" if more else "")


def read_arrays(path: Path, absent: str, damaged: str, what: str) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``: numbers only, no pickles, and no more than `MOST_ARRAYS` bytes of them.

    Args and errors as of `read_model`.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise AlignError(f"{path}: {error.strerror}", absent) from None
    with stream:
        try:
            with zipfile.ZipFile(stream) as file:
                if sum(part.file_size for part in file.infolist()) > MOST_ARRAYS:
                    raise ValueError(f"more than {MOST_ARRAYS >> 20} MB, unpacked")
                for part in file.infolist():
                    with file.open(part) as packed:
                        _require_numbers(packed, part)
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as stored:
                return dict(stored)
        except Exception as error:  # zip, zlib and NumPy each have their own
            raise AlignError(f"{path}: {what}: {cut(error) or type(error).__name__}", damaged) from None


def _require_numbers(stream: IO[bytes], part: zipfile.ZipInfo) -> None:
    """Raises ValueError for an array of something else than numbers, or one that says it is larger than its file."""
    older = np.lib.format.read_magic(stream) == (1, 0)
    shape, _, dtype = (np.lib.format.read_array_header_1_0 if older else np.lib.format.read_array_header_2_0)(stream)
    if dtype.kind not in "biufU":
        raise ValueError(f"{cut(part.filename, 60)} holds {dtype}, not numbers")
    size = dtype.itemsize
    for side in shape:
        size *= side
    if size > part.file_size or min(shape, default=0) < 0:
        raise ValueError(f"{cut(part.filename, 60)} is cut off: it says {list(shape)}")


def cut(value: object, most: int = 200) -> str:
    """A value on one line of at most so many characters."""
    text = " ".join(str(value)[: most * 10].split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
