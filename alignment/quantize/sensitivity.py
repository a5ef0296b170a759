"""How much each layer costs in int8: the results of a sweep, the metrics it takes, and the ranking that follows.

Two sweeps exist.  ``quantize-one``: one node reads int8 in the float graph, so that what is seen is its doing alone.
``leave-one-out``: one node is taken out of the graph whose nodes all read int8, so that what is seen is what leaving it
in float would win.

At the network's outputs a graph is held to FP32: the raw outputs that decoding starts from, each by itself, or boxes
and scores where the graph of a bare ONNX file gives nothing before them.  Raw outputs show an error before a sigmoid
flattens it, and a map of boxes counts as much as one of scores.  At the layer's own output (``@layer``) the graph is
held to the one without the change: float for ``quantize-one``, all of int8 for ``leave-one-out``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator

from alignment.errors import AlignError
from alignment.reading import read_model
from alignment.storage import writing

Mode = Literal["quantize-one", "leave-one-out"]
Part = Literal["both", "weights", "activations"]
MODES: tuple[Mode, ...] = get_args(Mode)
PARTS: tuple[Part, ...] = get_args(Part)
#: Noise relative to the signal that float32 does not resolve: SQNR ends at the 138 dB that it stands for.
RESOLVED = float(np.finfo(np.float32).eps) ** 2
TINY = float(np.finfo(np.float64).tiny)
#: Pairs of box and class count in the KL divergence where one side has such a score: NMS sees no others.
CANDIDATE = 0.001
#: Scores nearer to 0 and 1 than this are taken for this far away: their sigmoid was rounded.
SATURATED = 1e-7


@dataclass(frozen=True)
class Metric:
    """One number of a layer.

    Attributes:
        what: in words, with its unit.
        grows: whether it grows with the error.
        own: whether it is taken at the layer's own output.
    """

    what: str
    grows: bool = True
    own: bool = False


METRICS: dict[str, Metric] = {
    "map": Metric("AP that is lost against FP32"),
    "agreement": Metric("1 − agreement_ap with FP32's detections"),
    "kl": Metric("KL divergence of the candidates' scores, nats an image"),
    "mse": Metric("mean squared error of the outputs"),
    "cosine": Metric("cosine similarity of the outputs", grows=False),
    "sqnr": Metric("signal to quantization noise of the outputs, dB", grows=False),
    "mse@layer": Metric("mean squared error of the layer's output", own=True),
    "cosine@layer": Metric("cosine similarity of the layer's output", grows=False, own=True),
    "sqnr@layer": Metric("signal to quantization noise of the layer's output, dB", grows=False, own=True),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerSensitivity(_Frozen):
    """One node of a sweep: its torch module (empty where none is known), its multiplications, its `METRICS`."""

    node: str
    module: str
    macs: int
    metrics: dict[str, float]


class Sensitivity(_Frozen):
    """A sweep.

    Attributes:
        variant: its name.
        mode, part: which sweep, and what of a node reads int8: its weights, its activations, or both.
        identity: all that the numbers depend on; ``graph_sha256`` is that of the float graph.
        images: how many were run.
        baseline: ``ap`` of FP32, and the metrics of the graph without a change, `own` ones excepted.
        layers: in the order of the graph.
    """

    variant: str
    mode: Mode
    part: Part
    identity: dict[str, Any]
    images: int
    baseline: dict[str, float]
    layers: tuple[LayerSensitivity, ...] = ()

    @field_validator("layers")
    @classmethod
    def _alike(cls, layers: tuple[LayerSensitivity, ...]) -> tuple[LayerSensitivity, ...]:
        if len({frozenset(layer.metrics) for layer in layers}) > 1:
            raise ValueError("not all of them have the same metrics")
        if len({layer.node for layer in layers}) < len(layers):
            raise ValueError("one of them is there twice")
        return layers

    def ranking(self, metric: str) -> list[str]:
        """Node names, the most sensitive first; those that are alike in the order of the graph.

        Left out, a sensitive node brings the outputs nearer to FP32: `leave-one-out` has least errors first.

        Raises:
            AlignError: for a metric that does not exist, or that this sweep could not take.
        """
        require_metric(metric)
        missing = next((layer.node for layer in self.layers if metric not in layer.metrics), None)
        if missing is not None:
            taken = ", ".join(self.layers[0].metrics)
            raise AlignError(f"{self.variant}: its outputs do not have the metric {metric}", f"choose from {taken}")
        ranked = sorted(self.layers, key=lambda layer: -self.sign(metric) * layer.metrics[metric])
        return [layer.node for layer in ranked]

    def sign(self, metric: str) -> int:
        """1 where a larger value is of a more sensitive layer, else −1."""
        kind = METRICS[metric]
        return 1 if kind.grows == (self.mode == "quantize-one" or kind.own) else -1

    def save(self, path: Path) -> None:
        """Writes it as JSON, whole."""
        with writing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Reads what `save` wrote.  Raises AlignError for a file that is missing, truncated or something else."""
        return read_model(
            cls, path, "not a sensitivity sweep", "write one by `align sensitivity`", "delete it, and sweep anew"
        )


def require_metric(metric: str) -> None:
    """Raises AlignError for a metric that does not exist."""
    if metric not in METRICS:
        raise AlignError(f"no metric is named {metric!r}", f"choose from {', '.join(METRICS)}")


@dataclass
class Distortion:
    """MSE, cosine and SQNR of pairs of tensors, a pair being one output on one image.

    MSE and cosine are means over the pairs.  SQNR is that of the mean noise, relative to the signal of its own pair: a
    tensor of small numbers counts as much as one of large ones, and one that is equal on both sides as no noise.

    Attributes:
        pairs: how many were added.
        mse, cosine, noise: sums over them.
    """

    pairs: float = 0
    mse: float = 0.0
    cosine: float = 0.0
    noise: float = 0.0

    def add(self, reference: np.ndarray, subject: np.ndarray) -> None:
        """Adds a pair of equal shape, float32."""
        self.pairs += 1
        if np.array_equal(reference, subject):
            self.cosine += 1
            return
        reference, subject = reference.ravel(), subject.ravel()
        # Sums of NumPy, not of BLAS, whose threads would make other numbers in other processes.
        noise = float(np.square(reference - subject).sum())
        signal, power = float(np.square(reference).sum()), float(np.square(subject).sum())
        self.mse += noise / len(reference)
        self.noise += noise / max(signal, noise * RESOLVED, TINY)
        self.cosine += float((reference * subject).sum()) / math.sqrt(signal * power) if signal * power else 0.0

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """The three by name; empty before anything was added."""
        if not self.pairs:
            return {}
        noise = max(self.noise / self.pairs, RESOLVED)
        values = {"mse": self.mse / self.pairs, "cosine": self.cosine / self.pairs, "sqnr": -10 * math.log10(noise)}
        return {f"{name}{suffix}": value for name, value in values.items()}


def kl_divergence(reference: np.ndarray, subject: np.ndarray) -> float:
    """Σ p·ln(p/q) + (1 − p)·ln((1 − p)/(1 − q)) over the pairs of box and class that are candidates on either side.

    Every pair is a yes or no of its own, so that the divergence of an image's scores is the sum over pairs.  Those
    below `CANDIDATE` on both sides, nearly all, are left out: they come to nothing, and their sum would drown the rest.

    Args:
        reference, subject: ``[..., N, C]`` probabilities p and q.

    Returns:
        Nats.
    """
    counted = (reference >= CANDIDATE) | (subject >= CANDIDATE)
    p, q = (np.clip(side[counted].astype(np.float64), SATURATED, 1 - SATURATED) for side in (reference, subject))
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum())
