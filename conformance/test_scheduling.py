"""Which tests pytest-xdist sends to one worker: those that share a variant's results or a file's fixtures."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("xdist")

from alignment.scheduling import scope

ROOT = Path(__file__).parent.parent
CASES = {
    f"{name}-onnxruntime-{precision}": name for name in ("yolov8_n", "my_yolov8_n") for precision in ("fp32", "fp16")
}
#: In two parts, as a file with this name in it is one of those that take a variant.
ASKING = "def test_case(aligned" + "_case): ..."
SOURCES = {
    "cases.py": ASKING,
    "shared.py": "@pytest.fixture(scope='module')",
    "both.py": f'@pytest.fixture(scope="class")\n{ASKING}',
    "alone.py": "@pytest.fixture(scope='session')",
}


@pytest.mark.parametrize(
    ("nodeid", "found"),
    [
        ("cases.py::test_case[yolov8_n-onnxruntime-fp32]", "yolov8_n"),
        ("cases.py::TestIt::test_case[3-yolov8_n-onnxruntime-fp16-x]", "yolov8_n"),
        ("cases.py::test_case[my_yolov8_n-onnxruntime-fp16]", "my_yolov8_n"),
        ("cases.py::test_other", "cases.py::test_other"),
        ("both.py::test_case[yolov8_n-onnxruntime-fp32]", "yolov8_n"),
        ("both.py::test_other[1]", "both.py"),
        ("shared.py::TestIt::test_it[yolov8_n-onnxruntime-fp32]", "shared.py"),
        ("alone.py::test_it[yolov8_n-onnxruntime-fp32]", "alone.py::test_it[yolov8_n-onnxruntime-fp32]"),
        ("latin.py::test_it", "latin.py::test_it"),
        ("elsewhere.py::test_case[yolov8_n-onnxruntime-fp32]", "yolov8_n"),
        ("elsewhere.py::test_other", "elsewhere.py"),
    ],
)
def test_what_a_test_shares(tmp_path: Path, nodeid: str, found: str):
    for name, text in SOURCES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-  \xe9")
    assert scope(nodeid, tmp_path, CASES) == found


MADE = """
import os, pathlib, pytest

def note(what):
    with open("{name}-" + what, "a") as file:
        file.write(os.environ.get("PYTEST_XDIST_WORKER", "alone") + "\\n")

@pytest.fixture(scope="{scope}")
def made():
    note("made")

@pytest.mark.parametrize("i", range(8))
def test_it(made, i):
    note("tested")
"""


@pytest.mark.parametrize("options", [(), ("--dist", "loadfile"), ("--dist", "worksteal")], ids=" ".join)
def test_what_a_file_shares_is_made_once_and_every_test_runs_once(tmp_path: Path, options: tuple[str, ...]):
    for name, shared in (("a", "module"), ("b", "function"), ("c", "module")):
        (tmp_path / f"test_{name}.py").write_text(MADE.format(name=name, scope=shared))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", *options]
    if not any(e.value == "alignment.pytest_plugin" for e in entry_points(group="pytest11")):
        command += ["-p", "alignment.pytest_plugin"]
    environment = inherited | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "24 passed" in done.stdout, done.stdout + done.stderr
    assert not done.stderr
    workers = {path.name: path.read_text().split() for path in tmp_path.glob("?-*")}
    assert all(len(workers[f"{name}-tested"]) == 8 for name in "abc")
    if "worksteal" not in options:
        assert len(workers["a-made"]) == len(workers["c-made"]) == 1
