"""Files from outside: read whole, or refused in one line that names them; nothing in them is run, or grows."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from fuzz_arrays import spoilt_arrays
from fuzz_mutations import spoilt_bytes, spoilt_json, spoilt_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from alignment.commands.console import one_line
from alignment.errors import AlignError
from alignment.reading import checked, cut, read_arrays, read_json, read_text, read_yaml

MENDS = "give one", "mend it"
TREE = {"name": "a", "sides": [1, 2.5, None], "more": {"on": True, "é": "ü"}}
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
every = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(reader, path: Path, *arguments: object) -> str:
    with pytest.raises(AlignError) as caught:
        reader(path, *MENDS, *arguments)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert len(said.splitlines()) == 1
    assert len(said) < len(str(path)) + 400
    return said


@pytest.mark.parametrize(
    "text",
    [
        *("!!int x", "!!float x", "2024-13-45", "!!timestamp x", "!!binary '*'", "!!bool maybe", "0x_", "1:99:9x: ["),
        *("!!python/object/apply:os.getcwd []", "*nowhere", "&a [*a]", "[" * 5000, "- " * 5000, "{a: " * 400),
        *("2024-01-01", "!!set {a}", "!!binary aGk=", str(10**30), '"\\ud800"', LAUGHS, "a\0b", "\x01", '"' * 3),
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_is_none(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert "not YAML" in refused(read_yaml, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud800"', '{"\\udfff": 1}', "nan", "{}{}"],
    ids=lambda text: text[:12],
)
def test_json_that_is_none(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert "not JSON" in refused(read_json, tmp_path / "a.json")


def test_what_is_sound_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(TREE))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(TREE, allow_unicode=True), encoding="utf-8")
    (tmp_path / "b.json").write_text('"\\ud83d\\ude00"')
    (tmp_path / "b.yaml").write_text("a: &a [1]\nb: *a\n")
    assert read_json(tmp_path / "a.json", *MENDS) == read_yaml(tmp_path / "a.yaml", *MENDS) == TREE
    assert read_json(tmp_path / "b.json", *MENDS) == "\U0001f600"
    assert read_yaml(tmp_path / "b.yaml", *MENDS) == {"a": [1], "b": [1]}


@pytest.mark.parametrize("reader", [read_text, read_json, read_yaml])
def test_what_is_no_file_or_endless(tmp_path, reader, monkeypatch):
    monkeypatch.setattr("alignment.reading.MOST_YAML", 1000)
    assert "No such file" in refused(reader, tmp_path / "none")
    assert "Is a directory" in refused(reader, tmp_path)
    (tmp_path / "large").write_text(" " * 2**21)
    if reader is read_yaml:
        assert "larger than" in refused(reader, tmp_path / "large")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    refused(reader, tmp_path / "latin")


def test_an_endless_file_is_not_read_to_its_end():
    tracemalloc.start()
    with pytest.raises(AlignError, match="larger than 1 MB"):
        read_yaml(Path("/dev/zero"), *MENDS)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


class Shape(BaseModel):
    """What the tests read."""

    name: str
    sides: list[float] = []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"name": 1}, "name: Input should be a valid string (given: 1)"),
        ({}, "name: Field required"),
        ([], "file: Input should be"),
        ({"name": "x" * 10_000, "sides": "y" * 10_000}, "sides: Input should be a valid list (given: 'yyy"),
        ({"name": "a", "sides": [1, "b", "c"]}, "sides.1: "),
        ({"name": "a", "sides": [10**40]}, "a number of more than 64 bits"),
        ({"name": "a", "x": json.loads("[" * 200 + "]" * 200)}, "more than 100 values in each other"),
    ],
)
def test_a_field_that_does_not_fit_is_named(content, words):
    with pytest.raises(AlignError) as caught:
        checked(Shape, content, "a.json", "mend it", "no shape")
    assert str(caught.value).startswith(f"a.json: no shape: {words}")
    assert str(caught.value).endswith(": mend it")
    assert len(str(caught.value)) < 300


class Executed:
    """Unpickled, it fails the test."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("executed",)


def arrays(**named: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **named)
    return stream.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, content)
    return stream.getvalue()


def header(shape: str, descr: str = "<f8") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


NO_ARRAYS = {
    "empty": b"",
    "text": b"a: b",
    "one array": header("(1,)") + bytes(8),
    "cut off": arrays(a=np.arange(99))[:-30],
    "pickles": arrays(a=np.array([Executed()], object)),
    "dates": arrays(a=np.array(["2024-01-01"], "M8[s]")),
    "no numbers": zipped("a.npy", header("(1,)", "<V8")),
    "more than there is": zipped("a.npy", header("(1000000000000,)")),
    "less than none": zipped("a.npy", header("(-3,)")),
    "no array": zipped("a.npy", b"hello"),
    "another file": zipped("a.txt", b"hello"),
}


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_arrays_that_are_none(tmp_path, name):
    (tmp_path / "a.npz").write_bytes(NO_ARRAYS[name])
    assert "not mine" in refused(read_arrays, tmp_path / "a.npz", "not mine")


def test_arrays_that_would_grow_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("alignment.reading.MOST_ARRAYS", 2**20)
    (tmp_path / "a.npz").write_bytes(arrays(a=np.zeros(2**19), b=np.zeros(2)))
    assert "unpacked" in refused(read_arrays, tmp_path / "a.npz", "not mine")


def test_sound_arrays_are_read(tmp_path):
    (tmp_path / "a.npz").write_bytes(arrays(a=np.arange(3), b=np.array("text"), c=np.zeros((0, 4), np.float32)))
    found = read_arrays(tmp_path / "a.npz", *MENDS, "not mine")
    assert {name: (array.dtype.kind, array.shape) for name, array in found.items()} == {
        "a": ("i", (3,)),
        "b": ("U", ()),
        "c": ("f", (0, 4)),
    }


@every
@given(rng=st.randoms(use_true_random=False))
def test_whatever_is_spoilt_is_read_or_refused(tmp_path, rng):
    whole = arrays(a=np.arange(9), identity=np.array("{}"))
    for reader, content, more in (
        (read_yaml, spoilt_yaml(rng, TREE), ()),
        (read_json, spoilt_json(rng, TREE), ()),
        (read_arrays, spoilt_bytes(rng, whole) if rng.random() < 0.9 else spoilt_arrays(rng, whole), ("not mine",)),
    ):
        path = tmp_path / "file"
        path.write_bytes(content)
        try:
            reader(path, *MENDS, *more)
        except AlignError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017


@given(st.text())
def test_one_line_is_one_line_and_printable(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert line.isprintable()
    assert len(line) <= 1200


@given(st.text(), st.integers(10, 300))
def test_a_cut_value_is_short(text, most):
    assert len(cut(text, most)) <= most
    if len(text) <= most and text == " ".join(text.split()):
        assert cut(text, most) == text
