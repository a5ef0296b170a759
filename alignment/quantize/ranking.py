"""How well each metric of a sensitivity analysis ranks layers: its rank correlation with what int8 costs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from alignment.quantize.sensitivity import METRICS, Sensitivity

#: What int8 costs in the end, and what the metrics are held to.
COSTS = ("map", "agreement")


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, −1..1: Pearson's of the ranks, where equal values share the mean of their ranks.

    Raises:
        ValueError: for lists of different length.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values")
    x, y = (_ranks(np.asarray(values, float)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else float("nan")


def rank_correlations(found: Sensitivity, nodes: Collection[str]) -> dict[str, dict[str, float]]:
    """Metric → cost → the rank correlation of the two over `nodes`, 1 where the metric ranks as the cost does.

    Costs are AP and agreement lost, of those that were measured; NaN where either is the same for all nodes.
    """
    layers = [layer for layer in found.layers if layer.node in nodes]
    metrics = [metric for metric in METRICS if layers and all(metric in layer.metrics for layer in layers)]
    values = {metric: [found.sign(metric) * layer.metrics[metric] for layer in layers] for metric in metrics}
    costs = [cost for cost in COSTS if cost in values]
    return {metric: {cost: spearman(values[metric], values[cost]) for cost in costs} for metric in metrics}


def _ranks(values: np.ndarray) -> np.ndarray:
    """``[n]`` ranks from 1, the mean of them for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
