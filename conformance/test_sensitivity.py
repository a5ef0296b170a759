"""Sensitivity: suffixes compute what whole graphs do, sweeps go on where they were, planted faults come first."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import yaml
from command_line import align, one_line, variant_file
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from test_placement import graphs, tiny

from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.data.samples import open_samples
from alignment.errors import AlignError
from alignment.executor import open_executor
from alignment.export.onnx_export import exported
from alignment.models.outputs import Outputs, detections_of, to_outputs
from alignment.nms.multiclass import Detections
from alignment.quantize.chunks import Chunks
from alignment.quantize.layer_job import Store, judge
from alignment.quantize.placement import place
from alignment.quantize.qdq import write_qdq
from alignment.quantize.recipe import Quantized, quantize
from alignment.quantize.sensitivity import METRICS, Distortion, Sensitivity, kl_divergence
from alignment.quantize.suffix import Unchanged
from alignment.quantize.sweep import sweep
from alignment.runners.onnxruntime import open_session
from alignment.storage import cache_dir
from alignment.variant import Variant, load_variant, with_quantization

pytestmark = pytest.mark.sensitivity
#: The head alone reads int8: twelve layers, and short suffixes.
HEAD = {"policy": "conv-only", "keep_float": ["/detector/backbone/*", "/detector/neck/*"]}


class Subject(NamedTuple):
    variant: Variant
    quantized: Quantized

    def swept(self, path: Path, images: int = 2, **options) -> Sensitivity:
        return sweep(self.variant, self.quantized, open_samples(self.variant, None, images), path=path, **options)[0]


def subject(name: str, recipe: dict | None = None) -> Subject:
    pytest.importorskip("mmyolo")
    variant = with_quantization(load_variant(name), recipe or {})
    return Subject(variant, quantize(variant))


@pytest.fixture(scope="module")
def yolov8() -> Subject:
    return subject("yolov8_embedded")


@pytest.fixture(scope="module")
def head() -> Subject:
    return subject("yolov8_embedded", HEAD)


@pytest.fixture(scope="module")
def three(head, tmp_path_factory) -> Sensitivity:
    """Its sweep over three images, all at once."""
    return head.swept(tmp_path_factory.mktemp("three") / "s", 3)


@pytest.fixture(scope="module")
def size(head, tmp_path_factory) -> int:
    """Bytes of its kept tensors on an image."""
    return per_image(head, tmp_path_factory.mktemp("size"))


def both(subject: Subject, folder: Path, **asked) -> tuple[Sensitivity, Sensitivity]:
    """The sweep with shared prefixes, and that of whole graphs."""
    return subject.swept(folder / "shared", 1, **asked), subject.swept(folder / "plain", 1, share=False, **asked)


@pytest.mark.parametrize(
    ("mode", "units", "layers"), [("quantize-one", "all", 84), ("leave-one-out", "weights", 53)], ids=str
)
def test_every_suffix_gives_what_its_whole_graph_gives(yolov8, tmp_path, mode, units, layers):
    shared, plain = both(yolov8, tmp_path, mode=mode, units=units)
    assert shared == plain
    assert len(shared.layers) == layers


@pytest.mark.parametrize("mode", ["quantize-one", "leave-one-out"])
def test_weights_and_activations_apart(head, tmp_path, mode):
    parts = {}
    for part in ("both", "weights", "activations"):
        (tmp_path / part).mkdir()
        shared, plain = both(head, tmp_path / part, mode=mode, part=part)
        assert shared == plain
        parts[part] = shared.layers
    assert len(parts["weights"]) == len(parts["both"])
    assert len({layers[-1].metrics["mse"] for layers in parts.values()}) == 3


@settings(deadline=None, max_examples=40)
@given(model=graphs(), data=st.data())
def test_suffixes_of_random_graphs(model, data):
    placement = place(model, "full")
    channels = {weight.name: weight.dims for weight in model.graph.initializer}
    weights = {q.initializer: np.full(channels[q.initializer][q.axis], 0.01, np.float32) for q in placement.weights}
    scales = {quantizer.tensor: np.float32(0.02) for quantizer in placement.activations}
    nodes = data.draw(st.sets(st.sampled_from(placement.int8_nodes or ("none",)), min_size=1))
    changed = write_qdq(model, placement.restricted(nodes), scales, weights)
    # Every tensor is an output, so that each of those that the change does not reach can be held to the float graph.
    names = [name for node in model.graph.node for name in node.output]
    for marked in (model, changed):
        del marked.graph.output[:]
        marked.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    image = {"x": np.random.default_rng(0).normal(size=(1, 16, 8, 8)).astype(np.float32)}
    before, after = values(model, image, names), values(changed, image, names)
    cut = Unchanged(model).suffix(changed, names)
    found = values(cut.model, {name: (image | before)[name] for name in cut.inputs}, list(cut.outputs))
    assert set(cut.outputs) >= {node.output[0] for node in model.graph.node if node.name in nodes}
    for name in names:
        np.testing.assert_array_equal(found.get(name, before[name]), after[name])


def values(model: onnx.ModelProto, feeds: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    session = open_session(model, "cut", optimize=False, threads=1)
    return dict(zip(names, session.run(names, feeds) if names else [], strict=True))


def test_a_suffix_holds_no_more_than_it_needs():
    model = tiny("a = Conv(x, w0)\nb = Conv(a, w1)\nc = Conv(a, w2)\nd = Add(b, c)")
    placement = place(model, "conv-only").restricted({"b"})
    changed = write_qdq(model, placement, {"a": np.float32(0.1)}, {"w1": np.full(32, 0.1, np.float32)})
    cut = Unchanged(model).suffix(changed, ["d", "c"])
    kinds = sorted(node.op_type for node in cut.model.graph.node)
    assert kinds == ["Add", "Conv", *["DequantizeLinear"] * 2, *["QuantizeLinear"] * 2]
    assert (set(cut.inputs), cut.outputs) == ({"a", "c"}, ("d",))
    assert not {"w0", "w2"} & {weight.name for weight in cut.model.graph.initializer}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("stage", "done", "chunk"),
    [("FP32", 3, 2), ("layers", 10, 2), ("layers", 36, 2), ("layers", 41, 2), ("layers", 30, 3), ("metrics", 5, 2)],
    ids=str,
)
def test_an_interrupted_sweep_goes_on(head, three, size, tmp_path, monkeypatch, stage, done, chunk):
    """Eighteen layers, three images: before a chunk, amid and at the end of one, amid the metrics."""
    monkeypatch.setattr("alignment.quantize.chunks.KEPT", chunk * size)
    seen = []

    def interrupt(*at: object) -> None:
        seen.append(at[:2])
        if at[:2] == (stage, done):
            raise Interrupted

    with pytest.raises(Interrupted):
        head.swept(tmp_path / "sweep", 3, progress=interrupt)
    assert Sensitivity.load(tmp_path / "sweep").layers == three.layers[: done if stage == "metrics" else 0]
    assert head.swept(tmp_path / "sweep", 3, progress=lambda *at: seen.append(at[:2])) == three
    places = {of: [place for name, place in seen if name == of] for of in ("layers", "metrics")}
    first = range(chunk, 18 * chunk + 1, chunk)  # nothing is run twice
    assert places["layers"] == [*first, *range(first[-1] + 1, 18 * 3 + 1)]
    assert places["metrics"] == list(range(1, 18 + 1))
    assert head.swept(tmp_path / "sweep", 3, progress=lambda *_: pytest.fail("there is nothing left to do")) == three
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]


def test_a_sweep_of_something_else_is_refused(head, tmp_path):
    head.swept(tmp_path / "sweep", 1)
    with pytest.raises(AlignError, match=r"sweep: a sweep of another mode: quantize-one, now leave-one-out"):
        head.swept(tmp_path / "sweep", 1, mode="leave-one-out")
    with pytest.raises(AlignError, match=r"sweep: a sweep of another images: "):
        head.swept(tmp_path / "sweep", 2)


def per_image(one: Subject, folder: Path) -> int:
    """Bytes of what is kept for all layers on an image."""
    sizes = []

    class Spied(Chunks):
        def fill(self) -> None:
            sizes.append(self.image)
            raise Interrupted

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("alignment.quantize.sweep.Chunks", Spied)
        with pytest.raises(Interrupted):
            one.swept(folder / "sizes", 1)
    (folder / "sizes").unlink()
    return sizes[0]


@pytest.mark.parametrize(("chunk", "runs"), [(0, 3 * 18), (0.4, 3 * 4), (1, 3), (2, 3), (3, 3)], ids=str)
def test_chunks_of_any_size_give_the_same_numbers(head, three, size, tmp_path, monkeypatch, chunk, runs):
    """As many of three images as have room; where not even one has, layers in groups, down to one each.

    The unchanged graph runs once an image and group.
    """
    seen = []
    monkeypatch.setattr("alignment.quantize.chunks.KEPT", int(chunk * size))
    found = head.swept(tmp_path / "s", 3, progress=lambda stage, *_: seen.append(stage))
    assert found == three
    assert seen.count("FP32") == 3
    assert seen.count("tensors") == runs


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_from_the_other_end(head, size, tmp_path, monkeypatch, chunk):
    """Each layer taken out of the network that is all int8, whose own sums go from chunk to chunk too."""
    whole = head.swept(tmp_path / "whole", 3, mode="leave-one-out")
    monkeypatch.setattr("alignment.quantize.chunks.KEPT", chunk * size)
    assert head.swept(tmp_path / "s", 3, mode="leave-one-out") == whole
    assert whole.baseline["mse"] > 0


def test_a_sweep_has_the_numbers_of_plain_loops(head, size, tmp_path, monkeypatch):
    """One whole graph after the other, sums in the order of the images."""
    monkeypatch.setattr("alignment.quantize.chunks.KEPT", 2 * size)
    found, variant = head.swept(tmp_path / "s", 5), head.variant
    samples = open_samples(variant, None, 5)

    def outputs(graph: Path | onnx.ModelProto) -> list[Outputs]:
        session = open_session(graph, "whole", optimize=False, threads=1)
        names = [value.name for value in session.get_outputs()]
        each = (session.run(names, {session.get_inputs()[0].name: sample.tensor[None]}) for sample in samples)
        return [to_outputs(dict(zip(names, values, strict=True)), variant, 1) for values in each]

    def detected(given: list[Outputs]) -> dict[int, Detections]:
        pairs = zip(samples, given, strict=True)
        return {sample.entry.id: detections_of(one, sample.transform, variant) for sample, one in pairs}

    truth = outputs(exported(variant).onnx)
    for layer in (found.layers[0], found.layers[-1]):
        given, distortion, kl = outputs(head.quantized.only({layer.node}, True, True)), Distortion(), 0.0
        for ours, theirs in zip(given, truth, strict=True):
            for name, value in ours.raw.items():
                distortion.add(theirs.raw[name], value)
            kl += kl_divergence(theirs.scores[0], ours.scores[0])
        ap, lower = (coco_ap(samples.dataset, detected(side))[0] for side in (truth, given))
        agreement = agreement_ap(samples.dataset, detected(truth), detected(given))
        plain = {"map": ap - lower, "agreement": 1 - agreement, "kl": kl / 5, **distortion.metrics()}
        assert {name: layer.metrics[name] for name in plain} == plain


@contextmanager
def cluster() -> Iterator[object]:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as found, open_executor(scheduler=found.scheduler_address) as pool:
        yield pool


EXECUTORS = {"threads": lambda: ThreadPoolExecutor(2), "processes": lambda: open_executor(2), "cluster": cluster}


@pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS)
def test_workers_give_the_same_numbers(head, three, size, tmp_path, monkeypatch, executor):
    monkeypatch.setattr("alignment.quantize.chunks.KEPT", 2 * size)
    with executor() as pool:
        assert head.swept(tmp_path / "parallel", 3, executor=pool) == three


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(AlignError, match="run again, with fewer workers"), open_executor(2) as pool:
        pool.submit(os._exit, 1).result()


def test_a_worker_of_a_cluster_that_dies_is_one_line():
    distributed = pytest.importorskip("distributed")
    # Raised here: a worker that is killed in earnest is started anew by its nanny, and closing meets it halfway.
    with pytest.raises(AlignError, match="run again, with fewer workers"), cluster():
        raise distributed.KilledWorker("layer", SimpleNamespace(address="tcp://127.0.0.1:1"), 3)


@contextmanager
def scheduler(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """A scheduler with a worker, each a process of its own; its address, and its process."""
    pytest.importorskip("distributed")
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    told, quiet = folder / "scheduler.json", ("--no-dashboard",)
    options = {"env": {**os.environ, "PYTHONPATH": paths}, "stderr": subprocess.DEVNULL}

    def start(kind: str, *arguments: object) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{kind}", *map(str, arguments)], **options)

    with start("scheduler", "--port", 0, "--scheduler-file", told, *quiet) as head:
        try:
            for _ in range(300):
                if told.is_file() and told.stat().st_size:
                    break
                time.sleep(0.1)
            with start("worker", "--scheduler-file", told, "--nthreads", 1, "--no-nanny", *quiet) as worker:
                try:
                    yield json.loads(told.read_text())["address"], head
                finally:
                    worker.kill()
        finally:
            head.kill()


def test_a_scheduler_that_goes_away_is_one_line_and_what_is_done_is_kept(head, tmp_path, capfd):
    path = tmp_path / "s.json"
    with scheduler(tmp_path) as (address, process):

        def lose(stage: str, done: int, total: int) -> None:
            if (stage, done) == ("layers", 6):
                process.kill()

        line = rf"^--scheduler {address}: it went away: start one, and run again: what is done is kept$"
        with pytest.raises(AlignError, match=line), open_executor(scheduler=address) as pool:
            head.swept(path, executor=pool, progress=lose)
    assert "Traceback" not in capfd.readouterr().err
    seen = []
    went_on = head.swept(path, progress=lambda stage, done, _: stage == "layers" and seen.append(done))
    assert seen[0] > 6
    assert went_on == head.swept(tmp_path / "whole")


class TestStore:
    def test_what_is_written_is_read(self, tmp_path):
        store, rows = Store(tmp_path, 3), np.random.default_rng(0).normal(size=(3, 1, 2, 5)).astype(np.float32)
        for image, row in enumerate(rows):
            store.write(image, {"a": row, "b": row.transpose(0, 2, 1) > 0})
        assert np.array_equal(store.read("a"), rows)
        assert np.array_equal(store.read("b"), rows.transpose(0, 1, 3, 2) > 0)

    def test_another_shape(self, tmp_path):
        store = Store(tmp_path, 2)
        store.write(0, {"a": np.zeros((1, 2))})
        with pytest.raises(AlignError, match=r"tensor a: \(1, 3\), but \(1, 2\) before: give a fixed input size"):
            store.write(1, {"a": np.zeros((1, 3))})

    def test_a_disk_that_is_full_is_one_line(self, head, tmp_path, monkeypatch):
        """What Linux has for this purpose: every write fails for lack of room."""
        full = Path("/dev/full")
        if not full.exists():
            pytest.skip("no /dev/full here")
        monkeypatch.setattr(Store, "_path", lambda self, name: full)
        with pytest.raises(AlignError, match=r"^/dev/full: No space left on device: make room there, and start again"):
            head.swept(tmp_path / "s.json", 1)
        assert not list(cache_dir().glob(".sweep-*"))


def test_files_that_a_worker_does_not_see(head, tmp_path):
    with pytest.raises(AlignError, match="let every worker see this folder"):
        Store(tmp_path / "elsewhere", 1).read("images")
    dataset = open_samples(head.variant, None, 2).dataset
    with pytest.raises(AlignError, match=r"elsewhere: tells of 0 of 2 images: let every worker see this folder"):
        judge(tmp_path / "elsewhere", tmp_path / "elsewhere", dataset, 1.0)


class Planted(NamedTuple):
    """A fault of a layer that is none of the most sensitive ones, and the metrics that it comes first by."""

    variant: str
    node: str
    fault: str
    metrics: tuple[str, ...] = ("mse", "cosine", "sqnr", "sqnr@layer")


NECK = "/detector/neck/top_down_layers.0/blocks.0/conv1/conv/Conv"
ALL = tuple(metric for metric in METRICS if metric != "map")
PLANTED = (
    Planted("yolov8_embedded", "/detector/backbone/stage2/stage2.1/blocks.0/conv1/conv/Conv", "scale × 4"),
    Planted("yolov8_embedded", NECK, "scale × 16", (*Planted._field_defaults["metrics"], "kl")),
    Planted("yolov8_embedded", NECK, "clipped to 1/16", ALL),
    Planted("yolov8_embedded", "/detector/bbox_head/head_module/reg_preds.1/reg_preds.1.1/conv/Conv", "scale × 16"),
    Planted("yolov6_embedded", "/detector/neck/bottom_up_layers.1/block/block.0/rbr_reparam/Conv", "per-tensor"),
)


def faulty(quantized: Quantized, node: str, fault: str) -> Quantized:
    """The variant with one fault in what a node reads in int8."""
    if fault == "per-tensor":  # one scale for all channels: that of the wildest
        initializer = next(q.initializer for q in quantized.placement.weights if q.node == node)
        scale = quantized.weight_scales[initializer]
        return replace(
            quantized, weight_scales=quantized.weight_scales | {initializer: np.full_like(scale, scale.max())}
        )
    tensor = next(q.tensor for q in quantized.placement.activations if (node, 0) in q.readers)
    factor = np.float32({"scale × 4": 4, "scale × 16": 16, "clipped to 1/16": 1 / 16}[fault])
    return replace(quantized, scales=quantized.scales | {tensor: quantized.scales[tensor] * factor})


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, tuple[Subject, Sensitivity]]:
    folder, found = tmp_path_factory.mktemp("clean"), {}
    for name in dict.fromkeys(planted.variant for planted in PLANTED):
        one = subject(name)
        found[name] = one, one.swept(folder / name, 4)
    return found


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: f"{planted.variant}-{planted.fault}")
def test_a_planted_fault_comes_first(clean, tmp_path, planted):
    one, before = clean[planted.variant]
    spoilt = Subject(one.variant, faulty(one.quantized, planted.node, planted.fault))
    found = spoilt.swept(tmp_path / "sweep", 4)
    assert planted.node not in {before.ranking(metric)[0] for metric in planted.metrics if not METRICS[metric].own}
    assert {found.ranking(metric)[0] for metric in planted.metrics} == {planted.node}
    # It is alone in its graph: no other layer's numbers move.
    pairs = zip(found.layers, before.layers, strict=True)
    assert [ours.node for ours, theirs in pairs if ours != theirs] == [planted.node]


def test_leaving_a_fault_out_wins_most(clean, tmp_path):
    one, _ = clean["yolov8_embedded"]
    spoilt = Subject(one.variant, faulty(one.quantized, NECK, "clipped to 1/16"))
    found = spoilt.swept(tmp_path / "sweep", 4, mode="leave-one-out")
    assert {found.ranking(metric)[0] for metric in ALL} == {NECK}
    left_out = next(layer.metrics for layer in found.layers if layer.node == NECK)
    assert left_out["agreement"] < found.baseline["agreement"]


def test_values_that_are_not_finite_are_one_line(head, tmp_path, monkeypatch):
    """None is ranked by them; scales that give some are refused before, so that here a metric has one."""
    monkeypatch.setattr("alignment.quantize.layer_job.kl_divergence", lambda reference, subject: math.nan)
    with pytest.raises(AlignError, match="in int8 the network gives values that are not finite: run `align layers`"):
        head.swept(tmp_path / "s", 1)


def test_a_class_score_does_not_see_a_box(clean):
    _, found = clean["yolov8_embedded"]
    boxes = [layer.metrics for layer in found.layers if "/reg_preds." in layer.node]
    assert {metrics["kl"] for metrics in boxes} == {0.0}
    assert all(metrics["mse"] > 0 for metrics in boxes)


def test_the_layers_that_were_made_hard_are_found(clean):
    """Six pairs of blocks of yolov6_embedded are rescaled: channels that the second of a pair reads differ 40-fold."""
    one, found = clean["yolov6_embedded"]
    arrays = {w.name: numpy_helper.to_array(w) for w in onnx.load(one.quantized.source).graph.initializer}
    hard = set()
    for quantizer in one.quantized.placement.weights:
        channels = np.abs(arrays[quantizer.initializer]).max(axis=(0, 2, 3))
        if channels.max() > 40 * channels.min():
            hard.add(quantizer.node)
    assert len(hard) == 6
    for metric in ("mse", "cosine", "sqnr", "mse@layer", "cosine@layer", "sqnr@layer"):
        assert set(found.ranking(metric)[:6]) == hard, metric


def test_the_command(tmp_path):
    pytest.importorskip("mmyolo")
    pytest.importorskip("matplotlib")
    path = variant_file(tmp_path, lambda fields: fields.update(dataset="synthetic", quantization=HEAD))
    asked = ("sensitivity", path, "--metric", "sqnr", "--part", "weights", "--images", 2, "--show", 3)
    asked = (*asked, "--out", tmp_path / "x.json", "--plot", tmp_path / "x.svg")
    result = align(*asked)
    assert result.exit_code == 0, result.output
    assert "--plain" not in result.stdout
    found = Sensitivity.load(tmp_path / "x.json")
    rows = [line for line in result.stdout.splitlines() if "/Conv" in line]
    assert [node in row for node, row in zip(found.ranking("sqnr"), rows, strict=False)] == [True] * 3
    assert "model.bbox_head.head_module" in rows[0]
    picture = (tmp_path / "x.svg").read_bytes()
    assert found.layers[0].module.encode() in picture
    assert align(*asked).exit_code == 0
    assert (tmp_path / "x.svg").read_bytes() == picture


def test_biases_that_were_corrected_are_told_of(tmp_path):
    pytest.importorskip("pytorch_quantization")
    recipe = {**HEAD, "bias_correction": True, "images": 2}
    path = variant_file(tmp_path, lambda fields: fields.update(dataset="synthetic", quantization=recipe))
    result = align("sensitivity", path, "--images", 1, "--out", tmp_path / "x.json")
    assert "take --plain, or --mode leave-one-out" in result.stdout
    # For that is no float network any more.
    assert Sensitivity.load(tmp_path / "x.json").baseline["sqnr"] < 100


BAD = {
    "metric": (["--metric", "psnr"], "no metric is named 'psnr': choose from map, agreement,"),
    "mode": (["--mode", "both"], "--mode both: no such choice: choose from quantize-one, leave-one-out"),
    "part": (["--part", "bias"], "--part bias: no such choice: choose from both, weights, activations"),
    "units": (["--units", "blocks"], "--units blocks: no such choice: choose from weights, all"),
    "policy": (["--policy", "none"], "policy 'none': "),
    "executors": (["--workers", "2", "--scheduler", "tcp://a:1"], "--workers 2: --scheduler tcp://a:1 has workers of"),
    "folder": (["--out", "/dev/null/x.json"], "--out /dev/null: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_line(name):
    arguments, line = BAD[name]
    result = align("sensitivity", "yolov8_embedded", *arguments)
    assert result.exit_code == 2
    assert one_line(result.stderr).startswith(f"align: {line}")


def test_a_variant_without_int8_nodes(tmp_path):
    pytest.importorskip("mmyolo")
    everything = {"keep_float": ["*"]}
    path = variant_file(tmp_path, lambda fields: fields.update(dataset="synthetic", quantization=everything))
    name = yaml.safe_load(path.read_text())["name"]
    result = align("sensitivity", path, "--images", 1)
    assert result.exit_code == 2
    assert one_line(result.stderr).startswith(f"align: {name}: none of its nodes reads int8: mend")


def test_a_scheduler_that_does_not_answer(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("alignment.executor.ANSWER", 1)
    with pytest.raises(AlignError, match=r"--scheduler tcp://127\.0\.0\.1:9: "), open_executor(1, "tcp://127.0.0.1:9"):
        pass
