"""The nodes of a variant that could stay float, and the graph that keeping some of them makes."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from alignment.export.onnx_export import exported
from alignment.export.plugin_nms import refuse_plugin
from alignment.quantize.calibrate import identity_of
from alignment.quantize.graph import OnnxGraph
from alignment.quantize.placement import place
from alignment.quantize.recipe import Quantized, calibration_samples, quantize, search_identity
from alignment.variant import Variant, with_quantization


class Candidates:
    """The nodes with learnt weights that a variant's recipe puts into int8.

    Attributes:
        source: the float32 graph, as exported.
        nodes: their names, in the order of the graph.
        macs: multiplications with learnt weights for one image, by node, of all nodes that have any.
        kept_by_recipe: nodes that the recipe's own `keep_float` names, with the pattern that does.

    Raises:
        AlignError: for a graph that cannot be quantized, or without a fixed height and width.
    """

    def __init__(self, variant: Variant, data: Path | None = None) -> None:
        self.variant, self._data = variant, data
        self.source = refuse_plugin(exported(variant).onnx, "no int8 here")
        graph = OnnxGraph(onnx.load(self.source))
        recipe = variant.quantization
        self.kept_by_recipe = graph.matching(recipe.keep_float)
        self.nodes = tuple(q.node for q in place(graph, recipe.policy, recipe.keep_float).weights)
        self.macs = {node.name: macs for node in graph.nodes if (macs := graph.macs(node))}
        self._position = graph.position

    def named(self, kept: Collection[str]) -> list[str]:
        """All nodes that stay float by name when `kept` do, those of the recipe too, in the order of the graph."""
        return sorted({*kept, *self.kept_by_recipe}, key=self._position.__getitem__)

    def quantized(self, kept: Collection[str]) -> Quantized:
        """What the variant's recipe makes when these nodes stay float too: `align quantize --keep-float` is the same.

        Which other nodes read int8 follows by the placement rules: what moves values stays float where no node reads
        them in int8 any more.
        """
        return quantize(self._keeping(kept), self._data, every=False)

    def identity(self, kept: Collection[str]) -> list[Any]:
        """All that decides which graph `quantized` gives, JSON values, at no cost."""
        recipe = self._keeping(kept).quantization
        return [self._calibrated, recipe.fingerprint(), search_identity(recipe)]

    @cached_property
    def _calibrated(self) -> dict[str, Any]:
        return identity_of(self.source, calibration_samples(self.variant, self._data))

    def _keeping(self, kept: Collection[str]) -> Variant:
        return with_quantization(self.variant, {"keep_float": self.named(kept)})

    def int8_share(self, kept: Collection[str] = ()) -> float:
        """The share of the network's multiplications that are done in int8 when these nodes stay float too.

        Of all multiplications with learnt weights, those that the recipe leaves in float by itself included.
        """
        return sum(self.macs[node] for node in self.nodes if node not in kept) / sum(self.macs.values())
