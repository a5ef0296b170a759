"""The sweep over the layers of a quantized variant, in which none computes again what precedes it.

One run of the unchanged graph on every image keeps the tensors at which the layers' own graphs begin, see
`alignment.quantize.suffix`, in files: at most `KEPT` bytes at once, or what one layer needs, for the layers of a group.
Every layer is then a `Job` of its own, which needs those files and nothing else, wherever it runs.

ONNX Runtime computes node by node, without graph optimization, in one thread whatever ``ALIGN_THREADS`` says: numbers
are the same to the bit for any number of workers, and the same as those of whole graphs.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto

from alignment import __version__
from alignment.cache import Key, resumable
from alignment.compare.coco_map import coco_ap
from alignment.data.samples import Samples
from alignment.errors import AlignError
from alignment.export.onnx_export import exported, file_digest, modules_of
from alignment.layers import mark_outputs
from alignment.models.outputs import answered
from alignment.quantize.graph import OnnxGraph
from alignment.quantize.layer_job import Job, Meter, Store, Truth, compared, measure
from alignment.quantize.recipe import Quantized
from alignment.quantize.sensitivity import LayerSensitivity, Mode, Part, Sensitivity
from alignment.quantize.suffix import Suffix, Unchanged
from alignment.runners.onnxruntime import OnnxRuntimeRunner, open_session
from alignment.storage import locked
from alignment.variant import Variant

Progress = Callable[[str, int, int], None]
Units = Literal["weights", "all"]
#: Bytes of tensors that are kept in files for a group of layers.
KEPT = 2 << 30
#: Raise it when a metric comes to mean another number.
MEANING = 1


def sweep(
    variant: Variant,
    quantized: Quantized,
    samples: Samples,
    mode: Mode = "quantize-one",
    part: Part = "both",
    units: Units = "weights",
    *,
    path: Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    share: bool = True,
) -> tuple[Sensitivity, Path]:
    """Takes all metrics of every layer of a quantized variant.

    Args:
        variant: that was quantized.
        quantized: see `alignment.quantize.recipe.quantize`.
        samples: the images to score on.
        mode: see `alignment.quantize.sensitivity`.
        part: what reads int8: with ``weights`` activations are float everywhere, and the other way round.
        units: the nodes with learnt weights, or all that read int8.
        path: of the checkpoint, which is written after every layer; one that is there is completed, or returned as it
            is.  Default: one in the cache.
        executor: where layers are run; this process without one.
        progress: called with what is being done, how many are done, and all.
        share: whether layers begin at kept tensors; without, every one runs the whole network.

    Returns:
        The sweep, and where it is kept.

    Raises:
        AlignError: for a variant without int8 nodes, and a checkpoint of another sweep.
    """
    plan = _Plan(variant, quantized, samples, mode, part, units, share)
    name = f"{variant.name}.sensitivity.json"
    if path is not None:
        return _completed(plan, path, executor, progress)
    key = Key("sensitivity", variant.name, plan.inputs, plan.versions)
    with resumable(key, lambda folder: _require_sweep(folder / name)) as folder:
        return _completed(plan, folder / name, executor, progress)


def _require_sweep(path: Path) -> None:
    """Raises AlignError for an unfinished sweep that cannot be completed."""
    if path.is_file():
        Sensitivity.load(path)


def _completed(
    plan: _Plan, path: Path, executor: Executor | None, progress: Progress | None
) -> tuple[Sensitivity, Path]:
    """The sweep of a checkpoint with all layers, and where it is kept."""
    path = path.absolute()  # as workers may run elsewhere
    with locked(path):
        if path.is_file():
            found = Sensitivity.load(path)
            _require(found.identity, plan.identity, path)
        else:
            found = plan.empty()
        done = {layer.node for layer in found.layers}
        todo = [node for node in plan.nodes if node not in done]
        # One folder a sweep, so that what a run that was killed has left is known.
        folder = path.with_name(f".{path.stem}.work")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            if todo:
                found = _swept(plan, todo, found, folder, path, executor, progress)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return found, path


def _require(found: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    for key in dict.fromkeys([*asked, *found]):
        if found.get(key) != asked.get(key):
            what = f"{path}: a sweep of another {key}: {found.get(key)}, now {asked.get(key)}"
            raise AlignError(what, "delete it, or sweep into another file")


@dataclass(frozen=True)
class _Plan:
    """What is asked for, and the graphs that it takes."""

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


@dataclass(frozen=True)
class _Planned:
    """One layer's graph as a file, and the names of the unchanged graph's tensors that it needs."""

    node: str
    graph: Path
    needs: frozenset[str]


class _Base:
    """The unchanged graph, which gives its tensors image by image."""

    def __init__(self, plan: _Plan, names: set[str]) -> None:
        model = plan.base
        self.outputs = tuple(value.name for value in model.graph.output)
        self._input = model.graph.input[0].name
        marked = mark_outputs(model, sorted(names - {self._input}))
        self._session = open_session(marked, f"{plan.variant.name} with tensors marked", optimize=False, threads=1)

    def run(self, image: np.ndarray, names: Collection[str]) -> dict[str, np.ndarray]:
        """The tensors of these names, among which the image itself may be, and the outputs."""
        asked = list(dict.fromkeys([*self.outputs, *(name for name in names if name != self._input)]))
        return {self._input: image, **dict(zip(asked, self._session.run(asked, {self._input: image}), strict=True))}


def _swept(
    plan: _Plan,
    todo: list[str],
    found: Sensitivity,
    folder: Path,
    path: Path,
    executor: Executor | None,
    progress: Progress | None,
) -> Sensitivity:
    """`found` with the layers that are to do; it is written after every one."""
    show = progress or (lambda stage, done, total: None)
    truth = _truth(plan, folder / "fp32", show)
    planned = [_planned(plan, node, folder / f"{index}.onnx") for index, node in enumerate(todo)]
    base = _Base(plan, {name for one in planned for name in one.needs})
    modules = modules_of(plan.reference)
    for group in _groups(plan, base, planned):
        kept = Store(folder / "kept", len(plan.samples))
        baseline = _keep(plan, base, group, kept, truth, show)
        found = found.model_copy(update={"baseline": {"ap": truth.ap, **baseline}})
        jobs = [Job(one.node, plan.tensor(one.node), one.graph, base.outputs, truth, kept) for one in group]
        for job, metrics in zip(jobs, (executor.map if executor else map)(measure, jobs), strict=True):
            layers = [*found.layers, plan.layer(job.node, metrics, modules)]
            layers.sort(key=lambda layer: plan.nodes.index(layer.node))
            found = found.model_copy(update={"layers": tuple(layers)})
            found.save(path)
            show("layers", len(layers), len(plan.nodes))
        shutil.rmtree(kept.folder)
    return found


def _truth(plan: _Plan, folder: Path, show: Progress) -> Truth:
    store = Store(folder, len(plan.samples))
    transforms, detections = {}, {}
    with OnnxRuntimeRunner(plan.reference, optimize=False, threads=1) as runner:
        for index, (sample, outputs, found) in enumerate(answered(plan.samples, runner.run)):
            store.write(index, compared(outputs, plan.variant))
            transforms[sample.entry.id], detections[sample.entry.id] = sample.transform, found
            show("FP32", index + 1, len(plan.samples))
    dataset = plan.samples.dataset
    return Truth(plan.variant, dataset, transforms, detections, coco_ap(dataset, detections)[0], store)


def _planned(plan: _Plan, node: str, path: Path) -> _Planned:
    end = plan.end(node)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(end.model, path)
    outputs = {value.name for value in plan.base.graph.output}
    return _Planned(node, path, frozenset({*end.inputs, plan.tensor(node), *(outputs - {*end.outputs})}))


def _groups(plan: _Plan, base: _Base, planned: list[_Planned]) -> Iterator[list[_Planned]]:
    """Layers in their order, as many at once as `KEPT` has room for, by the sizes on the first image."""
    first = plan.samples.load(plan.samples.dataset.images[0]).tensor[None]
    sizes = {name: value.nbytes for name, value in base.run(first, {n for one in planned for n in one.needs}).items()}
    group: list[_Planned] = []
    needed: set[str] = set()
    for one in planned:
        together = needed | one.needs
        if group and sum(map(sizes.__getitem__, together)) * len(plan.samples) > KEPT:
            yield group
            group, together = [], set(one.needs)
        group.append(one)
        needed = together
    yield group


def _keep(
    plan: _Plan, base: _Base, group: list[_Planned], kept: Store, truth: Truth, show: Progress
) -> dict[str, float]:
    """Writes what the layers of a group need, and returns the metrics of the unchanged graph."""
    names = {name for one in group for name in one.needs}
    meter = Meter(truth)
    for index, sample in enumerate(plan.samples):
        values = base.run(sample.tensor[None], names)
        kept.write(index, {name: values[name] for name in names})
        meter.add({name: values[name] for name in base.outputs})
        show(f"tensors for {len(group)} layers", index + 1, len(plan.samples))
    return meter.metrics()
