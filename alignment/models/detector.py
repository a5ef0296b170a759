"""An mmyolo detector as one module: image in, decoded boxes, scores and raw head outputs out."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignment.variant import InputSize

RAW_KINDS = ("cls", "bbox", "obj")
ROTATED_KINDS = ("cls", "bbox", "angle")


class Detector(nn.Module):
    """Wraps an mmyolo detector; the decoding is its own, up to but without NMS.

    The outputs, in the order of `output_names`:

    - ``boxes`` ``[B, N, 4]``: x1, y1, x2, y2 in pixels of the network input; of a rotated head ``[B, N, 5]``: cx, cy,
      w, h and the angle in radians;
    - ``scores`` ``[B, N, C]``: probabilities (times objectness where the head has it);
    - raw head outputs, one a level and kind: ``cls_s8`` ``[B, A * C, H / 8, W / 8]``, ``bbox_s8``, ``obj_s8``
      or ``angle_s8``, ...

    `N` counts priors level by level, row by row, anchor by anchor, as mmyolo orders them.

    Args:
        model: an mmyolo ``YOLODetector``; put into eval mode.
        size: the fixed input size; priors are constants of the module.
    """

    priors: Tensor
    stride: Tensor

    def __init__(self, model: Any, size: InputSize) -> None:
        super().__init__()
        self.model: Any = model.eval()
        head = model.bbox_head
        strides = [int(s[0] if isinstance(s, tuple | list) else s) for s in head.featmap_strides]
        shapes = [(size.height // s, size.width // s) for s in strides]
        priors = head.prior_generator.grid_priors(shapes, dtype=torch.float32, device="cpu")
        counts = torch.tensor([len(p) for p in priors])
        self.strides, self.counts = strides, counts.tolist()
        with torch.no_grad():
            raw = head(model.extract_feat(torch.zeros(1, 3, 64, 64)))
        self.rotated = hasattr(head, "angle_coder")
        kinds = ROTATED_KINDS if self.rotated else RAW_KINDS
        self.kinds = [kind for kind, levels in zip(kinds, raw, strict=False) if levels is not None]
        self.register_buffer("priors", torch.cat(list(priors)), persistent=False)
        self.register_buffer("stride", torch.tensor(strides).float().repeat_interleave(counts), persistent=False)

    @property
    def output_names(self) -> list[str]:
        """Names of what `forward` returns."""
        return ["boxes", "scores", *(f"{kind}_s{s}" for kind in self.kinds for s in self.strides)]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """`image`: ``[B, 3, H, W]``, normalized, of the module's dtype."""
        raw = self.model.bbox_head(self.model.extract_feat(image))
        return (*self.decoded(raw), *(level for kind in raw if kind is not None for level in kind))

    def decoded(self, raw: tuple[list[Tensor], ...]) -> tuple[Tensor, Tensor]:
        """Boxes and scores, as `forward` gives them, of what the head gives in evaluation or in training."""
        scores = self._rows(raw[0], self.model.bbox_head.num_classes).sigmoid()
        if "obj" in self.kinds:
            scores = scores * self._rows(raw[2], 1).sigmoid()
        return self._boxes(raw), scores

    def _boxes(self, raw: tuple[list[Tensor], ...]) -> Tensor:
        """As the head's ``predict_by_feat`` decodes them before NMS."""
        head = self.model.bbox_head
        coder, distances = head.bbox_coder, self._rows(raw[1], 4)
        if not self.rotated:
            return coder.decode(self.priors[None], distances, self.stride)
        angles = head.angle_coder.decode(self._rows(raw[2], head.angle_out_dim), keepdim=True)
        if not head.test_cfg.get("decode_with_angle", True):
            x1, y1, x2, y2 = coder.decode(self.priors[None], distances, self.stride).split(1, -1)
            return torch.cat([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, angles], -1)
        # What the coder's `decode` does, less its scaling in place, which would become a ScatterND in ONNX.
        distances = torch.cat([distances * self.stride[:, None], angles], -1)
        return coder.distance2obb(self.priors[None], distances, None, coder.angle_version)

    def _rows(self, levels: list[Tensor], width: int) -> Tensor:
        """``[B, A * width, h, w]`` of each level to ``[B, N, width]``."""
        rows = [
            level.permute(0, 2, 3, 1).reshape(-1, count, width)
            for level, count in zip(levels, self.counts, strict=True)
        ]
        return torch.cat(rows, 1)


def fused(detector: Detector, dtype: torch.dtype = torch.float32) -> Detector:
    """A copy for deployment: RepVGG branches merged, BatchNorms and YOLOv7's implicit layers folded into convolutions.

    The arithmetic is float64, so each weight is rounded once, to `dtype`.
    """
    copied = copy.deepcopy(detector).double()
    for module in list(copied.modules()):
        merge = getattr(module, "switch_to_deploy", None)
        if callable(merge):
            merge()
    _unshare_convolutions(copied)
    _fold_batch_norms(copied)
    _fold_implicit_layers(copied)
    return copied.to(dtype).eval()


def _unshare_convolutions(module: nn.Module) -> None:
    """Gives each place of a convolution a copy of its own: RTMDet's levels share it, and each has its BatchNorm."""
    seen: set[int] = set()
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Conv2d):
                if id(child) in seen:
                    setattr(parent, name, copy.deepcopy(child))
                seen.add(id(child))


def _fold_batch_norms(module: nn.Module) -> None:
    """Folds each BatchNorm2d that directly follows a Conv2d among the children of a module."""
    last: nn.Conv2d | None = None
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and last is not None:
            _fold(last, child)
            setattr(module, name, nn.Identity())
            last = None
        elif isinstance(child, nn.Conv2d):
            last = child
        else:
            last = None
            _fold_batch_norms(child)


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
    conv.weight = nn.Parameter(conv.weight * gain[:, None, None, None], requires_grad=False)
    conv.bias = nn.Parameter((bias - norm.running_mean) * gain + norm.bias, requires_grad=False)


def _fold_implicit_layers(module: nn.Module) -> None:
    """Folds YOLOv7's learned constants: ImplicitA adds before a convolution, ImplicitM multiplies after it."""
    from mmyolo.models.layers import ImplicitA, ImplicitM

    for layers in [m for m in module.modules() if isinstance(m, nn.Sequential)]:
        for index, (first, second) in enumerate(itertools.pairwise(layers)):
            # Padding is not added to: the sum would differ along the border.
            if isinstance(first, ImplicitA) and isinstance(second, nn.Conv2d) and not any(second.padding):
                constant = first.implicit.expand(-1, -1, *second.kernel_size)
                bias = functional.conv2d(constant, second.weight, second.bias, groups=second.groups)
                second.bias = nn.Parameter(bias.flatten(), requires_grad=False)
                layers[index] = nn.Identity()
            elif isinstance(first, nn.Conv2d) and isinstance(second, ImplicitM):
                gain = second.implicit.flatten()
                first.weight = nn.Parameter(first.weight * gain[:, None, None, None], requires_grad=False)
                if first.bias is not None:
                    first.bias = nn.Parameter(first.bias * gain, requires_grad=False)
                layers[index + 1] = nn.Identity()
