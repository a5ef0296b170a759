"""Long commands, killed at any moment and started again, end with what an undisturbed run gives, and redo little.

``--kills 20`` is the long form.  The moments: right after the first checkpoint, amid the writing of a file, at random.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import variant_file
from killing import KILLED, Command, Stem

pytestmark = pytest.mark.kill
#: Part of the head reads int8.
FEW = {"policy": "conv-only", "keep_float": ["/detector/backbone/*", "/detector/neck/*", "*/reg_preds*"], "images": 6}
CLIPPED = "/detector/bbox_head/head_module/cls_preds.1/cls_preds.1.1/conv/Conv"
#: Small, as what is measured does not matter.
SMALL = {"dataset": "synthetic", "quantization": FEW, "input": {"height": 96, "width": 96}}
#: Keys of what differs between two runs of one command: dates and durations, and the digests of files that hold some.
VOLATILE = {"created", "made", "timing", "seconds", "size", "sha256"}
#: Names of what a command leaves only when it is killed.
UNFINISHED = re.compile(
    r"\..+\.[a-z0-9_]{8}(\.\w+)?|\.(sweep|scored)-.+|alignment-scratch-.+|.+\.work|units|.+\.checkpoint\.pth"
)
#: At most so much of that lies there at any time: a kill adds nothing for long.
UNFINISHED_AT_ONCE = 4


@dataclass(frozen=True)
class Long:
    """A command that takes long.

    Attributes:
        arguments: of ``align``.
        work: functions, as ``module:name`` below ``alignment``, each call of which is a step.
        lost: how many steps a kill loses at most; None where a command keeps nothing.
        first: pattern of its first checkpoint.
        status: that it ends with.
        constants: see `Command`; the same names.
        drawn: whether it begins with images alone, else with an exported graph and a calibration.
    """

    arguments: str
    work: tuple[str, ...] = ()
    lost: int | None = None
    first: str = "out/*"
    status: int = 0
    constants: dict[str, Any] = field(default_factory=dict)
    drawn: bool = False

    @property
    def command(self) -> Command:
        """It, for the driver."""
        constants = {f"alignment.{place}": value for place, value in self.constants.items()}
        return Command(tuple(self.arguments.split()), tuple(f"alignment.{place}" for place in self.work), constants)


COMMANDS = {
    "calibration": Long(
        "quantize planted.yaml --out out",
        ("quantize.calibrate:_Observed.run",),
        lost=2,
        first="cache/entries/calibration/*/*.npz",
        constants={"quantize.calibrate:SAVE_EVERY": 2},
        drawn=True,
    ),
    "adaround": Long(
        "quantize planted.yaml --rounding adaround --bias-correction --out out",
        ("quantize.reconstruction:reconstruct",),
        lost=1,
        first="cache/entries/weights/*/units/*.npz",
        constants={
            "quantize.adaround:Options.__init__.__defaults__": [15, 32, 0.01, 0.01, 0.2, [20.0, 2.0], 0.25, "cpu", 0],
            "quantize.reconstruction:PLACES": 512,
        },
    ),
    "sensitivity": Long(
        "sensitivity planted.yaml --images 2 --out out/found.json",
        ("quantize.chunks:measure",),
        lost=1,
        first="cache/entries/sensitivity/*/*.work/0",
        constants={"quantize.chunks:KEPT": 150_000},  # of one image
    ),
    # Beside the set in question a search that goes on runs the float network again.
    "partial": Long(
        "partial planted.yaml --images 2 --layers 1 --tries 2 --swaps 1 --out out",
        ("quantize.chunks:measure", "quantize.scoring:Scorer.detect"),
        lost=2,
        first="cache/entries/score/*",
    ),
    "culprit": Long(
        f"culprit planted.yaml --backend simulated --fault clip:{CLIPPED} --images 1 --out out",
        ("engine.gap:Comparison._measured",),
        lost=1,
        first="cache/entries/gap/*",
        status=1,
    ),
    "qat": Long(
        "qat planted.yaml --epochs 2 --images 8 --held-out 2 --batch 4 --distill logits --out out",
        ("quantize.qat:_Watch.after_train_iter",),
        lost=2,
        first="out/*.checkpoint.pth",
        status=1,
    ),
    "run": Long(
        "run planted.yaml yolov5_embedded --backend torch,onnxruntime --images 5 --out out",
        ("pipeline:_Side.run",),
        lost=4,
        first="cache/entries/run/*/*/*.npz",
        constants={"journal:IMAGES": 2, "pipeline:TURN": 2},
    ),
    "ladder": Long(
        "ladder planted.yaml --until ptq --backend torch,onnxruntime --images 3 --out out",
        ("ladder:_score",),
        lost=1,
        first="out/alignment.json",
    ),
    "new": Long(
        "new fresh --onnx cache/given.onnx --data cache/given --images 2 --out out",
        first="out/fresh.yaml",
    ),
    "explain": Long("explain planted.yaml --images 3 --out out"),
}


@pytest.fixture(scope="module")
def stem() -> Iterator[Stem]:
    """What forks the commands."""
    for name in ("mmyolo", "pytorch_quantization", "matplotlib"):
        pytest.importorskip(name)
    with Stem() as found:
        yield found


@pytest.fixture(scope="module")
def begun(stem, tmp_path_factory) -> Path:
    """A folder with a variant, and a cache that holds its images, its graph and its calibration."""
    folder = tmp_path_factory.mktemp("begun")
    variant_file(folder, lambda fields: fields.update(SMALL))
    assert stem.run(Command(("quantize", "planted.yaml", "--out", "out")), folder) == 0
    entries = folder / "cache" / "entries"
    shutil.copyfile(next((entries / "onnx").rglob("*.onnx")), folder / "cache" / "given.onnx")
    shutil.copytree(next((entries / "images").glob("*/synthetic-*")), folder / "cache" / "given")
    return folder


class Life:
    """A command from its beginning to its end, with kills between."""

    def __init__(self, long: Long, stem: Stem, folder: Path, begun: Path) -> None:
        self.long, self.folder, self._stem = long, folder, stem
        self.kills, self.over = 0, False
        folder.mkdir()
        shutil.copyfile(begun / "planted.yaml", folder / "planted.yaml")
        # By rename alone is anything written there, so that links do.
        shutil.copytree(begun / "cache", folder / "cache", copy_function=lambda a, b: Path(b).hardlink_to(a))
        for kind in (folder / "cache" / "entries").iterdir() if long.drawn else ():
            if kind.name != "images":
                shutil.rmtree(kind)

    def start(self, **moment: Any) -> int:
        """Its exit status."""
        return self._stem.run(self.long.command, self.folder, **moment)

    def live_until(self, moment: str | int | float, expected: dict[str, Any]) -> None:
        """Starts it, and kills it at a moment, unless it comes to its end, or to what is expected, before."""
        if moment == "first":
            status = self.start(seen=lambda: any(self.folder.glob(self.long.first)))
        else:
            status = self.start(**{"write" if isinstance(moment, int) else "seconds": moment})
        assert status in (KILLED, self.long.status), self.said
        self.kills += status == KILLED
        left = self.unfinished
        assert len(left) <= UNFINISHED_AT_ONCE, left
        self.over = status != KILLED or (not left and self.result == expected)

    @property
    def said(self) -> str:
        """The end of what it said."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    @property
    def unfinished(self) -> list[Path]:
        """What should not be there in the end."""
        return [path for path in self.folder.rglob("*") if UNFINISHED.fullmatch(path.name)]

    def counted(self, mark: str) -> int:
        """Steps (``.``), or files written (``w``), of all its starts."""
        return (self.folder / "work").read_text().count(mark)

    @property
    def result(self) -> dict[str, Any]:
        """All files that it came to, by name: what they say, without dates, durations and this folder's name."""
        parts = ("out", "cache/entries")
        paths = [path for part in parts for path in (self.folder / part).rglob("*") if path.is_file()]
        names = {str(path.relative_to(self.folder)): path for path in paths if path.suffix != ".lock"}
        return {name: self._told(path) for name, path in sorted(names.items())}

    def _told(self, path: Path) -> Any:
        content = path.read_bytes().replace(str(self.folder).encode(), b"FOLDER")
        if path.suffix == ".json":
            return _lasting(json.loads(content))
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}
        if path.suffix == ".html":  # has durations in many places; alignment.json, which it is made of, has not
            return content.rstrip().endswith(b"</html>")
        return re.sub(rb' (time|timestamp|hostname)="[^"]*"', b"", content) if path.suffix == ".xml" else content


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(one) for key, one in value.items() if key not in VOLATILE}
    return [_lasting(one) for one in value] if isinstance(value, list) else value


def moments(random: np.random.Generator, writes: int, duration: float) -> Iterator[str | int | float]:
    """At the first checkpoint, amid the writing of a file, thrice at random; and again."""
    while True:
        yield "first"
        yield int(random.integers(writes))
        yield from random.uniform(0, duration, 3).tolist()


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_moment_it_ends_as_if_nothing_had_befallen_it(name, stem, begun, tmp_path, request):
    long, left = COMMANDS[name], request.config.option.kills
    undisturbed = Life(long, stem, tmp_path / "undisturbed", begun)
    start = time.monotonic()
    assert undisturbed.start() == long.status, undisturbed.said
    assert not undisturbed.unfinished
    expected, duration = undisturbed.result, time.monotonic() - start
    when = moments(np.random.default_rng(zlib.crc32(name.encode())), undisturbed.counted("w"), duration)
    for number in itertools.count():
        life = Life(long, stem, tmp_path / f"life-{number}", begun)
        while life.kills < left and not life.over:
            life.live_until(next(when), expected)
        if not life.over:
            assert life.start() == long.status, life.said
        assert not life.unfinished
        result = life.result
        assert result.keys() == expected.keys()
        assert [name for name, told in result.items() if told != expected[name]] == []
        if long.lost is not None:
            assert life.counted(".") <= undisturbed.counted(".") + life.kills * long.lost
        left -= life.kills
        if not left:
            break
