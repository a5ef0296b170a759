"""What a run has measured so far is kept: one that was interrupted goes on, to the bit, and no other run takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pipeline import VARIANT, Fixed

from alignment import journal, pipeline
from alignment.case import cases_of
from alignment.compare.measure import TensorErrors
from alignment.data.samples import Samples, open_samples
from alignment.models.outputs import Outputs
from alignment.pipeline import RunOptions, align_live
from alignment.referee import Referee
from alignment.results import CaseResult

pytestmark = pytest.mark.kill
IMAGES = 9


class Seeing(Fixed):
    """Its scores depend on the image, and are off by `noise`."""

    def __init__(self, noise: float) -> None:
        super().__init__(VARIANT)
        self.noise, self.images = np.float32(noise), 0

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        self.images += len(batch)
        means = batch.mean((1, 2, 3))[:, None, None]
        scores = (self.outputs["scores"] + means) % 1
        boxes = np.repeat(self.outputs["boxes"], len(batch), 0) + self.noise
        return {"boxes": boxes, "scores": scores * (1 - self.noise)}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def samples() -> Samples:
    return open_samples(VARIANT, limit=IMAGES)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces of two images, and a referee that is a runner too."""
    monkeypatch.setattr(journal, "IMAGES", 2)
    monkeypatch.setattr(pipeline, "TURN", 2)
    monkeypatch.setattr(Referee, "open", lambda variant, reference: Referee(Seeing(0.0)))


def run(
    monkeypatch, samples: Samples, options: RunOptions, until: int = IMAGES
) -> tuple[list[CaseResult], dict[str, float], list[int]]:
    """Results, seconds, and how many images each runner saw; it ends after so many."""
    made = {"torch": Seeing(0.0), "onnxruntime": Seeing(1e-3)}
    monkeypatch.setattr(pipeline, "open_runner", lambda variant, case, *_: made[case.backend])

    def move(done: int) -> None:
        if until <= done < IMAGES:
            raise Killed

    try:
        found = align_live(VARIANT, cases_of(VARIANT, tuple(made), ("fp32",)), samples, options, move)
    except Killed:
        found = [], {}
    return *found, [runner.images for runner in made.values()]


def lasting(results: list[CaseResult]) -> list[dict]:
    return [result.model_dump(exclude={"timing"}) for result in results]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("until", [1, 3, 8])
def test_an_interrupted_run_goes_on_to_the_bit(monkeypatch, samples, tmp_path, batch, until):
    options = RunOptions(golden=tmp_path / "golden", batch=batch)
    whole, _, _ = run(monkeypatch, samples, options)
    options = replace(options, journal=tmp_path / "journal")
    assert run(monkeypatch, samples, options, until)[0] == []
    found, seconds, seen = run(monkeypatch, samples, options)
    assert lasting(found) == lasting(whole)
    kept = seconds.get("resumed_images", 0)
    piece = max(2, batch)
    assert kept % batch == 0
    assert until - piece <= kept <= until
    assert seen == [IMAGES - kept] * 2
    assert [len(result.worst) for result in found] == [len(result.worst) for result in whole]


def changed_batch(options: RunOptions, samples: Samples) -> tuple[RunOptions, Samples]:
    return replace(options, batch=2), samples


def fewer_images(options: RunOptions, samples: Samples) -> tuple[RunOptions, Samples]:
    return options, open_samples(VARIANT, limit=IMAGES - 1)


def fewer_of_the_referee(options: RunOptions, samples: Samples) -> tuple[RunOptions, Samples]:
    return replace(options, referee_images=1), samples


@pytest.mark.parametrize("change", [changed_batch, fewer_images, fewer_of_the_referee])
def test_another_run_takes_nothing(monkeypatch, samples, tmp_path, change):
    options = RunOptions(golden=tmp_path / "golden", journal=tmp_path / "journal")
    run(monkeypatch, samples, options, 5)
    options, others = change(options, samples)
    assert "resumed_images" not in run(monkeypatch, others, options)[1]


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:100]), Path.unlink])
def test_a_piece_that_is_torn_or_lost_is_measured_again(monkeypatch, samples, tmp_path, spoil):
    options = RunOptions(golden=tmp_path / "golden", journal=tmp_path / "journal")
    whole, _, _ = run(monkeypatch, samples, replace(options, journal=None))
    run(monkeypatch, samples, options, 7)
    spoil(next(options.journal.rglob("2-4.npz")))
    found, seconds, _ = run(monkeypatch, samples, options)
    assert seconds["resumed_images"] == 2
    assert lasting(found) == lasting(whole)


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.sampled_from([np.nan, np.inf, 0.0]))
def test_sums_that_were_kept_go_on_as_if_they_had_not_been(seed, cut, odd):
    rng = np.random.default_rng(seed)

    def outputs() -> Outputs:
        values = [rng.normal(size=shape).astype(np.float32) for shape in ((1, 50, 4), (1, 50, 3), (1, 9))]
        values[0][0, 0, 0] = odd
        return Outputs({"a/b": values[2]}, values[0], values[1])

    pairs = [(outputs(), outputs(), outputs() if number < 3 else None) for number in range(6)]
    whole, part = TensorErrors(), TensorErrors()
    for number, pair in enumerate(pairs):
        whole.add(*pair)
        if number == cut:
            part = TensorErrors.from_arrays(part.to_arrays())
        part.add(*pair)
    assert part.results() == whole.results()
    assert part.nonfinite == whole.nonfinite
