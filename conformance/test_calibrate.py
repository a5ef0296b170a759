"""Calibration: every tensor in one pass, the same for any batch, taken up where it stopped."""

from __future__ import annotations

import io
import tokenize
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from alignment.data.samples import Samples, open_samples
from alignment.errors import AlignError
from alignment.export.onnx_export import exported
from alignment.quantize import calibrate as module
from alignment.quantize import recipe
from alignment.quantize.calibrate import Calibration, activations, calibrate, identity_of
from alignment.quantize.observers import METHODS
from alignment.quantize.placement import POLICIES, place, quantizable
from alignment.quantize.sharing import followed, shared
from alignment.quantize.statistics import Statistics
from alignment.variant import load_variant, with_quantization

pytest.importorskip("onnxruntime")
IMAGES = 6
#: What a damaged archive raises beside BadZipFile.
RAW = (zlib.error, NotImplementedError, tokenize.TokenError)


def graph(*lines: str, output: str = "o", elements: int = TensorProto.FLOAT, seed: int = 0) -> onnx.ModelProto:
    """A graph of nodes in ONNX's own notation that reads ``images``, with the weights ``w`` and constants ``n``."""
    nodes = [onnx.parser.parse_node(line) for line in lines]
    for node in nodes:
        node.name = node.output[0]
    rng = np.random.default_rng(seed)
    constants = {
        "w": rng.normal(0, 0.5, (8, 3, 3, 3)).astype(np.float32),
        "w2": rng.normal(0, 0.5, (8, 8, 1, 1)).astype(np.float32),
        "n": np.float32(-1),
        "edges": np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
    }
    read = {name for node in nodes for name in node.input}
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 320, 320])],
        [helper.make_tensor_value_info(output, elements, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in read],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)


def written(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def assert_same(ours: Calibration, theirs: Calibration) -> None:
    """The same statistics of the same tensors, to the bit."""
    assert (ours.images, list(ours.tensors)) == (theirs.images, list(theirs.tensors))
    for name, statistics in ours.tensors.items():
        for key, array in statistics.to_arrays().items():
            np.testing.assert_array_equal(array, theirs.tensors[name].to_arrays()[key], err_msg=f"{name}: {key}")


@pytest.fixture(scope="module")
def samples() -> Samples:
    return open_samples(load_variant("yolov8_embedded"), limit=IMAGES, split="train2017")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    lines = ("y = Conv<strides = [2, 2]>(images, w)", "z = Relu(y)", "o = Conv<strides = [4, 4]>(z, w2)")
    return written(graph(*lines), tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(scope="module")
def whole(tiny, samples, tmp_path_factory) -> SimpleNamespace:
    """A calibration of the tiny graph without an interruption."""
    path = tmp_path_factory.mktemp("whole") / "whole.npz"
    return SimpleNamespace(path=path, found=calibrate(tiny, samples, path))


@pytest.fixture(scope="module")
def yolov8(quantized_build) -> SimpleNamespace:
    pytest.importorskip("mmyolo")
    variant = with_quantization(load_variant("yolov8_embedded"), {"images": 4})
    return SimpleNamespace(variant=variant, source=exported(variant).onnx, quantized=quantized_build(variant))


class TestActivations:
    @pytest.mark.parametrize("family", ["yolov6", "yolov8", "ppyoloe", "rtmdet"])
    def test_all_float_tensors_that_depend_on_the_image(self, family):
        pytest.importorskip("mmyolo")
        model = onnx.load(exported(load_variant(f"{family}_embedded")).onnx)
        makers = {name: node for node in model.graph.node for name in node.output}
        depends = {"images": True}

        def moves(tensor: str) -> bool:
            if tensor not in depends:
                depends[tensor] = tensor in makers and any([moves(name) for name in makers[tensor].input])
            return depends[tensor]

        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        known = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
        assert {name for node in model.graph.node for name in node.output if name} <= known.keys()
        floats = ["images", *(name for name in makers if known[name] == TensorProto.FLOAT and moves(name))]
        assert activations(model) == floats
        assert len(floats) > 100

    def test_constants_and_integers_are_none(self):
        model = graph(
            "m = Neg(n)",
            "y = Mul(images, m)",
            "i = Cast<to = 7>(y)",
            "s = Shape(y)",
            "f = Cast<to = 1>(s)",
            "o = Identity(i)",
            elements=TensorProto.INT64,
        )
        assert activations(model) == ["images", "y", "f"]

    def test_calibration_sees_them_all(self, yolov8):
        found = yolov8.quantized.calibration
        assert list(found.tensors) == activations(onnx.load(yolov8.source))
        assert all(statistics.elements > 0 for statistics in found.tensors.values())
        assert found.tensors["images"].elements == 4 * 3 * 320 * 320


class TestStatisticsOfAGraph:
    def test_they_are_those_of_the_tensors(self, tiny, whole, samples):
        """The input's, and what NumPy makes of it."""
        images = np.stack([sample.tensor for sample in samples])
        ours = Statistics()
        ours.add(images)
        found = whole.found.tensors["images"].to_arrays()
        for key, array in ours.to_arrays().items():
            np.testing.assert_array_equal(found[key], array, err_msg=key)
        tensors = whole.found.tensors
        assert whole.found.images == IMAGES
        assert (tensors["z"].minimum, tensors["z"].maximum) == (0.0, tensors["y"].maximum)
        assert tensors["y"].elements == tensors["z"].elements == IMAGES * 8 * 159 * 159

    @pytest.mark.parametrize("batch", [2, 4, 5, 100])
    def test_any_batch_gives_the_same(self, tiny, whole, samples, tmp_path, batch):
        assert_same(calibrate(tiny, samples, tmp_path / "other.npz", batch), whole.found)

    @pytest.mark.parametrize("batch", [2, 4])
    def test_any_batch_gives_the_same_of_a_detector(self, yolov8, tmp_path, batch):
        """To the bit: ONNX Runtime computes image by image, on one thread at least."""
        images = recipe.calibration_samples(yolov8.variant)
        assert_same(calibrate(yolov8.source, images, tmp_path / "other.npz", batch), yolov8.quantized.calibration)

    def test_a_tensor_of_zeros(self, samples, tmp_path):
        model = graph("y = Abs(images)", "m = Mul(y, n)", "z = Relu(m)", "o = Conv(z, w)")
        found = calibrate(written(model, tmp_path / "zeros.onnx"), samples, tmp_path / "zeros.npz")
        for method in METHODS:
            assert found.amax(method)["z"] == found.amax(method)["o"] == 0.0
        quantized = recipe.apply(tmp_path / "zeros.onnx", load_variant("yolov8_embedded").quantization, found)
        assert [name for name, _ in quantized.ranges] == ["images", "y", "m"]

    @pytest.mark.parametrize(("op", "tensor"), [("Sqrt", "y"), ("Log", "y")])
    def test_values_that_are_not_finite(self, samples, tmp_path, op, tensor):
        model = graph("m = Mul(images, n)", f"y = {op}(m)", "o = Relu(y)")
        with pytest.raises(
            AlignError, match=rf"^tensor {tensor}: holds values that are not finite: run `align layers`"
        ):
            calibrate(written(model, tmp_path / "nan.onnx"), samples, tmp_path / "nan.npz")
        assert not (tmp_path / "nan.npz").exists()

    @pytest.mark.parametrize(("fixed", "batch"), [(1, 4), (4, 4), (4, 1)])
    def test_a_graph_of_a_fixed_batch(self, samples, tmp_path, fixed, batch):
        """Either it is calibrated all the same, or one line says what to do."""
        model = graph("y = Neg(images)", "o = Relu(y)")
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = fixed
        path = written(model, tmp_path / "fixed.onnx")
        try:
            assert calibrate(path, samples, tmp_path / "fixed.npz", batch).tensors["o"].elements == IMAGES * 3 * 320**2
        except AlignError as error:
            assert "batch" in str(error)  # noqa: PT017

    @pytest.mark.parametrize("known", [True, False])
    def test_shapes_that_are_known_only_afterwards(self, samples, tmp_path, known):
        """Of a tensor whose values decide it, and of all where the input's is open."""
        model = graph("y = Relu(images)", "s = NonZero(y)", "o = Cast<to = 1>(s)")
        if not known:
            for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim, "bchw", strict=True):
                dim.dim_param = name
        tensors = calibrate(written(model, tmp_path / "open.onnx"), samples, tmp_path / "open.npz").tensors
        images = np.stack([sample.tensor for sample in samples])
        assert tensors["y"].elements == images.size
        assert tensors["o"].elements == 4 * np.count_nonzero(images > 0)
        assert tensors["o"].maximum == 319

    def test_a_graph_that_does_not_load(self, samples, tmp_path):
        model = graph("o = Unheard(images)")
        with pytest.raises(AlignError, match=r"bad\.onnx: ONNX Runtime cannot load it"):
            calibrate(written(model, tmp_path / "bad.onnx"), samples, tmp_path / "bad.npz")


class TestShared:
    """Tensors that are not looked at have the statistics that they would have if they were."""

    #: Nodes, and what becomes of channels where the first output is not looked at.
    MOVES = (
        ("a = Relu(images)", None),
        ("b = Neg(images)", None),
        ("c = Concat<axis = 1>(a, b)", "after"),
        ("d = Concat<axis = 2>(a, b)", "each"),
        ("e = Concat<axis = 0>(a, b)", None),
        ("f = Transpose<perm = [0, 1, 3, 2]>(c)", "each"),
        ("g = Transpose<perm = [0, 2, 1, 3]>(c)", None),
        ("h = Flatten(f)", "all"),
        ("i = Unsqueeze(c, two)", "all"),
        ("j = Squeeze(i, two)", None),
        ("k = Concat<axis = -1>(h, h)", "all"),
        ("l = Identity(d)", "each"),
        ("m = Neg(c)", "after"),
        ("n, o = Split<axis = 1>(m, parts)", None),
        ("p, q = Split<axis = 2>(images, halves)", None),
    )

    @pytest.fixture
    def moves(self, tmp_path) -> Path:
        model = graph(*(line for line, _ in self.MOVES), output="k")
        constants = {"two": np.array([2]), "parts": np.array([2, 4]), "halves": np.array([160, 160])}
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
        return written(model, tmp_path / "moves.onnx")

    def test_which_they_are(self, moves):
        model = onnx.load(moves)
        names = activations(model)
        found = shared(model, names, module.shapes_of(model, names, (7, 3, 320, 320)), 7)
        expected = {line[0]: kept for line, kept in self.MOVES if kept}
        assert {name: joined.channels for name, joined in found.items()} == expected
        assert found["m"].parts == ("n", "o")

    @pytest.mark.parametrize("batch", [1, 4])
    def test_of_moves(self, moves, samples, tmp_path, monkeypatch, batch):
        derived = calibrate(moves, samples, tmp_path / "derived.npz", batch)
        monkeypatch.setattr(module, "shared", lambda *_: {})
        assert_same(calibrate(moves, samples, tmp_path / "seen.npz", batch), derived)

    @pytest.mark.parametrize("family", ["yolov6", "yolov8", "ppyoloe", "rtmdet"])
    def test_of_a_detector(self, family, tmp_path, monkeypatch):
        pytest.importorskip("mmyolo")
        variant = load_variant(f"{family}_embedded")
        few = open_samples(variant, limit=3, split="train2017")
        source = exported(variant).onnx
        derived = calibrate(source, few, tmp_path / "derived.npz", 2)
        monkeypatch.setattr(module, "shared", lambda *_: {})
        assert_same(calibrate(source, few, tmp_path / "seen.npz"), derived)


#: What ONNX Runtime makes together with a convolution, and rounds otherwise, unless the tensor between is an output.
SUMS = (
    "y = Conv<strides = [2, 2]>(images, w)",
    "z = Relu(y)",
    "c = Conv(z, w2)",
    "s = Add(c, z)",
    "r = Relu(s)",
    "d = Conv(r, w2)",
    "m = Mul(d, n)",
    "g = Sigmoid(m)",
    "u = Mul(m, g)",
    "e = Erf(u)",
    "f = Sub(e, n)",
    "v = Mul(u, f)",
    "p = Pad(v, edges)",
    "o = Conv(p, w2)",
)


@pytest.fixture(scope="module")
def sums(samples, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("sums")
    source = written(graph(*SUMS), folder / "sums.onnx")
    return SimpleNamespace(source=source, found=calibrate(source, samples, folder / "all.npz"))


class TestSome:
    """Of tensors that are wanted alone, the statistics are those that they have among all."""

    @pytest.mark.parametrize(
        "wanted",
        [["o"], ["r"], ["s"], ["m", "z"], ["z", "r", "u", "v", "o"], ["v"], ["u"], ["images"], ["c", "d"]],
        ids="-".join,
    )
    def test_of_sums(self, sums, samples, tmp_path, wanted):
        found = calibrate(sums.source, samples, tmp_path / "some.npz", tensors=wanted)
        assert set(found.tensors) == set(wanted)
        assert_same(found, sums.found.only(wanted, tmp_path))

    @pytest.mark.parametrize(
        "family", ["yolov5", "yolov6", "yolov7", "yolov8", "yolox", "ppyoloe", "rtmdet", "rtmdet_r"]
    )
    def test_of_a_detector(self, family, tmp_path):
        pytest.importorskip("mmyolo")
        variant = load_variant(f"{family}_embedded")
        few = open_samples(variant, limit=2, split="train2017")
        source = exported(variant).onnx
        model = onnx.load(source)
        whole = calibrate(source, few, tmp_path / "all.npz")
        sets = {name: [one.tensor for one in place(model, name).activations] for name in POLICIES}
        for name, wanted in (*sets.items(), ("quantizable", quantizable(model))):
            assert_same(calibrate(source, few, tmp_path / f"{name}.npz", 2, None, wanted), whole.only(wanted, tmp_path))

    def test_nothing_else_is_handed_out(self, yolov8, tmp_path, monkeypatch):
        handed: list[list[str]] = []

        class Noting(module._Observed):
            def __init__(self, graph, names, path):
                handed.append(names)
                super().__init__(graph, names, path)

        monkeypatch.setattr(module, "_Observed", Noting)
        model = onnx.load(yolov8.source)
        wanted = quantizable(model)
        calibrate(yolov8.source, recipe.calibration_samples(yolov8.variant), tmp_path / "a.npz", 4, None, wanted)
        (names,) = handed
        joined = module._joined(model, activations(model))
        assert set(names) <= followed(wanted, joined) | module._rounding_alone(model)
        assert not joined.keys() & set(names)
        assert len(names) < 0.4 * len(activations(model))

    def test_the_image_alone(self, tiny, whole, samples, tmp_path):
        found = calibrate(tiny, samples, tmp_path / "image.npz", tensors=["images"])
        assert_same(found, whole.found.only(["images"], tmp_path))

    def test_what_is_left_out_of_a_sum(self, sums):
        assert module._rounding_alone(onnx.load(sums.source)) == {"c", "d", "e", "p"}

    def test_parts_come_along(self, samples, tmp_path):
        lines = ("a = Relu(images)", "b = Neg(images)", "c = Concat<axis = 1>(a, b)", "o = Transpose(c)", "d = Neg(o)")
        source = written(graph(*lines[:-1]), tmp_path / "moves.onnx")
        found = calibrate(source, samples, tmp_path / "some.npz", tensors=["c"])
        assert list(found.tensors) == ["c"]
        assert list(Calibration.load(tmp_path / "some.npz").tensors) == ["images", "a", "b", "c"]
        assert_same(found, calibrate(source, samples, tmp_path / "all.npz").only(["c"], tmp_path))

    def test_a_file_with_more_will_do(self, tiny, whole, samples):
        before = whole.path.read_bytes()
        found = calibrate(tiny, samples, whole.path, tensors=["z"])
        assert_same(found, whole.found.only(["z"], whole.path))
        assert whole.path.read_bytes() == before

    def test_a_file_with_more_is_completed(self, tiny, whole, samples, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "SAVE_EVERY", 2)
        path, seen = tmp_path / "part.npz", []
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny, samples, path, progress=TestInterrupted.stopping_after(2))
        calibrate(tiny, samples, path, progress=seen.append, tensors=["z"])
        assert seen == list(range(3, IMAGES + 1))
        assert_same(Calibration.load(path), whole.found)

    def test_some_go_on_where_they_were(self, tiny, whole, samples, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "SAVE_EVERY", 2)
        path, seen = tmp_path / "part.npz", []
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny, samples, path, progress=TestInterrupted.stopping_after(4), tensors=["z"])
        found = calibrate(tiny, samples, path, progress=seen.append, tensors=["z"])
        assert seen == [5, 6]
        assert_same(found, whole.found.only(["z"], path))

    def test_a_file_with_fewer_is_refused(self, tiny, samples, tmp_path):
        path = tmp_path / "few.npz"
        calibrate(tiny, samples, path, tensors=["z"])
        before = path.read_bytes()
        with pytest.raises(
            AlignError,
            match=r"few\.npz: a calibration of 2 tensors; 2 that are wanted are not among them, y first: .*anew",
        ):
            calibrate(tiny, samples, path)
        assert path.read_bytes() == before

    def test_one_that_the_graph_has_not(self, tiny, samples, tmp_path):
        with pytest.raises(AlignError, match=r"tiny\.onnx: no float32 activation is named w2: name tensors of this"):
            calibrate(tiny, samples, tmp_path / "none.npz", tensors=["w2", "z"])
        assert not list(tmp_path.iterdir())


class TestInterrupted:
    @staticmethod
    def stopping_after(images: int) -> Callable[[int], None]:
        def progress(done: int) -> None:
            if done >= images:
                raise KeyboardInterrupt

        return progress

    @pytest.mark.parametrize(("stop", "kept"), [(2, 2), (3, 2), (4, 4), (5, 4)])
    def test_it_goes_on_where_it_was(self, tiny, whole, samples, tmp_path, monkeypatch, stop, kept):
        monkeypatch.setattr(module, "SAVE_EVERY", 2)
        path, seen = tmp_path / "part.npz", []
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny, samples, path, progress=self.stopping_after(stop))
        assert Calibration.load(path).images == kept
        assert_same(calibrate(tiny, samples, path, progress=seen.append), whole.found)
        assert seen == list(range(kept + 1, IMAGES + 1))
        assert_same(Calibration.load(path), whole.found)

    def test_it_goes_on_in_another_batch(self, tiny, whole, samples, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "SAVE_EVERY", 1)
        path, seen = tmp_path / "part.npz", []
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny, samples, path, batch=1, progress=self.stopping_after(1))
        assert_same(calibrate(tiny, samples, path, batch=3, progress=seen.append), whole.found)
        assert seen == [4, 6]

    def test_before_the_first_write_nothing_is_left(self, tiny, whole, samples, tmp_path):
        path = tmp_path / "part.npz"
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny, samples, path, progress=self.stopping_after(1))
        assert list(tmp_path.iterdir()) == []
        assert_same(calibrate(tiny, samples, path), whole.found)

    def test_one_that_is_whole_is_only_read(self, tiny, whole, samples):
        def never(done: int) -> None:
            raise AssertionError(done)

        before = whole.path.read_bytes()
        assert_same(calibrate(tiny, samples, whole.path, progress=never), whole.found)
        assert whole.path.read_bytes() == before


class TestFiles:
    def test_round_trip(self, whole, tmp_path):
        whole.found.save(tmp_path / "a.npz")
        loaded = Calibration.load(tmp_path / "a.npz")
        assert loaded.identity == whole.found.identity
        assert_same(loaded, whole.found)

    def test_another_graph(self, whole, samples, tmp_path):
        model = written(graph("o = Conv(images, w)", seed=1), tmp_path / "other.onnx")
        with pytest.raises(AlignError, match=r"whole\.npz: a calibration of another graph: [0-9a-f]{64}, now .*anew"):
            calibrate(model, samples, whole.path)

    def test_another_weight(self, tiny, whole, samples, tmp_path):
        model = onnx.load(tiny)
        values = numpy_helper.to_array(model.graph.initializer[0]).copy()
        values.flat[0] = np.nextafter(values.flat[0], np.float32(1))
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, model.graph.initializer[0].name))
        with pytest.raises(AlignError, match="a calibration of another graph"):
            calibrate(written(model, tmp_path / "other.onnx"), samples, whole.path)

    @pytest.mark.parametrize("limit", [IMAGES - 1, IMAGES + 1])
    def test_another_number_of_images(self, tiny, whole, samples, limit):
        others = open_samples(samples.variant, limit=limit, split="train2017")
        with pytest.raises(AlignError, match=rf"another images: .*the first {IMAGES}, now .*the first {limit}"):
            calibrate(tiny, others, whole.path)

    def test_other_images(self, tiny, whole, samples):
        with pytest.raises(AlignError, match="a calibration of another images"):
            calibrate(tiny, open_samples(samples.variant, limit=IMAGES, split="val2017"), whole.path)

    @pytest.mark.parametrize(
        ("part", "changes"),
        [("preprocess", {"channels": "bgr"}), ("preprocess", {"mean": (1.0, 0.0, 0.0)}), ("input", {})],
    )
    def test_another_preprocessing(self, tiny, whole, samples, part, changes):
        old = getattr(samples.variant, part)
        new = old.model_copy(update=changes or {"width": old.width + 32})
        variant = samples.variant.model_copy(update={part: new})
        with pytest.raises(AlignError, match=f"a calibration of another {part}"):
            calibrate(tiny, Samples(variant, samples.dataset), whole.path)

    @pytest.mark.parametrize(("name", "key"), [("__version__", "alignment"), ("STATISTICS", "statistics")])
    def test_another_version(self, tiny, whole, samples, monkeypatch, name, key):
        monkeypatch.setattr(module, name, "another")
        with pytest.raises(AlignError, match=f"a calibration of another {key}: .*, now another"):
            calibrate(tiny, samples, whole.path)

    def test_another_onnxruntime(self, tiny, whole, samples, monkeypatch):
        monkeypatch.setattr("onnxruntime.__version__", "9.9.9")
        with pytest.raises(AlignError, match=r"a calibration of another onnxruntime: .*, now 9\.9\.9"):
            calibrate(tiny, samples, whole.path)

    def test_a_field_that_was_not_there(self, tiny, whole, samples, tmp_path):
        """As another version of this package wrote it."""
        identity = {key: value for key, value in identity_of(tiny, samples).items() if key != "preprocess"}
        replace(whole.found, identity=identity).save(tmp_path / "old.npz")
        with pytest.raises(AlignError, match="a calibration of another preprocess: None, now"):
            calibrate(tiny, samples, tmp_path / "old.npz")

    def test_what_is_refused_is_not_touched(self, tiny, whole, samples, monkeypatch):
        before = whole.path.read_bytes()
        monkeypatch.setattr(module, "STATISTICS", "another")
        with pytest.raises(AlignError):
            calibrate(tiny, samples, whole.path)
        assert whole.path.read_bytes() == before

    @staticmethod
    def archive(**arrays: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, **arrays)
        return stream.getvalue()

    @staticmethod
    def array() -> bytes:
        stream = io.BytesIO()
        np.save(stream, np.zeros(3))
        return stream.getvalue()

    @pytest.mark.parametrize(
        "damage",
        {
            "empty": lambda content: b"",
            "text": lambda content: b"calibration\n",
            "one array": lambda content: TestFiles.array(),
            "another archive": lambda content: TestFiles.archive(other=np.zeros(3)),
            "no object": lambda content: TestFiles.archive(about=np.frombuffer(b"[]", np.uint8)),
            "no tensors": lambda content: TestFiles.archive(about=np.frombuffer(b"{}", np.uint8)),
            "no JSON": lambda content: TestFiles.archive(about=np.frombuffer(b"\xff{", np.uint8)),
            "half": lambda content: content[: len(content) // 2],
            "no end": lambda content: content[:-1],
            "no beginning": lambda content: content[1000:],
        }.items(),
        ids=lambda item: item[0],
    )
    def test_damaged(self, tiny, whole, samples, tmp_path, damage):
        path = tmp_path / "damaged.npz"
        path.write_bytes(damage[1](whole.path.read_bytes()))
        with pytest.raises(AlignError) as caught:
            calibrate(tiny, samples, path)
        assert str(caught.value).startswith(f"{path}: not a calibration: ")
        assert str(caught.value).endswith("delete it, and calibrate anew")
        assert "\n" not in str(caught.value)

    def test_any_byte_that_is_wrong(self, whole, tmp_path):
        """Each is either noticed, in one line, or does not matter."""
        path, content = tmp_path / "damaged.npz", whole.path.read_bytes()
        for where in range(0, len(content), max(len(content) // 300, 1)):
            damaged = bytearray(content)
            damaged[where] ^= 0xFF
            path.write_bytes(damaged)
            try:
                assert_same(Calibration.load(path), whole.found)
            except AlignError as error:
                assert "\n" not in str(error)  # noqa: PT017

    def test_missing(self, tmp_path):
        with pytest.raises(AlignError, match=r"none\.npz: No such file or directory"):
            Calibration.load(tmp_path / "none.npz")


def test_other_pixels_are_other_images(yolov8, tmp_path):
    samples = open_samples(yolov8.variant, None, 2, "train2017")
    first, second = samples.dataset.images
    changed = tmp_path / first.file_name
    cv2.imwrite(str(changed), 255 - cv2.imread(str(first.path)))
    dataset = replace(samples.dataset, images=[replace(first, path=changed), second])
    ours, theirs = (identity_of(yolov8.source, Samples(yolov8.variant, d)) for d in (samples.dataset, dataset))
    assert {key for key in ours if ours[key] != theirs[key]} == {"images"}
