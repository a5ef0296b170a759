"""Quantization-aware training: better than PTQ, one graph in torch and ONNX before and after, resumed to the bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import yaml
from command_line import align
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from test_recipe import assert_routes_agree

from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.data.samples import open_samples
from alignment.errors import AlignError
from alignment.export.onnx_export import exported
from alignment.models.outputs import detections_of, to_outputs
from alignment.quantize import recipe
from alignment.quantize.keep_float import write_keep_float
from alignment.quantize.trained import Trained
from alignment.runners.base import Runner
from alignment.runners.onnxruntime import OnnxRuntimeRunner
from alignment.runners.torch import TorchRunner
from alignment.variant import Variant, load_variant, with_quantization

torch = pytest.importorskip("torch")
pytest.importorskip("mmyolo")
pytest.importorskip("pytorch_quantization")
amax_with = pytest.importorskip("alignment.quantize.torch_model").amax_with
pytestmark = pytest.mark.qat

NAMES = ("yolov5", "yolov6", "yolov7", "yolov8", "yolox", "ppyoloe", "rtmdet", "rtmdet_r")
IMAGES = 4


@pytest.fixture(scope="module")
def qat() -> SimpleNamespace:
    """The modules: mmyolo must be importable before they are."""
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from alignment.quantize import distill, lsq, qat, qat_data, qat_model, torch_model

    return SimpleNamespace(
        run=qat, data=qat_data, model=qat_model, lsq=lsq, distill=distill, detector=torch_model, Options=qat.Options
    )


def small(name: str) -> Variant:
    if name.startswith("rtmdet_r_"):
        pytest.importorskip("mmrotate")
    return with_quantization(load_variant(name), {"images": IMAGES})


def detect(variant: Variant, runner: Runner, images: int | None = None) -> dict:
    """Detections on the validation images."""
    found = {}
    for sample in open_samples(variant, limit=images):
        outputs = to_outputs(runner.run(sample.tensor[None].copy()), variant, 1)
        found[sample.entry.id] = detections_of(outputs, sample.transform, variant)
    return found


def detect_onnx(variant: Variant, model: onnx.ModelProto) -> dict:
    """The same in ONNX Runtime, node by node."""
    with OnnxRuntimeRunner(recipe.graph_file(model, f"{variant.name}.qdq"), optimize=False) as runner:
        return detect(variant, runner)


@pytest.fixture(scope="module")
def hard(qat, quantized_build, tmp_path_factory) -> SimpleNamespace:
    """Plain int8 costs this YOLOv6 a seventh of its agreement with FP32; it is trained for a minute."""
    variant, folder = load_variant("yolov6_embedded"), tmp_path_factory.mktemp("qat")
    start = quantized_build(variant)
    options = qat.Options(epochs=3, images=96, held_out=16)
    outcome = qat.run.train(variant, start, options, folder / "checkpoint.pth")
    outcome.trained.save(folder / "trained.npz")
    after = with_quantization(variant, {"trained": folder / "trained.npz"})
    return SimpleNamespace(variant=variant, start=start, outcome=outcome, after=after, trained=recipe.quantize(after))


@pytest.fixture(scope="module")
def found(qat, hard) -> SimpleNamespace:
    """What each side detects on the validation images: before training, and after."""
    variant, both = hard.variant, (hard.start, hard.trained)
    detectors = [qat.detector.quantized_detector(variant, quantized) for quantized in both]
    return SimpleNamespace(
        dataset=open_samples(variant).dataset,
        float32=detect_onnx(variant, onnx.load(exported(variant).onnx)),
        onnx=[detect_onnx(variant, quantized.model) for quantized in both],
        torch=[detect(variant, TorchRunner(variant, detector=detector)) for detector in detectors],
    )


def test_it_is_nearer_to_float_than_ptq_on_images_that_it_never_saw(found):
    ptq, trained = (agreement_ap(found.dataset, found.float32, side) for side in found.onnx)
    assert ptq < 0.88
    assert trained > ptq + 0.03
    assert coco_ap(found.dataset, found.onnx[1])[0] > coco_ap(found.dataset, found.onnx[0])[0] + 0.005


@pytest.mark.parametrize("place", [0, 1], ids=["before", "after"])
def test_torch_and_onnx_are_one_graph(found, place):
    ours, theirs = found.torch[place], found.onnx[place]
    assert agreement_ap(found.dataset, ours, theirs) >= 0.99
    assert abs(coco_ap(found.dataset, ours)[0] - coco_ap(found.dataset, theirs)[0]) <= 0.002


def test_what_was_kept_is_what_was_trained_to_the_bit(qat, hard):
    """The detector of the best epoch, and the one that stands behind the graph that was written."""
    image = torch.from_numpy(next(iter(open_samples(hard.variant, limit=1))).tensor[None])
    start = qat.detector.quantized_detector(hard.variant, hard.start)
    kept = qat.detector.quantized_detector(hard.after, hard.trained)
    again = qat.model.trained_of(hard.variant, kept, qat.detector.node_map_of(hard.variant), hard.trained)
    for part in ("weights", "biases", "scales", "weight_scales"):
        ours, theirs = getattr(again, part), getattr(hard.outcome.trained, part)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert not torch.equal(start(image)[1], kept(image)[1])


def test_weights_end_on_whole_steps_and_every_route_has_the_trained_scales(hard):
    trained = hard.outcome.trained
    for quantizer in hard.trained.placement.weights:
        name = quantizer.initializer
        levels = np.moveaxis(trained.weights[name], quantizer.axis, -1) / trained.weight_scales[name]
        assert np.abs(levels - np.rint(levels)).max() < 1e-3
        assert np.abs(levels).max() < 127.5
    assert any(trained.scales[name] != scale for name, scale in hard.start.scales.items())
    learnt = np.array(list(trained.scales.values()))
    assert np.array_equal(amax_with(learnt) / np.float32(127), learnt)  # a torch quantizer can have them
    assert_routes_agree(hard.trained)
    groups: dict[str, set[float]] = {}
    for quantizer in hard.trained.placement.activations:
        groups.setdefault(quantizer.group, set()).add(float(trained.scales[quantizer.tensor]))
    assert all(len(scales) == 1 for scales in groups.values())


@pytest.fixture(scope="module")
def light(qat, quantized_build) -> SimpleNamespace:
    """A detector that is quick to train, and how."""
    variant = small("yolov5_embedded")
    options = qat.Options(epochs=2, batch=4, images=8, held_out=4, distill=("logits",))
    return SimpleNamespace(variant=variant, start=quantized_build(variant), options=options)


def bits(trained: Trained) -> Mapping[str, bytes]:
    parts = (trained.weights, trained.biases, trained.scales)
    return {f"{number}/{name}": value.tobytes() for number, part in enumerate(parts) for name, value in part.items()}


@pytest.fixture(scope="module")
def undisturbed(qat, light, tmp_path_factory):
    """Training that nothing befalls."""
    return qat.run.train(light.variant, light.start, light.options, tmp_path_factory.mktemp("qat") / "c.pth")


def kill_at(count: int):
    """Progress that ends the process, as Ctrl-C does, when so many batches are done."""

    def move(stage: str, done: int, total: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return move


def test_what_was_killed_goes_on_to_the_same_bits(qat, light, undisturbed, tmp_path):
    path = tmp_path / "checkpoint.pth"
    with pytest.raises(KeyboardInterrupt):
        qat.run.train(light.variant, light.start, light.options, path, progress=kill_at(3))
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    torch.manual_seed(99)
    np.random.seed(99)
    counted: list[int] = []
    resumed = qat.run.train(
        light.variant, light.start, light.options, path, progress=lambda stage, done, total: counted.append(done)
    )
    assert counted == [3, 4]
    assert resumed.epochs == undisturbed.epochs
    assert bits(resumed.trained) == bits(undisturbed.trained)
    with pytest.raises(AlignError, match=r"begun with another start or other options"):
        qat.run.train(light.variant, light.start, replace(light.options, seed=1), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AlignError, match=r"no checkpoint of align qat.*delete it"):
        qat.run.train(light.variant, light.start, light.options, path)


def test_another_seed_trains_to_other_weights_and_the_process_keeps_its_own(qat, light, undisturbed, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    other = qat.run.train(light.variant, light.start, replace(light.options, seed=1), tmp_path / "c.pth")
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert undisturbed.best
    assert other.best
    assert bits(other.trained) != bits(undisturbed.trained)


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_an_absurd_rate_stops_with_the_start_kept(qat, light, rate, tmp_path):
    options = replace(light.options, lr=rate, scale_lr=0.0, max_norm=1e38)
    outcome = qat.run.train(light.variant, light.start, options, tmp_path / "c.pth")
    assert outcome.diverged
    assert outcome.best == 0
    assert "not finite" in outcome.stopped or "agreement fell" in outcome.stopped
    float_weights = {i.name: numpy_helper.to_array(i) for i in onnx.load(light.start.source).graph.initializer}
    for name, scale in light.start.weight_scales.items():
        steps = np.abs(outcome.trained.weights[name] - float_weights[name]) / scale.reshape(-1, 1, 1, 1)
        assert steps.max() < 0.51
    assert outcome.trained.scales == light.start.scales


def test_a_loss_that_is_no_number_stops_with_the_last_good_epoch_kept(qat, light, undisturbed, tmp_path, monkeypatch):
    calls = []

    def planted(*tensors):
        calls.append(1)
        return qat.distill.box_loss(*tensors) * (torch.nan if len(calls) > 2 else 1)

    monkeypatch.setattr(qat.model, "box_loss", planted)
    outcome = qat.run.train(light.variant, light.start, light.options, tmp_path / "c.pth")
    assert outcome.diverged
    assert outcome.stopped == "epoch 2, iteration 3: the loss is not finite"
    assert len(outcome.epochs) == 2
    assert outcome.epochs == undisturbed.epochs[:2]
    assert all(np.isfinite(weight).all() for weight in outcome.trained.weights.values())


def test_training_stops_when_no_epoch_is_better(qat, light, tmp_path, monkeypatch):
    monkeypatch.setattr(qat.run.Judge, "__call__", lambda judge, detector: 0.5)
    options = replace(light.options, epochs=9, patience=1)
    outcome = qat.run.train(light.variant, light.start, options, tmp_path / "c.pth")
    assert (len(outcome.epochs), outcome.best, outcome.diverged) == (2, 0, False)
    assert outcome.stopped == "no epoch of 1 is better than epoch 0"


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_losses_whose_gradients_reach_every_weight(qat, quantized_build, name):
    from mmengine.logging import MessageHub

    variant = small(f"{name}_embedded")
    start = quantized_build(variant)
    owner = qat.detector.quantized_detector(variant, start)
    parameters = qat.model.trainable(owner, qat.detector.node_map_of(variant))
    ratios = qat.lsq.learn_scales(owner, start.placement)
    held_out, images = qat.data.split_images(variant, None, 8, 4)
    preprocessor, loader = qat.data.data_config(held_out, images, 4, 0)
    teacher = qat.detector.float_detector(variant, exported(variant).onnx)
    model = qat.model.QatModel(owner, preprocessor, teacher, distill=("features", "logits"))
    batch = next(iter(qat.run.Runner.build_dataloader(loader)))
    MessageHub.get_current_instance().update_info("epoch", 0)  # as the Runner does: two heads ask for it
    model.train()
    losses = model(**model.data_preprocessor(batch, True))
    total, named = model.parse_losses(losses)
    assert {"loss_features", "loss_scores", "loss_boxes"} < set(named)
    assert sum(name not in ("loss", "loss_features", "loss_scores", "loss_boxes") for name in named) >= 2
    total.backward()
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in parameters)
    assert all(float(ratio.grad.abs()) > 0 for ratio in ratios)
    weights = sum(module.weight.numel() for module in owner.detector.modules() if isinstance(module, torch.nn.Conv2d))
    assert sum(parameter.numel() for parameter in parameters) >= 0.99 * weights


class TestLearnedScales:
    @given(
        st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40),
        st.floats(2, 500, width=32),
        st.floats(0.25, 4, width=32),
    )
    def test_values_and_gradients_are_the_papers(self, qat, values, amax, ratio):
        """The estimator written with autograd: round(x) = x + detach(round(x) - x)."""
        given_values, largest = torch.tensor([values]), torch.tensor(amax)
        ours = qat.lsq.LearnedScale(largest, torch.nn.Parameter(torch.tensor(ratio)))
        step = ours.scale.detach()
        scale = np.float32(step.numpy())
        read = given_values.clone().requires_grad_()
        out = ours(read)
        assert torch.equal(out, qat.detector.quantizer_of(scale)(given_values))
        weights = torch.linspace(-1, 2, len(values))
        (out * weights).sum().backward()
        x, s = given_values.double().requires_grad_(), step.double().requires_grad_()
        clipped = (x / s).clamp(-128, 127)
        (((clipped + (clipped.round() - clipped).detach()) * s) * weights).sum().backward()
        near = ((given_values / step).abs() % 1 - 0.5).abs() < 1e-3  # there float32 may round to the other side
        edge = ((given_values / step + 128).abs() < 1) | ((given_values / step - 127).abs() < 1)
        if not bool((near | edge).any()):
            torch.testing.assert_close(read.grad.double(), x.grad, rtol=1e-5, atol=1e-5)
            gain = (len(values) * 127) ** -0.5
            torch.testing.assert_close(ours.ratio.grad.double(), s.grad * (amax / 127) * gain, rtol=1e-3, atol=1e-3)

    def test_a_ratio_stays_positive(self, qat):
        module = qat.lsq.LearnedScale(torch.tensor(127.0), torch.nn.Parameter(torch.tensor(-3.0)))
        assert float(module.scale.detach()) == 1 / 16


class TestDistillation:
    def test_what_is_alike_costs_nothing(self, qat):
        boxes, scores = torch.rand(2, 5, 4) * 100, torch.rand(2, 5, 3)
        assert float(qat.distill.score_loss(scores, scores)) == pytest.approx(0, abs=1e-4)
        assert float(qat.distill.box_loss(boxes, boxes, scores, torch.full((5,), 8.0))) == 0
        assert float(qat.distill.feature_loss([boxes], [boxes])) == 0

    def test_boxes_that_the_teacher_does_not_see_do_not_count(self, qat):
        boxes, stride = torch.rand(1, 4, 5) * 100, torch.full((4,), 8.0)
        moved, scores = boxes.clone(), torch.tensor([[[0.0], [0.9], [0.9], [0.0]]])
        moved[:, [0, 3]] += 50
        assert float(qat.distill.box_loss(moved, boxes, scores, stride)) == 0
        moved[:, 1, 4] += 1
        assert float(qat.distill.box_loss(moved, boxes, scores, stride)) == pytest.approx(0.5)

    def test_features_count_by_their_own_size(self, qat):
        theirs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        losses = [float(qat.distill.feature_loss([1.1 * size * theirs], [size * theirs])) for size in (1, 100)]
        assert losses == pytest.approx([0.01, 0.01])

    def test_a_score_is_drawn_to_the_teachers(self, qat):
        ours, theirs = torch.tensor([[[0.2]]], requires_grad=True), torch.tensor([[[0.7]]])
        qat.distill.score_loss(ours, theirs).backward()
        assert float(ours.grad) < 0


class TestFile:
    @pytest.fixture
    def path(self, undisturbed, tmp_path) -> Path:
        undisturbed.trained.save(tmp_path / "trained.npz")
        return tmp_path / "trained.npz"

    def test_it_is_part_of_the_recipe_by_its_content(self, light, undisturbed, path):
        changed = with_quantization(light.variant, {"trained": path}).quantization
        first = changed.fingerprint()
        assert first != light.variant.quantization.fingerprint()
        moved = path.rename(path.with_name("elsewhere.npz"))
        assert with_quantization(light.variant, {"trained": moved}).quantization.fingerprint() == first
        replace(undisturbed.trained, scales={}).save(moved)
        assert with_quantization(light.variant, {"trained": moved}).quantization.fingerprint() != first

    def test_one_of_another_network_is_refused(self, path):
        with pytest.raises(AlignError, match=r"trained for another network than yolov8_embedded.*align qat"):
            Trained.load(path, load_variant("yolov8_embedded"))

    def test_one_of_another_placement_is_refused(self, light, path):
        changed = with_quantization(light.variant, {"trained": path, "policy": "conv-only"})
        with pytest.raises(AlignError, match="trained with other nodes in float"):
            recipe.quantize(changed)

    def test_ranges_of_another_tool_are_refused_beside_it(self, light, path):
        with pytest.raises(AlignError, match="scales that were trained, and ranges of another tool"):
            recipe.quantize(with_quantization(light.variant, {"trained": path}), ranges={"images": 1.0})

    @pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no archive", b"nothing"])
    def test_what_is_no_such_file_is_refused(self, light, tmp_path, content):
        path = tmp_path / "broken.npz"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(AlignError, match=r"broken\.npz"):
            recipe.quantize(with_quantization(light.variant, {"trained": path}))

    def test_one_cut_short_is_refused(self, light, path):
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(AlignError, match="not a file of align qat"):
            recipe.quantize(with_quantization(light.variant, {"trained": path}))


class TestCommand:
    ONE = ("--epochs", 1, "--images", 8, "--held-out", 4, "--distill", "logits", "--no-labels")

    def test_a_variant_comes_out_that_runs_by_every_route(self, light, tmp_path):
        kept = next(iter(n for n in onnx.load(exported(light.variant).onnx).graph.node if n.op_type == "Conv")).name
        partial, recipe_then = (
            tmp_path / "partial",
            light.variant.quantization.model_copy(update={"policy": "conv-only"}),
        )
        write_keep_float(
            partial / "keep_float.yaml", "yolov5_embedded", exported(light.variant).onnx, {kept: "first"}, recipe_then
        )
        result = align("qat", "yolov5_embedded", "--out", tmp_path / "out", "--from", partial, *self.ONE)
        assert result.exit_code in (0, 1), result.output
        own = load_variant(tmp_path / "out" / "yolov5_embedded_qat.yaml")
        assert own.name == "yolov5_embedded_qat"
        assert own.quantization == recipe_then.model_copy(
            update={"keep_float": [kept], "trained": own.quantization.trained}
        )
        assert "its recipe is taken: policy conv-only" in result.stdout
        assert not list((tmp_path / "out").glob("*checkpoint*"))
        quantized = recipe.quantize(own)
        assert quantized.placement.float_nodes[kept].startswith("keep-float")
        written = onnx.load(tmp_path / "out" / "yolov5_embedded.qdq.onnx")
        assert written.SerializeToString(deterministic=True) == quantized.model.SerializeToString(deterministic=True)
        papers = json.loads((tmp_path / "out" / "yolov5_embedded.qat.json").read_text())
        assert [set(epoch) >= {"agreement"} for epoch in papers["epochs"]] == [True, True]
        assert papers["options"]["distill"] == ["logits"]
        assert papers["images"] == 8
        run = align("run", tmp_path / "out" / "yolov5_embedded_qat.yaml", "--precision", "int8", "--images", 2)
        assert "yolov5_embedded_qat-onnxruntime-int8-qdq" in run.output
        assert run.exit_code in (0, 1)

    def test_a_config_that_is_a_file_is_found_from_anywhere(self, light, tmp_path, monkeypatch):
        """The config lies beside the variant's YAML, and is named by that alone."""
        from alignment.models.mmyolo_source import load_config

        given, config = tmp_path / "given", load_config(light.variant)
        given.mkdir()
        config.dump(given / "config.py")
        fields = light.variant.model_dump(mode="json", exclude_defaults=True)
        fields["source"] = {**fields["source"], "config": "config.py", "options": {}}
        (given / "mine.yaml").write_text(yaml.safe_dump({**fields, "name": "mine"}))
        monkeypatch.chdir(given)
        result = align("qat", "mine.yaml", "--out", "../out", *self.ONE)
        assert result.exit_code in (0, 1), result.output
        own = load_variant("../out/mine_qat.yaml")
        here = recipe.quantize(own).model
        monkeypatch.chdir("/")
        elsewhere = load_variant(tmp_path / "out" / "mine_qat.yaml")
        assert elsewhere.fingerprint() == own.fingerprint() == load_variant(given / "mine.yaml").fingerprint()
        assert elsewhere.fingerprint() != light.variant.fingerprint()
        assert recipe.quantize(elsewhere).model == here

    def test_divergence_is_one_line_and_status_1(self, tmp_path):
        result = align("qat", "yolov5_embedded", "--out", tmp_path, "--lr", 1000, *self.ONE)
        assert result.exit_code == 1
        assert sum(line.startswith("diverged: ") for line in result.output.splitlines()) == 1

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (("--no-labels", "--distill", "none"), "nothing is left to train by"),
            (("--from", "nowhere.yaml"), "nowhere.yaml: No such file"),
            (("--images", 4, "--held-out", 0), "--held-out"),
        ],
    )
    def test_wrong_usage_is_one_line(self, tmp_path, arguments, line):
        result = align("qat", "yolov5_embedded", "--out", tmp_path / "out", *arguments)
        assert result.exit_code == 2
        assert line in result.output
        assert not (tmp_path / "out").exists()

    def test_a_bare_file_has_nothing_to_train(self, tmp_path):
        fields = {
            "name": "bare",
            "source": {"kind": "onnx", "file": str(tmp_path / "a.onnx"), "head": {"layout": "decoded"}},
            "input": {"height": 64, "width": 64},
            "classes": 2,
        }
        (tmp_path / "bare.yaml").write_text(yaml.safe_dump(fields))
        result = align("qat", tmp_path / "bare.yaml", "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "no torch model to train" in result.output
