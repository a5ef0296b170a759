"""What a graph of a sweep has come to on the images so far, in a file that grows chunk by chunk of them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np

from alignment.data.coco import CocoDataset
from alignment.errors import AlignError
from alignment.nms.multiclass import Detections
from alignment.quantize.sensitivity import Distortion

#: Of detections, all images of a record together.
_COLUMNS = ("boxes", "scores", "labels", "rows")
#: Before a record: its bytes, and their CRC-32.
_HEAD = struct.Struct("<QI")


@dataclass
class Sums:
    """What is added up of a graph, image by image in their order.

    Attributes:
        kl: see `alignment.quantize.sensitivity.kl_divergence`.
        outputs: of the network.
        own: of the layer.
    """

    kl: float = 0.0
    outputs: Distortion = field(default_factory=Distortion)
    own: Distortion = field(default_factory=Distortion)

    def to_array(self) -> np.ndarray:
        """``[9] float64``, exactly."""
        return np.array([self.kl, *astuple(self.outputs), *astuple(self.own)])

    @classmethod
    def from_array(cls, values: np.ndarray) -> Sums:
        """The same again."""
        kl, *rest = values.tolist()
        half = len(rest) // 2
        return cls(kl, Distortion(*rest[:half]), Distortion(*rest[half:]))


class Ledger:
    """A file of records, one a chunk: the sums over all images up to its end, and the detections of its own images.

    What a kill has torn, or a disk has changed, is cut off with all behind it, and measured anew.

    Attributes:
        path: of the file, which need not be there.
        images: how many it tells of, the first.
        sums: over these.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.images, self.sums = path, 0, Sums()
        whole = 0
        for end, sums, found in _records(path):
            whole, self.images, self.sums = end, self.images + len(found), Sums.from_array(sums)
        if path.exists() and whole < path.stat().st_size:
            os.truncate(path, whole)

    def add(self, first: int, sums: Sums, found: Sequence[Detections]) -> None:
        """Adds a chunk that begins at image `first`, unless it is there.

        Raises:
            AlignError: for a disk that is full.
        """
        if first != self.images:
            return
        columns = [np.concatenate([getattr(one, column) for one in found]) for column in _COLUMNS]
        record = io.BytesIO()
        for array in (sums.to_array(), np.array([len(one) for one in found]), *columns):
            np.lib.format.write_array(record, array, allow_pickle=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = record.getvalue()
            with self.path.open("ab") as file:
                file.write(_HEAD.pack(len(content), zlib.crc32(content)) + content)
        except OSError as error:
            raise no_room(self.path, error) from None
        self.images, self.sums = self.images + len(found), sums


def told(path: Path, dataset: CocoDataset) -> tuple[Sums, dict[int, Detections]]:
    """What a ledger tells of all images: the sums, and image id → detections.

    Raises:
        AlignError: for a file that does not tell of all of them.
    """
    records = list(_records(path))
    every = [one for _, _, found in records for one in found]
    if len(every) < len(dataset.images):
        raise unseen(path, f"tells of {len(every)} of {len(dataset.images)} images")
    return Sums.from_array(records[-1][1]), {image.id: one for image, one in zip(dataset.images, every, strict=True)}


def _records(path: Path) -> Iterator[tuple[int, np.ndarray, list[Detections]]]:
    """Where each record ends, its sums and its detections by image, up to the first that is not whole."""
    if not path.exists():
        return
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            size, digest = _HEAD.unpack(head)
            if not 0 < size <= path.stat().st_size - file.tell():
                return
            content = file.read(size)
            if zlib.crc32(content) != digest:
                return
            record = io.BytesIO(content)
            sums, counts, *columns = (np.lib.format.read_array(record) for _ in range(2 + len(_COLUMNS)))
            parts = [np.split(column, np.cumsum(counts)[:-1]) for column in columns]
            yield file.tell(), sums, [Detections(*one) for one in zip(*parts, strict=True)]


def no_room(path: Path, error: OSError) -> AlignError:
    """What to say of a file that cannot be written."""
    mend = "make room there, and start again, which goes on; or set ALIGN_CACHE to a folder of a larger disk"
    return AlignError(f"{path}: {error.strerror or error}", mend)


def unseen(path: Path, reason: object) -> AlignError:
    """What to say of a file that a worker does not see."""
    return AlignError(f"{path}: {reason}", "let every worker see this folder under the same name")
