"""Work that is shared by processes: the same numbers wherever it runs, workers that die, and none that outlive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import align, one_line, variant_file
from test_sensitivity import HEAD, per_image, subject

from alignment.evaluation import PIECE
from alignment.executor import open_executor
from alignment.quantize.scoring import Scorer

pytestmark = pytest.mark.sensitivity
IMAGES = 2 * PIECE + 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Two workers of a Dask cluster, each a process of one thread."""
    distributed = pytest.importorskip("distributed")
    pytest.importorskip("mmyolo")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as found:
        yield found


def kill_one(cluster: object) -> None:
    """Ends one of the workers, as the lack of memory does."""
    from distributed import Client

    with Client(cluster.scheduler_address) as client:
        pid = min(client.run(os.getpid).values())
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def head():
    """A variant of whose nodes a few read int8."""
    return subject("yolov8_embedded", HEAD)


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Scores of this test alone, in one thread, as those of any executor are."""
    monkeypatch.setenv("ALIGN_THREADS", "1")
    monkeypatch.setattr("alignment.quantize.scoring.cache_dir", lambda: tmp_path)


@pytest.mark.parametrize("dies", [False, True], ids=["two workers", "one of them dies"])
def test_a_sweep_over_a_cluster_has_the_numbers_of_one_process(cluster, head, tmp_path, monkeypatch, dies):
    """There in chunks of two images and of one, here all at once."""
    alone = head.swept(tmp_path / "alone", 3)
    monkeypatch.setattr("alignment.quantize.chunks.KEPT", 2 * per_image(head, tmp_path))

    def move(stage: str, done: int, total: int) -> None:
        if dies and (stage, done) == ("layers", 6):
            kill_one(cluster)

    with open_executor(scheduler=cluster.scheduler_address) as pool:
        assert head.swept(tmp_path / "shared", 3, executor=pool, progress=move) == alone


@pytest.mark.parametrize("dies", [False, True], ids=["two workers", "one of them dies"])
def test_scores_over_a_cluster_are_those_of_one_process(cluster, head, monkeypatch, dies):
    alone = Scorer(head.variant, images=IMAGES)
    expected = alone.reference, alone.float_score, alone.score(head.quantized.model)
    monkeypatch.setattr(Scorer, "_kept", lambda self, graph, measure: measure())
    with open_executor(scheduler=cluster.scheduler_address) as pool:
        shared = Scorer(head.variant, images=IMAGES, executor=pool)
        if dies:
            handed = pool.map

            def losing(*asked: Any) -> Any:
                found = handed(*asked)
                monkeypatch.setattr(pool, "map", handed)
                kill_one(cluster)
                return found

            monkeypatch.setattr(pool, "map", losing)
        found = shared.reference, shared.float_score, shared.score(head.quantized.model)
    assert shared.runs == 2
    assert found[1:] == expected[1:]
    assert 0 < found[2].agreement < 1
    assert list(found[0]) == list(expected[0])
    for image, detections in expected[0].items():
        for field in ("boxes", "scores", "labels", "rows"):
            assert getattr(found[0][image], field).tobytes() == getattr(detections, field).tobytes()


def test_the_search_over_a_cluster(cluster, tmp_path, monkeypatch):
    """By its command: the same file, but for nothing."""
    path = variant_file(tmp_path, lambda fields: fields.update(dataset="synthetic", quantization=HEAD))
    asked = ("partial", path, "--images", 2, "--layers", 1, "--tries", 2, "--swaps", 0, "--out")
    found = []
    for name, where in {"alone": (), "shared": ("--scheduler", cluster.scheduler_address)}.items():
        monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / f"{name}-cache"))
        result = align(*asked, tmp_path / name, *where)
        assert result.exit_code == 0, result.output
        found.append(json.loads((tmp_path / name / "partial.json").read_text()))
    assert found[0] == found[1]


def test_what_cannot_be_had_is_one_line():
    result = align(
        "partial", "yolov8_embedded", "--layers", 1, "--out", "x", "--workers", 2, "--scheduler", "tcp://a:1"
    )
    assert result.exit_code == 2
    assert one_line(result.stderr).startswith("align: --workers 2: --scheduler tcp://a:1 has workers of its own")


SHARING = """
import os, time
from alignment.executor import open_executor
if __name__ == "__main__":
    with open_executor(2) as pool:
        print(*{pool.submit(os.getpid).result() for _ in range(8)}, flush=True)
        pool.submit(time.sleep, 600).result()
"""


def alive(pid: int) -> bool:
    """Whether a process is there that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_when_what_they_work_for_is_killed(tmp_path):
    (tmp_path / "sharing.py").write_text(SHARING)
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tmp_path / "sharing.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}) as process:
        assert process.stdout
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert workers
        assert all(map(alive, workers))
        process.kill()
    for _ in range(100):
        if not any(map(alive, workers)):
            break
        time.sleep(0.1)
    assert not any(map(alive, workers))
