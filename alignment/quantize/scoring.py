"""How well a graph detects in ONNX Runtime: its AP, and its agreement with the float32 network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnxruntime
from onnx import ModelProto

from alignment import __version__, cache
from alignment.compare.coco_map import agreement_ap, coco_ap
from alignment.data.samples import open_samples
from alignment.evaluation import detect_node_by_node
from alignment.export.onnx_export import exported, file_digest
from alignment.export.plugin_nms import refuse_plugin
from alignment.nms.multiclass import Detections
from alignment.runners.base import cpu_threads
from alignment.scratch import temporary
from alignment.storage import cache_dir
from alignment.variant import Variant

#: Raise it when decoding, NMS or what is measured comes to mean something else: kept scores are then left alone.
MEANING = 1


@dataclass(frozen=True)
class Score:
    """What detections are worth.

    Attributes:
        ap: COCO AP at IoU 0.50:0.95, 0..1; −1 where there is no truth.
        agreement: AP with the detections of the float32 network as truth, see `agreement_ap`.  It needs no labels, and
            moves where AP on a few images stays or wavers.
    """

    ap: float
    agreement: float


class Scorer:
    """Scores graphs of one variant, node by node; what was scored before is in the cache, by its content.

    Args:
        variant: whose images, decoding and NMS.
        data: COCO-layout root, for variants on COCO.
        images: the first so many of its validation images; default: all.
        executor: where images are run, see `alignment.evaluation`.

    Attributes:
        source: the float32 graph, as exported.
        samples: the images.
        runs: how many graphs went through ONNX Runtime.

    Raises:
        AlignError: for images or weights that are missing.
    """

    def __init__(
        self, variant: Variant, data: Path | None = None, images: int | None = None, executor: Executor | None = None
    ) -> None:
        self.variant, self._executor = variant, executor
        self.source = refuse_plugin(exported(variant).onnx, "no int8 here")
        self.samples = open_samples(variant, data, images)
        self.runs = 0

    @cached_property
    def reference(self) -> dict[int, Detections]:
        """What the float32 network detects: image id → detections in pixels of the original image."""
        return self.detect(self.source)

    @cached_property
    def float_score(self) -> Score:
        """The score of the float32 network, whose agreement with itself is 1."""
        return self._kept(_digest(self.source.read_bytes()), lambda: self.judge(self.reference))

    def score(self, model: ModelProto) -> Score:
        """The score of a quantized graph."""
        content = model.SerializeToString(deterministic=True)
        return self._kept(_digest(content), lambda: self.judge(self._detect(content)))

    def score_made(self, identity: Any, make: Callable[[], ModelProto]) -> Score:
        """The score of a graph that is made only where none is known.

        Args:
            identity: all that decides which graph it is, JSON values.
            make: makes it.
        """
        return self._kept(f"made of {cache.digest_of({'identity': identity})}", lambda: self.score(make()))

    def judge(self, found: Mapping[int, Detections]) -> Score:
        """The score of detections, by image id."""
        dataset = self.samples.dataset
        return Score(coco_ap(dataset, found)[0], agreement_ap(dataset, self.reference, found))

    def detect(self, path: Path) -> dict[int, Detections]:
        """What a graph detects, by image id."""
        self.runs += 1
        return detect_node_by_node(path, self.samples, self._executor)

    def _detect(self, content: bytes) -> dict[int, Detections]:
        # In the cache, which workers see.
        cache_dir().mkdir(parents=True, exist_ok=True)
        with temporary(cache_dir(), ".scored-", "", folder=True) as folder:
            path = folder / "scored.onnx"
            path.write_bytes(content)
            return self.detect(path)

    def _kept(self, graph: str, measure: Callable[[], Score]) -> Score:
        """The score of a graph from the cache, by what stands for it; it is measured where that is not known yet."""
        key = cache.Key("score", self.variant.name, {"graph": graph, **self._inputs}, self._versions)
        return Score(**cache.value(key, lambda: asdict(measure())))

    @cached_property
    def _inputs(self) -> dict[str, str | int | None]:
        """All that a score depends on beside the graph and `_versions`."""
        dataset = self.samples.dataset
        return {
            "variant": self.variant.fingerprint(),
            "source_sha256": file_digest(self.source),
            "images": f"{dataset.content_fingerprint}, the first {len(self.samples)}",
            "annotations": dataset.fingerprint,
            "threads": 1 if self._executor else cpu_threads(),
            "meaning": MEANING,
        }

    @cached_property
    def _versions(self) -> dict[str, str]:
        return {"alignment": __version__, "onnxruntime": onnxruntime.__version__}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
