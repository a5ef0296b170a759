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

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from alignment.errors import AlignError
from alignment.storage import writing

Mode = Literal["quantize-one", "leave-one-out"]
Part = Literal["both", "weights", "activations"]
MODES: tuple[Mode, ...] = get_args(Mode)
PARTS: tuple[Part, ...] = get_args(Part)


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
        kind = METRICS[metric]
        falling = kind.grows == (self.mode == "quantize-one" or kind.own)
        ranked = sorted(self.layers, key=lambda layer: (-1 if falling else 1) * layer.metrics[metric])
        return [layer.node for layer in ranked]

    def save(self, path: Path) -> None:
        """Writes it as JSON, whole."""
        with writing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Reads what `save` wrote.  Raises AlignError for a file that is missing, truncated or something else."""
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise AlignError(f"{path}: {error.strerror}", "write one by `align sensitivity`") from None
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except ValueError as error:  # of JSON and of UTF-8
            what = str(error)
        raise AlignError(f"{path}: not a sensitivity sweep: {what}", "delete it, and sweep anew")


def require_metric(metric: str) -> None:
    """Raises AlignError for a metric that does not exist."""
    if metric not in METRICS:
        raise AlignError(f"no metric is named {metric!r}", f"choose from {', '.join(METRICS)}")
