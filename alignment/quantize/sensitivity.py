"""How sensitive each layer is to int8."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from alignment.storage import writing


@dataclass(frozen=True)
class LayerSensitivity:
    """What int8 in one layer costs, by metric."""

    node: str
    module: str
    macs: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """What int8 costs layer by layer."""

    variant: str
    mode: Literal["quantize-one", "leave-one-out"]
    part: Literal["both", "weights", "activations"]
    identity: dict[str, Any]
    images: int
    baseline: dict[str, float]
    layers: list[LayerSensitivity]

    def ranking(self, metric: str) -> list[str]:
        """The most sensitive node first."""
        small = metric.partition("@")[0] in ("sqnr", "cosine")
        sign = 1 if small else -1
        return [layer.node for layer in sorted(self.layers, key=lambda layer: sign * layer.metrics[metric])]

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Reads one."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "layers": [LayerSensitivity(**layer) for layer in fields["layers"]]})

    def save(self, path: Path) -> None:
        """Writes it."""
        with writing(path) as file:
            file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
