"""Where independent pieces of work run: in this process, in others of this machine, or in those of a Dask cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context, parent_process

from alignment.errors import AlignError

#: Seconds that a scheduler has to answer.
ANSWER = 10
AGAIN = "run again, with fewer workers"
STARTED = "start one, and run again: what is done is kept"


@contextmanager
def open_executor(workers: int = 1, scheduler: str | None = None) -> Iterator[Executor | None]:
    """An executor, None for this process itself.

    Args:
        workers: processes of this machine; they start anew, as a fork would share what ONNX Runtime and torch hold.
        scheduler: address of a Dask scheduler, ``tcp://host:8786``.  Its workers need this package, and the same
            folders under the same names: what they read lies in ``ALIGN_CACHE``.

    Raises:
        AlignError: for a scheduler that does not answer or goes away, `distributed` that is missing, and a worker that
            died.
    """
    if scheduler is not None:
        if workers > 1:
            raise AlignError(f"--workers {workers}: --scheduler {scheduler} has workers of its own", "leave one out")
        yield from _dask(scheduler)
    elif workers == 1:
        yield None
    else:
        # Ctrl-C reaches every process of a terminal; what becomes of the work is for this one to say.
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin)
        try:
            yield pool
        except BrokenExecutor:
            raise AlignError(f"--workers {workers}: a worker died, of too little memory perhaps", AGAIN) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Of a worker: it leaves Ctrl-C to the process that it works for, and ends when that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _dask(address: str) -> Iterator[Executor]:
    if find_spec("distributed") is None:
        raise AlignError(f"--scheduler {address}: distributed is not installed", "pip install 'distributed>=2024.1'")
    from distributed import Client, KilledWorker
    from distributed.comm import CommClosedError

    # What it has to say of a lost connection is a traceback, and said below.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        client = Client(address, timeout=ANSWER)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise AlignError(f"--scheduler {address}: {reason}", "give the address that `dask scheduler` prints") from None
    with client:
        try:
            yield client.get_executor()
        except KilledWorker as error:
            reason = " ".join(str(error).split())[:160]
            raise AlignError(f"--scheduler {address}: {reason}", AGAIN) from None
        except (CancelledError, CommClosedError):
            raise AlignError(f"--scheduler {address}: it went away", STARTED) from None
