"""One run of an engine with any inputs: for plugins on their own, where `TensorRTRunner` takes one image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alignment.engine.build import BuildOptions, build_engine, cuda_context
from alignment.engine.log import Log, listening
from alignment.errors import AlignError


def execute(
    onnx_path: Path, options: BuildOptions, inputs: dict[str, np.ndarray], runs: int = 1
) -> list[dict[str, np.ndarray]]:
    """Builds a graph of fixed shapes and runs it.

    Args:
        onnx_path: the graph.
        options: how to build it.
        inputs: by name, in the graph's own types and shapes.
        runs: how many times, on fresh output buffers.

    Returns:
        The outputs of each run, by name.

    Raises:
        AlignError: TensorRT cannot run here, or cannot build or run it.
    """
    import pycuda.driver as cuda
    import tensorrt as trt

    log = Log()
    plan = build_engine(onnx_path, options, log)
    with cuda_context(), listening(log) as logger:
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan)
        context = engine.create_execution_context()
        stream = cuda.Stream()
        answers = []
        for _ in range(runs):
            memory, outputs = {}, {}
            for index in range(engine.num_io_tensors):
                name = engine.get_tensor_name(index)
                shape, dtype = tuple(engine.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name))
                array = np.ascontiguousarray(inputs[name], dtype) if name in inputs else np.zeros(shape, dtype)
                if name not in inputs:
                    outputs[name] = array
                memory[name] = cuda.mem_alloc(max(array.nbytes, 1))  # freed with the dictionary
                cuda.memcpy_htod(memory[name], array)
                context.set_tensor_address(name, int(memory[name]))
            if not context.execute_async_v3(stream.handle):
                raise AlignError(f"{onnx_path}: TensorRT cannot run it: {'; '.join(log.errors())}", "build it anew")
            stream.synchronize()
            for name, array in outputs.items():
                cuda.memcpy_dtoh(array, memory[name])
            answers.append(outputs)
        del memory, context, engine, runtime
    return answers
