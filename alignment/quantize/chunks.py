"""All layers of a sweep on all images, chunk by chunk of these.

One run of the unchanged graph on a chunk keeps the tensors at which the layers' own graphs begin, see
`alignment.quantize.suffix`, in files: at most `KEPT` bytes at once, so that a chunk has as many images as these hold
for all layers, or one, and the layers go in groups.  Every layer is then a `Job` of its own, which needs those files
and nothing else, wherever it runs.  What it comes to goes into its `Ledger`, from which the next chunk goes on, as does
a sweep that was interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from alignment.layers import mark_outputs
from alignment.models.outputs import answered
from alignment.quantize.layer_job import Job, Meter, Store, Truth, compared, measure
from alignment.quantize.ledger import Ledger, Sums
from alignment.quantize.sweep_plan import Plan
from alignment.runners.onnxruntime import OnnxRuntimeRunner, open_session

Progress = Callable[[str, int, int], None]
#: Bytes of tensors that are kept in files for a chunk of images.
KEPT = 2 << 30


@dataclass(frozen=True)
class Ledgers:
    """What graphs have come to so far: FP32's, the unchanged one, and those of layers by node."""

    fp32: Ledger
    unchanged: Ledger
    layers: dict[str, Ledger]

    @classmethod
    def open(cls, folder: Path, nodes: Sequence[str], done: Collection[str]) -> Ledgers:
        """Those in a folder, which need not be there, of all layers but those that are done."""
        layers = {node: Ledger(folder / f"{place}") for place, node in enumerate(nodes) if node not in done}
        return cls(Ledger(folder / "fp32"), Ledger(folder / "unchanged"), layers)

    @property
    def images(self) -> list[int]:
        """How many images each of them tells of."""
        return [ledger.images for ledger in (self.fp32, self.unchanged, *self.layers.values())]


@dataclass(frozen=True)
class _Layer:
    """One layer's graph as a file, and the names of the unchanged graph's tensors that it needs."""

    node: str
    graph: Path
    needs: frozenset[str]


class _Base:
    """The unchanged graph, which gives its tensors image by image."""

    def __init__(self, plan: Plan, names: set[str]) -> None:
        model = plan.base
        self.outputs = tuple(value.name for value in model.graph.output)
        self._input = model.graph.input[0].name
        marked = mark_outputs(model, sorted(names - {self._input}))
        self._session = open_session(marked, f"{plan.variant.name} with tensors marked", optimize=False, threads=1)

    def run(self, image: np.ndarray, names: Collection[str]) -> dict[str, np.ndarray]:
        """The tensors of these names, among which the image itself may be, and the outputs."""
        asked = list(dict.fromkeys([*self.outputs, *(name for name in names if name != self._input)]))
        return {self._input: image, **dict(zip(asked, self._session.run(asked, {self._input: image}), strict=True))}


class Chunks:
    """Layers on all images, chunk by chunk.

    Args:
        plan: of the sweep.
        ledgers: of the layers, what these come to is added to.
        folder: for their graphs, and for tensors, one chunk's at a time.
        run: as `map`, somewhere.
        show: see `sweep`.
    """

    def __init__(self, plan: Plan, ledgers: Ledgers, folder: Path, run: Callable[..., Any], show: Progress) -> None:
        self.plan, self.ledgers, self.folder, self.run, self.show = plan, ledgers, folder, run, show
        self.layers = [self._layer(place, node) for place, node in enumerate(ledgers.layers)]
        names = {name for layer in self.layers for name in layer.needs}
        self.base = _Base(plan, names)
        first = plan.samples.load(plan.samples.dataset.images[0]).tensor[None]
        found = self.base.run(first, names)
        self.sizes = {name: value.nbytes for name, value in found.items() if name in names}
        # FP32's outputs are kept beside them.
        self.truth = sum(found[name].nbytes for name in self.base.outputs)
        self.image = self.truth + sum(self.sizes.values())

    def fill(self) -> None:
        """Until all ledgers tell of all images."""
        images, most = len(self.plan.samples), max(1, KEPT // self.image)
        with OnnxRuntimeRunner(self.plan.reference, optimize=False, threads=1) as fp32:
            while (first := min(self.ledgers.images)) < images:
                # At most to where another one is, of before an interruption.
                end = min(first + most, images, *(place for place in self.ledgers.images if place > first))
                chunk = range(first, end)
                truth = self._truth(fp32.run, chunk)
                for group in self._groups(first):
                    self._measure(group, chunk, truth, self._keep(group, chunk, truth))
                    shutil.rmtree(self.folder / "kept")
                shutil.rmtree(truth.outputs.folder)

    def _layer(self, place: int, node: str) -> _Layer:
        end, path = self.plan.end(node), self.folder / f"{place}.onnx"
        onnx.save(end.model, path)
        self.show("graphs", place + 1, len(self.ledgers.layers))
        outputs = {value.name for value in self.plan.base.graph.output}
        return _Layer(node, path, frozenset({*end.inputs, self.plan.tensor(node), *(outputs - {*end.outputs})}))

    def _groups(self, first: int) -> Iterator[list[_Layer]]:
        """Layers that have come to `first`, as many at once as `KEPT` has room for on an image; at least one group."""
        group: list[_Layer] = []
        needed: set[str] = set()
        for layer in self.layers:
            if self.ledgers.layers[layer.node].images > first:
                continue
            together = needed | layer.needs
            if group and self.truth + sum(map(self.sizes.__getitem__, together)) > KEPT:
                yield group
                group, together = [], set(layer.needs)
            group.append(layer)
            needed = together
        yield group

    def _truth(self, run: Callable[[np.ndarray], dict[str, np.ndarray]], chunk: range) -> Truth:
        """What FP32 gives for a chunk."""
        plan, store, transforms, detections = self.plan, Store(self.folder / "fp32", len(chunk)), [], []
        samples = plan.samples.after(chunk.start, chunk.stop)
        for index, (sample, outputs, found) in enumerate(answered(samples, plan.variant, run)):
            store.write(index, compared(outputs, plan.variant))
            transforms.append(sample.transform)
            detections.append(found)
            self.show("FP32", chunk[index] + 1, len(plan.samples))
        self.ledgers.fp32.add(chunk.start, Sums(), detections)
        return Truth(plan.variant, tuple(transforms), store)

    def _keep(self, group: list[_Layer], chunk: range, truth: Truth) -> Store:
        """What the layers of a group need of the unchanged graph, whose own sums go into its ledger."""
        names, ledger = {name for layer in group for name in layer.needs}, self.ledgers.unchanged
        kept, meter = Store(self.folder / "kept", len(chunk)), Meter(truth, ledger.sums)
        for index, sample in enumerate(self.plan.samples.after(chunk.start, chunk.stop)):
            values = self.base.run(sample.tensor[None], names)
            kept.write(index, {name: values[name] for name in names})
            meter.add({name: values[name] for name in self.base.outputs})
            self.show("tensors", chunk[index] + 1, len(self.plan.samples))
        ledger.add(chunk.start, meter.sums, meter.found)
        return kept

    def _measure(self, group: list[_Layer], chunk: range, truth: Truth, kept: Store) -> None:
        """Runs the layers of a group on a chunk."""
        ledgers = self.ledgers.layers
        jobs = [
            Job(
                layer.node,
                self.plan.tensor(layer.node),
                layer.graph,
                self.base.outputs,
                truth,
                kept,
                ledgers[layer.node].sums,
            )
            for layer in group
        ]
        for layer, (sums, found) in zip(group, self.run(measure, jobs), strict=True):
            ledgers[layer.node].add(chunk.start, sums, found)
            done = sum(ledger.images for ledger in ledgers.values())
            self.show("layers", done, len(self.plan.samples) * len(ledgers))
