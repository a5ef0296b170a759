"""Export of the embedded variant: what was asked for, whole or not at all, and equal to torch in float64."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from alignment.data.preprocess import preprocess
from alignment.data.synthetic import draw
from alignment.errors import AlignError
from alignment.export import onnx_export
from alignment.export.onnx_export import ExportedModel, ExportOptions, check_onnx, exported, file_digest
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.variant import Variant, load_variant

pytest.importorskip("mmyolo")
torch = pytest.importorskip("torch")

DYNAMIC = ExportOptions(17, None, "both")
OPTIONS = [DYNAMIC, ExportOptions(13, None, "decoded"), ExportOptions(13, 1, "raw"), ExportOptions(17, 2, "both")]
PRIORS = 40 * 40 + 20 * 20 + 10 * 10
RAW = {f"{kind}_s{s}": [depth, 320 // s, 320 // s] for kind, depth in (("cls", 6), ("bbox", 4)) for s in (8, 16, 32)}
DECODED = {"boxes": [PRIORS, 4], "scores": [PRIORS, 6]}
SHAPES = {"decoded": DECODED, "raw": RAW, "both": {**DECODED, **RAW}}


def name_of(options: ExportOptions) -> str:
    return f"opset{options.opset}-batch{options.batch or 'N'}-{options.outputs}"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Iterator[Path]:
    """A cache of this module's own, so that nothing comes from an older export."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def variant() -> Variant:
    return load_variant("yolov8_embedded")


@pytest.fixture(scope="module")
def detector(variant):
    from alignment.models.mmyolo_source import build_detector

    return build_detector(variant)


@pytest.fixture(scope="module")
def deployed(detector):
    from alignment.models.detector import fused

    return fused(detector)


@pytest.fixture(scope="module")
def dynamic(cache, variant) -> ExportedModel:
    return exported(variant, DYNAMIC)


@pytest.fixture(scope="module", params=OPTIONS, ids=name_of)
def case(request, cache, variant) -> tuple[ExportOptions, ExportedModel, onnx.ModelProto]:
    model = exported(variant, request.param)
    return request.param, model, onnx.load(model.onnx)


@pytest.fixture(scope="module")
def batch(variant) -> np.ndarray:
    """Three synthetic images, preprocessed: ``[3, 3, 320, 320]``."""
    images = [draw("val2017", index)[0] for index in range(3)]
    return np.stack([preprocess(image, variant.input, variant.preprocess)[0] for image in images])


def largest(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in expected.items()}
    return {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}


def torch64(module, batch: np.ndarray) -> dict[str, np.ndarray]:
    import copy

    with torch.inference_mode():
        values = copy.deepcopy(module).double()(torch.from_numpy(batch).double())
    return {name: value.numpy() for name, value in zip(module.output_names, values, strict=True)}


def test_opset_inputs_and_outputs_are_as_asked(case):
    options, _, model = case
    assert [(o.domain, o.version) for o in model.opset_import] == [("", options.opset)]

    def signature(values) -> dict[str, list]:
        dims = {v.name: v.type.tensor_type.shape.dim for v in values}
        return {name: [d.dim_param or d.dim_value for d in shape] for name, shape in dims.items()}

    first = options.batch or "batch"
    assert signature(model.graph.input) == {"images": [first, 3, 320, 320]}
    expected = {name: [first, *shape] for name, shape in SHAPES[options.outputs].items()}
    assert signature(model.graph.output) == expected
    assert list(signature(model.graph.output)) == list(expected), "in this order"


def test_the_checker_and_shape_inference_pass(case):
    _, exported_model, model = case
    onnx.checker.check_model(model, full_check=True)
    assert check_onnx(exported_model.onnx) == model
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    typed = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    assert [name for node in model.graph.node for name in node.output if name not in typed] == []


def test_the_papers_are_inside(case, variant):
    options, _, model = case
    papers = {p.key.removeprefix("alignment."): p.value for p in model.metadata_props}
    assert papers["variant"] == variant.name
    assert papers["variant_fingerprint"] == variant.fingerprint()
    assert papers["weights_sha256"] == file_digest(variant.weights)
    assert json.loads(papers["preprocess"]) == variant.preprocess.model_dump(mode="json")
    assert json.loads(papers["export"]) == asdict(options)
    assert json.loads(papers["versions"])["torch"] == torch.__version__
    assert str(variant.weights.parent).encode() not in model.SerializeToString(), "no path of this machine"


def test_every_batch_norm_is_folded(case, deployed):
    _, _, model = case
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in deployed.modules())


def test_every_node_is_in_the_map_and_every_conv_has_its_weights(case, deployed):
    _, exported_model, model = case
    node_map = json.loads(exported_model.node_map.read_text())
    assert list(node_map) == [node.name for node in model.graph.node]
    assert len(node_map) == len(model.graph.node), "names are unique"
    modules = dict(deployed.named_modules())
    initializers = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    convolved = []
    for node in model.graph.node:
        entry = node_map[node.name]
        assert entry["op"] == node.op_type
        assert entry["module"] in modules
        if node.op_type == "Conv":
            convolved.append(entry["module"])
            module = modules[entry["module"]]
            np.testing.assert_array_equal(initializers[entry["weight"]], module.weight.detach().numpy())
            np.testing.assert_array_equal(initializers[node.input[2]], module.bias.detach().numpy())
    assert sorted(convolved) == sorted(n for n, m in modules.items() if isinstance(m, torch.nn.Conv2d))


def test_activations_and_decoding_are_mapped(dynamic):
    """Nodes without weights belong to the module that was running; decoding belongs to none."""
    node_map = json.loads(dynamic.node_map.read_text())
    sigmoids = [entry["module"] for entry in node_map.values() if entry["op"] == "Sigmoid"]
    assert [path for path in sigmoids if not path.endswith(".activate")] == [""]
    # SPPF calls one pooling three times
    pools = [entry["module"] for entry in node_map.values() if entry["op"] == "MaxPool"]
    assert pools == ["model.backbone.stage4.2.poolings"] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_that_is_called_again_is_found_again(tmp_path):
    """Heads share convolutions between levels; the exporter numbers their scopes."""
    from alignment.export.node_map import build_node_map

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = torch.nn.MaxPool2d(1)
            self.shared = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)))
            self.plain = torch.nn.ModuleList([torch.nn.Conv2d(3, 3, 1)])

        def forward(self, x):
            for _ in range(2):
                x = self.plain[0](self.shared(self.pool(x)))
            return x

    class Outer(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.detector = torch.nn.Module()
            self.detector.model = torch.nn.Module()
            self.detector.model.head = model
            self.detector.forward = lambda x: model(x)

        def forward(self, x):
            return self.detector(x)

    outer, path = Outer(Inner()).eval(), tmp_path / "shared.onnx"
    torch.onnx.export(outer, (torch.zeros(1, 3, 8, 8),), str(path), dynamo=False)
    node_map = build_node_map(onnx.load(path), outer.detector)
    assert [entry["module"].removeprefix("model.head.") for entry in node_map.values()] == [
        *("pool", "shared.0", "shared.1.0", "plain.0"),
        *("pool", "shared.0", "shared.1.0", "plain.0"),
    ]


def test_a_node_map_with_foreign_weights_is_refused(dynamic, deployed):
    from alignment.export.node_map import build_node_map

    model = onnx.load(dynamic.onnx)
    weight = next(i for i in model.graph.initializer if i.name.endswith("stem.conv.weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    with pytest.raises(RuntimeError, match=r"does not hold the weights of module 'model\.backbone\.stem\.conv'"):
        build_node_map(model, deployed)


def test_the_graph_equals_torch_in_float64(case, detector, deployed, batch):
    """With the same weights to float64's rounding; without fusion to that of the fused weights, once each."""
    from alignment.runners.evaluator import OnnxEvaluator

    options, _, model = case
    images = batch[: options.batch or 2]
    found = OnnxEvaluator(model, "float64").run(images)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float64)}
    same = {name: value for name, value in torch64(deployed, images).items() if name in found}
    assert max(largest(found, same).values()) < 1e-9
    unfused = {name: value for name, value in torch64(detector, images).items() if name in found}
    differences = largest(found, unfused)
    assert max(differences.values()) > 0, "fusion rounds"
    # ten times what was measured: 4.1e-5 px, 2.1e-7, 2.6e-6
    limits = {"boxes": 4e-4, "scores": 2e-6}
    assert {n: d for n, d in differences.items() if d > limits.get(n, 3e-5)} == {}


def test_a_batch_gives_the_same_per_image(dynamic, batch):
    with OnnxRuntimeRunner(dynamic.onnx) as runner:
        together = runner.run(batch)
        alone = [runner.run(image[None]) for image in batch]
    apart = {name: np.concatenate([one[name] for one in alone]) for name in together}
    # seen equal to the bit; other CPUs may sum in another order
    differences = largest(together, apart)
    assert differences["boxes"] < 2e-3
    assert differences["scores"] < 2e-5
    assert np.ptp(together["scores"].max(1), axis=0).max() > 0.1, "the images are not alike"


@pytest.mark.parametrize("images", [1, 3, 4])
def test_a_fixed_batch_takes_any_number_of_images(cache, variant, dynamic, batch, images):
    some = batch[[0, 1, 2, 0]][:images]
    with OnnxRuntimeRunner(exported(variant, OPTIONS[3]).onnx) as runner:
        pieces = runner.run(some)
    assert {len(value) for value in pieces.values()} == {images}
    with OnnxRuntimeRunner(dynamic.onnx) as runner:
        differences = largest(pieces, runner.run(some))
    assert differences["boxes"] < 2e-3
    assert differences["scores"] < 2e-5


def test_the_second_export_comes_from_the_cache(cache, variant, dynamic, monkeypatch):
    before = dynamic.onnx.stat()
    monkeypatch.setattr(onnx_export, "export", lambda *_: pytest.fail("exported again"))
    again = exported(variant, ExportOptions(17, None, "both"))
    assert again == dynamic
    assert again.onnx.stat().st_mtime_ns == before.st_mtime_ns
    assert exported(variant).onnx == dynamic.onnx, "the default options"


def test_other_weights_or_settings_are_another_export(cache, variant, dynamic, tmp_path, monkeypatch):
    made: list[Path] = []

    def pretend(variant: Variant, folder: Path, options: ExportOptions) -> None:
        made.append(folder)

    monkeypatch.setattr(onnx_export, "export", pretend)
    weights = tmp_path / "other.pth"
    weights.write_bytes(variant.weights.read_bytes() + b"\0")
    source = variant.source.model_copy(update={"checkpoint": weights})
    exported(variant.model_copy(update={"source": source}))
    exported(variant.model_copy(update={"nms": variant.nms.model_copy(update={"iou_threshold": 0.5})}))
    exported(variant, ExportOptions(16))
    exported(variant, ExportOptions(17, 1))
    assert len({*made, dynamic.onnx.parent}) == 5


@pytest.fixture
def quick(dynamic, detector, deployed, monkeypatch) -> None:
    """Building, tracing and simplification take what was made before."""
    monkeypatch.setattr("alignment.models.mmyolo_source.build_detector", lambda variant: detector)
    monkeypatch.setattr("alignment.models.detector.fused", lambda module: deployed)
    monkeypatch.setattr(onnx_export, "_trace", lambda d, v, o, path: shutil.copyfile(dynamic.onnx, path))
    monkeypatch.setattr(onnx_export, "_simplify", lambda model: model)


@pytest.mark.parametrize("step", ["_trace", "_simplify", "_add_papers"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_leaves_nothing_behind(quick, variant, tmp_path, monkeypatch, step, error):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))

    def fail(*args) -> None:
        if step == "_trace":
            args[-1].write_bytes(b"half")
        raise error("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, step, fail)
        with pytest.raises(error, match="stopped"):
            exported(variant)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    done = exported(variant)
    assert {path for path in done.onnx.parent.iterdir()} == {done.onnx, done.node_map, done.onnx.parent / "entry.json"}


def test_an_exporter_that_writes_another_opset_is_caught(quick, variant, tmp_path):
    with pytest.raises(AlignError, match="yolov8_embedded: opset 13 asked for, 17 written"):
        onnx_export.export(variant, tmp_path, ExportOptions(13))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [9, 12, 18])
def test_an_opset_out_of_range_is_refused(opset):
    with pytest.raises(AlignError, match=f"opset {opset} is not supported: give one from 13 to 17"):
        ExportOptions(opset)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_that_is_none_is_refused(batch):
    with pytest.raises(AlignError, match=f"batch {batch} is not a batch size"):
        ExportOptions(batch=batch)


def test_a_truncated_export_is_named(dynamic, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(dynamic.onnx.read_bytes()[:100_000])
    for reader in (check_onnx, OnnxRuntimeRunner):
        with pytest.raises(AlignError, match=re.escape(str(path))):
            reader(path)
