"""TensorRT on the GPU, through the tensor-address API that 8.6, 10 and 11 share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from alignment.cache import discard
from alignment.engine.build import BuildOptions, build_environment, cached_engine, cuda_context, engine_key
from alignment.engine.capabilities import Capabilities, gpu
from alignment.engine.inspect import EngineLayer, parse, reformats
from alignment.engine.int8 import CalibrationImages
from alignment.engine.log import Log, listening, warnings_of
from alignment.engine.registry import plugin_identity, register_plugins
from alignment.errors import AlignError
from alignment.export.onnx_export import file_digest
from alignment.results import EngineFacts
from alignment.runners.base import Runner


class TensorRTRunner(Runner):
    """An ONNX file as a TensorRT engine, built or taken from the cache.

    Several may live in one process: all use the GPU's primary context, each has its stream and its buffers.  A batch
    above the engine's largest goes through in pieces; one below its smallest is filled up with its last image.  Neither
    can be where the size of an output depends on the data: its rows are no images.

    Args:
        onnx_path: a graph with one image input, ``[B, 3, H, W]``.
        options: how to build it.
        images: what `BuildOptions.calibrator` reads.

    Raises:
        AlignError: TensorRT cannot run here, or cannot build or load the engine.
    """

    def __init__(self, onnx_path: Path, options: BuildOptions, images: CalibrationImages | None = None) -> None:
        self._path = onnx_path
        self._log = Log()
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._stream: Any = None
        self._outputs: dict[str, np.dtype] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._memory = _Memory()
        self._allocated: set[str] = set()  # outputs whose size only the data tell
        found = cached_engine(onnx_path, options, images)
        try:
            try:
                self._load(found.plan)
            except _UnloadableError as error:
                if not found.from_cache:
                    raise
                discard(engine_key(onnx_path, options, images), error.what)
                found = cached_engine(onnx_path, options, images)
                self._load(found.plan)
        except BaseException:
            self.close()
            raise
        self._size = len(found.plan)
        self.warnings = warnings_of([*found.messages, *self._log.messages])
        self.provenance = self._provenance(options, found.plan, found.from_cache)

    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """See `Runner.run`.  Float16 outputs come as float32, all others in the engine's own type.

        Raises:
            AlignError: images of another shape than the graph's, TensorRT cannot run them, or an output without batch
                axis would have to be joined or cut.
        """
        self._check(batch)
        with cuda_context(), listening(self._log):
            parts = [self._piece(batch[i : i + self._max]) for i in range(0, len(batch), self._max)]
        return parts[0] if len(parts) == 1 else {name: self._joined(name, parts) for name in self._outputs}

    def latency(self, batch: np.ndarray, repeats: int = 100, warmup: int = 10) -> list[float]:
        """Milliseconds on the GPU for each of `repeats` runs of one batch, without copies to and from the host.

        Raises:
            AlignError: more images than the engine takes at once.
        """
        import pycuda.driver as cuda

        self._check_one(batch)
        times = []
        with cuda_context(), listening(self._log):
            self._piece(batch)
            start, end = cuda.Event(), cuda.Event()
            for index in range(warmup + repeats):
                start.record(self._stream)
                self._enqueue()
                end.record(self._stream)
                end.synchronize()
                if index >= warmup:
                    times.append(float(start.time_till(end)))
        return times

    def engine(self) -> EngineFacts | None:
        """See `Runner.engine`; None too where the inspector tells what cannot be read."""
        try:
            layers = self.layers()
        except (KeyError, ValueError):
            return None
        return EngineFacts(layers=len(layers), reformats=reformats(layers), size_bytes=self._size)

    def layers(self) -> list[EngineLayer]:
        """What the engine is made of."""
        return parse(self.inspector_text())

    def inspector_text(self) -> str:
        """What TensorRT's inspector tells of the engine: JSON, with raw control characters in its texts."""
        import tensorrt as trt

        with cuda_context(), listening(self._log):
            engine, context = self._engine, self._context
            inspector = engine.create_engine_inspector()
            if self._min != self._max:  # formats are told for one shape only
                context.set_input_shape(self._input, (self._batches[1], *self._shape))
                inspector.execution_context = context
            text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
            return text

    def layer_times(self, batch: np.ndarray, repeats: int = 100, warmup: int = 10) -> dict[str, float]:
        """Milliseconds of each layer, by the inspector's names: medians over `repeats` runs of one batch.

        Measuring takes time itself: their sum is not what `latency` tells.

        Raises:
            AlignError: more images than the engine takes at once.
        """
        self._check_one(batch)
        runs: list[dict[str, float]] = []
        usual = self._context
        with cuda_context(), listening(self._log):
            # A context of its own: no profiler stays behind on the one that `latency` measures.
            engine = self._engine
            context = self._context = engine.create_execution_context()
            if context is None:
                self._context = usual
                raise AlignError(f"{self._path}: no second execution context: {self._said()}", "free memory on the GPU")
            try:
                self._allocated.clear()
                context.profiler = _profiler(runs)
                for _ in range(warmup + repeats):
                    runs.append({})
                    self._piece(batch)
            finally:
                self._context = usual
                self._allocated.clear()  # each context is told of its allocators when it runs next
                del context  # while the GPU's context is current
        names = dict.fromkeys(name for run in runs for name in run)
        return {name: float(np.median([run.get(name, 0.0) for run in runs[warmup:]])) for name in names}

    def close(self) -> None:
        """Frees engine, buffers and stream; the runner cannot run any more."""
        if self._runtime is None:
            return
        with cuda_context(), listening(self._log):
            if self._stream is not None:
                self._stream.synchronize()
            self._context = None
            self._engine = None
            self._runtime = None
            self._memory.free()
            self._stream = None

    def _load(self, plan: bytes) -> None:
        import pycuda.driver as cuda
        import tensorrt as trt

        with cuda_context(), listening(self._log) as logger:
            register_plugins(logger, self._path)
            try:
                self._runtime = trt.Runtime(logger)
            except TypeError:  # what pybind11 makes of a null pointer
                raise AlignError(f"TensorRT cannot start: {self._said()}", "check the GPU's driver") from None
            engine = self._engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                what = f"{self._path}: TensorRT cannot load its engine: {self._said()}"
                raise _UnloadableError(what, "`align cache prune --kind engine --all` removes kept engines")
            self._context = engine.create_execution_context()
            if self._context is None:
                raise AlignError(
                    f"{self._path}: no execution context: {self._said()}",
                    "free memory on the GPU; or, for an output whose size depends on the data, export with a dynamic "
                    "batch: 8.6 makes no context of such an engine without a profile",
                )
            self._stream = cuda.Stream()
            inputs = []
            for index in range(engine.num_io_tensors):
                name = engine.get_tensor_name(index)
                if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                    inputs.append(name)
                else:
                    self._outputs[name] = self._dtype(name)
        if len(inputs) != 1 or len(tuple(engine.get_tensor_shape(inputs[0]))) != 4:
            raise AlignError(f"{self._path}: inputs {', '.join(inputs)}", "give a model with one image input")
        self._input = inputs[0]
        self._input_dtype = self._dtype(self._input)
        self._batches, self._shape = self._profile()
        self._min, _, self._max = self._batches

    def _dtype(self, name: str) -> np.dtype:
        import tensorrt as trt

        engine = self._engine
        kind = engine.get_tensor_dtype(name)
        try:
            return np.dtype(trt.nptype(kind))
        except TypeError:
            raise AlignError(f"{self._path}: {name} is {kind}, unknown to NumPy", "cast it to float32") from None

    def _profile(self) -> tuple[tuple[int, int, int], tuple[int, ...]]:
        """Smallest, best and largest batch of the engine, and the shape of one image."""
        engine = self._engine
        batch, *image = (int(size) for size in engine.get_tensor_shape(self._input))
        if batch >= 0:
            return (batch, batch, batch), tuple(image)
        smallest, best, largest = (int(shape[0]) for shape in engine.get_tensor_profile_shape(self._input, 0))
        return (smallest, best, largest), tuple(image)

    def _check(self, batch: np.ndarray) -> None:
        if self._runtime is None:
            raise AlignError(f"{self._path}: its runner is closed", "make a new one")
        if tuple(batch.shape[1:]) != self._shape or not len(batch):
            raise AlignError(
                f"{self._path}: images of {list(self._shape)} asked, a batch of {list(batch.shape)} given",
                "mend `input` in the variant's YAML, or export again",
            )

    def _check_one(self, batch: np.ndarray) -> None:
        self._check(batch)
        if len(batch) > self._max:
            raise AlignError(f"{len(batch)} images, the engine takes {self._max} at once", "build with a larger batch")

    def _piece(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs what the engine takes at once; the context is current."""
        import pycuda.driver as cuda

        count = len(images)
        if count < self._min:
            images = np.concatenate([images, np.repeat(images[-1:], self._min - count, axis=0)])
        images = np.ascontiguousarray(images, self._input_dtype)
        self._bind(images)
        if self._allocated and count < len(images):
            raise AlignError(
                f"{self._path}: the size of output {min(self._allocated)} depends on the data, so a batch of {count} "
                f"cannot be filled up to {len(images)}",
                "build with a smaller min batch",
            )
        cuda.memcpy_htod_async(self._memory.held[self._input], images, self._stream)
        self._enqueue()
        outputs = {name: np.empty(self._shapes[name], dtype) for name, dtype in self._outputs.items()}
        for name, array in outputs.items():
            if array.size:
                cuda.memcpy_dtoh_async(array, self._memory.held[name], self._stream)
        self._stream.synchronize()
        for name, array in outputs.items():
            if array.ndim and len(array) == len(images) and name not in self._allocated:
                array = array[:count]
            outputs[name] = array.astype(np.float32) if array.dtype == np.float16 else array
        return outputs

    def _joined(self, name: str, parts: list[dict[str, np.ndarray]]) -> np.ndarray:
        """One output of all pieces, none of which but the last is smaller than the engine's largest batch."""
        arrays = [part[name] for part in parts]
        if name in self._allocated or any(array.ndim == 0 or len(array) != self._max for array in arrays[:-1]):
            raise AlignError(
                f"{self._path}: output {name} has no batch axis, so pieces of {self._max} images cannot be joined",
                "build with a larger max batch",
            )
        return np.concatenate(arrays)

    def _bind(self, images: np.ndarray) -> None:
        """Tells the engine shapes and addresses, and notes the shape of each output that is known before the run."""
        context = self._context
        if not context.set_input_shape(self._input, tuple(images.shape)):
            raise AlignError(f"{self._path}: TensorRT refuses {list(images.shape)}: {self._said()}", "build it anew")
        self._reserve(self._input, images.nbytes)
        for name, dtype in self._outputs.items():
            shape = tuple(int(size) for size in context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                self._allocate_while_running(name)
                continue
            self._shapes[name] = shape
            self._reserve(name, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)

    def _allocate_while_running(self, name: str) -> None:
        """Lets TensorRT ask for the memory of an output, and tell its shape, when the data have told them."""
        context = self._context
        self._shapes.pop(name, None)
        if name in self._allocated:
            return
        if not context.set_output_allocator(name, _allocator(self._memory, self._shapes)):
            raise AlignError(f"{self._path}: TensorRT takes no allocator for {name}: {self._said()}", "build it anew")
        self._allocated.add(name)

    def _reserve(self, name: str, size: int) -> None:
        """Device memory of at least `size` bytes for one tensor."""
        context = self._context
        if not context.set_tensor_address(name, self._memory.reserve(name, size)):
            raise AlignError(f"{self._path}: TensorRT refuses a buffer for {name}: {self._said()}", "build it anew")

    def _enqueue(self) -> None:
        context = self._context
        if not context.execute_async_v3(self._stream.handle):
            raise AlignError(f"{self._path}: TensorRT cannot run it: {self._said()}", "build it anew")

    def _said(self) -> str:
        return "; ".join(self._log.errors()) or "no error message"

    def _provenance(self, options: BuildOptions, plan: bytes, from_cache: bool) -> dict[str, Any]:
        import pycuda
        import pycuda.driver as cuda

        device = gpu()
        return {
            "backend": "tensorrt",
            "tensorrt": Capabilities.current().version,
            "gpu": device.name,
            "compute_capability": device.compute_capability,
            "driver_cuda": device.driver_cuda,
            "cuda": ".".join(map(str, cuda.get_version())),
            "pycuda": pycuda.VERSION_TEXT,
            "onnx_sha256": file_digest(self._path),
            "engine_sha256": hashlib.sha256(plan).hexdigest(),
            "engine_from_cache": from_cache,
            **plugin_identity(self._path),
            "build": {
                "precision": options.precision,
                "tf32": options.precision == "tf32",
                "fp16": options.precision in ("fp16", "int8"),
                "int8": options.precision == "int8",
                "ranges": len(options.ranges),
                "calibrator": options.calibrator,
                "float32_nodes": len(options.float32_nodes),
                "strongly_typed": options.strongly_typed or Capabilities.current().always_strongly_typed,
                "optimization_level": options.optimization_level,
                "batch": list(self._batches),
                "workspace": options.workspace,
                "layers_as_outputs": list(options.layers_as_outputs),
                "environment": build_environment(),
            },
        }


class _UnloadableError(AlignError):
    """An engine that this TensorRT or GPU does not take."""


class _Memory:
    """Device memory by tensor; it only grows.

    Attributes:
        held: ``pycuda.driver.DeviceAllocation`` by name.
    """

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}

    def reserve(self, name: str, size: int) -> int:
        """The address of at least `size` bytes; what was in them may be lost."""
        import pycuda.driver as cuda

        if name not in self.held or self._sizes[name] < size:
            if name in self.held:
                self.held.pop(name).free()
            self.held[name] = cuda.mem_alloc(max(size, 1))
            self._sizes[name] = size
        return int(self.held[name])

    def free(self) -> None:
        """Gives all of it back."""
        for allocation in self.held.values():
            allocation.free()
        self.held.clear()
        self._sizes.clear()


def _allocator(memory: _Memory, shapes: dict[str, tuple[int, ...]]) -> Any:
    """A ``trt.IOutputAllocator`` that takes memory from `memory` and puts the shape that it is told into `shapes`.

    The bindings from 10 on, which ask for ``reallocate_output_async`` first, fall back to ``reallocate_output`` (their
    pyCore.cpp).  An allocation that fails is told by TensorRT's own error.
    """
    import tensorrt as trt

    class Allocator(trt.IOutputAllocator):
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)

        def reallocate_output(self, name: str, address: int, size: int, alignment: int) -> int:
            return memory.reserve(name, size)

        def notify_shape(self, name: str, shape: Any) -> None:
            shapes[name] = tuple(int(size) for size in shape)

    return Allocator()


def _profiler(runs: list[dict[str, float]]) -> Any:
    """A ``trt.IProfiler`` that adds the milliseconds of each layer to the last of `runs`, by name."""
    import tensorrt as trt

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, milliseconds: float) -> None:
            runs[-1][name] = runs[-1].get(name, 0.0) + milliseconds

    return Profiler()
