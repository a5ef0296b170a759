"""An ONNX file that ends in EfficientNMS_TRT, where TensorRT is not: its graph in a backend, the plugin in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.export.plugin_nms import attributes_of, before_plugin, plugin_of
from alignment.nms.implementations import efficient_nms, prepared
from alignment.nms.semantics import run
from alignment.runners.base import Runner
from alignment.storage import cache_dir, locked, writing


class PluginNmsRunner(Runner):
    """Runs a graph up to its plugin, then what `alignment.nms` knows of it: held to the real one on a GPU.

    Ties go by index, and `class_agnostic` counts, which TensorRT 8.6 passes over.

    Args:
        path: the file.
        open_graph: opens the backend on the file without the plugin.

    Raises:
        AlignError: for a plugin in an unknown form, or what the backend cannot load.
    """

    def __init__(self, path: Path, open_graph: Callable[[Path], Runner]) -> None:
        model = onnx.load(path)
        node = plugin_of(model)
        assert node is not None
        self._path = path
        self._settings = attributes_of(node)
        self._boxes, self._scores = node.input
        self._outputs = list(node.output)
        digest = file_digest(path)
        cut = cache_dir() / "before_plugin" / f"{path.stem}-{digest[:16]}.onnx"
        with locked(cut):
            if not cut.is_file():
                with writing(cut) as temporary:
                    onnx.save(before_plugin(model, path), temporary)
        self._graph = open_graph(cut)
        self.warnings = self._graph.warnings
        self.provenance = {**self._graph.provenance, "onnx_sha256": digest, "plugin": f"{node.op_type} in NumPy"}

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """See `Runner.run`: the plugin's four outputs, unused places 0."""
        named = self._graph.run(batch)
        boxes, scores = named[self._boxes], named[self._scores]
        boxes = boxes[:, :, 0] if boxes.ndim == 4 and boxes.shape[2] == 1 else boxes
        if boxes.ndim != 3 or boxes.shape[2] != 4 or scores.ndim != 3 or boxes.shape[1] != scores.shape[1]:
            raise AlignError(
                f"{self._path}: its plugin reads boxes {list(boxes.shape)} and scores {list(scores.shape)}, not "
                "[B, N, 4] and [B, N, C]",
                "export it up to its NMS",
            )
        images = [_kept(*image, self._settings) for image in zip(boxes, scores, strict=True)]
        return dict(zip(self._outputs, map(np.stack, zip(*images, strict=True)), strict=True))

    def close(self) -> None:
        """See `Runner.close`."""
        self._graph.close()


def _kept(boxes: np.ndarray, scores: np.ndarray, settings: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """One image's count ``[1] int32``, boxes ``[K, 4]``, scores ``[K]`` and labels ``[K] int32``."""
    corners = prepared(boxes, int(settings.get("box_coding", 0)))
    fates = run(efficient_nms(settings), corners, scores)
    kept, places = fates.kept, int(settings["max_output_boxes"])
    values = fates.scores[kept]
    if settings.get("score_activation", 0):
        values = 1 / (1 + np.exp(-values))
    found = corners[fates.rows[kept]], values, fates.labels[kept].astype(np.int32)
    padded = [np.zeros((places, *part.shape[1:]), part.dtype) for part in found]
    for place, part in zip(padded, found, strict=True):
        place[: len(kept)] = part
    return np.array([len(kept)], np.int32), *padded
