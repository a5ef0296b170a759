"""What a sweep over the layers, and a score, take on many images, layers and workers: from measured parts.

    python -m benchmarks.cost yolov8_n --few 4 --many 12

The parts are processor seconds of one thread, so that others on the machine do not count, of two sweeps over as many
images as ``--few`` and ``--many`` say; what grows with the images is the difference, the rest is what does not.  With I
images, L layers, W workers, and N chunks of as many images as keep their tensors within the sweep's limit,

    sweep = start + L plan + I (2 float + L keep) + L ((N + 1) send + I bytes / rate)
          + L (N open + close + I (layer + judge)) / min(W, L)
    score = open + close + I (image / W + judge)

where float is the float network with its NMS, which FP32 and the unchanged graph both take, plan cuts and writes one
layer's graph, keep writes one layer's tensors, open and layer are one layer's graph, opened and run on one image, close
and judge are its AP and agreement, send and bytes / rate is what Dask takes to hand a layer's tasks to a worker and
their results back, and image is a network with its NMS.  Where even one image of all layers has no room, layers go in
groups, and the unchanged graph runs once for each.  Then the formula is held to sweeps over ``--check`` images in this
process and on two workers.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from alignment.data.samples import open_samples
from alignment.evaluation import detect_node_by_node
from alignment.executor import open_executor
from alignment.quantize.chunks import KEPT
from alignment.quantize.layer_job import Job
from alignment.quantize.recipe import Quantized, quantize
from alignment.quantize.sweep import sweep
from alignment.storage import cache_dir
from alignment.variant import PLAIN, Variant, load_variant, with_quantization

TASKS = 20


@dataclass(frozen=True)
class Parts:
    """What was measured: seconds; `kept` is bytes of a layer's tensors on an image, `bytes` of what is sent for it, and
    `told` of its detections in a ledger."""

    start: float
    floating: float
    plan: float
    keep: float
    open: float
    layer: float
    close: float
    judge: float
    kept: float
    told: float
    bytes: float
    send: float
    rate: float
    image: float

    def chunks(self, images: int, layers: int) -> int:
        """How many chunks the images go in."""
        return math.ceil(images / max(1, int(KEPT / (layers * self.kept))))

    def sweep(self, images: int, layers: int, workers: int, cluster: bool = True) -> float:
        """Seconds of a sweep; see above."""
        chunks, groups = self.chunks(images, layers), math.ceil(layers * self.kept / KEPT)
        alone = self.start + layers * self.plan + images * ((1 + groups) * self.floating + layers * self.keep)
        sent = layers * ((chunks + 1) * self.send + images * self.bytes / self.rate) if cluster else 0.0
        shared = layers * (chunks * self.open + self.close + images * (self.layer + self.judge))
        return alone + sent + shared / min(workers, layers)

    def score(self, images: int, workers: int) -> float:
        """Seconds of one network's AP and agreement."""
        return self.open + self.close + images * (self.image / workers + self.judge)


@dataclass
class Watched(Executor):
    """This process, with the bytes of a layer's tasks and results, of its detections, and of all kept tensors."""

    sent: int = 0
    told: int = 0
    kept: int = 0

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        """One by one."""
        (tasks,) = map(list, iterables)
        self.sent += len(pickle.dumps((fn, tasks[0])))
        if isinstance(tasks[0], Job):
            self.kept = sum(path.stat().st_size for path in tasks[0].kept.folder.iterdir())
        for place, result in enumerate(map(fn, tasks)):
            if not place and isinstance(tasks[0], Job):
                self.told = len(pickle.dumps(result))
            yield result


@dataclass
class Swept:
    """A sweep: processor seconds by stage, and how often each was told of."""

    images: int
    watched: Watched = field(default_factory=Watched)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def step(self, stage: str) -> float:
        """Seconds of a step of a stage, the first left out, which other things precede."""
        return mean(self.seconds[stage][1:])


def measured(variant: Variant, quantized: Quantized, images: int) -> Swept:
    """One sweep in this process, all images of which go in one chunk."""
    found, last = Swept(images), time.process_time()

    def move(stage: str, done: int, total: int) -> None:
        nonlocal last
        passed, last = time.process_time() - last, time.process_time()
        found.seconds.setdefault(stage, []).append(passed)

    with _folder() as folder:
        samples = open_samples(variant, None, images)
        sweep(variant, quantized, samples, path=folder / "sweep.json", executor=found.watched, progress=move)
    assert len(found.seconds["tensors"]) == images
    assert len(found.seconds["layers"]) == len(found.seconds["graphs"])
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


def _scored(variant: Variant, quantized: Quantized, images: int) -> float:
    """Seconds of one image through a network with its NMS."""
    start = time.process_time()
    detect_node_by_node(quantized.source, open_samples(variant, None, images))
    return (time.process_time() - start) / images


def parts_of(variant: Variant, quantized: Quantized, few: int, many: int) -> Parts:
    """All parts."""
    less, more = (measured(variant, quantized, images) for images in (few, many))
    layers, watched, before = len(more.seconds["graphs"]), more.watched, less.watched

    def grows(stage: str) -> float:
        return max(0.0, (more.step(stage) - less.step(stage)) / (many - few))

    layer, judge = grows("layers"), grows("metrics")
    send, rate = _sent(max(watched.sent, 1 << 20))
    return Parts(
        start=sum(max(0.0, more.seconds[stage][0] - more.step(stage)) for stage in more.seconds),
        floating=more.step("FP32"),
        plan=more.step("graphs"),
        keep=max(0.0, more.step("tensors") - more.step("FP32")) / layers,
        open=max(0.0, more.step("layers") - many * layer),
        layer=layer,
        close=max(0.0, more.step("metrics") - many * judge),
        judge=judge,
        kept=watched.kept / layers / many,
        told=watched.told / many,
        bytes=max(0.0, watched.sent + watched.told - before.sent - before.told) / (many - few),
        send=send,
        rate=rate,
        image=_scored(variant, quantized, many),
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
    few: Annotated[int, typer.Option(min=2, help="images of the first sweep")] = 4,
    many: Annotated[int, typer.Option(min=3, help="images of the second, more")] = 12,
    checked: Annotated[int, typer.Option("--check", help="images of those that the formula is held to")] = 8,
    images: Annotated[int, typer.Option(help="to tell the cost of")] = 5000,
    layers: Annotated[int, typer.Option(help="to tell the cost of")] = 300,
    workers: Annotated[str, typer.Option(help="to tell the cost of, with commas")] = "1,8,64",
) -> None:
    """JSON: the parts, the check, and hours of a sweep and minutes of a score by workers."""
    if many <= few:
        raise typer.BadParameter(f"--many {many}: give more images than --few {few}")
    variant = with_quantization(load_variant(name), PLAIN | {"policy": "conv-only"})
    quantized = quantize(variant, every=False)
    parts = parts_of(variant, quantized, few, many)
    own = len(quantized.placement.weights)
    counts = [int(text) for text in workers.split(",")]
    found = {
        "variant": name,
        "layers measured": own,
        "parts": {key: float(f"{value:.4g}") for key, value in asdict(parts).items()},
        "check: formula, formula for 1, processor s, clock s": check(variant, quantized, checked, parts, own),
        "chunks": {str(count): parts.chunks(count, layers) for count in (64, images)},
        "detections, GB": round(parts.told * images * layers / 1e9, 1),
        "sweep, hours": {str(w): round(parts.sweep(images, layers, w) / 3600, 2) for w in counts},
        "sweep, hours, 64 images": {str(w): round(parts.sweep(64, layers, w) / 3600, 3) for w in counts},
        "score, minutes": {str(w): round(parts.score(images, w) / 60, 2) for w in counts},
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
