"""What a sweep over the layers is asked for, the graphs that it takes, and all that its numbers depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import ModelProto

from alignment import __version__
from alignment.data.samples import Samples
from alignment.errors import AlignError
from alignment.export.onnx_export import exported, file_digest
from alignment.layers import mark_outputs
from alignment.quantize.graph import OnnxGraph
from alignment.quantize.recipe import Quantized
from alignment.quantize.sensitivity import LayerSensitivity, Mode, Part, Sensitivity
from alignment.quantize.suffix import Suffix, Unchanged
from alignment.variant import Variant

Units = Literal["weights", "all"]
#: Raise it when a metric comes to mean another number.
MEANING = 1


@dataclass(frozen=True)
class Plan:
    """See `alignment.quantize.sweep.sweep`, whose arguments these are."""

    variant: Variant
    quantized: Quantized
    samples: Samples
    mode: Mode
    part: Part
    units: Units
    share: bool

    @cached_property
    def graph(self) -> OnnxGraph:
        return OnnxGraph(onnx.load(self.quantized.source))

    @cached_property
    def nodes(self) -> list[str]:
        """The layers, in the order of the graph."""
        placement = self.quantized.placement
        weighted = [quantizer.node for quantizer in placement.weights]
        nodes = weighted if self.units == "weights" or self.part == "weights" else placement.int8_nodes
        if not nodes:
            raise AlignError(f"{self.variant.name}: none of its nodes reads int8", "mend its policy or keep_float")
        return sorted(nodes, key=self.graph.position.__getitem__)

    @cached_property
    def base(self) -> ModelProto:
        """The graph without a change."""
        return onnx.load(self.quantized.source) if self.mode == "quantize-one" else self._int8(self._all)

    @cached_property
    def _unchanged(self) -> Unchanged:
        return Unchanged(self.base)

    @cached_property
    def reference(self) -> Path:
        """FP32."""
        return exported(self.variant).onnx

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that a sweep depends on."""
        return {**self.inputs, **self.versions}

    @cached_property
    def versions(self) -> dict[str, Any]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "alignment": __version__}

    @cached_property
    def inputs(self) -> dict[str, Any]:
        samples, int8 = self.samples, self._int8(self._all).SerializeToString(deterministic=True)
        return {
            "graph_sha256": file_digest(self.quantized.source),
            "reference_sha256": file_digest(self.reference),
            "int8_sha256": hashlib.sha256(int8).hexdigest(),
            "recipe": self.quantized.recipe.fingerprint(),
            "variant": self.variant.fingerprint(),
            "images": f"{samples.dataset.content_fingerprint}, the first {len(samples)}",
            "annotations": samples.dataset.fingerprint,
            "mode": self.mode,
            "part": self.part,
            "units": self.units,
            "meaning": MEANING,
        }

    @property
    def _all(self) -> frozenset[str]:
        return frozenset(self.quantized.placement.int8_nodes)

    def empty(self) -> Sensitivity:
        return Sensitivity(
            variant=self.variant.name,
            mode=self.mode,
            part=self.part,
            identity=self.identity,
            images=len(self.samples),
            baseline={},
        )

    def tensor(self, node: str) -> str:
        """What a node gives."""
        return self.graph.nodes[self.graph.position[node]].output[0]

    def end(self, node: str) -> Suffix:
        """The graph with one layer changed, from where it has to be computed anew."""
        changed = self._int8({node} if self.mode == "quantize-one" else self._all - {node})
        outputs = [value.name for value in changed.graph.output]
        wanted = dict.fromkeys([*outputs, self.tensor(node)])
        if self.share:
            return self._unchanged.suffix(changed, wanted)
        whole = mark_outputs(changed, [self.tensor(node)])
        return Suffix(whole, (whole.graph.input[0].name,), tuple(wanted))

    def layer(self, node: str, metrics: dict[str, float], modules: Mapping[str, str]) -> LayerSensitivity:
        macs = self.graph.macs(self.graph.nodes[self.graph.position[node]])
        return LayerSensitivity(node=node, module=modules.get(node, ""), macs=macs, metrics=metrics)

    def _int8(self, nodes: frozenset[str] | set[str]) -> ModelProto:
        return self.quantized.only(nodes, self.part != "weights", self.part != "activations")
