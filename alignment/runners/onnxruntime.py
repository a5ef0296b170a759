"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.runners.base import Runner, cpu_threads, in_pieces


def open_session(graph: Path | ModelProto, name: Path | str, optimize: bool = True, threads: int | None = None) -> Any:
    """A session of ONNX Runtime on the CPU.

    Args:
        graph: a file, or what is in it.
        name: what an error calls it.
        optimize: without, every node is computed by itself, as it is.
        threads: default: `cpu_threads`.

    Raises:
        AlignError: when ONNX Runtime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Fatal ones only: every error is also raised, and said once.
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or cpu_threads() or 0
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    # Threads that spin while they wait would take the processor from those that have work: the other backend's, ours,
    # and others' on a machine that is shared.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = graph.SerializeToString() if isinstance(graph, ModelProto) else str(graph)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has one exception type for each status code
        reason = " ".join(str(error).split())[:240]
        raise AlignError(f"{name}: ONNX Runtime cannot load it: {reason}", "export it again") from None


def cannot_run(name: Path | str, shape: Sequence[int], error: Exception) -> AlignError:
    """What to say when a session refuses images of that shape."""
    reason = " ".join(str(error).split())
    if len(reason) > 300:  # the node comes first, its shapes last
        reason = f"{reason[:120]} ... {reason[-180:]}"
    what = f"{name}: ONNX Runtime cannot run it on {list(shape)}: {reason}"
    return AlignError(what, "export it for this batch and size, or mend `input` in the variant's YAML or --batch")


class OnnxRuntimeRunner(Runner):
    """An ONNX file in ONNX Runtime's CPU provider.

    Args:
        path: the file.
        optimize: ONNX Runtime's graph optimization; off for quantized graphs, whose fused int8 kernels saturate on
            some CPUs.
        threads: see `open_session`.

    Raises:
        AlignError: when ONNX Runtime cannot load it, an unknown operator say.
    """

    def __init__(self, path: Path, optimize: bool = True, threads: int | None = None) -> None:
        import onnxruntime

        self._session = open_session(path, path, optimize, threads)
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4 or 0 in inputs[0].shape:
            shown = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise AlignError(f"{path}: inputs {shown}", "give a model with one float32 image input [B, 3, H, W]")
        self._path, self._input, self._shape = path, inputs[0].name, inputs[0].shape
        outputs = self._session.get_outputs()
        self._outputs = [output.name for output in outputs]
        self._batched = {output.name for output in outputs if output.shape and output.shape[0] == self._shape[0]}
        self.warnings = []
        self.provenance = {
            "backend": "onnxruntime",
            "onnxruntime": onnxruntime.__version__,
            "providers": self._session.get_providers(),
            "graph_optimization": optimize,
            "threads": threads or cpu_threads() or "all",
            "onnx_sha256": file_digest(path),
        }

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """See `Runner.run`.  A graph with a fixed batch gets the batch in pieces, the last filled up.

        Raises:
            AlignError: when the images do not have the size that the graph asks for, and when a node cannot be run: a
                graph whose inputs are dynamic may hold shapes that are not.
        """
        for given, asked in zip(batch.shape[1:], self._shape[1:], strict=True):
            if isinstance(asked, int) and given != asked:
                raise AlignError(
                    f"{self._path}: input {list(self._shape)}, but the variant's images are {list(batch.shape)}",
                    "mend `input` in the variant's YAML",
                )
        fixed = self._shape[0] if isinstance(self._shape[0], int) else len(batch)
        return in_pieces(batch, fixed, self._batched, self._piece)

    def _piece(self, images: np.ndarray) -> dict[str, np.ndarray]:
        try:
            answers = self._session.run(self._outputs, {self._input: images})
        except Exception as error:  # as above
            raise cannot_run(self._path, images.shape, error) from None
        return dict(zip(self._outputs, answers, strict=True))
