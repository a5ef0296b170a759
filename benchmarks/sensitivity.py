"""What a sweep over the layers costs beside the plain sum of whole runs, one a layer, in one process.

    python -m benchmarks.sensitivity yolov8_n --images 32 --policy conv-only

Both take all metrics, in the same sessions of one thread.  A sweep with shared prefixes runs of each layer's graph what
the layer can reach; the plain one runs the whole network.  The time of quantizing and of preprocessing is in neither.
On a machine that others use too, the ratio of processor time says more than that of the clock.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from alignment.data.samples import Sample, Samples, open_samples
from alignment.quantize.recipe import quantize
from alignment.quantize.sensitivity import MODES
from alignment.quantize.sweep import sweep
from alignment.storage import cache_dir
from alignment.variant import PLAIN, Variant, load_variant, with_quantization


class Loaded(Samples):
    """Samples that are in memory."""

    def __init__(self, variant: Variant, images: int) -> None:
        found = open_samples(variant, limit=images)
        super().__init__(variant, found.dataset)
        self._kept = {sample.entry.id: sample for sample in found}

    def load(self, entry) -> Sample:
        """The image, preprocessed before."""
        return self._kept[entry.id]


def main(
    variant: str,
    images: Annotated[int, typer.Option()] = 32,
    mode: Annotated[str, typer.Option(help=" or ".join(MODES))] = "quantize-one",
    policy: Annotated[str, typer.Option(help="conv-only: every convolution is a layer")] = "conv-only",
) -> None:
    """One line of JSON."""
    chosen = with_quantization(load_variant(variant), PLAIN | {"policy": policy})
    quantized, samples = quantize(chosen), Loaded(chosen, images)
    seconds, cpu, found = {}, {}, {}
    cache_dir().mkdir(parents=True, exist_ok=True)
    for name, share in (("shared", True), ("plain", False)):
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            start, busy = time.perf_counter(), time.process_time()
            path = Path(folder) / "sweep.json"
            found[name] = sweep(chosen, quantized, samples, mode, path=path, share=share)[0]  # type: ignore[arg-type]
            seconds[name], cpu[name] = time.perf_counter() - start, time.process_time() - busy
    line = {
        "variant": variant,
        "mode": mode,
        "policy": policy,
        "images": len(samples),
        "layers": len(found["shared"].layers),
        "shared_s": round(seconds["shared"], 1),
        "plain_s": round(seconds["plain"], 1),
        "ratio": round(seconds["shared"] / seconds["plain"], 3),
        "shared_cpu_s": round(cpu["shared"], 1),
        "plain_cpu_s": round(cpu["plain"], 1),
        "cpu_ratio": round(cpu["shared"] / cpu["plain"], 3),
        "equal": found["shared"] == found["plain"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    typer.run(main)
