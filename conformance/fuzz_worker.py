"""One process that runs `align` on one spoilt input after another, and says what is wrong with how it took it.

It reads ``[surface, seed]`` a line from stdin and writes a verdict a line to stdout.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from xml.etree import ElementTree

from fuzz_mutations import TAG
from fuzz_surfaces import SURFACES, Input, Sound

#: Bytes that one input may take.
MEMORY = 2 * 2**30
#: What is said of an entry of the cache that is not as it was written.
_REBUILT = re.compile(r"cache: \S+ is refused: .*: it is made anew")
_NO_MEMORY = ("bad_alloc", "Unable to allocate", "MemoryError", "Failed to allocate", "can't allocate memory")


@dataclass
class Verdict:
    """What became of one input; `fault` is empty where that is as it should be."""

    surface: str
    seed: int
    status: int = 0
    fault: str = ""
    seconds: float = 0.0
    said: str = ""
    arguments: list[str] = field(default_factory=list)


def prepare(folder: Path) -> Sound:
    """Sound inputs in `folder`, and a cache of its own beside them."""
    os.environ.update(ALIGN_CACHE=str(folder / "cache"), ALIGN_DATA=str(folder / "nowhere"), ALIGN_THREADS="1")
    (folder / "sound").mkdir(parents=True)
    return Sound(folder / "sound")


def judged(surface: str, seed: int, sound: Sound, folder: Path) -> Verdict:
    """Makes the input in `folder`, which is empty, and runs `align` on it there."""
    given = SURFACES[surface](Random(f"{surface}/{seed}"), sound, folder)
    verdict = Verdict(surface, seed, arguments=given.arguments)
    before, start = _digests(folder, given), time.perf_counter()
    _forget_peak()
    resident = _status("VmRSS")
    verdict.status, out, err, trouble = _run(given, folder)
    verdict.seconds = time.perf_counter() - start
    taken = _status("VmHWM") - resident
    verdict.said = (err or out)[-600:]
    verdict.fault = trouble or _fault(verdict.status, err, given, folder)
    if taken > MEMORY or any(words in err for words in _NO_MEMORY):
        verdict.fault = f"memory: {taken / 2**30:.1f} GB; {verdict.fault}"
    if not verdict.fault and before != _digests(folder, given):
        verdict.fault = "input changed"
    return verdict


def _run(given: Input, folder: Path) -> tuple[int, str, str, str]:
    """Exit status, what was said, and a fault where an exception came out."""
    from alignment.cli import app

    here, kept = Path.cwd(), dict(os.environ)
    if (folder / "cache").is_dir():
        os.environ["ALIGN_CACHE"] = str(folder / "cache")
    streams = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - closed with the list
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    status, trouble = 0, ""
    os.chdir(folder)
    try:
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
        app(given.arguments, prog_name="align")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/alignment/" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"
        status, trouble = 1, f"traceback: {type(error).__name__} at {place}"
        traceback.print_exc()
    finally:
        os.chdir(here)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, fd in enumerate(saved, 1):
            os.dup2(fd, number)
            os.close(fd)
        os.environ.clear()
        os.environ.update(kept)
    texts = []
    for stream in streams:
        stream.seek(0)
        texts.append(stream.read().decode(errors="backslashreplace"))
    return status, texts[0], texts[1], trouble


def _fault(status: int, err: str, given: Input, folder: Path) -> str:
    """What is not as the contract has it."""
    if status not in (0, 1, 2):
        return f"status {status}"
    if (folder / "executed").exists():
        return "executed"
    if left := [p for p in folder.rglob(".*") if p.name != ".cache"]:
        return f"left {left[0].name}"
    if "Traceback" in err:
        return "traceback in stderr"
    lines = [line for line in err.splitlines() if not _REBUILT.fullmatch(line)]
    usage = bool(lines) and lines[0].startswith("Usage: align")
    if status == 2 and not usage:
        if len(lines) != 1 or not lines[0].startswith("align: "):
            return "not one line" if lines else "silent"
        if given.spoilt and not any(Path(name).stem in lines[0] for name in (*given.spoilt, *given.also)):
            return "names no file"
        if len(lines[0]) > 1500:
            return "endless line"
        # `align new` says that it wrote its YAML, which is there to be mended.
        whole = {f"{given.arguments[1]}.yaml"} if given.arguments[0] == "new" else set()
        if (folder / "out").is_dir() and {path.name for path in (folder / "out").iterdir()} - whole:
            return "half-written"
    if status != 2 and lines:
        return f"chatter: {lines[0][:60]}"
    return _bad_pages(folder)


class _Elements(HTMLParser):
    found = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == TAG:
            self.found = tag


def _bad_pages(folder: Path) -> str:
    """Pages that markup of an input came into, and XML that is none."""
    for path in folder.rglob("*.*"):
        if path.suffix == ".html" and path.is_file():
            reader = _Elements()
            reader.feed(path.read_text(encoding="utf-8"))
            if reader.found:
                return f"markup in {path.name}"
        if path.suffix in (".svg", ".xml") and path.is_file():
            try:
                ElementTree.parse(path)
            except ElementTree.ParseError as error:
                return f"bad XML in {path.name}: {error}"
    return ""


def _digests(folder: Path, given: Input) -> list[str]:
    """Of what was spoilt; a cache may be mended, and golden values are there to be updated."""
    if "--update-golden" in given.arguments or any(name.startswith("cache/") for name in given.spoilt):
        return []
    paths = [folder / name for name in given.spoilt]
    return [hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() and not p.is_symlink() else "" for p in paths]


def _status(field_name: str) -> int:
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field_name)), 0)


def _forget_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def main() -> None:
    """Serves until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    folder = Path(sys.argv[1]).absolute()
    sound = prepare(folder)
    for number, line in enumerate(sys.stdin):
        surface, seed = json.loads(line)
        place = folder / "inputs" / str(number)
        place.mkdir(parents=True)
        if number == 0:
            _warm(sound)
        verdict = judged(surface, seed, sound, place)
        answers.write(json.dumps(asdict(verdict)) + "\n")
        shutil.rmtree(place, ignore_errors=True)


def _warm(sound: Sound) -> None:
    """Imports everything, then limits what may be allocated beyond that."""
    import onnxruntime  # noqa: F401
    import torch  # noqa: F401

    sound.quantized  # noqa: B018
    most = _status("VmSize") + MEMORY * 3 // 2
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
