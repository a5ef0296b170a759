"""An ONNX file that ends in an NMS plugin, where TensorRT is not: its graph in a backend, the plugin in NumPy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from alignment.cache import Key, kept
from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.export.plugin_nms import attributes_of, before_plugin, plugin_of
from alignment.nms.plugins import WIDTH, plugin_outputs
from alignment.runners.base import Runner


class PluginNmsRunner(Runner):
    """Runs a graph up to its plugin, then what `alignment.nms` knows of it: held to the real one on a GPU.

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
        self._path, self._plugin = path, node.op_type
        self._settings = attributes_of(node)
        self._boxes, self._scores = node.input
        self._outputs = list(node.output)
        self._given = [output.name for output in model.graph.output]
        # By its own content: weights may lie in another file.
        content = before_plugin(model, path).SerializeToString(deterministic=True)
        key = Key("before-plugin", path.stem, {"sha256": hashlib.sha256(content).hexdigest()})
        folder = kept(key, lambda folder: (folder / path.name).write_bytes(content))
        self._graph = open_graph(folder / path.name)
        self.warnings = self._graph.warnings
        self.provenance = {
            **self._graph.provenance,
            "onnx_sha256": file_digest(path),
            "plugin": f"{node.op_type} in NumPy",
        }

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """See `Runner.run`: the outputs of the file in its order; see `plugin_outputs` for the plugin's own four."""
        named, width = self._graph.run(batch), WIDTH[self._plugin]
        boxes, scores = named[self._boxes], named[self._scores]
        boxes = boxes[:, :, 0] if boxes.ndim == 4 and boxes.shape[2] == 1 else boxes
        if boxes.ndim != 3 or boxes.shape[2] != width or scores.ndim != 3 or boxes.shape[1] != scores.shape[1]:
            raise AlignError(
                f"{self._path}: its plugin reads boxes {list(boxes.shape)} and scores {list(scores.shape)}, not "
                f"[B, N, {width}] and [B, N, C]",
                "export it up to its NMS",
            )
        kept = plugin_outputs(self._plugin, boxes, scores, self._settings)
        named |= dict(zip(self._outputs, kept, strict=True))
        return {name: named[name] for name in self._given}

    def close(self) -> None:
        """See `Runner.close`."""
        self._graph.close()
