"""Ledgers of a sweep: what was added is read, whatever a kill has torn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.errors import AlignError
from alignment.nms.multiclass import Detections
from alignment.quantize.ledger import Ledger, Sums, told
from alignment.quantize.sensitivity import Distortion

pytestmark = pytest.mark.sensitivity
SIDES = st.sampled_from([4, 5])
#: Detections of each image of each chunk.
COUNTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=4)
NUMBERS = st.lists(st.floats(allow_nan=False), min_size=9, max_size=9)


def chunks(counts: list[list[int]], side: int) -> list[list[Detections]]:
    rng = np.random.default_rng(0)

    def of(count: int) -> Detections:
        boxes = rng.normal(size=(count, side)).astype(np.float32)
        scores, integers = rng.random(count, np.float32), rng.integers(0, 9, (2, count), np.int32)
        return Detections(boxes, scores, *integers)

    return [[of(count) for count in chunk] for chunk in counts]


def filled(path: Path, given: list[list[Detections]], sums: Sums) -> list[int]:
    """Where each record ends."""
    ledger, ends = Ledger(path), []
    for chunk in given:
        ledger.add(ledger.images, sums, chunk)
        ends.append(path.stat().st_size)
    return ends


def require(ledger: Ledger, given: list[list[Detections]]) -> None:
    """It tells of these, to the bit."""
    flat = [one for chunk in given for one in chunk]
    dataset = SimpleNamespace(images=[SimpleNamespace(id=7 * number) for number in range(len(flat))])
    assert ledger.images == len(flat)
    if not flat:
        return
    sums, read = told(ledger.path, dataset)
    assert sums == ledger.sums
    assert list(read) == [image.id for image in dataset.images]
    for ours, theirs in zip(read.values(), flat, strict=True):
        for column in ("boxes", "scores", "labels", "rows"):
            one, other = getattr(ours, column), getattr(theirs, column)
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@settings(deadline=None, max_examples=60)
@given(counts=COUNTS, side=SIDES, numbers=NUMBERS, data=st.data())
def test_a_torn_record_is_as_none(tmp_path_factory, counts, side, numbers, data):
    path = tmp_path_factory.mktemp("ledger") / "work" / "0"
    sums = Sums(numbers[0], Distortion(*numbers[1:5]), Distortion(*numbers[5:]))
    parts = chunks(counts, side)
    ends = filled(path, parts, sums)
    left = data.draw(st.integers(0, ends[-1]))
    with path.open("rb+") as file:
        file.truncate(left)
    ledger = Ledger(path)
    whole = sum(end <= left for end in ends)
    require(ledger, parts[:whole])
    assert ledger.sums == (sums if whole else Sums())
    assert path.stat().st_size == ([0, *ends])[whole]
    for chunk in parts[whole:]:
        ledger.add(ledger.images, sums, chunk)
    require(ledger, parts)
    require(Ledger(path), parts)


@settings(deadline=None, max_examples=200)
@given(counts=COUNTS, side=SIDES, data=st.data())
def test_a_record_that_a_disk_has_changed_is_as_none(tmp_path_factory, counts, side, data):
    path = tmp_path_factory.mktemp("ledger") / "0"
    parts = chunks(counts, side)
    ends = filled(path, parts, Sums(1.5))
    content = bytearray(path.read_bytes())
    first = data.draw(st.integers(0, len(content) - 1))
    end = min(len(content), first + data.draw(st.sampled_from([1, 12, 4096])))
    content[first:end] = bytes([content[first] ^ data.draw(st.integers(1, 255))]) + bytes(end - first - 1)
    path.write_bytes(content)
    whole = sum(end <= first for end in ends)
    ledger = Ledger(path)
    assert path.stat().st_size == ([0, *ends])[whole]
    require(ledger, parts[:whole])
    for chunk in parts[whole:]:
        ledger.add(ledger.images, Sums(1.5), chunk)
    require(Ledger(path), parts)


def test_what_is_there_is_not_added_again(tmp_path):
    (first, second), sums = chunks([[1], [2]], 4), Sums(1.0)
    ledger = Ledger(tmp_path / "0")
    ledger.add(0, sums, first)
    ledger.add(0, Sums(2.0), second)
    require(ledger, [first])
    assert ledger.sums == sums


def test_a_disk_that_is_full_is_one_line():
    """What Linux has for this purpose: every write fails for lack of room."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    ledger = Ledger(Path("/dev/null"))
    ledger.path = full
    with pytest.raises(AlignError, match=r"^/dev/full: No space left on device: make room there, and start again"):
        ledger.add(0, Sums(), chunks([[1]], 4)[0])
