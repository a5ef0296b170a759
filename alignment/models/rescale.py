"""Makes a detector hard to quantize without changing what it computes.

A channel that a ReLU passes on may be multiplied by any s > 0 where it is made and divided by s where it is used: the
function stays, but the channels of one tensor now differ in range, and one scale for all of them serves none.  Badly
scaled real checkpoints look like that (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", 2019, undo it).  The factors here are powers of two, so that not even the rounding changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: A few bad layers among many good ones, as sensitivity analysis finds them.
PAIRS = 6
#: Channels are scaled by 2^-LOG2_SPREAD to 2^LOG2_SPREAD.
LOG2_SPREAD = 3


def rescale_channels(model: nn.Module, seed: int = 0, count: int = PAIRS, log2_spread: int = LOG2_SPREAD) -> None:
    """Rescales, in place, the channels between some RepVGG blocks and the blocks that they alone feed.

    Args:
        model: an mmyolo detector in its training form (RepVGG branches not merged).
        seed: of the choice of blocks and of the factors.
        count: between how many pairs of blocks.
        log2_spread: see `LOG2_SPREAD`.
    """
    random = torch.Generator().manual_seed(seed)
    pairs = [pair for chain in _chains(model) for pair in itertools.pairwise(chain)]
    chosen = torch.randperm(len(pairs), generator=random)[:count].sort().values.tolist()
    with torch.no_grad():
        for producer, consumer in (pairs[index] for index in chosen):
            width = producer.rbr_dense.bn.num_features
            exponents = torch.randint(-log2_spread, log2_spread + 1, (width,), generator=random)
            factors = torch.pow(2.0, exponents.float())
            _scale_output(producer, factors)
            _unscale_input(consumer, factors)


def _chains(model: nn.Module) -> Iterator[list[Any]]:
    """Runs of RepVGG blocks that feed one another: a stage of the backbone, or a block of the neck by itself."""
    from mmyolo.models.layers import RepStageBlock, RepVGGBlock

    seen: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            chain: list[Any] = []
            for child in module:
                if isinstance(child, RepVGGBlock) and child not in seen:
                    chain.append(child)
                elif isinstance(child, RepStageBlock):
                    chain += _blocks(child)
                else:
                    break
            seen.update(chain)
            yield chain
        elif isinstance(module, RepStageBlock) and module.conv1 not in seen:
            chain = _blocks(module)
            seen.update(chain)
            yield chain


def _blocks(stage: Any) -> list[Any]:
    return [stage.conv1, *(stage.block or [])]


def _scale_output(block: Any, factors: Tensor) -> None:
    """Multiplies what comes out of a RepVGG block, before its ReLU, channel by channel."""
    for norm in (block.rbr_dense.bn, block.rbr_1x1.bn, block.rbr_identity):
        if norm is not None:
            norm.weight *= factors
            norm.bias *= factors


def _unscale_input(block: Any, factors: Tensor) -> None:
    """Divides what goes into a RepVGG block, within its weights."""
    for branch in (block.rbr_dense, block.rbr_1x1):
        branch.conv.weight /= factors[None, :, None, None]
    if block.rbr_identity is not None:
        block.rbr_identity.running_mean *= factors
        block.rbr_identity.weight /= factors
