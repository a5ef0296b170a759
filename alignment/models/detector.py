"""An mmyolo detector as one module: image in, decoded boxes, scores and raw head outputs out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from alignment.variant import InputSize

RAW_KINDS = ("cls", "bbox", "obj")


class Detector(nn.Module):
    """Wraps an mmyolo detector; the decoding is its own, up to but without NMS.

    The outputs, in the order of `output_names`:

    - ``boxes`` ``[B, N, 4]``: x1, y1, x2, y2 in pixels of the network input;
    - ``scores`` ``[B, N, C]``: probabilities (times objectness where the head has it);
    - raw head outputs, one a level and kind: ``cls_s8`` ``[B, A * C, H / 8, W / 8]``, ``bbox_s8``, ``obj_s8``, ...

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
        self.kinds = [kind for kind, levels in zip(RAW_KINDS, raw, strict=False) if levels is not None]
        self.register_buffer("priors", torch.cat(list(priors)), persistent=False)
        self.register_buffer("stride", torch.tensor(strides).float().repeat_interleave(counts), persistent=False)

    @property
    def output_names(self) -> list[str]:
        """Names of what `forward` returns."""
        return ["boxes", "scores", *(f"{kind}_s{s}" for kind in self.kinds for s in self.strides)]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """`image`: ``[B, 3, H, W]``, normalized, of the module's dtype."""
        raw = self.model.bbox_head(self.model.extract_feat(image))
        head = self.model.bbox_head
        scores = self._rows(raw[0], head.num_classes).sigmoid()
        if "obj" in self.kinds:
            scores = scores * self._rows(raw[2], 1).sigmoid()
        boxes = head.bbox_coder.decode(self.priors[None], self._rows(raw[1], 4), self.stride)
        return (boxes, scores, *(level for kind in raw if kind is not None for level in kind))

    def _rows(self, levels: list[Tensor], width: int) -> Tensor:
        """``[B, A * width, h, w]`` of each level to ``[B, N, width]``."""
        rows = [
            level.permute(0, 2, 3, 1).reshape(-1, count, width)
            for level, count in zip(levels, self.counts, strict=True)
        ]
        return torch.cat(rows, 1)


def fused(detector: Detector) -> Detector:
    """A copy for deployment: RepVGG branches merged, every BatchNorm folded into its convolution.

    The arithmetic is float64, so each weight is rounded once.
    """
    copied = copy.deepcopy(detector).double()
    for module in list(copied.modules()):
        merge = getattr(module, "switch_to_deploy", None)
        if callable(merge):
            merge()
    _fold_batch_norms(copied)
    return copied.float().eval()


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
