"""Partial quantization: the search against set functions with a known best set, then on an embedded detector."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import yaml
from command_line import align, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from own_cache import values_in

from alignment.engine.capabilities import Capabilities
from alignment.errors import AlignError, BuildError
from alignment.export.onnx_export import file_digest
from alignment.quantize.candidates import Candidates
from alignment.quantize.keep_float import adopted, read_keep_float, write_keep_float
from alignment.quantize.partial import Goal, Point, budget, partial
from alignment.quantize.partial_result import PartialResult, frontier
from alignment.quantize.ranking import rank_correlations, spearman
from alignment.quantize.scoring import Score, Scorer
from alignment.quantize.search import Kept, Search, worth
from alignment.quantize.sensitivity import LayerSensitivity, Sensitivity
from alignment.variant import Quantization, load_variant, with_quantization

pytestmark = pytest.mark.sensitivity
NAMES = "abcdefgh"
MACS = {node: 10 * (place + 1) for place, node in enumerate(NAMES)}


class Objective:
    """A set function as scores, and all sets that it was asked for."""

    def __init__(self, value) -> None:
        self.value, self.asked = value, []

    def __call__(self, kept: Kept) -> Score:
        self.asked.append(kept)
        return Score(0.5, self.value(kept))


def additive(gains: dict[str, float]) -> Objective:
    return Objective(lambda kept: 0.5 + sum(gains[node] for node in kept))


def arbitrary(seed: int) -> Objective:
    """Any interaction at all: every set has a value of its own."""
    return Objective(lambda kept: random.Random(f"{seed} {sorted(kept)}").random())


class TestCount:
    def test_two_layers_that_mend_the_same_thing(self):
        """a and b win most, each alone; together they win no more than one of them."""
        search = Search(
            {"m": "abcd"}, Objective(lambda k: 0.5 + 0.3 * bool(k & {"a", "b"}) + 0.1 * ("c" in k)), swaps=0
        )
        found = search.by_count(2)
        assert found.ways["top-2 by m"] == {"a", "b"}
        assert found.chosen == found.ways["greedy"] == {"a", "c"}
        assert search.scores[found.chosen].agreement > search.scores[found.ways["top-2 by m"]].agreement

    def test_two_layers_that_only_together_mend_anything(self):
        """a wins most alone, so greedy and the ranking take it; b and c together win more."""
        value = {"a": 0.3, "b": 0.2, "c": 0.1, "ab": 0.35, "ac": 0.31, "bc": 0.9}
        objective = Objective(lambda kept: value.get("".join(sorted(kept)), 0.0))
        assert Search({"m": "abc"}, objective, swaps=0).by_count(2).chosen == {"a", "b"}
        found = Search({"m": "abc"}, objective).by_count(2)
        assert found.ways["exchanged"] == found.chosen == {"b", "c"}

    def test_ranking_that_is_best(self):
        """Every pair but the first two spoils all: greedy goes for c, and the ranking is taken."""
        value = {"c": 0.6, "a": 0.1, "b": 0.1, "ab": 0.9}
        found = Search({"m": "abc"}, Objective(lambda kept: value.get("".join(sorted(kept)), 0.0)), swaps=0).by_count(2)
        assert "c" in found.ways["greedy"]
        assert found.chosen == {"a", "b"}

    def test_of_equals_the_better_ranked(self):
        assert Search({"m": "dbca"}, Objective(lambda kept: 0.5)).by_count(2).chosen == {"d", "b"}

    def test_ap_decides_between_sets_that_agree_alike(self):
        search = Search({"m": "abc"}, lambda kept: Score(0.6 if "c" in kept else 0.5, 0.9))
        assert search.by_count(1).chosen == {"c"}

    def test_another_ranking_that_is_better(self):
        """Only c and d together mend anything, which greedy cannot see; one of two metrics ranks them first."""
        objective = Objective(lambda kept: 0.9 if kept >= {"c", "d"} else 0.1 * len(kept & {"a", "b"}))
        assert Search({"m": "abcd"}, objective, swaps=0).by_count(2).chosen == {"a", "b"}
        found = Search({"m": "abcd", "n": "dcba"}, objective, swaps=0).by_count(2)
        assert found.chosen == found.ways["top-2 by n"] == {"c", "d"}

    @given(gains=st.lists(st.floats(0, 0.05), min_size=1, max_size=7), data=st.data())
    def test_best_where_gains_add_up(self, gains, data):
        """Whatever the ranking says, if all nodes are tried."""
        known = dict(zip(NAMES, gains, strict=False))
        count = data.draw(st.integers(1, len(known)))
        search = Search({"m": data.draw(st.permutations(sorted(known)))}, additive(known), tries=len(known))
        best = max(sum(known[node] for node in kept) for kept in itertools.combinations(known, count))
        assert search.scores[search.by_count(count).chosen].agreement == pytest.approx(0.5 + best)

    @given(
        seed=st.integers(0, 10**6),
        size=st.integers(1, 8),
        tries=st.integers(1, 8),
        swaps=st.integers(0, 3),
        data=st.data(),
    )
    def test_any_interaction(self, seed, size, tries, swaps, data):
        count, objective = data.draw(st.integers(1, size)), arbitrary(seed)
        search = Search({"m": NAMES[:size]}, objective, tries, swaps)
        found = search.by_count(count)
        search.needed(found.chosen)
        assert all(len(kept) == count for kept in (found.chosen, *found.ways.values()))
        scores = {name: worth(search.scores[kept]) for name, kept in found.ways.items()}
        assert worth(search.scores[found.chosen]) == max(scores.values())
        assert scores["exchanged"] >= max(scores["greedy"], scores[f"top-{count} by m"])
        assert found.ways[f"top-{count} by m"] == set(NAMES[:count])
        assert len(objective.asked) == len(set(objective.asked)) == len(search.scores) <= search.most
        again = Search({"m": NAMES[:size]}, arbitrary(seed), tries, swaps).by_count(count)
        assert again == found


class TestScore:
    def test_small_ones_suffice(self):
        """The first of the ranking wins most, but the two behind it win as much with less work in float."""
        gains, macs = {"a": 0.2, "b": 0.11, "c": 0.1}, {"a": 100, "b": 10, "c": 10}
        search = Search({"m": "abc"}, additive(gains))
        found = search.by_score(lambda score: score.agreement >= 0.7, macs)
        assert found.ways == {"ranked by m": {"a"}, "greedy": {"b", "c"}}
        assert found.reached
        assert found.chosen == {"b", "c"}

    def test_stops_when_it_is_reached(self):
        objective = additive({"a": 0.3, "b": 0.2, "c": 0.1})
        found = Search({"m": "abc"}, objective).by_score(lambda score: score.agreement >= 0.8, MACS)
        assert found.chosen == {"a"}
        assert max(map(len, objective.asked)) == 1
        objective = additive({"a": 0.3})
        assert Search({"m": "a"}, objective).by_score(lambda score: True, MACS).chosen == frozenset()
        assert objective.asked == [frozenset()]

    def test_not_needed_any_more(self):
        """a helps at first; with b and c it is not needed."""
        gains = {"": 0, "a": 0.3, "ab": 0.4, "abc": 0.6, "bc": 0.6}
        search = Search({"m": "abc"}, Objective(lambda kept: gains.get("".join(sorted(kept)), 0.1)), tries=1)
        found = search.by_score(lambda score: score.agreement >= 0.5, MACS)
        assert found.chosen == {"b", "c"}

    def test_cannot_be_reached(self):
        search = Search({"m": "abc"}, additive({"a": 0.1, "b": -0.2, "c": 0.2}))
        found = search.by_score(lambda score: score.agreement > 0.9, MACS)
        assert not found.reached
        assert found.chosen == {"a", "c"}

    @given(seed=st.integers(0, 10**6), size=st.integers(1, 8), tries=st.integers(1, 8), limit=st.floats(0, 1))
    def test_any_interaction(self, seed, size, tries, limit):
        objective = arbitrary(seed)
        search = Search({"m": NAMES[:size]}, objective, tries)
        found = search.by_score(lambda score: score.agreement >= limit, MACS)
        agreement = search.scores[found.chosen].agreement
        assert found.reached == (agreement >= limit)
        if not found.reached:
            assert agreement == max(score.agreement for score in search.scores.values())
        for kept, score in search.scores.items():
            assert score.agreement < limit or self.cost(found.chosen) <= self.cost(kept)
        assert all(search.scores[kept].agreement >= limit for kept in found.ways.values())
        search.needed(found.chosen)
        assert len(objective.asked) == len(set(objective.asked)) <= search.most
        assert (
            Search({"m": NAMES[:size]}, arbitrary(seed), tries).by_score(lambda s: s.agreement >= limit, MACS) == found
        )

    def cost(self, kept: Kept) -> int:
        return sum(MACS[node] for node in kept)


class TestLatency:
    def test_most_accurate_that_is_fast_enough(self):
        """a wins most and is too slow; b and c are both within the limit, with d they are not."""
        slow = {"a": 5, "b": 1, "c": 1, "d": 2}
        timed = []

        def latency(kept: Kept) -> float:
            timed.append(kept)
            return 1 + sum(slow[node] for node in kept)

        search = Search({"m": "abcd"}, additive({"a": 0.2, "b": 0.1, "c": 0.05, "d": 0.01}))
        found = search.by_latency(latency, 3)
        assert found.reached
        assert found.chosen == {"b", "c"}
        assert len(timed) == len(set(timed)) == len(search.latencies)
        assert len(search.scores) <= search.most

    def test_nothing_that_loses(self):
        search = Search({"m": "ab"}, additive({"a": -0.1, "b": 0.0}))
        assert search.by_latency(lambda kept: 0, 1).chosen == frozenset()

    def test_int8_itself_is_too_slow(self):
        assert not Search({"m": "ab"}, additive({"a": 0.1, "b": 0.1})).by_latency(lambda kept: 2, 1).reached

    def test_a_set_of_which_no_engine_comes(self):
        """Neither of int8 itself nor of any set without b."""
        gains = additive({"a": 0.2, "b": 0.1, "c": 0.0})
        found = Search({"m": "abc"}, gains).by_latency(lambda kept: 1 if "b" in kept else math.inf, 1)
        assert found.reached
        assert found.chosen == {"a", "b"}
        assert not Search({"m": "abc"}, gains).by_latency(lambda kept: math.inf, 1).reached


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_frontier(pairs):
    points = [Point([], share / 6, 0.5, lost / 100, 0.9) for share, lost in pairs]
    front = frontier(points, lambda p: -p.int8_macs, lambda p: p.ap_lost)

    def better(a: Point, b: Point) -> bool:
        return a.int8_macs >= b.int8_macs and a.ap_lost <= b.ap_lost and a != b

    assert {(p.int8_macs, p.ap_lost) for p in front} == {
        (p.int8_macs, p.ap_lost) for p in points if not any(better(q, p) for q in points)
    }
    assert [p.int8_macs for p in front] == sorted({p.int8_macs for p in front}, reverse=True)


def test_budget():
    assert budget("AP=0.3") == Goal("AP", 0.3)
    assert budget("agreement=0.95") == Goal("agreement", 0.95)
    # Points are hundredths: at 0.3 of them, 0.003 of AP may be lost, and more agreement does not help.
    assert Goal("AP", 0.3).accepts(Score(0.4975, 0.5), Score(0.5, 1))
    assert not Goal("AP", 0.3).accepts(Score(0.4965, 1), Score(0.5, 1))
    for text in ("AP", "AP=", "AP=x", "AP=-1", "AP=nan", "mAP=1", "agreement=2", "0.3"):
        with pytest.raises(AlignError, match=r"--budget .*AP=0\.3"):
            budget(text)


class TestRankCorrelation:
    @settings(deadline=None)  # scipy is imported
    @given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-1, 1)), min_size=2, max_size=20))
    def test_spearman_is_scipys(self, pairs):
        stats = pytest.importorskip("scipy.stats")
        a, b = zip(*pairs, strict=True)
        expected = float("nan") if len(set(a)) == 1 or len(set(b)) == 1 else stats.spearmanr(a, b).statistic
        assert spearman(a, b) == pytest.approx(expected, abs=1e-12, nan_ok=True)

    def test_of_metrics(self):
        """One metric ranks as AP does, one the other way round, and one falls where the error grows."""
        cost = [0.1, 0.0, 0.3, 0.2]
        metrics = {"map": cost, "mse": [1, 0.5, 9, 3], "kl": [1, 2, 0, 0.5], "sqnr": [30, 40, 10, 20]}
        found = rank_correlations(sweep(*({k: v[i] for k, v in metrics.items()} for i in range(4))), "abcd")
        assert {metric: values["map"] for metric, values in found.items()} == {"map": 1, "mse": 1, "kl": -1, "sqnr": 1}
        assert rank_correlations(sweep({"mse": 1.0}, {"mse": 2.0}), "ab") == {"mse": {}}

    def test_of_layers_left_out(self):
        """What is left when one layer is in float is least where that layer is the most sensitive."""
        layers = [{"map": 0.1, "mse": 1.0, "mse@layer": 5.0}, {"map": 0.3, "mse": 2.0, "mse@layer": 1.0}]
        left = sweep(*layers).model_copy(update={"mode": "leave-one-out"})
        assert rank_correlations(left, "ab") == {"map": {"map": 1}, "mse": {"map": 1}, "mse@layer": {"map": 1}}


def sweep(*metrics: dict[str, float], **changes) -> Sensitivity:
    layers = [LayerSensitivity(node=n, module="", macs=1, metrics=m) for n, m in zip(NAMES, metrics, strict=False)]
    fields = {"variant": "v", "mode": "quantize-one", "part": "both", "identity": {}, "images": 1, "baseline": {}}
    return Sensitivity(**{**fields, "layers": tuple(layers), **changes})


class TestFile:
    @pytest.fixture
    def graph(self, tmp_path):
        nodes = [onnx.helper.make_node("Relu", ["x"], ["y"], name=name) for name in ("a[0]", "b*", "c: d", "é")]
        path = tmp_path / "graph.onnx"
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [])), path)
        return path

    def test_round_trip(self, graph, tmp_path):
        path = tmp_path / "keep_float.yaml"
        write_keep_float(path, "v", graph, {"b*": "why: so", "a[0]": "", "é": "x" * 300, "c: d": "#"})
        assert read_keep_float(path, graph).names == ["b*", "a[0]", "é", "c: d"]
        assert read_keep_float(path, graph).said == {}
        fields = yaml.safe_load(path.read_text())
        assert fields["graph_sha256"] == file_digest(graph)
        assert fields["nodes"][0] == {"node": "b*", "reason": "why: so"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "No such file"),
            ("[", "not YAML"),
            ("", "file: Input should be"),
            ("{graph_sha256: DIGEST, variant: v}", "nodes: Field required"),
            ("{graph_sha256: DIGEST, variant: v, nodes: [a]}", r"nodes\.0: "),
            ("{graph_sha256: DIGEST, variant: v, nodes: [{node: x, reason: y}]}", "no node of the graph is named 'x'"),
            ("{graph_sha256: beef, variant: v8, nodes: []}", "made for v8's graph beef, but"),
            (
                "{graph_sha256: DIGEST, variant: v, recipe: {policy: all}, nodes: []}",
                r"recipe\.policy: Input should be",
            ),
        ],
    )
    def test_refused(self, graph, tmp_path, text, message):
        path = tmp_path / "keep.yaml"
        if text is not None:
            path.write_text(text.replace("DIGEST", file_digest(graph)))
        with pytest.raises(AlignError, match=rf"keep\.yaml: {message}") as refused:
            read_keep_float(path, graph)
        assert "\n" not in str(refused.value)


class TestRecipeOfAFile:
    OWN = Quantization(images=8)

    def file(self, graph, path, **fields) -> dict:
        recipe = Quantization(**{"images": 8, "keep_float": ["not part of it"], **fields})
        write_keep_float(path, "v", graph, {}, recipe)
        return {path: read_keep_float(path, graph)}

    @pytest.fixture
    def graph(self, tmp_path):
        path = tmp_path / "graph.onnx"
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), path)
        return path

    def test_the_same_is_nothing_to_tell(self, graph, tmp_path):
        changes, lines = adopted(self.OWN, self.file(graph, tmp_path / "k.yaml"), {})
        assert self.OWN.model_copy(update=changes) == self.OWN
        assert lines == []

    def test_another_is_taken(self, graph, tmp_path):
        file = self.file(graph, tmp_path / "k.yaml", policy="full", bias_correction=True)
        changes, lines = adopted(self.OWN, file, {})
        assert self.OWN.model_copy(update=changes) == Quantization(images=8, policy="full", bias_correction=True)
        (line,) = lines
        assert line.endswith(
            "k.yaml: its recipe is taken: policy full, bias_correction True (the variant's own: policy tensorrt, "
            "bias_correction False)"
        )

    def test_what_is_asked_for_goes_first(self, graph, tmp_path):
        file = self.file(graph, tmp_path / "k.yaml", policy="full")
        changes, lines = adopted(self.OWN, file, {"policy": "conv-only"})
        assert changes["policy"] == "conv-only"
        assert [line.partition("k.yaml: ")[2] for line in lines] == [
            "found with policy full, but asked for is policy conv-only"
        ]
        assert adopted(self.OWN, file, {"policy": "full"})[1] == []

    def test_files_that_differ(self, graph, tmp_path):
        files = self.file(graph, tmp_path / "a.yaml", policy="full") | self.file(graph, tmp_path / "b.yaml")
        with pytest.raises(
            AlignError, match=r"a\.yaml and \S+b\.yaml: found with policy full and tensorrt: give files"
        ):
            adopted(self.OWN, files, {})
        assert adopted(self.OWN, files, {"policy": "full"})[0]["policy"] == "full"

    def test_fields_that_a_hand_left_out_are_the_variants(self, graph, tmp_path):
        path = tmp_path / "k.yaml"
        text = f"{{graph_sha256: {file_digest(graph)}, variant: v, recipe: {{method: minmax}}, nodes: []}}"
        path.write_text(text)
        assert adopted(self.OWN, {path: read_keep_float(path, graph)}, {})[0] == {"method": "minmax"}


@pytest.fixture(scope="module")
def yolov8() -> SimpleNamespace:
    """The embedded YOLOv8 with one stage kept in float by its recipe, and a ranking of the rest by size."""
    pytest.importorskip("mmyolo")
    pytest.importorskip("onnxruntime")
    variant = with_quantization(
        load_variant("yolov8_embedded"), {"images": 4, "keep_float": ["/detector/backbone/stage1/*"]}
    )
    candidates = Candidates(variant)
    layers = [
        LayerSensitivity(node=node, module="", macs=macs, metrics={"agreement": 1 / macs, "mse": float(macs)})
        for node in candidates.nodes
        for macs in [candidates.macs[node]]
    ]
    identity = {"reference_sha256": file_digest(candidates.source)}
    return SimpleNamespace(
        variant=variant, candidates=candidates, ranking=sweep(layers=tuple(layers), identity=identity)
    )


@pytest.fixture
def own_scores(monkeypatch, tmp_path):
    """No scores but those of this test."""
    monkeypatch.setattr("alignment.cache.value", values_in(tmp_path / "cache"))


class TestScorer:
    def test_float_network(self, yolov8, own_scores):
        scorer = Scorer(yolov8.variant, images=6)
        assert scorer.float_score == scorer.judge(scorer.reference) == scorer.score(onnx.load(scorer.source))
        assert scorer.float_score.agreement == 1
        assert scorer.float_score.ap > 0.5
        kept = Candidates.quantized(yolov8.candidates, yolov8.candidates.nodes)
        assert scorer.score(kept.model) == scorer.float_score

    def test_kept_by_content(self, yolov8, own_scores):
        model = yolov8.candidates.quantized(()).model
        first = Scorer(yolov8.variant, images=3)
        score = first.score(model)
        assert first.runs == 2
        assert first.score(model) == score
        assert first.runs == 2
        again = Scorer(yolov8.variant, images=3)
        assert again.score(model) == score
        assert again.runs == 0
        more = Scorer(yolov8.variant, images=4)
        more.score(model)
        assert more.runs == 2

    def test_a_planted_fault(self, yolov8, own_scores):
        """One scale four times too small is another graph, of another score."""
        scorer, model = Scorer(yolov8.variant, images=4), yolov8.candidates.quantized(()).model
        healthy = scorer.score(model)
        scale = next(value for value in model.graph.initializer if value.name.endswith("_scale") and not value.dims)
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(16), scale.name))
        assert scorer.score(model).agreement < healthy.agreement - 0.05


class TestCandidates:
    def test_shares(self, yolov8):
        """Shares add up, and what the recipe leaves in float by itself counts as float."""
        candidates = yolov8.candidates
        everything = with_quantization(yolov8.variant, {"policy": "conv-only", "keep_float": []})
        assert Candidates(everything).int8_share() == 1
        assert candidates.int8_share(candidates.nodes) == 0
        assert 0 < candidates.int8_share() < 1
        parts = [candidates.int8_share(set(candidates.nodes) - {node}) for node in candidates.nodes]
        assert sum(parts) == pytest.approx(candidates.int8_share())

    def test_identity(self, yolov8, monkeypatch):
        """Of one graph the same, and of every other another; nothing is calibrated for it."""
        pytest.importorskip("torch")
        monkeypatch.setattr("alignment.quantize.recipe.calibrate", None)
        changes = ({}, {"method": "minmax"}, {"images": 3}, {"rounding": "adaround"}, {"bias_correction": True})
        variants = [with_quantization(yolov8.variant, change) for change in changes]
        seen = [Candidates(v).identity(kept) for v in variants for kept in ((), yolov8.candidates.nodes[:1])]
        assert len({json.dumps(identity, sort_keys=True) for identity in seen}) == len(seen) == 10
        assert Candidates(yolov8.variant).identity(()) == seen[0]

    def test_what_moves_values_follows(self, yolov8):
        """With all readers of a Concat in float, neither it nor what feeds it is quantized any more."""
        candidates = yolov8.candidates
        whole, none = candidates.quantized(()).placement, candidates.quantized(candidates.nodes).placement
        assert {q.rule for q in whole.activations} >= {"weighted", "concat"}
        assert none.activations == none.weights == ()
        node = candidates.nodes[0]
        assert {q.node for q in candidates.quantized({node}).placement.weights} == {*candidates.nodes} - {node}


class TestPartial:
    def test_killed_and_run_again(self, yolov8, own_scores, monkeypatch):
        """Each set is run once in all, whenever the search was killed."""

        def search(scorer: Scorer) -> dict:
            return partial(yolov8.candidates, scorer, yolov8.ranking, Goal("layers", 2), tries=2, swaps=1).report()

        killed, detect = Scorer(yolov8.variant, images=2), Scorer.detect

        def dies(self: Scorer, path):
            if self is killed and self.runs == 4:
                raise KeyboardInterrupt
            return detect(self, path)

        monkeypatch.setattr(Scorer, "detect", dies)
        with pytest.raises(KeyboardInterrupt):
            search(killed)
        second, third = Scorer(yolov8.variant, images=2), Scorer(yolov8.variant, images=2)
        found = search(second)
        assert search(third) == found
        assert third.runs == 0
        # One run of each is the float network, which detections of others are held to.
        assert (killed.runs - 1) + (second.runs - 1) == len(found["points"])

    def test_sets_that_are_known_are_not_quantized_again(self, yolov8, own_scores, monkeypatch):
        """Where weights are searched for, that would be a reconstruction a set."""

        def search() -> dict:
            scorer = Scorer(yolov8.variant, images=2)
            return partial(Candidates(yolov8.variant), scorer, yolov8.ranking, Goal("layers", 1), tries=2).report()

        found, quantized = search(), []
        monkeypatch.setattr(Candidates, "quantized", lambda self, kept: quantized.append(kept))
        assert search() == found
        assert quantized == []

    def test_latency(self, yolov8):
        scorer, nodes = Scorer(yolov8.variant, images=2), []

        def latency(kept: Kept) -> float:
            nodes.append(kept)
            return 1.0 + len(kept)

        found = partial(yolov8.candidates, scorer, yolov8.ranking, Goal("latency", 2), tries=2, latency=latency)
        assert found.found.reached
        assert len(found.found.chosen) <= 1
        timed = [point for point in found.points if point.latency_ms is not None]
        assert [point.latency_ms for point in timed] == [1.0 + len(point.kept) for point in timed]
        assert len(timed) == len(nodes)

    def test_no_truth(self, yolov8, monkeypatch):
        scorer = Scorer(yolov8.variant, images=2)
        monkeypatch.setattr(scorer, "float_score", Score(-1, 1))
        with pytest.raises(AlignError, match="no truth to lose AP on: give agreement"):
            partial(yolov8.candidates, scorer, yolov8.ranking, Goal("AP", 0.3))

    def test_ranking_of_another_graph(self, yolov8):
        other = yolov8.ranking.model_copy(update={"identity": {"reference_sha256": "beef"}})
        with pytest.raises(AlignError, match=r"graph beef, this one is .*align sensitivity"):
            partial(yolov8.candidates, Scorer(yolov8.variant, images=2), other, Goal("layers", 1))

    def test_a_hard_detector(self):
        """A few layers of 58 bring YOLOv6, all in int8, back to within 0.4 points of AP, ranked on six images."""
        pytest.importorskip("mmyolo")
        variant = with_quantization(load_variant("yolov6_embedded"), {"policy": "full"})
        candidates, few, scorer = Candidates(variant), Scorer(variant, images=6), Scorer(variant)
        whole = candidates.quantized(())
        alone = {node: few.score(whole.only({node})).agreement for node in candidates.nodes}
        layers = [
            LayerSensitivity(node=node, module="", macs=0, metrics={"agreement": 1 - agreement})
            for node, agreement in alone.items()
        ]
        ranking = sweep(layers=tuple(layers), identity={"reference_sha256": file_digest(candidates.source)})
        assert scorer.float_score.ap - scorer.score(whole.model).ap > 0.02
        found = partial(candidates, scorer, ranking, Goal("AP", 0.4), tries=1)
        chosen = found.point(found.found.chosen)
        assert found.found.reached
        assert chosen.ap_lost <= 0.004
        assert chosen.int8_macs >= 0.9
        assert len(chosen.kept) <= 6


@pytest.fixture
def ranked(yolov8, tmp_path_factory):
    """Arguments of `align partial`."""
    path = tmp_path_factory.mktemp("ranking") / "r.sensitivity.json"
    yolov8.ranking.save(path)
    return ["yolov8_embedded", "--images", "2", "--tries", "2", "--swaps", "1", "--ranking", path]


class TestCommand:
    def test_what_is_written_is_what_was_scored(self, ranked, tmp_path, own_scores):
        pytest.importorskip("matplotlib")
        asked = [*ranked, "--layers", "2", "--policy", "conv-only", "--plain"]
        runs = [align("partial", *asked, "--out", tmp_path / name) for name in "ab"]
        assert [run.exit_code for run in runs] == [0, 0], runs[0].output
        assert "top-2 by agreement" in runs[0].stdout
        assert "+1.000" in runs[0].stdout
        for name in ("keep_float.yaml", "partial.json", "pareto.svg"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        ElementTree.parse(tmp_path / "a" / "pareto.svg")
        kept = yaml.safe_load((tmp_path / "a" / "keep_float.yaml").read_text())["nodes"]
        report = json.loads((tmp_path / "a" / "partial.json").read_text())
        assert {entry["node"] for entry in kept} == set(report["chosen"]["kept"])
        assert all(entry["reason"].startswith("rank ") for entry in kept)
        assert report["chosen"] in report["points"]
        read = PartialResult.load(tmp_path / "a" / "partial.json")
        assert {name: read.model_dump(mode="json")[name] for name in report if name != "graph_sha256"} == {
            name: value for name, value in report.items() if name != "graph_sha256"
        }
        taken = next(line for line in runs[0].stdout.splitlines() if line.startswith("it is taken by: align quantize"))
        again = align("quantize", *taken.split()[6:-1], tmp_path / "q")
        assert again.exit_code == 0, again.output
        assert "keep_float.yaml: its recipe is taken: policy conv-only (" in again.stdout
        scorer = Scorer(load_variant("yolov8_embedded"), images=2)
        score = scorer.score(onnx.load(tmp_path / "q" / "yolov8_embedded.qdq.onnx"))
        assert scorer.runs == 0
        assert (score.ap, score.agreement) == (report["chosen"]["ap"], report["chosen"]["agreement"])

    def test_the_recipes_own_nodes_are_written_too(self, yolov8, tmp_path):
        found = partial(yolov8.candidates, Scorer(yolov8.variant, images=2), yolov8.ranking, Goal("layers", 1), tries=1)
        found.save(tmp_path)
        names = read_keep_float(tmp_path / "keep_float.yaml", yolov8.candidates.source).names
        assert set(names) == {*found.found.chosen, *yolov8.candidates.kept_by_recipe}
        bare = with_quantization(yolov8.variant, {"keep_float": names})
        same = Candidates(bare).quantized(()).model
        assert same == yolov8.candidates.quantized(found.found.chosen).model
        assert any(
            reason.startswith("the recipe keeps /detector/backbone/stage1/*") for reason in found.reasons.values()
        )

    def test_out_of_reach(self, ranked, tmp_path, monkeypatch):
        monkeypatch.setattr(Capabilities, "current", lambda: Capabilities.of("10.0"))
        monkeypatch.setattr("alignment.runners.int8.qdq_latency", lambda *_: 2.0)
        run = align("partial", *ranked, "--latency", "1.5", "--out", tmp_path)
        assert run.exit_code == 1
        assert "not reached: at most 1.5 ms" in run.stdout
        report = json.loads((tmp_path / "partial.json").read_text())
        assert not report["reached"]
        assert report["chosen"]["latency_ms"] == 2
        ElementTree.parse(tmp_path / "pareto.svg")

    def test_no_engine_of_any_set(self, ranked, tmp_path, monkeypatch):
        def fails(*asked: object) -> float:
            raise BuildError(f"level {asked[-1]}: TensorRT cannot build it", "look it up")

        monkeypatch.setattr(Capabilities, "current", lambda: Capabilities.of("8.6.1"))
        monkeypatch.setattr("alignment.runners.int8.qdq_latency", fails)
        run = align("partial", *ranked, "--latency", "1.5", "--level", "2", "--tries", "1", "--out", tmp_path)
        assert run.exit_code == 1, run.output
        assert "no engine with nothing more in float: level 2: TensorRT cannot build it" in run.stdout
        assert json.loads((tmp_path / "partial.json").read_text())["chosen"]["latency_ms"] is None

    def test_without_a_ranking(self, ranked, tmp_path):
        """It sweeps by itself."""
        pytest.importorskip("alignment.quantize.sweep")
        run = align("partial", *ranked[:5], "--layers", "1", "--metric", "mse", "--out", tmp_path)
        assert run.exit_code == 0, run.output
        assert "sqnr@layer" in run.stdout

    def test_patterns_beside_a_file(self, yolov8, tmp_path):
        write_keep_float(tmp_path / "k.yaml", "v", yolov8.candidates.source, {yolov8.candidates.nodes[0]: "so"})
        kept = ["--keep-float", tmp_path / "k.yaml", "--keep-float", "/detector/neck/*", "--images", "4"]
        assert align("quantize", "yolov8_embedded", *kept, "--out", tmp_path).exit_code == 0
        nodes = json.loads((tmp_path / "yolov8_embedded.scales.json").read_text())["float_nodes"]
        assert nodes[yolov8.candidates.nodes[0]].startswith("keep-float")
        assert sum("named by /detector/neck/*" in reason for reason in nodes.values()) > 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "wants one goal: give one of --budget, --layers and --latency"),
            (["--layers", "2", "--budget", "AP=1"], "wants one goal"),
            (["--budget", "AP"], "--budget AP: no budget: give AP=0.3"),
            (["--latency", "1"], "TensorRT cannot be imported"),
            (["--layers", "400"], "--layers 400: "),
            (["--layers", "1", "--metric", "beauty"], "no metric is named 'beauty'"),
            (["--layers", "1", "--metric", "kl"], "the metric kl"),
            (["--layers", "1", "--ranking", "none.json"], "none.json: No such file"),
        ],
    )
    def test_wrong_usage(self, ranked, tmp_path, monkeypatch, options, message):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        run = align("partial", *ranked, *options, "--out", tmp_path)
        assert run.exit_code == 2
        assert message in one_line(run.stderr)
        assert not list(tmp_path.iterdir())

    def test_a_file_of_another_graph(self, yolov8, tmp_path):
        write_keep_float(tmp_path / "k.yaml", "yolov8_embedded", yolov8.candidates.source, {})
        run = align("quantize", "yolov6_embedded", "--keep-float", tmp_path / "k.yaml", "--out", tmp_path / "q")
        assert run.exit_code == 2
        assert "k.yaml: made for yolov8_embedded's graph" in one_line(run.stderr)
