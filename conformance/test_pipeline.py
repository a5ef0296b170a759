"""`align_live` with backends made by hand: which bytes went in, and that every runner is closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alignment import pipeline
from alignment.case import Case, cases_of
from alignment.data.samples import Sample, Samples, open_samples
from alignment.errors import AlignError
from alignment.models.outputs import Outputs
from alignment.pipeline import RunOptions, align_live
from alignment.referee import Referee
from alignment.results import CaseResult, EngineFacts, StageName
from alignment.runners.base import Runner
from alignment.variant import Variant, load_variant

VARIANT = load_variant("yolov8_embedded")
IMAGES = 3


class Fixed(Runner):
    """Answers the same whatever comes in; with `spoils` it flips one bit of its second input."""

    def __init__(self, variant: Variant, spoils: bool = False) -> None:
        rng = np.random.default_rng(5)
        # About the centre, where no image ends.
        corner = variant.input.height * rng.uniform(0.4, 0.5, (1, 40, 2)).astype(np.float32)
        self.outputs = {
            "boxes": np.concatenate([corner, corner + 10], -1),
            "scores": rng.random((1, 40, variant.classes), np.float32),
        }
        self.spoils, self.seen, self.closed = spoils, 0, False
        self.provenance, self.warnings = {"backend": "made by hand"}, []

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        self.seen += 1
        if self.spoils and self.seen == 2:
            batch.view(np.int32)[0, 0, 0, 0] ^= 1
        return {name: value.copy() for name, value in self.outputs.items()}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def samples() -> Samples:
    return open_samples(VARIANT, limit=IMAGES)


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> dict[str, Runner]:
    """The runner of each backend, which tests may replace; the float64 referee is away."""
    made: dict[str, Runner] = {backend: Fixed(VARIANT) for backend in ("torch", "onnxruntime")}
    monkeypatch.setattr(pipeline, "open_runner", lambda variant, case, *_: made[case.backend])
    monkeypatch.setattr(Referee, "open", lambda variant, reference: Referee())
    return made


def run(samples: Samples, folder: Path) -> dict[str, CaseResult]:
    cases = cases_of(VARIANT, ("torch", "onnxruntime"), ("fp32",))
    return {r.case.backend: r for r in align_live(VARIANT, cases, samples, RunOptions(golden=folder))[0]}


def failed(result: CaseResult) -> list[StageName]:
    return [stage.name for stage in result.stages if stage.status == "fail"]


def equal_inputs(result: CaseResult) -> float:
    return result.stages[0].checks[0].value


@pytest.mark.parametrize("guilty", ["torch", "onnxruntime"])
def test_a_backend_that_writes_into_its_input_fails_alone(samples, runners, tmp_path, guilty):
    runners[guilty] = Fixed(VARIANT, spoils=True)
    results = run(samples, tmp_path)
    bad = results.pop(guilty)
    (good,) = results.values()
    assert (bad.status, bad.first_difference, failed(bad)) == ("fail", "input", ["input"])
    assert (good.status, failed(good)) == ("pass", [])
    assert (equal_inputs(bad), equal_inputs(good)) == (IMAGES - 1, IMAGES)
    assert bad.stages[0].checks[0].limit == f"= {IMAGES}"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["boxes", "scores", "cls_s8"])
@pytest.mark.parametrize("guilty", [["torch"], ["onnxruntime"], ["torch", "onnxruntime"]], ids="-".join)
def test_a_backend_whose_outputs_are_not_finite_fails_where_they_are(samples, runners, tmp_path, guilty, name, value):
    for runner in runners.values():
        runner.outputs["cls_s8"] = np.ones((1, 6, 4, 4), np.float32)
    for backend in guilty:
        runners[backend].outputs[name].reshape(-1)[7] = value
    results = run(samples, tmp_path)
    where = "raw" if name == "cls_s8" else "decoded"
    for backend in guilty:
        assert results[backend].first_difference == where
        assert (
            f"differs first at {where}: NaN or infinite {IMAGES}, allowed = 0 values of {name}"
            in results[backend].reason
        )
    # One that is finite differs from a reference that is not.
    assert results["onnxruntime"].first_difference == where
    assert (results["torch"].status == "fail") == ("torch" in guilty)


@pytest.mark.parametrize("guilty", ["torch", "onnxruntime"])
def test_a_backend_that_is_fed_something_else_fails_alone(samples, runners, tmp_path, monkeypatch, guilty):
    feed = pipeline._Side.run

    def misfed(side: pipeline._Side, batch: np.ndarray, several: list[Sample], variant: Variant) -> list[Outputs]:
        return feed(side, batch[..., ::-1] if side.case.backend == guilty else batch, several, variant)

    monkeypatch.setattr(pipeline._Side, "run", misfed)
    results = run(samples, tmp_path)
    assert {backend: failed(r) for backend, r in results.items() if failed(r)} == {guilty: ["input"]}
    assert results[guilty].first_difference == "input"
    assert equal_inputs(results[guilty]) == 0


def test_what_the_first_backend_writes_does_not_reach_the_second(samples, runners, tmp_path):
    class Wiper(Fixed):
        def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
            batch[:] = 0
            return super().run(batch)

    class Looker(Fixed):
        def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
            assert batch.any()
            return super().run(batch)

    runners.update(torch=Wiper(VARIANT), onnxruntime=Looker(VARIANT))
    assert {b: equal_inputs(r) for b, r in run(samples, tmp_path).items()} == {"torch": 0, "onnxruntime": IMAGES}


def test_when_a_later_runner_cannot_be_opened_the_earlier_ones_are_closed(samples, runners, tmp_path, monkeypatch):
    def opener(variant: Variant, case: Case, batch: int, data: Path | None) -> Runner:
        if case.backend == "onnxruntime":
            raise AlignError("no such graph", "export it again")
        return runners[case.backend]

    monkeypatch.setattr(pipeline, "open_runner", opener)
    with pytest.raises(AlignError, match="no such graph"):
        run(samples, tmp_path)
    assert runners["torch"].closed


def test_every_runner_is_closed_after_a_run_and_after_one_that_fails(samples, runners, tmp_path):
    run(samples, tmp_path)
    assert all(runner.closed for runner in runners.values())

    class Broken(Fixed):
        def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
            raise AlignError("out of memory")

    runners.update(torch=Fixed(VARIANT), onnxruntime=Broken(VARIANT))
    with pytest.raises(AlignError, match="out of memory"):
        run(samples, tmp_path)
    assert all(runner.closed for runner in runners.values())


class Device(Fixed):
    """A backend with a clock of its own, and an engine."""

    def latency(self, batch: np.ndarray, repeats: int = 100, warmup: int = 10) -> list[float]:
        self.timed = batch
        return [3.0, 1.0, 2.0]

    def engine(self) -> EngineFacts:
        return EngineFacts(layers=9, reformats=2, size_bytes=1000)


def test_a_device_tells_latency_by_its_own_clock_and_its_engine_in_numbers(samples, runners, tmp_path):
    runners["onnxruntime"] = device = Device(VARIANT)
    results = run(samples, tmp_path)
    timing = results["onnxruntime"].timing
    assert timing is not None
    assert (timing.latency_ms, timing.clock, timing.batch) == (2.0, "gpu", 1)
    assert np.array_equal(device.timed, samples.load(samples.dataset.images[0]).tensor[None])
    assert results["onnxruntime"].engine == EngineFacts(layers=9, reformats=2, size_bytes=1000)
    assert results["torch"].engine is None


@pytest.mark.parametrize(("images", "told"), [(3, None), (9, None), (10, 4000.0), (12, 4000.0)])
def test_latency_on_the_wall_is_a_median_without_the_first_and_last_call_where_there_are_enough(images, told):
    side = pipeline._Side(Case("v", "torch", "fp32"), Fixed(VARIANT), calls=[90.0, *[4.0] * (images - 2), 0.1])
    timing = side.timing(images, 1)
    assert timing.latency_ms == told
    assert timing.clock == ("wall" if told else None)
    assert timing.inference_s == pytest.approx(90.1 + 4.0 * (images - 2))


def test_one_case_of_a_variant_carries_the_signature_of_its_graph(samples, runners, tmp_path):
    pytest.importorskip("mmyolo")
    results = run(samples, tmp_path)
    signature = results["onnxruntime"].signature
    assert results["torch"].signature is None
    assert signature is not None
    first = samples.load(samples.dataset.images[0])
    assert (signature.image_id, signature.input_digest) == (first.entry.id, first.digest)
