"""What mmengine's Runner trains: a quantized detector with the losses of its head and of distillation.

Weights are parametrized by quantization steps.  A step of a channel is 1/127 of its largest weight, as a power of two,
so that putting weights in and taking them out rounds nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from alignment.quantize.distill import box_loss, feature_loss, score_loss
from alignment.quantize.lsq import LearnedScale
from alignment.quantize.torch_model import QuantizedDetector, Quantizing
from alignment.quantize.trained import Trained, identity_of
from alignment.variant import Variant

if TYPE_CHECKING:
    from alignment.models.detector import Detector
    from alignment.quantize.recipe import Quantized


class Diverged(Exception):
    """Training that came to nothing, and how that showed."""


class QatModel(BaseModel):
    """What the Runner trains: a quantized detector, with the losses of its own head and of distillation.

    Args:
        owner: the detector; its head is that of mmyolo, with assigner and losses.
        preprocessor: config of mmyolo's data preprocessor.
        teacher: the float detector, on the device of training, where something is distilled.
        labels: whether the head's own losses take part.
        distill: of ``features`` and ``logits``: what is brought near to the teacher's.
    """

    def __init__(
        self,
        owner: QuantizedDetector,
        preprocessor: dict,
        teacher: Detector | None = None,
        labels: bool = True,
        distill: Collection[str] = (),
    ) -> None:
        super().__init__(preprocessor)
        self.owner, self.labels, self.distill = owner, labels, distill
        #: Out of sight of `parameters` and `state_dict`.
        self._teacher = (teacher,) if teacher and distill else ()
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
        if self.labels:
            losses |= head.loss_by_feat(*raw, data_samples["bboxes_labels"], data_samples["img_metas"])
        for teacher in self._teacher:
            losses |= self._distilled(teacher, inputs, features, raw)
        return losses

    def _distilled(self, teacher: Detector, inputs: Tensor, features: Any, raw: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            theirs = teacher.model.extract_feat(inputs)
            boxes, scores = teacher.decoded(teacher.model.bbox_head(theirs))
        losses = {}
        if "features" in self.distill:
            losses["loss_features"] = feature_loss(features, theirs)
        if "logits" in self.distill:
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
    return list(shared.values())


def trained_of(
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
