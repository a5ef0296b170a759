"""Trains an embedded variant on the synthetic shapes and writes its checkpoint (fp16 weights).

    python -m alignment.models.train_embedded yolov8_embedded

mmyolo's own Runner, losses and data pipeline.  About 35 minutes on 2 CPU cores for `yolov8_embedded`; the result is
the same for the same seed on the same machine, and equal in quality elsewhere.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from alignment.data.synthetic import CATEGORIES, SPLITS, write_split
from alignment.models.mmyolo_source import load_config, require_mmyolo
from alignment.storage import cache_dir, locked, writing, writing_folder
from alignment.variant import Variant, load_variant

TRAIN_IMAGES = 1536
EPOCHS = 40
BATCH = 16


def train_config(variant: Variant, root: Path, work: Path, epochs: int, seed: int):
    """The variant's own mmyolo config with a short schedule and the synthetic set as data."""
    config = load_config(variant)
    size = variant.input.width, variant.input.height
    iterations = epochs * (TRAIN_IMAGES // BATCH)
    meta = dict(classes=tuple(CATEGORIES.values()))
    load: list[dict] = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
    letterbox: list[dict] = [
        dict(type="YOLOv5KeepRatioResize", scale=size),
        dict(type="LetterResize", scale=size, allow_scale_up=True, pad_val=dict(img=114)),
    ]
    keys = ("img_id", "img_path", "ori_shape", "img_shape")
    train_pipeline = [
        *load,
        *letterbox,
        dict(
            type="YOLOv5RandomAffine",
            max_rotate_degree=0.0,
            max_shear_degree=0.0,
            scaling_ratio_range=(0.6, 1.3),
            border_val=(114, 114, 114),
        ),
        dict(type="YOLOv5HSVRandomAug"),
        dict(type="mmdet.RandomFlip", prob=0.5),
        dict(type="mmdet.PackDetInputs", meta_keys=(*keys, "flip", "flip_direction")),
    ]
    test_pipeline = [
        load[0],
        letterbox[0],
        {**letterbox[1], "allow_scale_up": False},
        dict(type="LoadAnnotations", with_bbox=True, _scope_="mmdet"),
        dict(type="mmdet.PackDetInputs", meta_keys=(*keys, "scale_factor", "pad_param")),
    ]

    def loader(split: str, pipeline: list, train: bool) -> dict:
        return dict(
            batch_size=BATCH,
            num_workers=1,
            persistent_workers=True,
            drop_last=train,
            sampler=dict(type="DefaultSampler", shuffle=train),
            collate_fn=dict(type="yolov5_collate") if train else dict(type="pseudo_collate"),
            dataset=dict(
                type="YOLOv5CocoDataset",
                metainfo=meta,
                data_root=str(root),
                ann_file=f"annotations/instances_{split}.json",
                data_prefix=dict(img=f"{split}/"),
                test_mode=not train,
                filter_cfg=dict(filter_empty_gt=False, min_size=0),
                pipeline=pipeline,
            ),
        )

    config.train_dataloader = loader("train2017", train_pipeline, train=True)
    config.val_dataloader = loader("val2017", test_pipeline, train=False)
    config.val_evaluator = dict(
        type="mmdet.CocoMetric", ann_file=str(root / "annotations/instances_val2017.json"), metric="bbox"
    )
    config.test_dataloader = config.test_evaluator = config.test_cfg = None
    config.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=10)
    config.optim_wrapper = dict(
        type="OptimWrapper",
        optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
        clip_grad=dict(max_norm=10.0),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    )
    config.param_scheduler = [
        dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=300),
        dict(type="CosineAnnealingLR", eta_min=2e-5, by_epoch=False, begin=300, end=iterations),
    ]
    config.default_hooks = dict(
        param_scheduler=dict(type="ParamSchedulerHook"),
        logger=dict(type="LoggerHook", interval=24),
        checkpoint=dict(type="CheckpointHook", interval=5, max_keep_ckpts=1, save_last=True),
    )
    config.custom_hooks = [dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.002, gamma=300, priority=49)]
    config.randomness = dict(seed=seed, deterministic=True)
    config.work_dir, config.visualizer, config.default_scope = str(work), None, "mmyolo"
    config.resume, config.load_from = True, None
    return config


def training_root() -> Path:
    """The synthetic set with `TRAIN_IMAGES` training images, drawn once into the cache folder."""
    root = cache_dir() / f"synthetic-train-{TRAIN_IMAGES}"
    with locked(root):
        if not root.exists():
            with writing_folder(root) as folder:
                write_split(folder, "val2017", SPLITS["val2017"])
                write_split(folder, "train2017", TRAIN_IMAGES)
    return root


def main(
    name: Annotated[str, typer.Argument(help="an embedded variant of the zoo")],
    out: Annotated[Path | None, typer.Option(help="checkpoint to write; default: the variant's own")] = None,
    work: Annotated[Path | None, typer.Option(help="work folder of the Runner; run again with it to resume")] = None,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> None:
    """Train variant NAME on the synthetic shapes."""
    require_mmyolo()
    # The Runner resumes from checkpoints that it wrote itself into `work`; they hold more than tensors.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    import torch
    from mmengine.runner import Runner

    variant = load_variant(name)
    work = work or Path(tempfile.mkdtemp(prefix="align-train-"))
    runner = Runner.from_cfg(train_config(variant, training_root(), work, epochs, seed))
    runner.train()
    ema = next(hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model"))
    # The averaged weights with the trained model's BatchNorm statistics: what the Runner itself validates.
    trained = {**runner.model.state_dict(), **dict(ema.module.named_parameters())}
    state = {
        key: value.detach().half() if value.is_floating_point() else value
        for key, value in trained.items()
        if not key.endswith("num_batches_tracked")
    }
    path = out or variant.weights
    with writing(path) as temporary:
        torch.save(state, temporary)
    typer.echo(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB)")


if __name__ == "__main__":
    typer.run(main)
