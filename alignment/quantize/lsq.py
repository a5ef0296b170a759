"""Learned step sizes of activations: Esser et al., "Learned Step Size Quantization", 2020.

The gradient of a quantized value with regard to its scale s, by the straight-through estimator, is round(x / s) − x / s
inside the range and the outermost level beyond it (the paper's equation 3).  It is multiplied by 1 / sqrt(n · Q), n
being the number of elements of an image and Q the largest level (its section 2.2), so that scales learn at the pace of
weights.  What is learnt is the ratio to the range of the calibration: one learning rate then suits all of them.  The
scale is that range by 127, as everywhere: not every float32 is such a quotient, and no quantizer of torch could have
the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignment.quantize.placement import Placement
from alignment.quantize.torch_model import QuantizedDetector

LEAST, LARGEST = -128, 127
#: A ratio that falls below it stays there.
LEAST_RATIO = 1 / 16


class LearnedScale(nn.Module):
    """In an activation quantizer's place: fake quantization, of the same bits, whose scale has a gradient.

    Args:
        amax: range of the calibration, float32.
        ratio: to it, a scalar; the tensors of one group share the parameter.
    """

    initial: Tensor

    def __init__(self, amax: Tensor, ratio: nn.Parameter) -> None:
        super().__init__()
        self.register_buffer("initial", amax.detach().clone())
        self.ratio = ratio

    @property
    def scale(self) -> Tensor:
        """Scalar, float32."""
        return self.initial * self.ratio.clamp(min=LEAST_RATIO) / LARGEST

    def forward(self, values: Tensor) -> Tensor:
        """`values` at the nearest levels."""
        gain = (values[0].numel() * LARGEST) ** -0.5
        return _FakeQuantize.apply(values, self.scale, gain)  # type: ignore[no-any-return,no-untyped-call]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, gain: float) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.gain = gain
        return torch.fake_quantize_per_tensor_affine(values, float(scale), 0, LEAST, LARGEST)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        values, scale = ctx.saved_tensors
        levels = values / scale
        rounded = levels.round()
        inside = (rounded >= LEAST) & (rounded <= LARGEST)
        slope = torch.where(inside, rounded - levels, rounded.clamp(LEAST, LARGEST))
        return gradients[0] * inside, (gradients[0] * slope).sum() * ctx.gain, None


def learn_scales(owner: QuantizedDetector, placement: Placement) -> list[nn.Parameter]:
    """Puts learnable scales in the place of the activation quantizers, and returns their ratios, one a group."""
    ratios: dict[str, nn.Parameter] = {}
    for place, quantizer in enumerate(placement.activations):
        ratio = ratios.setdefault(quantizer.group, nn.Parameter(torch.ones(())))
        amax: Any = owner.activations[place].amax
        owner.activations[place] = LearnedScale(amax, ratio)
    return list(ratios.values())
