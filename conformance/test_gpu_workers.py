"""Sharding over GPUs, with GPUs that are only names: what each pytest-xdist worker sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.gpu_workers import VISIBLE, gpus, take_gpu

ROOT = Path(__file__).parent.parent
UUIDS = [f"GPU-{i:08x}-0000-0000-0000-000000000000" for i in range(3)]


@pytest.fixture
def driver(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``nvidia-smi`` tells of three GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo {name}\n" for name in UUIDS))
    tool.chmod(0o755)
    return {"PATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("variable", "found"),
    [
        ("0", ["0"]),
        ("2, 0", ["2", "0"]),
        (",".join(UUIDS[1:]), UUIDS[1:]),
        ("0,-1,1", ["0"]),
        ("", []),
        ("-1", []),
        ("MIG-1,MIG-2", ["MIG-1", "MIG-2"]),
    ],
)
def test_the_variable_decides_as_cuda_reads_it(driver: dict[str, str], variable: str, found: list[str]):
    assert gpus({**driver, VISIBLE: variable}) == found


def test_without_it_the_driver_is_asked(driver: dict[str, str]):
    assert gpus(driver) == UUIDS


@pytest.mark.parametrize("says", ["exit 9", "echo No devices were found"])
def test_a_driver_without_a_device_or_none_at_all_is_no_gpu(tmp_path: Path, driver: dict[str, str], says: str):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
    assert gpus(driver) == []
    assert gpus({"PATH": str(tmp_path / "empty")}) == []


def test_workers_take_gpus_in_turn(driver: dict[str, str]):
    taken = []
    for worker in ("gw0", "gw1", "gw2", "gw3"):
        own = dict(driver)
        taken.append(take_gpu(worker, own))
        assert own[VISIBLE] == taken[-1]
    assert taken == [*UUIDS, UUIDS[0]]


def test_without_gpus_nothing_is_set():
    own = {"PATH": ""}
    assert take_gpu("gw1", own) is None
    assert own == {"PATH": ""}


TESTS = """
import os, pathlib, pytest
@pytest.mark.parametrize("i", range(8))
def test_it(i, worker_id):
    pathlib.Path(f"seen-{worker_id}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
"""


@pytest.mark.parametrize(
    ("workers", "visible", "seen"),
    [
        ("3", "4,7", {"gw0": "4", "gw1": "7", "gw2": "4"}),
        ("auto", "4,7", {"gw0": "4", "gw1": "7"}),
        ("0", "4,7", {"master": "4,7"}),
        ("2", "", {"gw0": "", "gw1": ""}),
    ],
)
def test_each_worker_of_a_run_sees_one_gpu(tmp_path: Path, workers: str, visible: str, seen: dict[str, str]):
    (tmp_path / "test_seen.py").write_text(TESTS)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment = inherited | {VISIBLE: visible, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers]
    if not _installed():
        command += ["-p", "alignment.pytest_plugin"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name.removeprefix("seen-"): p.read_text() for p in tmp_path.glob("seen-*")} == seen


def _installed() -> bool:
    from importlib.metadata import entry_points

    return any(e.value == "alignment.pytest_plugin" for e in entry_points(group="pytest11"))
