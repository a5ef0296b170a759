"""Bad input by the thousand: ``python conformance/fuzz.py --inputs 5000``.

Each input is a surface of `fuzz_surfaces` and a seed, and can be made again from these alone.  `align` takes it in a
process that is watched: one that hangs or dies is told from one that says no.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

from fuzz_surfaces import SURFACES, Sound
from fuzz_worker import Verdict

HERE = Path(__file__).parent
#: Seconds that an input may take.
PATIENCE = 30
#: And the first of a process, which imports everything and makes sound inputs.
FIRST = 300


class Worker:
    """A process of `fuzz_worker`, begun anew when it hangs or dies."""

    def __init__(self, folder: Path, program: Path = HERE / "fuzz_worker.py", patience: float = PATIENCE) -> None:
        self._folder, self._program, self._patience = folder, program, patience
        self._process: subprocess.Popen | None = None
        self._starts = 0

    def judge(self, surface: str, seed: int) -> Verdict:
        """What becomes of an input."""
        first = self._process is None
        process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps([surface, seed]) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            late = not selector.select(FIRST if first else self._patience + 5)
        line = "" if late else process.stdout.readline()
        if line:
            verdict = Verdict(**json.loads(line))
            if verdict.seconds > self._patience and not first:
                verdict.fault = "hang"
            return verdict
        code = None if late else process.wait()
        self.close()
        said = (self._folder / str(self._starts) / "stderr").read_text(errors="replace")[-600:]
        return Verdict(surface, seed, -1, "hang" if late else f"died: {code}", said=said)

    def close(self) -> None:
        """Ends the process."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen:
        self._starts += 1
        folder = self._folder / str(self._starts)
        folder.mkdir(parents=True)
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(self._program), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("wb"),
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        return self._process


def fuzz(plan: list[tuple[str, int]], folder: Path) -> Iterator[Verdict]:
    """The verdicts on inputs, in their order."""
    worker = Worker(folder)
    try:
        for surface, seed in plan:
            yield worker.judge(surface, seed)
    finally:
        worker.close()


def keep(verdict: Verdict, folder: Path, sound: Sound) -> Path:
    """Makes a faulty input again, in `folder`, with the command that reads it."""
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{verdict.surface}-{verdict.seed}")
    place = folder / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    given = SURFACES[verdict.surface](Random(f"{verdict.surface}/{verdict.seed}"), sound, place)
    told = {"arguments": given.arguments, "spoilt": given.spoilt, "fault": verdict.fault, "said": verdict.said}
    (place / "fault.json").write_text(json.dumps(told, indent=1))
    return place


def main() -> None:
    """Fuzzes every surface, or some, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=len(SURFACES) * 10, help="in all")
    parser.add_argument("--surface", action="append", help="part of a surface's name; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--json", type=Path, help="file for all verdicts, a line each")
    parser.add_argument("--save", type=Path, help="folder for inputs that show a fault")
    asked = parser.parse_args()
    names = [name for name in SURFACES if not asked.surface or any(part in name for part in asked.surface)]
    plan = [(names[index % len(names)], asked.seed + index // len(names)) for index in range(asked.inputs)]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    faults: dict[str, list[Verdict]] = defaultdict(list)
    slowest, start = 0.0, time.time()
    with tempfile.TemporaryDirectory(prefix="align-fuzz-") as folder:
        for done, verdict in enumerate(fuzz(plan, Path(folder)), 1):
            told = {0: "accepted", 1: "accepted", 2: "refused"}.get(verdict.status, "neither")
            counts[verdict.surface].update(["inputs", "faults" if verdict.fault else told])
            slowest = max(slowest, verdict.seconds)
            if asked.json:
                with asked.json.open("a") as file:
                    file.write(json.dumps(vars(verdict)) + "\n")
            if verdict.fault:
                if verdict.fault not in faults:
                    print(f"{verdict.surface} {verdict.seed}: {verdict.fault}\n    {verdict.said[-400:]!r}", flush=True)
                faults[verdict.fault].append(verdict)
            if done % 200 == 0:
                print(f"{done} inputs, {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{'surface':32}{'inputs':>8}{'accepted':>10}{'refused':>9}{'faults':>8}")
    for name, count in counts.items():
        print(
            f"{name:32}"
            + "".join(
                f"{count[key]:>{width}}"
                for key, width in (("inputs", 8), ("accepted", 10), ("refused", 9), ("faults", 8))
            )
        )
    print(f"{sum(c['inputs'] for c in counts.values())} inputs, slowest {slowest:.1f} s")
    for fault, cases in sorted(faults.items(), key=lambda one: -len(one[1])):
        print(f"{len(cases):5} {fault}: " + ", ".join(f"{v.surface} {v.seed}" for v in cases[:4]))
    if asked.save and faults:
        sound = Sound(Path(tempfile.mkdtemp(prefix="align-sound-")))
        for cases in faults.values():
            for verdict in cases[:3]:
                keep(verdict, asked.save, sound)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
