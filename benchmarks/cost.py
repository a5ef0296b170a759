"""What a sweep over the layers, and a score, take on many images, layers and workers: from measured parts.

    python -m benchmarks.cost yolov8_n --few 4 --many 12

The parts are processor seconds of one thread, so that others on the machine do not count, of two sweeps over as many
images as ``--few`` and ``--many`` say; what grows with the images is the difference, the rest is what does not.  With I
images, L layers, W workers and G groups of layers, as many as keep their tensors within the sweep's limit,

    sweep = start + I float + L plan + G I keep + L (send + I bytes / rate) + L (open + I layer) / min(W, L / G)
    score = open + I (image / W + judge)

where float is the float network with its NMS, plan cuts and writes one layer's graph, keep runs the unchanged graph and
writes its tensors, open and layer are one layer's graph, opened and run on one image, send and bytes / rate is what
Dask takes to hand a layer to a worker, image is a network with its NMS, and judge is AP and agreement.  Then the
formula is held to sweeps over ``--check`` images in this process and on two workers.
"""

from __future__ import annotations

import json
import math
import pickle
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.data.samples import open_samples
from alignment.evaluation import detect_node_by_node
from alignment.executor import open_executor
from alignment.quantize.chunks import KEPT
from alignment.quantize.recipe import Quantized, quantize
from alignment.quantize.sweep import sweep
from alignment.storage import cache_dir
from alignment.variant import PLAIN, Variant, load_variant, with_quantization

TASKS = 20


@dataclass(frozen=True)
class Parts:
    """What was measured: seconds; `kept` is bytes of a layer's tensors on an image, `bytes` of a task an image."""

    start: float
    floating: float
    plan: float
    keep: float
    open: float
    layer: float
    kept: float
    bytes: float
    send: float
    rate: float
    image: float
    judge: float

    def groups(self, images: int, layers: int) -> int:
        """How many groups the layers go in."""
        return min(layers, max(1, math.ceil(layers * images * self.kept / KEPT)))

    def sweep(self, images: int, layers: int, workers: int, cluster: bool = True) -> float:
        """Seconds of a sweep; see above."""
        groups = self.groups(images, layers)
        alone = self.start + images * self.floating + layers * self.plan + groups * images * self.keep
        sent = layers * (self.send + images * self.bytes / self.rate) if cluster else 0.0
        return alone + sent + layers * (self.open + images * self.layer) / min(workers, layers / groups)

    def score(self, images: int, workers: int) -> float:
        """Seconds of one network's AP and agreement."""
        return self.open + images * (self.image / workers + self.judge)


@dataclass
class Watched(Executor):
    """This process, with the size of a task."""

    size: int = 0

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        """One by one."""
        (jobs,) = map(list, iterables)
        self.size = len(pickle.dumps(jobs[0]))
        return map(fn, jobs)


@dataclass
class Swept:
    """A sweep, by stage: processor seconds; bytes of all kept tensors, and of a task."""

    images: int
    layers: int = 0
    whole: float = 0.0
    floating: float = 0.0
    plan: float = 0.0
    keep: float = 0.0
    run: float = 0.0
    kept: int = 0
    task: int = 0


def measured(variant: Variant, quantized: Quantized, images: int) -> Swept:
    """One sweep in this process, all layers of which go in one group."""
    found, executor, last = Swept(images), Watched(), time.process_time()
    with _folder() as folder:

        def move(stage: str, done: int, total: int) -> None:
            nonlocal last
            passed, last = time.process_time() - last, time.process_time()
            if stage == "FP32":
                found.floating += passed
            elif stage == "layers":
                found.run, found.layers = found.run + passed, total
            elif done == 1:
                found.plan += passed
            else:
                found.keep += passed
                found.kept = sum(path.stat().st_size for path in (folder / "sweep.work" / "kept").iterdir())

        start = time.process_time()
        sweep(
            variant,
            quantized,
            open_samples(variant, None, images),
            path=folder / "sweep.json",
            executor=executor,
            progress=move,
        )
        found.whole = time.process_time() - start
    found.task = executor.size
    return found


@contextmanager
def _folder() -> Iterator[Path]:
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        yield Path(folder)


def _sent(size: int) -> tuple[float, float]:
    """Seconds that Dask takes for a task, and bytes a second, by tasks of almost nothing and of `size` bytes."""
    from distributed import LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    seconds = []
    with LocalCluster(**options) as cluster, open_executor(scheduler=cluster.scheduler_address) as pool:
        assert pool
        for content in (b"", b"", bytes(size)):  # the first to warm up
            start = time.perf_counter()
            # Each of its own, as equal ones would be sent once.
            list(pool.map(len, [content + str(number).encode() for number in range(TASKS)]))
            seconds.append((time.perf_counter() - start) / TASKS)
    return seconds[1], size / max(seconds[2] - seconds[1], 1e-9)


def _scored(variant: Variant, quantized: Quantized, images: int) -> tuple[float, float]:
    """Seconds of one image through a network with its NMS, and of judging it."""
    samples = open_samples(variant, None, images)
    start = time.process_time()
    found = detect_node_by_node(quantized.source, samples)
    middle = time.process_time()
    coco_ap(samples.dataset, found)
    agreement_ap(samples.dataset, found, found)
    return (middle - start) / images, (time.process_time() - middle) / images


def parts_of(variant: Variant, quantized: Quantized, few: int, many: int) -> Parts:
    """All parts."""
    less, more = (measured(variant, quantized, images) for images in (few, many))
    layers = more.layers

    def grows(name: str) -> float:
        return max(0.0, (getattr(more, name) - getattr(less, name)) / (many - few))

    layer = grows("run") / layers
    send, rate = _sent(max(more.task, 1 << 20))
    image, judge = _scored(variant, quantized, many)
    return Parts(
        start=max(0.0, more.floating - many * grows("floating")),
        floating=grows("floating"),
        plan=more.plan / layers,
        keep=more.keep / max(1, many - 1),
        open=max(0.0, more.run / layers - many * layer),
        layer=layer,
        kept=more.kept / layers / many,
        bytes=max(0.0, (more.task - less.task) / (many - few)),
        send=send,
        rate=rate,
        image=image,
        judge=judge,
    )


def check(variant: Variant, quantized: Quantized, images: int, parts: Parts, layers: int) -> dict[str, list[float]]:
    """Sweeps in this process and on two workers: what the formula says, processor seconds, and those of the clock."""
    found = {}
    for workers in (1, 2):
        with _folder() as folder:
            start, busy = time.perf_counter(), _busy()
            with open_executor(workers) as pool:
                sweep(
                    variant, quantized, open_samples(variant, None, images), path=folder / "sweep.json", executor=pool
                )
            said = parts.sweep(images, layers, workers, cluster=False)
            whole = parts.sweep(images, layers, 1, cluster=False)
            seconds = [said, whole, _busy() - busy, time.perf_counter() - start]
            found[f"{workers} workers"] = [round(value, 2) for value in seconds]
    return found


def _busy() -> float:
    """Processor seconds of this process and of those that it started and that have ended."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in each)


def main(
    name: Annotated[str, typer.Argument(metavar="VARIANT")],
    few: Annotated[int, typer.Option(help="images of the first sweep")] = 4,
    many: Annotated[int, typer.Option(help="images of the second")] = 12,
    checked: Annotated[int, typer.Option("--check", help="images of those that the formula is held to")] = 8,
    images: Annotated[int, typer.Option(help="to tell the cost of")] = 5000,
    layers: Annotated[int, typer.Option(help="to tell the cost of")] = 300,
    workers: Annotated[str, typer.Option(help="to tell the cost of, with commas")] = "1,8,64",
) -> None:
    """JSON: the parts, the check, and hours of a sweep and minutes of a score by workers."""
    variant = with_quantization(load_variant(name), PLAIN | {"policy": "conv-only"})
    quantized = quantize(variant)
    parts = parts_of(variant, quantized, few, many)
    own = len(quantized.placement.weights)
    counts = [int(text) for text in workers.split(",")]
    found = {
        "variant": name,
        "layers measured": own,
        "parts": {key: float(f"{value:.4g}") for key, value in asdict(parts).items()},
        "check: formula, formula for 1, processor s, clock s": check(variant, quantized, checked, parts, own),
        "groups": parts.groups(images, layers),
        "sweep, hours": {str(w): round(parts.sweep(images, layers, w) / 3600, 2) for w in counts},
        "sweep, hours, 64 images": {str(w): round(parts.sweep(64, layers, w) / 3600, 3) for w in counts},
        "score, minutes": {str(w): round(parts.score(images, w) / 60, 2) for w in counts},
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
