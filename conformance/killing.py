"""Commands that are killed: a process that has imported everything forks one for each, which SIGKILL ends at a moment.

Run as a program it is that process, see `serve`.  Its requests and answers are lines of JSON.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Seconds after which a command hangs.
HANGS = 300
#: The exit status of what SIGKILL ended.
KILLED = -signal.SIGKILL
#: What commands import when they need it.
MODULES = (
    "alignment.cli",
    "alignment.guess.bare",
    "alignment.guess.config",
    "alignment.ladder",
    "alignment.divergence",
    "alignment.quantize.qat",
    "alignment.quantize.partial",
    "alignment.engine.culprit",
    "alignment.report.pareto",
)


@dataclass(frozen=True)
class Command:
    """A command, and what is counted of it.

    Attributes:
        arguments: of ``align``.
        work: functions, as ``module:name``, each call of which is counted.
        constants: as ``module:name``, in place of what they are.
    """

    arguments: tuple[str, ...]
    work: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)


class Stem:
    """The process that forks commands; use it as a context."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "ALIGN_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Stem:
        self._answer(HANGS)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(HANGS)

    def run(
        self,
        command: Command,
        folder: Path,
        seconds: float | None = None,
        seen: Callable[[], bool] | None = None,
        write: int | None = None,
    ) -> int:
        """Runs a command in `folder`, with ``cache`` and ``tmp`` in there, and returns its exit status, −9 when killed.

        Args:
            command: what to run.
            folder: where; ``log`` receives what it says, ``work`` a dot for each call that is counted, and a w for each
                file that came to be what it is.
            seconds: kill it after so many.
            seen: kill it as soon as this is true.
            write: let it kill itself when it has written half of its so manieth file, the first is 0.
        """
        (folder / "tmp").mkdir(exist_ok=True)
        request = {
            "arguments": command.arguments,
            "work": command.work,
            "constants": dict(command.constants),
            "folder": str(folder),
            "write": write,
        }
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        pid = int(self._answer(HANGS))
        if seconds is not None and not self._ready(seconds):
            os.kill(pid, signal.SIGKILL)
        while seen is not None and not self._ready(0.002):
            if seen():
                os.kill(pid, signal.SIGKILL)
                break
        if not self._ready(HANGS):
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"align {' '.join(command.arguments)}: no end after {HANGS} s")
        return int(self._answer(1))

    def _ready(self, seconds: float) -> bool:
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def _answer(self, seconds: float) -> str:
        assert self._process.stdout
        if not self._ready(seconds) or not (line := self._process.stdout.readline()):
            raise RuntimeError("the process that forks commands does not answer")
        return line.decode()


def serve() -> None:
    """Says that it is ready, then reads requests, forks, and says the process id and the exit status of each."""
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    for name in MODULES:
        importlib.import_module(name)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    answers.write(b"ready\n")
    for line in requests:
        pid = os.fork()
        if not pid:
            answers.close()
            requests.close()
            _be(json.loads(line))
        answers.write(f"{pid}\n".encode())
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


def _be(request: dict[str, Any]) -> None:
    """The command itself; it never returns."""
    folder = Path(request["folder"])
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"ALIGN_CACHE": str(folder / "cache"), "ALIGN_DATA": "", "TMPDIR": str(folder / "tmp")}
    tempfile.tempdir = None
    status = 70
    try:
        for place, value in request["constants"].items():
            _change(place, lambda _, value=value: _tuples(value))
        work = os.open("work", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for place in request["work"]:
            _change(place, functools.partial(_counted, work, b"."))
        _change("pathlib:Path.replace", functools.partial(_counted, work, b"w"))
        if request["write"] is not None:
            _change("pathlib:Path.replace", functools.partial(_dying, request["write"]))
        from alignment.cli import app

        sys.argv = ["align", *request["arguments"]]
        app()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def _change(place: str, change: Callable[[Any], Any]) -> None:
    module, _, name = place.partition(":")
    *path, name = name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    setattr(owner, name, change(getattr(owner, name)))


def _counted(log: int, mark: bytes, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        os.write(log, mark)
        return function(*arguments, **options)

    return call


def _dying(left: int, replace: Callable[..., Any]) -> Callable[..., Any]:
    """`Path.replace`, by which every file becomes what it is; after so many one is torn in two, and all ends."""

    def call(path: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return replace(path, target)  # type: ignore[no-any-return]

    return call


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    serve()
