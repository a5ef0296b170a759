"""The sweep over the layers of a quantized variant, in which none computes again what precedes it.

`alignment.quantize.chunks` runs the layers on the images, and keeps what they come to in ledgers; once these tell of
all images, they are judged.

ONNX Runtime computes node by node, without graph optimization, in one thread whatever ``ALIGN_THREADS`` says: numbers
are the same to the bit for any number of workers, and the same as those of whole graphs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

from alignment.cache import Key, resumable
from alignment.compare.coco_map import coco_ap
from alignment.data.samples import Samples
from alignment.errors import AlignError
from alignment.export.onnx_export import modules_of
from alignment.quantize.chunks import Chunks, Ledgers, Progress
from alignment.quantize.layer_job import judge
from alignment.quantize.ledger import told
from alignment.quantize.recipe import Quantized
from alignment.quantize.sensitivity import Mode, Part, Sensitivity
from alignment.quantize.sweep_plan import Plan, Units
from alignment.scratch import temporary
from alignment.storage import cache_dir, locked
from alignment.variant import Variant


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
        path: of the sweep; one that is there is completed, or returned as it is.  What is done lies beside it, in
            ``PATH.work``, until all is.  Default: one in the cache.
        executor: where layers are run; this process without one.
        progress: called with what is being done, how many are done, and all.
        share: whether layers begin at kept tensors; without, every one runs the whole network.

    Returns:
        The sweep, and where it is kept.

    Raises:
        AlignError: for a variant without int8 nodes, and a checkpoint of another sweep.
    """
    plan = Plan(variant, quantized, samples, mode, part, units, share)
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
    plan: Plan, path: Path, executor: Executor | None, progress: Progress | None
) -> tuple[Sensitivity, Path]:
    """The sweep of a checkpoint with all layers, and where it is kept."""
    path, cache = path.absolute(), cache_dir().absolute()  # as workers may run elsewhere
    # The folder is made in any case, as what a sweep that was killed has left goes then.
    with locked(path), temporary(cache, ".sweep-", "", folder=True) as folder:
        work = path.with_name(f"{path.name}.work")
        if path.is_file():
            found = Sensitivity.load(path)
            _require(found.identity, plan.identity, path)
        else:  # of which sweep ledgers are, only this file says
            shutil.rmtree(work, ignore_errors=True)
            found = plan.empty()
            found.save(path)
        if len(found.layers) < len(plan.nodes):
            ledgers = Ledgers.open(work, plan.nodes, {layer.node for layer in found.layers})
            run, show = executor.map if executor else map, progress or (lambda stage, done, total: None)
            if min(ledgers.images) < len(plan.samples):
                Chunks(plan, ledgers, folder, run, show).fill()
            found = _judged(plan, ledgers, found, path, run, show)
        shutil.rmtree(work, ignore_errors=True)
    return found, path


def _require(found: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    for key in dict.fromkeys([*asked, *found]):
        if found.get(key) != asked.get(key):
            what = f"{path}: a sweep of another {key}: {found.get(key)}, now {asked.get(key)}"
            raise AlignError(what, "delete it, or sweep into another file")


def _judged(
    plan: Plan, ledgers: Ledgers, found: Sensitivity, path: Path, run: Callable[..., Any], show: Progress
) -> Sensitivity:
    """`found` with the layers that it lacks; it is written after every one."""
    dataset, modules = plan.samples.dataset, modules_of(plan.reference)
    ap = coco_ap(dataset, told(ledgers.fp32.path, dataset)[1])[0]
    tell = partial(judge, reference=ledgers.fp32.path, dataset=dataset, ap=ap)
    found = found.model_copy(update={"baseline": {"ap": ap, **tell(ledgers.unchanged.path)}})
    paths = [ledger.path for ledger in ledgers.layers.values()]
    for node, metrics in zip(ledgers.layers, run(tell, paths), strict=True):
        layers = [*found.layers, plan.layer(node, metrics, modules)]
        layers.sort(key=lambda layer: plan.nodes.index(layer.node))
        found = found.model_copy(update={"layers": tuple(layers)})
        found.save(path)
        show("metrics", len(layers), len(plan.nodes))
    return found
