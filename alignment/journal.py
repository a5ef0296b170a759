"""What a run over many images has measured so far, so that one that was killed goes on where it was, to the bit.

A folder of pieces, ``<first>-<end>.npz``: each holds the detections of some images, and the sums over all images up to
its end.  A piece is written whole, so that what was lost is at most one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from alignment import __version__
from alignment.case import Case
from alignment.compare.measure import TensorErrors
from alignment.data.samples import Samples
from alignment.nms.multiclass import Detections
from alignment.referee import Referee
from alignment.runners.base import Runner
from alignment.storage import writing

#: Images and seconds of a piece, whichever comes first.
IMAGES, SECONDS = 64, 60.0
COLUMNS = ("boxes", "scores", "labels", "rows")


class Kept(Protocol):
    """One backend's part of a run; see `alignment.pipeline`."""

    case: Case
    runner: Runner
    calls: list[float]
    equal_inputs: int
    detections: dict[int, Detections]
    errors: TensorErrors


@dataclass
class Journal:
    """The pieces of one variant's run.

    Attributes:
        folder: where they lie; nobody else writes there but the same run.
        turn: images that a backend answers in a row: pieces end where turns do, so that the same ones follow.
        done: how many images they hold.
        resumed: how many of them an earlier run left.
    """

    folder: Path
    turn: int = 1
    done: int = 0
    resumed: int = 0
    _written: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, parent: Path, samples: Samples, sides: Sequence[Kept], how: tuple[int, int, int]) -> Journal:
        """That of a run, below `parent`.

        Args:
            parent: a folder.
            samples: the images.
            sides: the backends.
            how: the batch, on how many images float64 is run, and the turn.
        """
        dataset = samples.dataset
        # An engine that is taken from the cache is the one that was built.
        provenance = [{k: v for k, v in side.runner.provenance.items() if k != "engine_from_cache"} for side in sides]
        images = [dataset.content_fingerprint, dataset.fingerprint, len(samples)]
        cases = [side.case.id for side in sides]
        identity = [samples.variant.model_dump(mode="json"), cases, provenance, how, images, __version__, _sources()]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return cls(parent / digest[:16], how[2])

    def restore(self, images: Sequence[int], sides: Sequence[Kept], truth: Referee) -> int:
        """Fills in what was measured, and returns of how many of the images, the first."""
        last: dict[str, np.ndarray] | None = None
        while piece := self._next(len(images)):
            end, last = piece
            for number, found in enumerate([*(side.detections for side in sides), truth.detections]):
                found.update(_unpacked(last, f"{number}/"))
            self.done = end
        if last is not None:
            told = json.loads(str(last["told"]))
            truth.seconds, truth.note = told["seconds"], told["note"]
            truth.runner = None if truth.note else truth.runner
            for number, side in enumerate(sides):
                side.calls[:], side.equal_inputs = told["calls"][number], told["equal_inputs"][number]
                start = f"{number}/errors/"
                arrays = {name.removeprefix(start): a for name, a in last.items() if name.startswith(start)}
                side.errors = TensorErrors.from_arrays(arrays)
        self.resumed = self.done
        return self.done

    def keep(self, images: Sequence[int], end: int, sides: Sequence[Kept], truth: Referee) -> None:
        """Writes a piece, where one is due; all images up to `end` were measured."""
        due = end - self.done >= IMAGES or time.monotonic() - self._written >= SECONDS
        if end < len(images) and (not due or end % self.turn):
            return
        told = {
            "seconds": truth.seconds,
            "note": truth.note,
            "calls": [side.calls for side in sides],
            "equal_inputs": [side.equal_inputs for side in sides],
        }
        arrays = {"told": np.array(json.dumps(told))}
        for number, found in enumerate([*(side.detections for side in sides), truth.detections]):
            arrays |= _packed({i: found[i] for i in images[self.done : end] if i in found}, f"{number}/")
        for number, side in enumerate(sides):
            arrays |= {f"{number}/errors/{name}": array for name, array in side.errors.to_arrays().items()}
        with writing(self.folder / f"{self.done}-{end}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        self.done, self._written = end, time.monotonic()

    def _next(self, images: int) -> tuple[int, dict[str, np.ndarray]] | None:
        """The piece behind what is done, and its end; one that cannot be read is as none."""
        for path in self.folder.glob(f"{self.done}-*.npz"):
            end = int(path.stem.partition("-")[2])
            if self.done < end <= images:
                try:
                    with np.load(path) as stored:
                        return end, dict(stored)
                except Exception:  # zip and NumPy each have their own
                    path.unlink(missing_ok=True)
        return None


def _packed(found: Mapping[int, Detections], start: str) -> dict[str, np.ndarray]:
    arrays = {f"{start}images": np.array(list(found), np.int64)}
    if found:
        arrays[f"{start}counts"] = np.array([len(one) for one in found.values()])
        for column in COLUMNS:
            arrays[start + column] = np.concatenate([getattr(one, column) for one in found.values()])
    return arrays


def _unpacked(arrays: Mapping[str, np.ndarray], start: str) -> dict[int, Detections]:
    images = arrays[f"{start}images"].tolist()
    if not images:
        return {}
    ends = np.cumsum(arrays[f"{start}counts"])[:-1]
    columns = zip(*(np.split(arrays[start + column], ends) for column in COLUMNS), strict=True)
    return {image: Detections(*one) for image, one in zip(images, columns, strict=True)}


@cache
def _sources() -> str:
    """This package itself: who mends it does not want the numbers of before."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
