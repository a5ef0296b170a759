"""Trains an embedded variant on the synthetic shapes and writes its checkpoint (fp16 weights).

    python -m alignment.models.train_embedded yolov8_embedded

mmyolo's own Runner, losses and data pipeline, on the GPU where torch sees one.  `EPOCHS` × 50 seconds an epoch on 2 CPU
cores, × 10 on one H100 or H200 with 16 cores, where seven run side by side (``--workers 2``, under NVIDIA's MPS):

    =====================================  ======  ============  ============
    variant                                epochs  minutes, CPU  minutes, GPU
    =====================================  ======  ============  ============
    yolov5, v6, x, rtmdet, rtmdet_r        34      28            6
    yolov8                                 40      33            7
    yolov7                                 60      50            10
    ppyoloe                                70      58            12
    =====================================  ======  ============  ============

On a CPU the same seed gives the same weights, to the bit, on the same machine with as many threads (not the same file:
its format numbers tensors by their addresses).  On a GPU it does not, not even there: some losses have no deterministic
CUDA kernel, so that sums come in another order each time; what comes out, as on another machine or with other threads,
is equal in quality, not in bits.  Seed, epochs, device and versions are written beside the checkpoint
(``<checkpoint>.json``); those in the repository are older than that.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from alignment import __version__
from alignment.data import synthetic, synthetic_rotated
from alignment.data.coco import annotation_file
from alignment.export.onnx_export import file_digest
from alignment.models.mmyolo_source import load_config
from alignment.models.rescale import rescale_channels
from alignment.storage import writing
from alignment.variant import Variant, load_variant

TRAIN_IMAGES = 1536
#: What the checkpoints of the repository were trained for; YOLOv7 and PP-YOLOE are slower to learn.
EPOCHS = {"yolov8_embedded": 40, "yolov7_embedded": 60, "ppyoloe_embedded": 70}
USUAL_EPOCHS = 34
#: Made hard to quantize after training: see `alignment.models.rescale`.
RESCALED = ("yolov6_embedded",)
BATCH = 16

_META = ("img_id", "img_path", "ori_shape", "img_shape")


@dataclass(frozen=True)
class Schedule:
    """How long, on how many images, and from which seed; `workers` are processes that read and augment them."""

    epochs: int
    images: int = TRAIN_IMAGES
    seed: int = 0
    workers: int = 1


def train_config(variant: Variant, root: Path, work: Path, schedule: Schedule) -> Any:
    """The variant's own mmyolo config with a short schedule and the synthetic set as data."""
    import torch

    config = load_config(variant)
    iterations = schedule.epochs * (schedule.images // BATCH)
    warmup = min(300, max(1, iterations // 4))
    config.model.data_preprocessor = _preprocessor(variant)
    config.train_dataloader = dict(
        batch_size=BATCH,
        num_workers=schedule.workers,
        persistent_workers=schedule.workers > 0,
        drop_last=True,
        sampler=dict(type="DefaultSampler", shuffle=True),
        collate_fn=dict(type="yolov5_collate"),
        dataset=_rotated_dataset(variant, root) if variant.rotated else _dataset(variant, root),
    )
    config.val_dataloader = config.val_evaluator = config.val_cfg = None
    config.test_dataloader = config.test_evaluator = config.test_cfg = None
    config.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=schedule.epochs)
    config.optim_wrapper = dict(
        type="OptimWrapper",
        optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
        clip_grad=dict(max_norm=10.0),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, bypass_duplicate=True),
    )
    config.param_scheduler = [
        dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup),
        dict(type="CosineAnnealingLR", eta_min=2e-5, by_epoch=False, begin=warmup, end=iterations),
    ]
    config.default_hooks = dict(
        param_scheduler=dict(type="ParamSchedulerHook"),
        logger=dict(type="LoggerHook", interval=24),
        checkpoint=dict(type="CheckpointHook", interval=5, max_keep_ckpts=1, save_last=True),
    )
    config.custom_hooks = [dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.002, gamma=300, priority=49)]
    # Some losses have no deterministic CUDA kernel.
    config.randomness = dict(seed=schedule.seed, deterministic=not torch.cuda.is_available())
    config.work_dir, config.visualizer, config.default_scope = str(work), None, "mmyolo"
    config.resume, config.load_from = True, None
    return config


def _preprocessor(variant: Variant) -> dict:
    """Normalizes as the variant says.  The config's own may also resize whole batches; this variant has one size."""
    settings = variant.preprocess
    return dict(
        type="YOLOv5DetDataPreprocessor",
        mean=list(settings.mean),
        std=list(settings.std),
        bgr_to_rgb=settings.channels == "rgb",
    )


def _resize(variant: Variant) -> list[dict]:
    """The variant's own preprocessing in mmyolo's transforms, small images enlarged."""
    size = variant.input.width, variant.input.height
    pad = dict(pad_val=dict(img=(114, 114, 114)))
    if variant.preprocess.resize == "stretch":
        return [dict(type="mmdet.Resize", scale=size, keep_ratio=False, interpolation=variant.preprocess.interpolation)]
    if variant.preprocess.resize == "letterbox_top_left":
        return [dict(type="mmdet.Resize", scale=size, keep_ratio=True), dict(type="mmdet.Pad", size=size[::-1], **pad)]
    return [
        dict(type="YOLOv5KeepRatioResize", scale=size),
        dict(type="LetterResize", scale=size, allow_scale_up=True, pad_val=dict(img=114)),
    ]


def _dataset(variant: Variant, root: Path) -> dict:
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True),
        *_resize(variant),
        dict(
            type="YOLOv5RandomAffine",
            max_rotate_degree=0.0,
            max_shear_degree=0.0,
            scaling_ratio_range=(0.6, 1.3),
            border_val=(114, 114, 114),
        ),
        dict(type="YOLOv5HSVRandomAug"),
        dict(type="mmdet.RandomFlip", prob=0.5),
        dict(type="mmdet.PackDetInputs", meta_keys=(*_META, "flip", "flip_direction")),
    ]
    return dict(
        type="YOLOv5CocoDataset",
        metainfo=dict(classes=tuple(synthetic.CATEGORIES.values())),
        data_root=str(root),
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=False, min_size=0),
        pipeline=pipeline,
    )


def _rotated_dataset(variant: Variant, root: Path) -> dict:
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, box_type="qbox"),
        dict(type="mmrotate.ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
        *_resize(variant)[:1],
        dict(type="YOLOv5HSVRandomAug"),
        dict(type="mmdet.RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
        dict(type="mmrotate.RandomRotate", prob=0.5, angle_range=180, rotate_type="mmrotate.Rotate"),
        *_resize(variant)[1:],
        dict(type="RegularizeRotatedBox", angle_version="le90"),
        dict(type="mmdet.PackDetInputs", meta_keys=_META),
    ]
    return dict(
        type="YOLOv5DOTADataset",
        metainfo=dict(classes=tuple(synthetic_rotated.CATEGORIES.values())),
        data_root=str(root),
        ann_file="annfiles/",
        data_prefix=dict(img_path="train2017/"),
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=pipeline,
    )


def training_root(variant: Variant, images: int = TRAIN_IMAGES) -> Path:
    """The variant's synthetic set with so many training images, drawn once into the cache folder."""
    source = synthetic_rotated if variant.rotated else synthetic

    def write(folder: Path, split: str, count: int) -> None:
        source.write_split(folder, split, count)
        if variant.rotated:
            _write_dota(folder, split)

    return synthetic.cached_splits(f"{variant.dataset}-train-{images}", {"train2017": images}, write)


def _write_dota(root: Path, split: str) -> None:
    """The annotations once more in DOTA's own form, a text file an image, which mmrotate's dataset reads."""
    truth = json.loads(annotation_file(root, split).read_text())
    names = {c["id"]: c["name"] for c in truth["categories"]}
    lines: dict[int, list[str]] = {image["id"]: [] for image in truth["images"]}
    for entry in truth["annotations"]:
        polygon = " ".join(f"{v:.2f}" for v in synthetic_rotated.corners(np.array(entry["rbox"])).ravel())
        lines[entry["image_id"]].append(f"{polygon} {names[entry['category_id']]} 0\n")
    (root / "annfiles").mkdir()
    for image in truth["images"]:
        (root / "annfiles" / Path(image["file_name"]).with_suffix(".txt")).write_text("".join(lines[image["id"]]))


def trained(variant: Variant, work: Path, schedule: Schedule) -> dict[str, Any]:
    """Trains; returns the averaged weights on the CPU, fp16, rescaled where the variant is of `RESCALED`."""
    # The Runner resumes from checkpoints that it wrote itself into `work`; they hold more than tensors.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    config = train_config(variant, training_root(variant, schedule.images), work, schedule)
    from mmengine.runner import Runner

    runner = Runner.from_cfg(config)
    runner.train()
    ema = next(hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model"))
    # The averaged weights with the trained model's BatchNorm statistics: what the Runner itself validates.
    runner.model.load_state_dict({**runner.model.state_dict(), **dict(ema.module.named_parameters())})
    model = runner.model.cpu()
    if variant.name in RESCALED:
        rescale_channels(model)
    return {
        key: value.half() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def provenance(variant: Variant, schedule: Schedule) -> dict[str, Any]:
    """What a checkpoint was made of and on; on a GPU, `deterministic` is false."""
    import torch

    gpu = torch.cuda.is_available()
    packages = ("torch", "mmengine", "mmdet", "mmyolo", *(["mmrotate"] if variant.rotated else []), "numpy")
    return {
        "variant": variant.name,
        "variant_fingerprint": variant.fingerprint(),
        **asdict(schedule),
        "batch": BATCH,
        "dataset": f"{variant.dataset} v{synthetic.VERSION}, seed {synthetic.SEED}",
        "device": torch.cuda.get_device_name()
        if gpu
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "deterministic": not gpu,
        "versions": {"alignment": __version__, **{name: importlib.metadata.version(name) for name in packages}},
    }


def main(
    name: Annotated[str, typer.Argument(help="an embedded variant of the zoo")],
    out: Annotated[Path | None, typer.Option(help="checkpoint to write; default: the variant's own")] = None,
    work: Annotated[Path | None, typer.Option(help="work folder of the Runner; run again with it to resume")] = None,
    epochs: Annotated[int | None, typer.Option(help="default: as the repository's checkpoints")] = None,
    seed: int = 0,
    workers: Annotated[int, typer.Option(help="processes that read and augment images")] = 1,
    images: Annotated[int, typer.Option(help="training images", min=2 * BATCH)] = TRAIN_IMAGES,
) -> None:
    """Train variant NAME on the synthetic shapes."""
    import torch

    variant = load_variant(name)
    schedule = Schedule(epochs or EPOCHS.get(variant.name, USUAL_EPOCHS), images, seed, workers)
    work = work or Path(tempfile.mkdtemp(prefix="align-train-"))
    resumed, start = (work / "last_checkpoint").is_file(), time.monotonic()
    state = trained(variant, work, schedule)
    minutes = round((time.monotonic() - start) / 60, 2)
    path = out or variant.weights
    with writing(path) as temporary:
        # torch's zip format would pad each of some 500 small tensors: a tenth of the file.
        torch.save(state, temporary, _use_new_zipfile_serialization=False)
    papers = {**provenance(variant, schedule), "minutes": minutes, "resumed": resumed, "sha256": file_digest(path)}
    with writing(path.with_name(f"{path.name}.json")) as temporary:
        temporary.write_text(json.dumps(papers, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB)")


if __name__ == "__main__":
    typer.run(main)
