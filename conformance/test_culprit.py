"""The search for culprits finds what was planted in a simulated backend, on real graphs, and nothing else."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from command_line import align
from onnx import ModelProto
from own_cache import values_in
from typer.testing import CliRunner

from alignment.commands.culprit import culprit
from alignment.data.samples import open_samples
from alignment.engine.capabilities import missing
from alignment.engine.culprit import find
from alignment.engine.delta import cut, search
from alignment.engine.gap import THRESHOLD, Comparison, Reference
from alignment.engine.qdq_backends import HALF_NOISE, Fault, Simulated, TensorRT
from alignment.errors import AlignError, BuildError
from alignment.quantize.pairs import QdqGraph
from alignment.quantize.recipe import quantize
from alignment.variant import load_variant
from benchmarks.culprit import app as benchmark

pytestmark = pytest.mark.culprit
BLOCKS, SMALL = 8, "yolov6_embedded"
#: Variant, kind of fault, seeds: 20 single faults.
SINGLE = [
    *((SMALL, "clip", seed) for seed in range(7)),
    *((SMALL, "scale", seed) for seed in range(7)),
    *((SMALL, "per-tensor", seed) for seed in range(4)),
    ("yolov8_embedded", "clip", 0),
    ("yolox_embedded", "scale", 0),
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Measurements of this run alone; exports and calibrations come from where they always do."""
    pytest.importorskip("mmyolo")
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignment.cache.value", values_in(folder))
        yield folder


@functools.cache
def reference(name: str) -> Reference:
    """The QDQ graph of an embedded variant, on two images."""
    variant = load_variant(name)
    images = np.stack([sample.tensor for sample in open_samples(variant, limit=2)])
    return Reference(QdqGraph(quantize(variant).model), images)


@functools.cache
def own(name: str) -> dict[str, float]:
    return dict(compare(name).own)


def compare(name: str, *faults: Fault, known: dict[str, float] | None = None) -> Comparison:
    return Comparison(reference(name).graph, reference(name), Simulated(faults, seed=1), own=known)


def planted(name: str, kind: str, seed: int, blocks: int = BLOCKS) -> Comparison:
    """One fault that shows, in the whole or in a block of it; those drawn before it that do not show are passed by."""
    graph = reference(name).graph
    units = graph.int8_nodes
    for unit in np.random.default_rng([seed, len(kind)]).permutation(units):
        weights = kind == "per-tensor"
        if not any(pair.node == unit and pair.stored == weights for pair in graph.pairs):
            continue
        comparison = compare(name, Fault(kind, str(unit)), known=own(name))
        block = next(block for block in cut(units, blocks) if unit in block)
        if comparison.bad(units) or comparison.bad(block):
            return comparison
    raise AssertionError(f"{name}: no {kind} shows")


def faults_of(comparison: Comparison) -> set[str]:
    return {fault.node for fault in comparison.candidate.faults}


@pytest.mark.parametrize(("name", "kind", "seed"), SINGLE, ids=str)
def test_one_planted_fault_is_found(name, kind, seed):
    comparison = planted(name, kind, seed)
    units = comparison.units
    found = search(comparison.bad, units, BLOCKS)
    assert set(found.removal) == faults_of(comparison)
    assert found.closed
    assert found.needed
    assert found.questions <= BLOCKS + 1 + 2 * math.ceil(math.log2(len(units) / BLOCKS)) + 2


@pytest.mark.parametrize("seeds", [(0, 1), (2, 3), (4, 5)], ids=str)
def test_two_planted_faults_are_found(seeds):
    faults = {fault for seed in seeds for fault in planted(SMALL, "clip", seed).candidate.faults}
    comparison = compare(SMALL, *faults, known=own(SMALL))
    found = search(comparison.bad, comparison.units, BLOCKS)
    assert set(found.removal) == faults_of(comparison)
    assert len(found.cores) == 2
    assert found.closed
    assert found.needed


@pytest.mark.parametrize("name", [SMALL, "yolov8_embedded", "yolox_embedded"])
def test_noise_is_no_gap(name):
    """Of a backend whose noise is twice that of float16, and without any."""
    for noise in (HALF_NOISE, 1e-6) if name == SMALL else (HALF_NOISE,):
        units = reference(name).graph.int8_nodes
        comparison = Comparison(reference(name).graph, reference(name), Simulated(noise=noise, seed=2))
        assert all(comparison.gap(part) < 1.5 for part in (units, units[:10], units[-10:], units[5:6]))
        found = search(comparison.bad, units)
        assert (found.removal, found.closed, found.questions) == ((), True, 1)


@dataclass(frozen=True)
class Together(Simulated):
    """Clips a node's range while all of `with_` read int8 too."""

    with_: tuple[str, ...] = ()

    def outputs(self, model: ModelProto, images: np.ndarray, marked: Sequence[str] = ()) -> dict[str, np.ndarray]:
        faults = self.faults if set(self.with_) <= set(QdqGraph(model).int8_nodes) else ()
        return Simulated(faults, self.noise, self.seed).outputs(model, images, marked)


def test_two_that_are_bad_only_together():
    """One of them is taken out, the one that costs less."""
    (fault,) = planted(SMALL, "clip", 1, blocks=1).candidate.faults
    units = reference(SMALL).graph.int8_nodes
    other = units[(units.index(fault.node) + 20) % len(units)]
    comparison = Comparison(reference(SMALL).graph, reference(SMALL), Together((fault,), seed=1, with_=(other,)))
    verdict = find(comparison, cost=lambda unit: float(unit == fault.node))
    assert [set(core) for core in verdict.found.cores] == [{fault.node, other}]
    assert verdict.found.removal == (other,)
    assert verdict.found.closed
    assert verdict.found.needed
    assert set(verdict.culprits[0].core) == {fault.node, other}


def test_evidence():
    comparison = planted(SMALL, "clip", 0, blocks=1)
    (node,) = faults_of(comparison)
    verdict = find(comparison, modules={node: "model.layer"})
    assert verdict.gap > comparison.threshold > verdict.mended
    (culprit,) = verdict.culprits
    assert (culprit.node, culprit.op, culprit.module, culprit.core) == (node, "Conv", "model.layer", (node,))
    assert culprit.gap > 10
    assert culprit.output in comparison.reference.outputs
    pairs = [pair for pair in comparison.subject.pairs if pair.node == node]
    values = {pair.tensor: comparison.subject.values(pair.scale) for pair in pairs}
    read, weights = (next(pair.tensor for pair in pairs if pair.stored == constant) for constant in (False, True))
    assert culprit.scales == {read: float(values[read])}
    assert culprit.weight_scales == (float(values[weights].min()), float(values[weights].max()))
    errors = {tensor.role: tensor for tensor in culprit.tensors}
    assert errors["reads"].tensor == read
    assert errors["reads"].error < 0.01 < 10 * errors["gives"].int8 < errors["gives"].error
    maker = next(n for n in comparison.subject.model.graph.node if errors["gives"].tensor in n.output)
    assert maker.op_type == "Relu"
    assert not any(tensor.fusion_changed for tensor in culprit.tensors)


class Fusing(Simulated):
    """Fuses less where a tensor is an output, and cannot have `hidden` as an output."""

    hidden = ""

    def outputs(self, model: ModelProto, images: np.ndarray, marked: Sequence[str] = ()) -> dict[str, np.ndarray]:
        if self.hidden in marked:
            raise AlignError("no such tensor")
        return super().outputs(model, images, marked)

    def layers(self, model: ModelProto, marked: Sequence[str] = ()) -> list[str]:
        return ["all but one", "one"] if marked else ["all"]


def test_a_tensor_that_cannot_be_looked_at_as_it_is():
    graph = reference(SMALL).graph
    (fault,) = planted(SMALL, "clip", 0, blocks=1).candidate.faults
    Fusing.hidden = next(pair.tensor for pair in graph.pairs if pair.node == fault.node and not pair.stored)
    comparison = Comparison(graph, reference(SMALL), Fusing((fault,), seed=1), own=own(SMALL))
    found = find(comparison).culprits[0].tensors
    assert [tensor.role for tensor in found] == ["gives"]
    assert found[0].fusion_changed


class Interrupted(Simulated):
    """Is killed after some sets."""

    left = 7

    def outputs(self, model: ModelProto, images: np.ndarray, marked: Sequence[str] = ()) -> dict[str, np.ndarray]:
        if not Interrupted.left:
            raise KeyboardInterrupt
        Interrupted.left -= 1
        return super().outputs(model, images, marked)


def test_a_killed_search_goes_on(monkeypatch, tmp_path):
    faults = planted(SMALL, "clip", 2, blocks=1).candidate.faults
    monkeypatch.setattr("alignment.cache.value", values_in(tmp_path))

    def comparison() -> Comparison:
        return Comparison(reference(SMALL).graph, reference(SMALL), Interrupted(faults, seed=3))

    first = comparison()
    with pytest.raises(KeyboardInterrupt):
        search(first.bad, first.units)
    assert first.builds == 8  # the last was begun
    assert len(first.measured) == len(list(tmp_path.glob("entries/gap/*/value.json"))) == 7
    Interrupted.left = 1000
    again = comparison()
    found = search(again.bad, again.units)
    assert found.removal == tuple(fault.node for fault in faults)
    assert again.builds == found.questions + 1 - 7  # and the empty set
    third = comparison()
    assert search(third.bad, third.units) == found
    assert third.builds == 0
    # Another fault, image, or graph is another search.
    other = Comparison(again.subject, again.reference, Simulated(seed=3))
    other.measure(())
    assert other.builds == 1


class Broken(Simulated):
    """Gives no numbers where a node reads int8, or always."""

    node = ""

    def outputs(self, model: ModelProto, images: np.ndarray, marked: Sequence[str] = ()) -> dict[str, np.ndarray]:
        found = super().outputs(model, images, marked)
        if not self.node or self.node in QdqGraph(model).int8_nodes:
            found = {name: np.full_like(array, np.nan) for name, array in found.items()}
        return found


def test_values_that_are_not_finite():
    graph = reference(SMALL).graph
    candidate = Broken(seed=4)
    comparison = Comparison(graph, reference(SMALL), candidate)
    with pytest.raises(AlignError, match="not finite without any int8: mend that first"):
        comparison.gap(comparison.units)
    Broken.node = graph.int8_nodes[17]
    found = Comparison(graph, reference(SMALL), Broken(seed=5))
    assert found.gap(found.units) == math.inf
    assert search(found.bad, found.units).removal == (Broken.node,)
    assert Comparison(graph, reference(SMALL), Broken(seed=5)).gap(found.units) == math.inf  # as it was kept


class Unbuildable(Simulated):
    """No engine comes where all of these nodes read int8."""

    nodes: frozenset[str] = frozenset()

    def outputs(self, model: ModelProto, images: np.ndarray, marked: Sequence[str] = ()) -> dict[str, np.ndarray]:
        if self.nodes <= set(QdqGraph(model).int8_nodes):
            raise BuildError("yolo.onnx: TensorRT 8.6.1 cannot build it: outScales", "look that node up")
        return super().outputs(model, images, marked)


@pytest.mark.parametrize("together", [1, 2])
def test_no_engine_at_all(together, monkeypatch):
    graph = reference(SMALL).graph
    nodes = graph.int8_nodes[15:27:11][:together]
    monkeypatch.setattr(Unbuildable, "nodes", frozenset(nodes))
    comparison = Comparison(graph, reference(SMALL), Unbuildable(seed=6 + together))
    verdict = find(comparison)
    assert verdict.gap == math.inf
    assert verdict.mended < THRESHOLD
    assert verdict.found.closed
    assert verdict.found.needed
    (culprit,) = verdict.culprits
    assert set(culprit.core) == set(nodes)
    assert culprit.failure == "yolo.onnx: TensorRT 8.6.1 cannot build it: outScales: look that node up"
    assert Comparison(graph, reference(SMALL), Unbuildable(seed=6 + together)).measure(nodes).failure == culprit.failure


def test_a_part_of_which_no_engine_comes_hides_no_fault(monkeypatch):
    comparison = planted(SMALL, "scale", 3)
    (fault,) = faults_of(comparison)
    # Alone, a neighbour is not to be built; with all the others it is.
    neighbour = next(unit for unit in comparison.units if unit != fault)

    class Alone(Simulated):
        def outputs(self, model, images, marked=()):
            units = QdqGraph(model).int8_nodes
            if neighbour in units and len(units) < 4:
                raise BuildError("no engine")
            return super().outputs(model, images, marked)

    candidate = Alone(comparison.candidate.faults, seed=comparison.candidate.seed)
    verdict = find(Comparison(comparison.subject, comparison.reference, candidate), BLOCKS)
    assert verdict.found.removal == (fault,)
    assert verdict.found.closed


def test_no_engine_without_any_int8():
    class Never(Simulated):
        def outputs(self, model, images, marked=()):
            raise BuildError("no engine", "look it up")

    comparison = Comparison(reference(SMALL).graph, reference(SMALL), Never(seed=9))
    with pytest.raises(BuildError, match="no engine: look it up"):
        comparison.gap(comparison.units)


def test_graphs_that_do_not_fit():
    graph = reference(SMALL).graph
    less = QdqGraph(graph.without(graph.int8_nodes[:1]))
    with pytest.raises(AlignError, match=f"node {graph.int8_nodes[0]} reads int8 in one of the two graphs only"):
        Comparison(less, reference(SMALL), Simulated())
    with pytest.raises(AlignError, match="no Q/DQ pairs"):
        Comparison(QdqGraph(graph.only(())), reference(SMALL), Simulated())


@pytest.fixture(scope="module")
def bad_file(tmp_path_factory):
    """A QDQ file in which one layer's scale was multiplied by 4, the clean one, and the node."""
    folder = tmp_path_factory.mktemp("files")
    graph = reference(SMALL).graph
    (fault,) = planted(SMALL, "scale", 0).candidate.faults
    onnx.save(graph.model, folder / "clean.onnx")
    onnx.save(fault.planted(graph), folder / "bad.onnx")
    return folder / "bad.onnx", folder / "clean.onnx", fault.node


def test_a_bad_file_and_the_clean_one(bad_file, tmp_path):
    bad, clean, node = bad_file
    command = ["culprit", SMALL, "--qdq", bad, "--reference", clean, "--backend", "simulated", "--images", 2]
    result = align(*command, "--blocks", BLOCKS, "--out", tmp_path)
    assert result.exit_code == 1, result.output
    assert f"culprit: {node} (Conv, model." in result.output
    assert "without them: gap " in result.output
    repaired = onnx.load(tmp_path / f"{SMALL}.repaired.onnx")
    assert repaired == QdqGraph(onnx.load(bad)).without([node])
    report = json.loads((tmp_path / "culprit.json").read_text())
    assert [culprit["node"] for culprit in report["verdict"]["culprits"]] == [node]
    assert report["verdict"]["found"]["removal"] == [node]
    assert report["deployed"] is None
    assert [pattern["pattern"] for pattern in report["patterns"]] == ["one tensor, two scales", "ConvTranspose in int8"]
    assert len(report["measured"]) == report["verdict"]["found"]["questions"] + 2  # nothing in int8, and all
    # With the same file on both sides there is no gap: the backend does what the file says.
    result = align("culprit", SMALL, "--qdq", bad, "--backend", "simulated", "--images", 2)
    assert result.exit_code == 0, result.output
    assert "no gap; --blocks 8 looks closer" in result.output


REFUSED = {
    "not KIND:NODE": ["--backend", "simulated", "--fault", "scale"],
    "TensorRT has faults of its own": ["--fault", "scale:a"],
    "--fault clip:absent: no node of this name reads int8": ["--backend", "simulated", "--fault", "clip:absent"],
    "no such file": ["--backend", "simulated", "--qdq", "absent.onnx"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_usage(message):
    result = align("culprit", SMALL, *REFUSED[message])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_the_command_has_the_same_threshold():
    assert inspect.signature(culprit).parameters["threshold"].default == THRESHOLD


def test_the_benchmark(tmp_path):
    result = CliRunner().invoke(
        benchmark, ["plant", SMALL, "--seeds", "1", "--backend", "simulated", "--images", "2", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    fields = json.loads(path.read_text())
    assert fields["exact"]
    assert fields["found"] == [fields["planted"]]
    assert fields["healthy_gap"] < THRESHOLD < fields["gap_alone"]
    assert f"| {fields['planted']} | yes |" in CliRunner().invoke(benchmark, ["table", str(tmp_path)]).output


@pytest.mark.gpu
def test_a_bad_file_on_an_engine(bad_file):
    if reason := missing():
        pytest.skip(reason)
    bad, _, node = bad_file
    comparison = Comparison(QdqGraph(onnx.load(bad)), reference(SMALL), TensorRT(load_variant(SMALL)))
    verdict = find(comparison, BLOCKS)
    assert verdict.found.removal == (node,)
    assert verdict.found.closed
    assert verdict.found.questions <= BLOCKS + 1 + 2 * math.ceil(math.log2(len(comparison.units) / BLOCKS)) + 2
