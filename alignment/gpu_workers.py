"""Sharding over GPUs: one pytest-xdist worker a GPU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, MutableMapping

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that CUDA would see here, as ``CUDA_VISIBLE_DEVICES`` names them; asked without starting CUDA.

    Where the variable is set it decides, up to the first entry that is no device, as CUDA reads it; else the driver is
    asked for their UUIDs.
    """
    if VISIBLE in environment:
        named = [name.strip() for name in environment[VISIBLE].split(",")]
        wrong = (place for place, name in enumerate(named) if not name or name.startswith("-"))
        return named[: next(wrong, len(named))]
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is None:
        return []
    command = [tool, "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # a driver without a device: tests that need one say so
    return [line.strip() for line in done.stdout.splitlines() if line.startswith("GPU-")]


def take_gpu(worker: str, environment: MutableMapping[str, str]) -> str | None:
    """Leaves one GPU visible to a worker, before CUDA starts in it; workers beyond the number of GPUs share them.

    Args:
        worker: pytest-xdist's name of it, ``gw0``.
        environment: of the worker's process, which is changed.

    Returns:
        The GPU; None where there is none.
    """
    found = gpus(environment)
    if not found:
        return None
    environment[VISIBLE] = found[int(worker.removeprefix("gw")) % len(found)]
    return environment[VISIBLE]
