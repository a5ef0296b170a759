"""Quantization-aware training of a fused detector by mmyolo's own Runner, losses and data pipeline.

What is trained is the graph that is deployed: BatchNorms are folded, RepVGG branches merged, and every node reads what
the QDQ graph says it reads.  Augmentation is a flip, there is no average of weights, and the schedule is short: a
linear warm-up and a cosine.

A weight moves in quantization steps of its channel, so that one learning rate suits layers and channels of any range.
Scales of weights stay what they were: the largest of a channel stays at ±127 nearly always, so that TensorRT, where it
finds scales by itself, finds these.  Those of activations are learnt, or stay too (`alignment.quantize.lsq`).  After
each epoch agreement with the float detector is measured on training images that were held out, and all is written; the
best epoch is what remains, the start included.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from alignment import __version__
from alignment.data.samples import Samples
from alignment.errors import AlignError
from alignment.export.onnx_export import exported, file_digest
from alignment.quantize.lsq import learn_scales
from alignment.quantize.qat_data import Judge, data_config, split_images
from alignment.quantize.qat_model import Diverged, QatModel, trainable, trained_of
from alignment.quantize.torch_model import float_detector, node_map_of, quantized_detector
from alignment.quantize.trained import Trained, identity_of
from alignment.runners.base import cpu_threads
from alignment.scratch import scratch_folder
from alignment.storage import writing
from alignment.variant import Variant

if TYPE_CHECKING:
    from alignment.quantize.recipe import Quantized

Progress = Callable[[str, int, int], None]
#: Parts of all iterations that the rate rises for, and of the rate that the cosine ends with.
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
    lr: float = 0.01
    scale_lr: float = 0.01
    batch: int = 8
    images: int = 224
    held_out: int = 32
    labels: bool = True
    distill: tuple[str, ...] = ("features", "logits")
    learn_scales: bool = True
    patience: int = 3
    max_norm: float = 10.0
    seed: int = 0
    device: str = "cpu"


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


class _Watch(Hook):
    """Seeds each epoch, measures it, keeps the best, writes all, and stops where no good comes of it."""

    def __init__(self, options: Options, judge: Judge, path: Path, identity: str, progress: Progress | None) -> None:
        self.options, self.judge, self.path, self.identity = options, judge, path, identity
        self.progress = progress
        self.found: Progressed | None = None
        self._losses: list[dict[str, float]] = []

    def before_train(self, runner: Runner) -> None:
        if self.found is None:
            self.found = Progressed([{"agreement": self._agreement(runner)}], 0, _copied(runner.model))
        elif self.found.stopped:
            runner.train_loop.stop_training = True

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
        if self.progress:
            self.progress("training", runner.iter + 1, runner.max_iters)

    def after_train_epoch(self, runner: Runner) -> None:
        assert self.found is not None
        found, number = self.found, runner.epoch + 1
        mean = {name: float(np.mean([losses[name] for losses in self._losses])) for name in self._losses[0]}
        agreement = self._agreement(runner)
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

    def _agreement(self, runner: Runner) -> float:
        runner.model.eval()
        return self.judge(runner.model.owner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        assert self.found is not None
        checkpoint["qat"] = {"identity": self.identity, **asdict(self.found)}
        # Log buffers are objects.  Without them a checkpoint is read as tensors and plain values, and never run.
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.found = Progressed(**{name: value for name, value in checkpoint["qat"].items() if name != "identity"})


def _require_begun_alike(path: Path, identity: str) -> None:
    """Raises AlignError for a checkpoint of another start or other options, or what is none."""
    try:
        begun = torch.load(path, map_location="cpu", weights_only=True)["qat"]["identity"]
    except Exception as error:  # whatever unpickling raises
        raise AlignError(f"{path}: no checkpoint of align qat: {type(error).__name__}", "delete it") from None
    if begun != identity:
        what = f"{path}: begun with another start or other options"
        raise AlignError(what, "give the same, or another --out, or delete it")


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
        images: how many were trained on.
    """

    trained: Trained
    epochs: list[dict[str, float]]
    best: int
    stopped: str
    diverged: bool
    images: int

    def report(self, variant: Variant, options: Options) -> dict[str, Any]:
        """What ``<variant>.qat.json`` says."""
        return {
            "variant": variant.name,
            "recipe": variant.quantization.model_dump(mode="json"),
            "options": asdict(options),
            "identity": dict(self.trained.identity),
            "images": self.images,
            "epochs": self.epochs,
            "best": self.best,
            "stopped": self.stopped,
            "diverged": self.diverged,
            "deterministic": options.device == "cpu",
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        }


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What the Runner sets for the whole process is put back: seeds, determinism, threads of OpenCV."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), cv2.getNumThreads()
    logging.getLogger("mmengine").setLevel(logging.ERROR)
    try:
        # pycocotools prints.
        with contextlib.redirect_stdout(None):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.use_deterministic_algorithms(deterministic)
        cv2.setNumThreads(threads)


@_undisturbed()
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
        raise AlignError("--no-labels --distill none: nothing is left to train by", "leave one of them away")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise AlignError(f"--device cuda: torch {torch.__version__} finds no GPU", "leave it at cpu")
    held_out, learnt = split_images(variant, data, options.images, options.held_out)
    if threads := cpu_threads():
        torch.set_num_threads(threads)
    identity = _identity(variant, quantized, options, held_out)
    if checkpoint.is_file():
        _require_begun_alike(checkpoint, identity)
    node_map, owner = node_map_of(variant), quantized_detector(variant, quantized)
    groups = [{"params": trainable(owner, node_map), "lr": options.lr}]
    if options.learn_scales:
        groups.append({"params": learn_scales(owner, quantized.placement), "lr": options.scale_lr})
    teacher = float_detector(variant, exported(variant).onnx)
    judge = Judge(held_out, teacher)
    preprocessor, loader = data_config(held_out, learnt, options.batch, options.seed)
    model = QatModel(owner, preprocessor, teacher.to(options.device), options.labels, options.distill)
    watch = _Watch(options, judge, checkpoint, identity, progress)
    stopped, diverged = "", False
    with scratch_folder() as work:
        runner = _runner(model.to(options.device), loader, groups, watch, work, learnt)
        try:
            runner.train()
        except Diverged as error:
            stopped, diverged = f"epoch {runner.epoch + 1}, iteration {runner.iter + 1}: {error}", True
    assert watch.found is not None
    found = watch.found
    model.load_state_dict(found.state)
    trained = trained_of(variant, model.cpu().owner, node_map, quantized)
    return Outcome(trained, found.epochs, found.best, stopped or found.stopped, diverged, learnt)


def _identity(variant: Variant, quantized: Quantized, options: Options, held_out: Samples) -> str:
    """All that decides what training comes to."""
    scales = {name: float(scale) for name, scale in quantized.scales.items()}
    parts: list[Any] = [identity_of(variant), variant.quantization.fingerprint(), file_digest(quantized.source), scales]
    parts += [asdict(options), held_out.dataset.fingerprint, torch.get_num_threads(), _versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    names = ("torch", "mmengine", "mmdet", "mmyolo", "pytorch-quantization", "numpy")
    return {"alignment": __version__, **{name: importlib.metadata.version(name) for name in names}}


class _Runner(Runner):
    """mmengine's moves a model to a GPU where there is one; this one leaves it where it is."""

    def wrap_model(self, model_wrapper_cfg: Any, model: Any) -> Any:
        return model


def _runner(model: QatModel, loader: Any, groups: list, watch: _Watch, work: Path, images: int) -> Runner:
    options, resume = watch.options, watch.path.is_file()
    iterations = options.epochs * math.ceil(images / options.batch)
    warmup = round(WARMUP * iterations)
    rise = dict(type="LinearLR", start_factor=FINAL_RATE, by_epoch=False, begin=0, end=warmup)
    fall = dict(type="CosineAnnealingLR", eta_min_ratio=FINAL_RATE, by_epoch=False, begin=warmup, end=iterations)
    return _Runner(
        model,
        str(work),
        train_dataloader=loader,
        train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=options.epochs),
        optim_wrapper=OptimWrapper(
            torch.optim.AdamW(groups, weight_decay=0.0), clip_grad=dict(max_norm=options.max_norm)
        ),
        param_scheduler=[rise, fall] if warmup else fall,
        default_hooks=dict(timer=None, logger=None, checkpoint=None),
        custom_hooks=[watch],
        # Some losses have no deterministic CUDA kernel.
        randomness=dict(seed=options.seed, deterministic=options.device == "cpu"),
        load_from=str(watch.path) if resume else None,
        resume=resume,
        log_level="ERROR",
        default_scope="mmyolo",
        # Runners of one name would share their logs.
        experiment_name=uuid.uuid4().hex,
    )
