"""Distillation: what a quantized detector is told by the float one, beside labels or in their place.

Every family of detectors decodes to boxes and scores, so these are compared, not the raw outputs, whose meaning differs
from head to head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

#: Distances between boxes up to it, in strides, count by their square.
_BETA = 0.1
_EPSILON = 1e-6


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error of the neck's outputs in units of the teacher's mean square, level by level, averaged."""
    pairs = zip(student, teacher, strict=True)
    errors = [(ours - theirs).square().mean() / theirs.square().mean() for ours, theirs in pairs]
    return sum(errors[1:], errors[0]) / len(errors)


def score_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence (Kullback-Leibler) of the student's scores from the teacher's: 0 where they are alike.

    Args:
        student: ``[B, N, C]`` probabilities.
        teacher: the same of the float detector.

    Returns:
        The sum over all scores, for each object that the teacher sees: over the sum of the best score of each box.
    """
    ours, theirs = (scores.clamp(_EPSILON, 1 - _EPSILON) for scores in (student, teacher))
    divergence = functional.binary_cross_entropy(ours, theirs, reduction="sum")
    entropy = functional.binary_cross_entropy(theirs, theirs, reduction="sum")
    return (divergence - entropy) / seen(teacher).sum().clamp(min=1)


def box_loss(student: Tensor, teacher: Tensor, scores: Tensor, stride: Tensor) -> Tensor:
    """Smooth L1 distance of the boxes, weighed by the teacher's best score for each.

    Args:
        student: ``[B, N, 4]`` in pixels; rotated ones are ``[B, N, 5]`` with an angle in radians.
        teacher: the same of the float detector.
        scores: ``[B, N, C]``, the teacher's.
        stride: ``[N]``, in pixels: the unit of the distances.
    """
    unit = stride[None, :, None]
    distance = functional.smooth_l1_loss(student[..., :4] / unit, teacher[..., :4] / unit, reduction="none", beta=_BETA)
    total = distance.sum(-1)
    if student.shape[-1] == 5:
        total = total + (student[..., 4] - teacher[..., 4]).abs()
    weight = seen(scores)
    return (total * weight).sum() / weight.sum().clamp(min=1)


def seen(scores: Tensor) -> Tensor:
    """``[B, N]``: the best score of each box."""
    return scores.amax(-1)
