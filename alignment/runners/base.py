"""What every backend offers: a batch of preprocessed images in, the named outputs of the graph out."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from alignment.errors import AlignError
from alignment.results import EngineFacts


def cpu_threads() -> int | None:
    """Threads that a CPU backend may use (``ALIGN_THREADS``); None leaves it to the backend.

    The number decides in which order sums are made, so results are the same to the bit only for the same number.

    Raises:
        AlignError: when the variable is not a positive number.
    """
    text = os.environ.get("ALIGN_THREADS")
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise AlignError(f"ALIGN_THREADS={text}: not a number of threads", "give 1 or more, or unset it")
    return int(text)


def limit_openmp() -> None:
    """Gives OpenMP, of which torch takes its threads, ``ALIGN_THREADS`` as well: for a process that has no torch yet.

    Threads that wait for each other keep their processors busy: on processors that others use too, AdaRound has been
    seen to take five times as long on two threads as on one.
    """
    if (text := os.environ.get("ALIGN_THREADS", "")).isdigit():
        os.environ.setdefault("OMP_NUM_THREADS", text)


def filled(batch: np.ndarray, size: int) -> np.ndarray:
    """The batch, its last image repeated until there is a multiple of `size`."""
    missing = -len(batch) % size
    return np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch


def in_pieces(
    batch: np.ndarray, size: int, batched: set[str], run: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Runs a graph whose batch is fixed; the last piece is filled up.

    Args:
        size: the fixed batch.
        batched: outputs that the graph declares to be of that batch; those of three and more axes may go without.
        run: runs one piece.

    Raises:
        AlignError: when pieces of an output without a batch axis, a row a detection say, would have to be joined.
    """
    whole = filled(batch, size)
    pieces = [run(whole[i : i + size]) for i in range(0, len(whole), size)]
    joined = {}
    for name, first in pieces[0].items():
        if first.ndim and len(first) == size and (name in batched or first.ndim >= 3):
            joined[name] = np.concatenate([piece[name] for piece in pieces])[: len(batch)]
        elif len(pieces) == 1:
            joined[name] = first
        else:
            raise AlignError(
                f"output {name} has no batch axis: {len(batch)} images in pieces of {size} cannot be joined",
                "export it with a dynamic batch",
            )
    return joined


class Runner(ABC):
    """One backend with one model loaded.  A context manager; it knows nothing of tolerances.

    Attributes:
        provenance: versions, device, ONNX hash, build flags, all JSON values.
        warnings: what the backend complained about while loading, one line each.
    """

    provenance: dict[str, Any]
    warnings: list[str]

    @abstractmethod
    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one batch.

        Args:
            batch: ``[B, 3, H, W] float32``, preprocessed.

        Returns:
            Every output of the model by name, first axis B; arrays that the caller owns.
        """

    def latency(self, batch: np.ndarray, repeats: int = 100, warmup: int = 10) -> list[float]:
        """Milliseconds by the device's own clock for each of `repeats` runs; empty where it has none."""
        return []

    def engine(self) -> EngineFacts | None:
        """What was built for the device, in numbers; None where nothing is."""
        return None

    def close(self) -> None:  # noqa: B027 - most backends hold nothing
        """Frees what the backend holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
