"""Quantization-aware training of a fused detector by mmyolo's own Runner, losses and data pipeline.

What is trained is the graph that is deployed: BatchNorms are folded, RepVGG branches merged, and every node reads what
the QDQ graph says it reads.  Augmentation is a flip, there is no average of weights, and the schedule is short: a
linear warm-up and a cosine.

A weight moves in quantization steps of its channel, so that one learning rate suits layers and channels of any range.
Scales of weights stay what they were; those of activations too, unless they are learnt (`alignment.quantize.lsq`).
After each epoch agreement with the float detector is measured on training images that were held out, and all is
written; the best epoch is what remains, the start included.
"""

from __future__ import annotations

import logging
import math
import random
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.utils import parametrize

from alignment.compare.coco_map import agreement_ap
from alignment.data.samples import CALIBRATION_SPLIT, Samples, dataset_root, images_mend
from alignment.errors import AlignError
from alignment.quantize.distill import box_loss, feature_loss, score_loss
from alignment.quantize.lsq import LearnedScale, learn_scales
from alignment.quantize.torch_model import QuantizedDetector, Quantizing, float_detector, node_map_of, quantized_detector
from alignment.quantize.trained import Trained, identity_of
from alignment.runners.base import cpu_threads
from alignment.storage import writing
from alignment.variant import Variant

if TYPE_CHECKING:
    from alignment.models.detector import Detector
    from alignment.nms.multiclass import Detections
    from alignment.quantize.recipe import Quantized

Progress = Callable[[str, int, int], None]
#: Transforms of a training pipeline that fine-tuning does without.
STRONG = ("YOLOv5RandomAffine", "YOLOv5HSVRandomAug", "mmrotate.RandomRotate")
WARMUP, FINAL_RATE = 0.1, 0.01
#: Training that falls below this part of the agreement that it began with has diverged.
DIVERGED = 0.5


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        epochs: at most.
        lr: of weights and biases, by AdamW, in quantization steps of their channel.
        scale_lr: of activation scales where they are learnt, in parts of themselves.
        batch: images at once.
        images: at most so many of the training split are trained on.
        held_out: so many others, its last, say which epoch is best.
        labels: whether mmyolo's losses take part; without them there must be something to distill.
        distill: of ``features`` and ``logits``: what is brought near to the float detector's.
        learn_scales: whether scales of activations are trained.
        patience: so many epochs without a better one end it.
        max_norm: of the gradient, see `torch.nn.utils.clip_grad_norm_`.
        seed: of the order of images, and of flips.
        device: of torch, "cpu" or "cuda".
    """

    epochs: int = 6
    lr: float = 0.02
    scale_lr: float = 2e-3
    batch: int = 8
    images: int = 224
    held_out: int = 32
    labels: bool = True
    distill: tuple[str, ...] = ()
    learn_scales: bool = False
    patience: int = 3
    max_norm: float = 10.0
    seed: int = 0
    device: str = "cpu"


class Diverged(Exception):
    """Training that came to nothing, and how that showed."""


@dataclass
class Progressed:
    """What training came to so far.

    Attributes:
        epochs: for each one its mean losses, and ``agreement`` on the images held out; the start comes first.
        best: number of the epoch with the best agreement, 0 for the start.
        state: the model's state after that epoch.
        stopped: why it ended before its last epoch, if it did.
    """

    epochs: list[dict[str, float]]
    best: int
    state: dict[str, Tensor]
    stopped: str = ""


class QatModel(BaseModel):
    """What the Runner trains: a quantized detector, with the losses of its own head and of distillation.

    Args:
        owner: the detector; its head is that of mmyolo, with assigner and losses.
        preprocessor: config of mmyolo's data preprocessor.
        teacher: the float detector, where something is distilled.
        options: how to train.
    """

    def __init__(self, owner: QuantizedDetector, preprocessor: dict, teacher: Detector | None, options: Options) -> None:
        super().__init__(preprocessor)
        self.owner, self.options = owner, options
        #: Out of sight of `parameters` and `state_dict`.
        self._teacher = (teacher.to(options.device),) if teacher else ()
        head: Any = owner.detector.model.bbox_head
        # What is fine-tuned has no need of the assigner that YOLOv6 and PP-YOLOE begin with.
        head.initial_epoch = 0

    def init_weights(self) -> None:
        """Nothing: they are there."""

    def train(self, mode: bool = True) -> QatModel:
        """Only the head tells training from evaluation: it then also gives what its losses need."""
        super().train(False)
        head: Any = self.owner.detector.model.bbox_head
        head.head_module.train(mode)
        return self

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "loss") -> dict[str, Any]:
        """The losses of a batch.

        Raises:
            Diverged: when the head gives numbers that are not finite.
        """
        detector = self.owner.detector
        head: Any = detector.model.bbox_head
        with Quantizing(self.owner) as quantizing:
            features = detector.model.extract_feat(inputs)
            raw = head(features)
        quantizing.require_all()
        if not all(bool(level.isfinite().all()) for kind in raw[:2] for level in kind):
            raise Diverged("the head's outputs are not finite")
        losses: dict[str, Any] = {}
        if self.options.labels:
            losses |= head.loss_by_feat(*raw, data_samples["bboxes_labels"], data_samples["img_metas"])
        for teacher in self._teacher:
            losses |= self._distilled(teacher, inputs, features, raw)
        return losses

    def _distilled(self, teacher: Detector, inputs: Tensor, features: Any, raw: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            theirs = teacher.model.extract_feat(inputs)
            boxes, scores = teacher.decoded(teacher.model.bbox_head(theirs))
        losses = {}
        if "features" in self.options.distill:
            losses["loss_features"] = feature_loss(features, theirs)
        if "logits" in self.options.distill:
            our_boxes, our_scores = self.owner.detector.decoded(raw)
            losses["loss_scores"] = score_loss(our_scores, scores)
            losses["loss_boxes"] = box_loss(our_boxes, boxes, scores, teacher.stride)
        # mmyolo's losses are those of an image times the images of a batch.
        return {name: loss * len(inputs) for name, loss in losses.items()}


class _InSteps(nn.Module):
    """Parametrizes a tensor by how many quantization steps it is long; those are powers of two, nothing is rounded."""

    step: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("step", scale.log2().round().exp2())

    def forward(self, steps: Tensor) -> Tensor:
        return steps * self.step

    def right_inverse(self, values: Tensor) -> Tensor:
        return values / self.step


def trainable(owner: QuantizedDetector, node_map: Mapping[str, Mapping[str, str]]) -> list[nn.Parameter]:
    """Makes weights and biases of the graph's nodes parameters in quantization steps; one for each initializer."""
    found: list[nn.Parameter] = []
    shared: dict[str, nn.Parameter] = {}
    done: set[str] = set()
    for entry in node_map.values():
        if "weight" not in entry or entry["module"] in done:
            continue
        done.add(entry["module"])
        module: Any = owner.detector.get_submodule(entry["module"])
        axis = 1 if entry["op"] == "ConvTranspose" else 0
        largest = module.weight.detach().abs().amax([d for d in range(module.weight.dim()) if d != axis], keepdim=True)
        whole = largest.max().clamp(min=1e-6)
        scale = torch.where(largest > 1e-6 * whole, largest, whole) / 127
        steps = {"weight": scale} if module.bias is None else {"weight": scale, "bias": scale.flatten()}
        for name, step in steps.items():
            parametrize.register_parametrization(module, name, _InSteps(step))
            part = module.parametrizations[name]
            key = entry["weight"] if name == "weight" else f"{entry['module']}.bias"
            part.original = shared.setdefault(key, part.original.requires_grad_())
    found.extend(shared.values())
    return found


class _Watch(Hook):
    """Seeds each epoch, measures it, keeps the best, writes all, and stops where no good comes of it."""

    def __init__(
        self, options: Options, agreement: Callable[[QatModel], float], path: Path, identity: str, progress: Progress
    ) -> None:
        self.options, self.agreement, self.path, self.identity = options, agreement, path, identity
        self.progress = progress
        self.found: Progressed | None = None
        self._losses: list[dict[str, float]] = []

    def before_train(self, runner: Runner) -> None:
        if self.found is None:
            self.found = Progressed([{"agreement": self.agreement(runner.model)}], 0, _copied(runner.model))

    def before_train_epoch(self, runner: Runner) -> None:
        # What is resumed goes on with the same flips.
        seed = self.options.seed * 1000 + runner.epoch
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self._losses = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        losses = {name: float(value.detach()) for name, value in outputs.items()}
        if not all(map(math.isfinite, losses.values())):
            raise Diverged("the loss is not finite")
        self._losses.append(losses)
        self.progress("training", runner.iter + 1, runner.max_iters)

    def after_train_epoch(self, runner: Runner) -> None:
        assert self.found is not None
        found, number = self.found, runner.epoch + 1
        mean = {name: float(np.mean([losses[name] for losses in self._losses])) for name in self._losses[0]}
        agreement = self.agreement(runner.model)
        found.epochs.append({**mean, "agreement": agreement})
        if agreement < DIVERGED * found.epochs[0]["agreement"]:
            raise Diverged(f"agreement fell from {found.epochs[0]['agreement']:.3f} to {agreement:.3f}")
        if agreement > found.epochs[found.best]["agreement"]:
            found.best, found.state = number, _copied(runner.model)
        if number - found.best >= self.options.patience and number < runner.max_epochs:
            found.stopped = f"no epoch of {self.options.patience} is better than epoch {found.best}"
            runner.train_loop.stop_training = True
        with writing(self.path) as temporary:
            runner.save_checkpoint(str(temporary.parent), temporary.name, by_epoch=True)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        assert self.found is not None
        checkpoint["qat"] = {"identity": self.identity, **asdict(self.found)}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        kept = dict(checkpoint["qat"])
        if kept.pop("identity") != self.identity:
            raise AlignError(
                f"{self.path}: begun with other options", "give the same options, another --out, or delete it"
            )
        self.found = Progressed(**kept)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class Outcome:
    """What came of training.

    Attributes:
        trained: the best epoch's weights and scales, for `Quantization.trained`.
        epochs: see `Progressed`.
        best: see `Progressed`; 0: none was better than the start, which is what `trained` holds.
        stopped: why it ended early, or "".
        diverged: whether that is because it came to nothing.
        report: all that ``<variant>.qat.json`` says.
    """

    trained: Trained
    epochs: list[dict[str, float]]
    best: int
    stopped: str
    diverged: bool
    report: dict[str, Any]


def train(
    variant: Variant,
    quantized: Quantized,
    options: Options,
    checkpoint: Path,
    data: Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Trains a quantized variant; goes on from `checkpoint` where that is there.

    Args:
        variant: with an mmyolo source, by whose recipe it was quantized.
        quantized: the start: its weights, placement and scales.
        options: how to train.
        checkpoint: written after each epoch.
        data: COCO-layout root, for variants on COCO.
        progress: called with the stage, how much of it is done, and all.

    Raises:
        AlignError: for a variant without torch model or images, and a checkpoint of other options.
    """
    if not (options.labels or options.distill):
        raise AlignError("--no-labels without --distill: nothing is left to train by", "give --distill logits")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise AlignError(f"--device cuda: torch {torch.__version__} finds no GPU", "leave it at cpu")
    root, held_out, learnt = _images(variant, data, options)
    if threads := cpu_threads():
        torch.set_num_threads(threads)
    node_map = node_map_of(variant)
    owner = quantized_detector(variant, quantized)
    float_model = _float(variant)
    preprocessor, loader = _data(variant, root, learnt, held_out.dataset.class_names, options)
    model = QatModel(owner, preprocessor, float_model if options.distill else None, options)
    groups = [{"params": trainable(owner, node_map), "lr": options.lr}]
    if options.learn_scales:
        groups.append({"params": learn_scales(owner, quantized.placement), "lr": options.scale_lr})
    judge = _Judge(held_out, float_model)
    identity = _identity(variant, quantized, options, held_out)
    watch = _Watch(options, judge, checkpoint, identity, progress or (lambda stage, done, total: None))
    stopped, diverged = "", False
    with _undisturbed(), tempfile.TemporaryDirectory(prefix="align-qat-") as work:
        runner = _runner(model, loader, groups, watch, options, Path(work), learnt)
        try:
            runner.train()
        except Diverged as error:
            stopped, diverged = f"epoch {runner.epoch + 1}, iteration {runner.iter + 1}: {error}", True
    assert watch.found is not None
    found = watch.found
    model.load_state_dict(found.state)
    model.cpu()
    trained = _trained(variant, owner, node_map, quantized)
    stopped = stopped or found.stopped
    report = {
        "variant": variant.name,
        "options": asdict(options),
        "start": variant.quantization.model_dump(mode="json"),
        "identity": dict(trained.identity),
        "trained_on": learnt,
        "held_out": len(held_out),
        "epochs": found.epochs,
        "best": found.best,
        "stopped": stopped,
        "diverged": diverged,
        "deterministic": options.device == "cpu",
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }
    return Outcome(trained, found.epochs, found.best, stopped, diverged, report)


def _float(variant: Variant) -> Detector:
    from alignment.export.onnx_export import exported

    return float_detector(variant, exported(variant).onnx)


def _images(variant: Variant, data: Path | None, options: Options) -> tuple[Path, Samples, int]:
    """The root of the training images, those held out, and how many, the first, are trained on."""
    from alignment.data.coco import CocoDataset
    from alignment.models.train_embedded import training_root

    if variant.dataset == "dota":
        raise AlignError(f"{variant.name}: DOTA's tiles are of no training split", "train a variant on another set")
    root = training_root(variant, options.images + options.held_out) if variant.embedded else dataset_root(variant, data)
    if root is None:
        raise AlignError(f"{variant.name}: no images to train on", images_mend(variant))
    dataset = CocoDataset.open(root, CALIBRATION_SPLIT)
    learnt = min(options.images, len(dataset.images) - options.held_out)
    if learnt < 1 or options.held_out < 1:
        what = f"{root}: {len(dataset.images)} training images, of which {options.held_out} are held out"
        raise AlignError(what, "give more images, or hold out fewer, one at least")
    return root, Samples(variant, replace(dataset, images=dataset.images[-options.held_out :])), learnt


def _data(variant: Variant, root: Path, learnt: int, classes: list[str], options: Options) -> tuple[dict, dict]:
    """Configs of mmyolo's data preprocessor and of its loader, with the pipeline of the embedded variants' training."""
    from alignment.models.train_embedded import Schedule, train_config

    config = train_config(variant, root, root, Schedule(1, options.batch, options.seed, 0))
    loader = config.train_dataloader
    loader.batch_size, loader.drop_last = options.batch, False
    dataset = loader.dataset
    dataset.indices = list(range(learnt))
    dataset.pipeline = [step for step in dataset.pipeline if step.type not in STRONG]
    dataset.metainfo = dict(classes=tuple(classes))
    return config.model.data_preprocessor, loader


class _Judge:
    """Agreement of a model with the float detector on images that were held out."""

    def __init__(self, samples: Samples, float_model: Detector) -> None:
        self.samples = samples
        with torch.no_grad():
            self.reference = self._detect(float_model)

    def __call__(self, model: QatModel) -> float:
        model.eval()
        with torch.no_grad():
            return agreement_ap(self.samples.dataset, self.reference, self._detect(model.owner))

    def _detect(self, detector: Detector | QuantizedDetector) -> dict[int, Detections]:
        from alignment.models.outputs import detections_of, to_outputs

        variant = self.samples.variant
        device = next(detector.parameters()).device
        found = {}
        for sample in self.samples:
            values = detector(torch.from_numpy(sample.tensor[None]).to(device))
            named = {name: v.cpu().numpy() for name, v in zip(detector.output_names, values, strict=True)}
            found[sample.entry.id] = detections_of(to_outputs(named, variant, 1), sample.transform, variant)
        return found


def _identity(variant: Variant, quantized: Quantized, options: Options, held_out: Samples) -> str:
    """All that decides what training comes to."""
    import hashlib
    import json

    from alignment.export.onnx_export import file_digest

    scales = {name: float(scale) for name, scale in quantized.scales.items()}
    parts = [identity_of(variant), variant.quantization.fingerprint(), file_digest(quantized.source), scales]
    parts += [asdict(options), held_out.dataset.fingerprint, torch.get_num_threads(), _versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    import importlib.metadata

    from alignment import __version__

    names = ("torch", "mmengine", "mmdet", "mmyolo", "pytorch-quantization", "numpy")
    return {"alignment": __version__, **{name: importlib.metadata.version(name) for name in names}}


class _Runner(Runner):
    """mmengine's takes a GPU where there is one; this one takes the device that was asked for."""

    def wrap_model(self, model_wrapper_cfg: Any, model: Any) -> Any:
        return model.to(model.options.device)


def _runner(
    model: QatModel, loader: Any, groups: list, watch: _Watch, options: Options, work: Path, images: int
) -> Runner:
    iterations = options.epochs * math.ceil(images / options.batch)
    warmup = max(1, round(WARMUP * iterations))
    cosine = dict(type="CosineAnnealingLR", eta_min_ratio=FINAL_RATE, by_epoch=False, begin=warmup, end=iterations)
    return _Runner(
        model,
        str(work),
        train_dataloader=loader,
        train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=options.epochs),
        optim_wrapper=OptimWrapper(
            torch.optim.AdamW(groups, weight_decay=0.0), clip_grad=dict(max_norm=options.max_norm)
        ),
        param_scheduler=[dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup), cosine],
        default_hooks=dict(timer=None, logger=None, checkpoint=None),
        custom_hooks=[watch],
        # Some losses have no deterministic CUDA kernel.
        randomness=dict(seed=options.seed, deterministic=options.device == "cpu"),
        load_from=str(watch.path) if watch.path.is_file() else None,
        resume=watch.path.is_file(),
        log_level="ERROR",
        default_scope="mmyolo",
        # Runners of one name would share their logs.
        experiment_name=uuid.uuid4().hex,
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What the Runner sets for the whole process is put back: seeds, determinism, threads of OpenCV."""
    import contextlib
    import os

    import cv2

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), cv2.getNumThreads()
    trust = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    # The Runner resumes from checkpoints that it wrote itself; they hold more than tensors.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    logging.getLogger("mmengine").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):  # pycocotools prints
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.use_deterministic_algorithms(deterministic)
        cv2.setNumThreads(threads)
        if trust is None:
            del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]


def _trained(
    variant: Variant, owner: QuantizedDetector, node_map: Mapping[str, Mapping[str, str]], start: Quantized
) -> Trained:
    """What is in the detector, as the graph keeps it."""
    places = {name: place for place, name in enumerate(owner.initializers)}
    weights, biases = {}, {}
    with torch.no_grad():
        for node, entry in node_map.items():
            if "weight" not in entry:
                continue
            module: Any = owner.detector.get_submodule(entry["module"])
            name = entry["weight"]
            weight = owner.read_weight(places[name], module.weight) if name in places else module.weight
            weights[name] = weight.numpy().copy()
            if module.bias is not None:
                biases[node] = module.bias.detach().numpy().copy()
    scales = dict(start.scales)
    for quantizer, module in zip(start.placement.activations, owner.activations, strict=True):
        if isinstance(module, LearnedScale):
            scales[quantizer.tensor] = np.float32(module.scale.detach().numpy())
    return Trained(weights, biases, scales, start.weight_scales, identity_of(variant))
