"""AdaRound: for each weight, up or down, so that a layer's or block's output stays nearest to the float one.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020): the fraction that is added to
floor(w / scale) is a rectified sigmoid of a free variable, which a regularizer drives to 0 or 1 while its exponent is
annealed.  Whole blocks at once: Li et al., "BRECQ" (2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from alignment.errors import AlignError

#: Ends of the rectified sigmoid, sigmoid(v) * (ZETA - GAMMA) + GAMMA clipped to [0, 1]; the paper's equation 23.
ZETA, GAMMA = 1.1, -0.1


@dataclass(frozen=True)
class Options:
    """How to optimize.

    Attributes:
        iterations: steps of Adam for each unit.
        batch: samples in each.
        rate: of learning.
        regularization: weight of the regularizer, against the squared error summed over channels.
        warmup: the part of the iterations before it begins.
        exponents: of the regularizer, annealed from the first to the second.
        held_out: the part of the samples, the last, that is not optimized on: what was found is judged by it, as a
            layer with more weights than samples fits these and nothing else.
        device: "cpu" or "cuda".
        seed: of the order of samples.
    """

    iterations: int = 1000
    batch: int = 128
    rate: float = 1e-2
    regularization: float = 0.01
    warmup: float = 0.2
    exponents: tuple[float, float] = (20.0, 2.0)
    held_out: float = 0.25
    device: str = "cpu"
    seed: int = 0


class SoftRounding(nn.Module):
    """A weight whose elements lie between two levels of int8.

    Args:
        weight: float32, of any shape.
        scale: float32, broadcast against it.
    """

    scale: Tensor
    floor: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        levels = weight.detach() / scale
        self.register_buffer("floor", torch.floor(levels))
        fraction = (levels - torch.floor(levels)).clamp(1e-4, 1 - 1e-4)
        self.variable = nn.Parameter(torch.logit((fraction - GAMMA) / (ZETA - GAMMA)))

    @property
    def amax(self) -> Tensor:
        """As a TensorQuantizer has it."""
        return self.scale * 127

    def fraction(self) -> Tensor:
        """What is added to the level below, 0..1."""
        return (torch.sigmoid(self.variable) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """The soft weight; `weight` is passed over."""
        return (self.floor + self.fraction()).clamp(-127, 127) * self.scale

    def rounded(self) -> Tensor:
        """The weight with each element at the nearer level."""
        return (self.floor + (self.fraction() >= 0.5)).clamp(-127, 127).detach() * self.scale

    def undecided(self, exponent: float) -> Tensor:
        """The regularizer: how many elements are between levels; the paper's equation 24."""
        return (1 - (2 * self.fraction() - 1).abs().pow(exponent)).sum()


@dataclass
class Unit:
    """What is reconstructed at once: a layer, or a block.

    Attributes:
        name: of the ONNX node, or of the module.
        inputs: ``[N, ...] float32``, as the quantized network has them.
        targets: ``[N, ...] float32``, the float network's outputs.
        forward: from inputs and weights, in the order of `weights`, to outputs.
        weights: float32, by initializer.
        scales: of these, broadcast against them.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    forward: Callable[[Tensor, list[Tensor]], Tensor]
    weights: dict[str, Tensor]
    scales: dict[str, Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """What came of a unit.

    Attributes:
        name: of the unit.
        nearest: mean squared error of its outputs on the samples held out, weights rounded to nearest.
        adaround: the same, weights rounded as found here.
        weights: by initializer, of whichever is less: each element a whole number of steps.
    """

    name: str
    nearest: float
    adaround: float
    weights: dict[str, Tensor] = field(repr=False)

    @property
    def improved(self) -> bool:
        """Whether AdaRound won."""
        return self.adaround < self.nearest


def nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """Each element at the nearest level."""
    return torch.round(weight / scale).clamp(-127, 127) * scale


def reconstruct(unit: Unit, options: Options | None = None) -> Reconstruction:
    """Finds the rounding of a unit's weights.

    Returns:
        Weights of the lesser error on samples that were held out; those to nearest where AdaRound does not lower it.

    Raises:
        AlignError: for samples of which none are left to optimize on, or none to judge by.
    """
    options = options or Options()
    learnt = len(unit.inputs) - round(options.held_out * len(unit.inputs))
    if not 0 < learnt < len(unit.inputs):
        raise AlignError(
            f"{unit.name}: {len(unit.inputs)} samples, {learnt} of them to optimize on", "calibrate on more images"
        )
    unit = _moved(unit, torch.device(options.device))
    inputs, targets = unit.inputs[:learnt], unit.targets[:learnt]
    soft = [SoftRounding(weight, unit.scales[name]) for name, weight in unit.weights.items()]
    optimizer = torch.optim.Adam([one.variable for one in soft], options.rate)
    order = torch.Generator().manual_seed(options.seed)
    first = int(options.warmup * options.iterations)
    for step in range(options.iterations):
        chosen = torch.randint(len(inputs), (min(options.batch, len(inputs)),), generator=order).to(inputs.device)
        optimizer.zero_grad()
        outputs = unit.forward(inputs[chosen], [one() for one in soft])
        loss = (outputs - targets[chosen]).square().sum(1).mean()
        if step >= first:
            loss = loss + options.regularization * sum(one.undecided(_annealed(step, first, options)) for one in soft)
        loss.backward()
        optimizer.step()
    plain = {name: nearest(weight, unit.scales[name]) for name, weight in unit.weights.items()}
    found = {name: one.rounded() for name, one in zip(unit.weights, soft, strict=True)}
    judge = replace(unit, inputs=unit.inputs[learnt:], targets=unit.targets[learnt:])
    before, after = (error_of(judge, list(weights.values())) for weights in (plain, found))
    better = found if after < before else plain
    return Reconstruction(unit.name, before, after, {name: weight.cpu() for name, weight in better.items()})


def _moved(unit: Unit, device: torch.device) -> Unit:
    """The same on another device; what `forward` closes over has to be there already."""
    weights, scales = (
        {name: tensor.to(device) for name, tensor in tensors.items()} for tensors in (unit.weights, unit.scales)
    )
    return replace(unit, inputs=unit.inputs.to(device), targets=unit.targets.to(device), weights=weights, scales=scales)


def error_of(unit: Unit, weights: list[Tensor], batch: int = 256) -> float:
    """The mean squared error of a unit's outputs with these weights, over all its samples."""
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(unit.inputs), batch):
            outputs = unit.forward(unit.inputs[start : start + batch], weights)
            total += float((outputs - unit.targets[start : start + batch]).square().sum(dtype=torch.float64))
    return total / unit.targets.numel()


def _annealed(step: int, first: int, options: Options) -> float:
    """The exponent at a step: a cosine from the first to the second, as in the paper's implementation."""
    begin, end = options.exponents
    done = (step - first) / max(1, options.iterations - first)
    return end + 0.5 * (begin - end) * (1 + float(torch.cos(torch.tensor(done * torch.pi))))
