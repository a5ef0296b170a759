"""From a calibration to int8 artefacts: the routes agree, what is written, ranges of another tool, the command."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from alignment.cli import app
from alignment.engine.int8 import ranges_in_cache, read_cache
from alignment.errors import AlignError
from alignment.export.onnx_export import exported
from alignment.quantize import recipe
from alignment.quantize.observers import METHODS
from alignment.quantize.placement import POLICIES, quantizable
from alignment.quantize.qdq import fake_quantizers
from alignment.storage import cache_dir
from alignment.variant import load_variant, with_quantization

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def yolov8(quantized_build) -> SimpleNamespace:
    pytest.importorskip("mmyolo")
    variant = with_quantization(load_variant("yolov8_embedded"), {"images": 4})
    return SimpleNamespace(variant=variant, source=exported(variant).onnx, quantized=quantized_build(variant))


def assert_routes_agree(quantized: recipe.Quantized) -> None:
    """The scale of every quantized tensor, by each route, to a unit in the last place of float32."""
    in_graph, _ = fake_quantizers(quantized.model)
    ranges, cached = dict(quantized.ranges), read_cache(quantized.cache())
    assert in_graph.keys() == {quantizer.tensor for quantizer in quantized.placement.activations}
    assert in_graph.keys() <= ranges.keys()
    assert ranges.keys() == cached.keys() == {name for name, value in quantized.amax.items() if value > 0}
    assert quantized.amax.keys() == quantized.calibration.tensors.keys()
    for name, value in ranges.items():
        np.testing.assert_array_max_ulp(np.float32(cached[name]), np.float32(value / 127), 1)
    for name, scale in in_graph.items():
        assert scale.dtype == np.float32
        np.testing.assert_array_max_ulp(scale, np.float32(ranges[name] / 127), 1)
        np.testing.assert_array_max_ulp(scale, np.float32(cached[name]), 1)
        np.testing.assert_array_max_ulp(scale, np.float32(quantized.scales[name]), 1)


class TestRoutes:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method(self, yolov8, method):
        changed = yolov8.variant.quantization.model_copy(update={"method": method})
        quantized = recipe.apply(yolov8.source, changed, yolov8.quantized.calibration)
        assert_routes_agree(quantized)
        amax = quantized.calibration.amax(method)
        groups: dict[str, list[float]] = {}
        for place in quantized.placement.activations:
            groups.setdefault(place.group, []).append(amax[place.tensor])
        for place in quantized.placement.activations:
            assert quantized.amax[place.tensor] == max(groups[place.group])
            amax.pop(place.tensor)
        assert {name: quantized.amax[name] for name in amax} == amax

    @pytest.mark.parametrize("policy", POLICIES)
    def test_every_policy(self, yolov8, policy):
        changed = yolov8.variant.quantization.model_copy(update={"policy": policy})
        assert_routes_agree(recipe.apply(yolov8.source, changed, yolov8.quantized.calibration))

    def test_scales_of_weights(self, yolov8):
        assert yolov8.variant.quantization.weights == "minmax"
        values = {value.name: value for value in onnx.load(yolov8.source).graph.initializer}
        _, scales = fake_quantizers(yolov8.quantized.model)
        assert scales.keys() == {quantizer.initializer for quantizer in yolov8.quantized.placement.weights}
        for quantizer in yolov8.quantized.placement.weights:
            weight = numpy_helper.to_array(values[quantizer.initializer])
            others = tuple(axis for axis in range(weight.ndim) if axis != quantizer.axis)
            largest = np.abs(weight).max(others)
            assert (largest > 0).all()
            np.testing.assert_array_equal(scales[quantizer.initializer], largest / np.float32(127))

    def test_joint_calibration_sees_quantized_weights(self, yolov8):
        found = recipe.quantize(with_quantization(yolov8.variant, {"calibration": "joint"}))
        assert_routes_agree(found)
        separate = yolov8.quantized.calibration
        assert found.source == yolov8.source
        assert found.calibration.identity["graph"] != separate.identity["graph"]
        assert found.calibration.tensors.keys() == separate.tensors.keys()
        ours, theirs = found.calibration.amax("minmax"), separate.amax("minmax")
        assert ours["images"] == theirs["images"]
        assert ours != theirs


class TestQdqOnly:
    """Of the tensors that a policy may quantize alone: the same scales and QDQ graph, and nothing for other routes."""

    @pytest.fixture
    def empty(self, yolov8, tmp_path, monkeypatch) -> None:
        """A cache without a calibration."""
        shared = cache_dir() / "entries"
        for kind in (path for path in shared.iterdir() if path.name != "calibration"):
            (tmp_path / "cache" / "entries").mkdir(parents=True, exist_ok=True)
            (tmp_path / "cache" / "entries" / kind.name).symlink_to(kind)
        monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))

    @pytest.mark.parametrize("policy", POLICIES)
    def test_the_graph_is_the_same(self, yolov8, empty, policy):
        variant = with_quantization(yolov8.variant, {"policy": policy, "keep_float": ["/detector/backbone/stage1/*"]})
        part = recipe.quantize(variant, every=False)
        whole = recipe.apply(yolov8.source, variant.quantization, yolov8.quantized.calibration)
        assert part.model.SerializeToString(deterministic=True) == whole.model.SerializeToString(deterministic=True)
        assert part.scales == whole.scales
        assert part.placement.activations
        assert part.amax.keys() == part.calibration.tensors.keys() == set(quantizable(onnx.load(yolov8.source)))
        assert part.calibration.identity == yolov8.quantized.calibration.identity

    def test_ranges_are_refused(self, yolov8, tmp_path):
        part = recipe.quantize(yolov8.variant, every=False)
        for give in (lambda: part.ranges, part.cache):
            with pytest.raises(
                AlignError, match=r"\.onnx: \d+ tensors were not calibrated, \S+ first: .* other than qdq"
            ):
                give()
        assert [path.name for path in part.save(tmp_path, "tiny")] == ["tiny.qdq.onnx", "tiny.scales.json"]
        assert len(list(tmp_path.iterdir())) == 2
        assert len(json.loads((tmp_path / "tiny.scales.json").read_text())["activations"]) == len(part.amax)

    def test_it_gives_way_to_one_of_all(self, yolov8, empty, caplog):
        seen: list[str] = []

        def calibrated(every: bool) -> bool:
            """Whether images were run."""
            seen.clear()
            found = recipe.quantize(yolov8.variant, progress=lambda stage, *_: seen.append(stage), every=every)
            assert found.unranged == () or not every
            return "calibration" in seen

        assert [calibrated(every) for every in (False, False, True, True, False)] == [True, False, True, False, False]
        refused = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
        assert len(refused) == 1
        assert "that are wanted are not among them" in refused[0]


class TestSave:
    def test_files_that_agree(self, yolov8, tmp_path):
        quantized = yolov8.quantized
        paths = quantized.save(tmp_path / "new", "tiny")
        names = ["tiny.qdq.onnx", "tiny.float.onnx", "tiny.ranges.json", "tiny.calibration", "tiny.scales.json"]
        assert paths == [tmp_path / "new" / name for name in names]
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
        activation_scales, weight_scales = fake_quantizers(onnx.load(paths[0]))
        assert onnx.load(paths[1]) == onnx.load(quantized.source)
        ranges = json.loads(paths[2].read_text())
        cached = read_cache(paths[3].read_text())
        scales = json.loads(paths[4].read_text())
        assert ranges == dict(quantized.ranges)
        assert list(cached) == list(ranges)
        assert {n: e["scale"] for n, e in scales["activations"].items() if "scale" in e} == activation_scales
        assert {n: e["amax"] for n, e in scales["activations"].items() if e["amax"] > 0} == ranges
        assert {n: np.float32(e["scales"]).tolist() for n, e in scales["weights"].items()} == {
            n: s.tolist() for n, s in weight_scales.items()
        }
        places = [(q.initializer, q.node, q.axis) for q in quantized.placement.weights]
        assert [(n, e["node"], e["axis"]) for n, e in scales["weights"].items()] == places
        for name, entry in scales["activations"].items():
            statistics = quantized.calibration.tensors[name]
            assert (entry["minimum"], entry["maximum"]) == (statistics.minimum, statistics.maximum)
            assert entry["elements"] == statistics.elements
        for place in quantized.placement.activations:
            entry = scales["activations"][place.tensor]
            assert (entry["group"], entry["rule"]) == (place.group, place.rule)
        assert scales["identity"] == quantized.calibration.identity
        assert scales["recipe"] == yolov8.variant.quantization.model_dump(mode="json")
        assert scales["adaround"] == []
        assert scales["float_nodes"] == quantized.placement.float_nodes

    def test_the_graph_is_valid(self, yolov8, tmp_path):
        path, *_ = yolov8.quantized.save(tmp_path, "tiny")
        onnx.checker.check_model(str(path), full_check=True)

    def test_the_cache_names_its_version(self, yolov8):
        assert yolov8.quantized.cache().startswith("TRT-8601-EntropyCalibration2\nimages: ")
        assert yolov8.quantized.cache("10.13.3").startswith("TRT-101303-EntropyCalibration2\n")


class TestRangesOfAnother:
    """A TensorRT calibration cache in place of what was calibrated."""

    def test_its_scales_are_in_the_graph_to_one_ulp(self, yolov8):
        cache = recipe.quantize(with_quantization(yolov8.variant, {"method": "entropy"})).cache()
        found = recipe.quantize(yolov8.variant, ranges=ranges_in_cache(cache))
        assert found.calibration.identity == yolov8.quantized.calibration.identity
        assert found.scales != yolov8.quantized.scales
        scales = read_cache(cache)
        for name, scale in found.scales.items():
            ulp = np.spacing(np.float32(scales[name]))
            assert abs(np.float32(scale) - np.float32(scales[name])) <= ulp

    def test_a_tensor_that_it_does_not_name_keeps_its_own(self, yolov8):
        found = recipe.quantize(yolov8.variant, ranges={"images": 2.0})
        assert found.amax["images"] == 2.0
        assert {n for n, a in found.amax.items() if a != yolov8.quantized.amax[n]} == {"images"}

    def test_one_of_another_model_is_refused(self, yolov8):
        with pytest.raises(AlignError, match=r"none of its tensors is among the 1 ranges"):
            recipe.quantize(yolov8.variant, ranges={"elsewhere": 2.0})


class TestCommand:
    @pytest.fixture
    def quick(self, tmp_path):
        """The command on a variant that calibrates on 2 images."""
        pytest.importorskip("mmyolo")
        return ["quantize", "yolov8_embedded", "--images", "2", "--out", str(tmp_path / "out")]

    def test_it_says_what_it_did(self, quick, tmp_path):
        done = CliRunner().invoke(app, [*quick, "--keep-float", "/detector/backbone/stem/*", "--method", "percentile"])
        assert done.exit_code == 0, done.output
        assert len(list((tmp_path / "out").iterdir())) == 5
        assert "ranges from 2 images" in done.output
        report = json.loads((tmp_path / "out" / "yolov8_embedded.scales.json").read_text())
        assert (report["recipe"]["method"], report["recipe"]["images"]) == ("percentile", 2)
        assert any(why.startswith("keep-float") for why in report["float_nodes"].values())

    def test_the_qdq_graph_alone(self, quick, tmp_path):
        (tmp_path / "out").mkdir()
        for suffix in ("float.onnx", "ranges.json", "calibration"):
            (tmp_path / "out" / f"yolov8_embedded.{suffix}").write_text("of another method")
        done = CliRunner().invoke(app, [*quick, "--qdq-only"])
        assert done.exit_code == 0, done.output
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"yolov8_embedded.qdq.onnx", "yolov8_embedded.scales.json"}

    def test_adaround_that_does_not_help_is_told(self, quick, monkeypatch):
        pytest.importorskip("pytorch_quantization")
        from alignment.quantize import adaround, reconstruction

        monkeypatch.setattr(reconstruction, "PLACES", 64)
        monkeypatch.setattr(adaround.Options, "__init__", _options(iterations=3, rate=10.0))
        keep = [word for stage in ("stem", "stage1", "stage2", "stage3") for word in ("--keep-float", f"*/{stage}/*")]
        keep += ["--keep-float", "/detector/bbox_head/*"]
        done = CliRunner().invoke(app, [*quick, "--rounding", "adaround", *keep, "--keep-float", "*/neck/*"])
        assert done.exit_code == 0, done.output
        assert "AdaRound does not lower its error: rounded to nearest" in done.output

    def test_ranges_that_are_no_cache_exit_2(self, quick, tmp_path):
        (tmp_path / "cache").write_text("images: 3c010a14")
        done = CliRunner().invoke(app, [*quick, "--ranges", str(tmp_path / "cache")])
        assert done.exit_code == 2
        assert "not a TensorRT calibration cache" in done.stderr
        assert not (tmp_path / "out").exists()


def _options(**changes):
    """`Options` with other defaults."""
    from alignment.quantize.adaround import Options

    own = Options.__init__

    def init(self, **given):
        own(self, **{**changes, **given})

    return init
