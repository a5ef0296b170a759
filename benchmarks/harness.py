"""Contestants that do the same work in turns, A B C A B C ..., in one process.

What a turn costs is that of the work alone: a contestant prepares beforehand, and what it came to is judged afterwards.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import CaseResult, Entry, Kind, Measured, Memory, Request, Turn

Work = Callable[[], Any]
#: Seconds of the wall and of all processors, each from any beginning.
Clock = Callable[[], tuple[float, float]]
#: Stage, how many are done, how many in all.
Progress = Callable[[str, int, int], None]
#: Of which the machine's versions are noted.
PACKAGES = ("numpy", "onnx", "onnxruntime", "opencv-python", "torch", "mmyolo", "pycocotools")


class Fault(Exception):
    """Why a contestant cannot be measured, in one line."""


@dataclass(frozen=True)
class Setting:
    """What a contestant is given.

    Attributes:
        size: on the case's axis.
        folder: for files; all contestants share it at one size.
        variant: name or YAML file; empty where a case has none.
    """

    size: int
    folder: Path
    variant: str = ""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        name: in the table, one of its own in a case.
        kind: ``ours``, a ``peer``, or the ``floor``: what the work cannot cost less than.
        prepare: loads and imports what the work needs, and gives the work, which can be done again and again.
        packages: distributions whose versions are noted.
        most: the largest size that it gets, where its cost would drown the others.
    """

    name: str
    kind: Kind
    prepare: Callable[[Setting], Work]
    packages: tuple[str, ...] = ()
    most: int | None = None


@dataclass(frozen=True)
class Case:
    """One kind of work.

    Attributes:
        name: on the command line.
        title: one line.
        axis: what a size counts.
        sizes: rising.
        contestants: the first of kind ``ours`` is the one that the others are held to.
        variant: whose network is used, unless the command line names another; empty where none is.
        repeat: turns, unless the command line says otherwise.
        judge: setting and results by contestant, of the largest size → scores by contestant.
        missing: why the case cannot run on this machine, or None.
    """

    name: str
    title: str
    axis: str
    sizes: tuple[int, ...]
    contestants: tuple[Contestant, ...]
    variant: str = ""
    repeat: int = 5
    judge: Callable[[Setting, dict[str, Any]], dict[str, dict[str, float]]] | None = None
    missing: Callable[[], str | None] = field(default=lambda: None)


#: What `benchmarks.memory.probe` does: case, contestant and setting → memory.  Raises Fault.
Probe = Callable[[Case, Contestant, Setting], Memory]


def clock() -> tuple[float, float]:
    """Wall seconds, and processor seconds of all threads of this process and of the children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime


def measure(
    case: Case, request: Request, probe: Probe, read: Clock = clock, progress: Progress | None = None
) -> CaseResult:
    """Measures one case.

    A contestant runs in a process of its own first, at the smallest and the largest size: for its memory, and to see
    whether it can run at all.  What fails there, or in a turn, stays in the result with its reason.

    Args:
        case: what to do.
        request: variant, sizes and turns.
        probe: measures memory.
        read: the clock.
        progress: called with the memory or turns done.
    """
    case = replace(case, contestants=_asked(case.contestants, request.only))
    found = CaseResult(
        request=request,
        title=case.title,
        axis=case.axis,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        skipped=case.missing() or "",
        entries=[Entry(name=one.name, kind=one.kind, versions=versions(one.packages)) for one in case.contestants],
    )
    if found.skipped:
        return found
    show = progress or (lambda stage, done, total: None)
    entries = {entry.name: entry for entry in found.entries}
    with tempfile.TemporaryDirectory() as root:
        _probe_all(case, request, entries, probe, Path(root), show)
        for place, size in enumerate(request.sizes):
            folder = Path(root) / f"turns-{size}"
            folder.mkdir()
            setting = Setting(size, folder, request.variant)
            results = _turns(case, setting, entries, request.repeat, place == 0, read, show)
        if case.judge:
            for name, scores in case.judge(setting, results).items():
                entries[name].scores = scores
    return found


def _asked(contestants: tuple[Contestant, ...], words: list[str]) -> tuple[Contestant, ...]:
    first = next((one for one in contestants if one.kind == "ours"), None)
    return tuple(one for one in contestants if not words or one is first or any(word in one.name for word in words))


def _probe_all(
    case: Case, request: Request, entries: dict[str, Entry], probe: Probe, root: Path, show: Progress
) -> None:
    for done, contestant in enumerate(case.contestants, 1):
        entry = entries[contestant.name]
        sizes = [size for size in request.sizes if size <= (contestant.most or size)]
        entry.sizes = [Measured(size=size) for size in sizes]
        if sizes != request.sizes:
            entry.fault = (
                f"up to {contestant.most} {case.axis} only" if sizes else f"more than {contestant.most} {case.axis}"
            )
        for measured in dict.fromkeys((0, len(sizes) - 1)) if sizes else ():
            folder = root / f"memory-{done}-{measured}"
            folder.mkdir()
            try:
                setting = Setting(sizes[measured], folder, request.variant)
                entry.sizes[measured].memory = probe(case, contestant, setting)
            except Fault as fault:
                entry.fault = str(fault) if not measured else f"{sizes[measured]} {case.axis}: {fault}"
                entry.sizes = entry.sizes[:measured]
                break
        show(f"{case.name}: memory", done, len(case.contestants))


def _turns(
    case: Case, setting: Setting, entries: dict[str, Entry], repeat: int, warm: bool, read: Clock, show: Progress
) -> dict[str, Any]:
    """Adds the turns of one size, A B C A B C ...; with `warm` after one that does not count.  Results by name."""
    works: dict[str, Work] = {}
    results: dict[str, Any] = {}

    def attempt(name: str, do: Callable[[], Any]) -> Any:
        try:
            with quiet():
                return do()
        except Exception as error:
            entry = entries[name]
            entry.fault = f"{setting.size} {case.axis}: {line(error)}"
            entry.sizes = [one for one in entry.sizes if one.size < setting.size]
            works.pop(name, None)
            results.pop(name, None)
            return None

    for contestant in case.contestants:
        if any(one.size == setting.size for one in entries[contestant.name].sizes):
            work = attempt(contestant.name, lambda c=contestant: c.prepare(setting))  # type: ignore[misc]
            if work is not None:
                works[contestant.name] = work
    # What is prepared is no garbage, and Python's collector would go through all of it in somebody's turn.
    gc.collect()
    gc.freeze()
    for turn in range(-int(warm), repeat):
        for name, work in list(works.items()):
            gc.collect()
            before = read()
            result = attempt(name, work)
            after = read()
            if name in works:
                results[name] = result
                if turn >= 0:
                    spent = Turn(wall_s=after[0] - before[0], cpu_s=after[1] - before[1])
                    next(one for one in entries[name].sizes if one.size == setting.size).turns.append(spent)
        show(f"{case.name}: turns, {setting.size} {case.axis}", max(turn + 1, 0), repeat)
    gc.unfreeze()
    return results


@contextmanager
def quiet() -> Iterator[None]:
    """Sends what is printed, by C++ too, nowhere."""
    kept = [os.dup(number) for number in (1, 2)]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
        finally:
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)


def line(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of those distributions that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Processor, memory, GPU, Python and packages."""
    facts = {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "threads": os.environ.get("ALIGN_THREADS", "all"),
        "python": platform.python_version(),
    }
    return facts | versions(PACKAGES) | _gpu()


def _gpu() -> dict[str, str]:
    """Name of the GPU and version of TensorRT, where it runs; its package may go by another name."""
    from alignment.engine.capabilities import Capabilities, gpu, missing

    return {} if missing() else {"gpu": gpu().name, "tensorrt": Capabilities.current().version}


def _first(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((text.partition(":")[2].strip() for text in lines if text.startswith(key)), "")
