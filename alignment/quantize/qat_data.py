"""Images and data pipeline of quantization-aware training, and the judge of its epochs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from alignment.compare.coco_map import agreement_ap
from alignment.data.coco import CocoDataset
from alignment.data.samples import CALIBRATION_SPLIT, Samples, dataset_root, images_mend
from alignment.errors import AlignError
from alignment.models.outputs import detect
from alignment.models.train_embedded import Schedule, train_config, training_root
from alignment.nms.multiclass import Detections
from alignment.variant import Variant

if TYPE_CHECKING:
    from alignment.models.detector import Detector
    from alignment.quantize.torch_model import QuantizedDetector

#: Transforms of a training pipeline that fine-tuning does without.
STRONG = ("YOLOv5RandomAffine", "YOLOv5HSVRandomAug", "mmrotate.RandomRotate")


def split_images(variant: Variant, data: Path | None, images: int, held_out: int) -> tuple[Samples, int]:
    """The training images that are held out, and how many, the first, are trained on.

    Args:
        variant: of an embedded one, as many as are asked for are drawn.
        data: COCO-layout root, for variants on COCO.
        images: at most so many to train on.
        held_out: the last so many of the training split.

    Raises:
        AlignError: for images that are missing, or too few.
    """
    if variant.dataset == "dota":
        raise AlignError(f"{variant.name}: DOTA's tiles are of no training split", "train a variant on another set")
    root = training_root(variant, images + held_out) if variant.embedded else dataset_root(variant, data)
    if root is None:
        raise AlignError(f"{variant.name}: no images to train on", images_mend(variant))
    dataset = CocoDataset.open(root, CALIBRATION_SPLIT)
    learnt = min(images, len(dataset.images) - held_out)
    if learnt < 1:
        what = f"{root}: {len(dataset.images)} training images, of which {held_out} are held out"
        raise AlignError(what, "give more images, or hold out fewer")
    return Samples(variant, replace(dataset, images=dataset.images[-held_out:])), learnt


def data_config(held_out: Samples, images: int, batch: int, seed: int) -> tuple[dict, dict]:
    """Configs of mmyolo's data preprocessor, and of its loader of the first `images` training images.

    The pipeline is that of the embedded variants' training, less what is `STRONG`.
    """
    dataset = held_out.dataset
    config = train_config(held_out.variant, dataset.root, dataset.root, Schedule(1, batch, seed, 0))
    loader = config.train_dataloader
    loader.batch_size, loader.drop_last = batch, False
    loader.dataset.indices = list(range(images))
    loader.dataset.pipeline = [step for step in loader.dataset.pipeline if step.type not in STRONG]
    loader.dataset.metainfo = dict(classes=tuple(dataset.class_names))
    return config.model.data_preprocessor, loader


class Judge:
    """Agreement with the float detector on images that were held out."""

    def __init__(self, samples: Samples, float_model: Detector) -> None:
        self.samples = samples
        self.reference = self._detect(float_model)

    def __call__(self, detector: QuantizedDetector) -> float:
        """See `agreement_ap`."""
        return agreement_ap(self.samples.dataset, self.reference, self._detect(detector))

    def _detect(self, detector: Detector | QuantizedDetector) -> dict[int, Detections]:
        device = next(detector.parameters()).device

        def run(batch: np.ndarray) -> dict[str, np.ndarray]:
            with torch.no_grad():
                values = detector(torch.from_numpy(batch).to(device))
            return {name: v.cpu().numpy() for name, v in zip(detector.output_names, values, strict=True)}

        return detect(self.samples, run)
