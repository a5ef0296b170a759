"""The peak memory of one contestant, in a fresh process: ``python -m benchmarks.memory JSON``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.harness import Case, Contestant, Fault, Setting, line, quiet
from benchmarks.results import Memory

ROOT = Path(__file__).parent.parent


def probe(timeout: float) -> Callable[[Case, Contestant, Setting], Memory]:
    """What `benchmarks.harness.measure` asks: does the work once, in another process, for at most `timeout` seconds."""

    def one(case: Case, contestant: Contestant, setting: Setting) -> Memory:
        given = {"case": case.name, "contestant": contestant.name, "size": setting.size, "variant": setting.variant}
        command = [sys.executable, "-m", "benchmarks.memory", json.dumps({**given, "folder": str(setting.folder)})]
        # The current folder's meaning stays, as ALIGN_DATA may be relative to it.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise Fault(f"not done in {timeout:.0f} s") from None
        answer = (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode < 0:
            raise Fault(f"ended by signal {-done.returncode}")
        try:
            found = json.loads(answer)
        except ValueError:
            said = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
            raise Fault(f"exit status {done.returncode}: {said[:240]}") from None
        if "fault" in found:
            raise Fault(found["fault"])
        return Memory.model_validate(found)

    return one


def resident(key: str) -> float:
    """MB that Linux says of this process: ``VmRSS``, or ``VmHWM``, the highest so far; 0 where it says nothing."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(text.split()[1]) for text in lines if text.startswith(f"{key}:")) / 1024
    return 0.0


def main() -> None:
    """Prints the memory as JSON, or the fault."""
    from benchmarks.cases import CASES

    given = json.loads(sys.argv[1])
    setting = Setting(given["size"], Path(given["folder"]), given["variant"])
    chosen = next(one for one in CASES[given["case"]].contestants if one.name == given["contestant"])
    try:
        with quiet():
            work = chosen.prepare(setting)
            with suppress(OSError):  # the highest so far is that of preparing: begin anew
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = resident("VmRSS")
            kept = work()
        found = {"before_mb": before, "peak_mb": max(resident("VmHWM"), before)}
        del kept
    except Exception as error:
        found = {"fault": line(error)}  # type: ignore[dict-item]
    # Not by way of the interpreter's end, in which libraries of peers have been seen to crash.
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
