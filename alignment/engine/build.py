"""From an ONNX file to a TensorRT engine, built once and kept by content."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import onnx
from google.protobuf.message import DecodeError

from alignment.cache import Key, holding
from alignment.engine.capabilities import Capabilities, gpu, require
from alignment.engine.int8 import CalibrationImages, CalibratorKind, make_calibrator, set_ranges
from alignment.engine.log import Log, Message, listening, warnings_of
from alignment.engine.registry import plugin_identity, register_plugins
from alignment.errors import AlignError, BuildError
from alignment.export.onnx_export import file_digest

# Raise it when the same options come to mean another engine: cached ones are then left alone.
RECIPE = 3
PRECISIONS = ("fp32", "tf32", "fp16", "int8")
LEVELS = range(0, 6)
# Variables that change what TensorRT builds; they belong to an engine's identity.
NO_CUBLAS = "ALIGN_TRT_NO_CUBLAS"
ENVIRONMENT = (NO_CUBLAS, "NVIDIA_TF32_OVERRIDE")
# Files of an entry in the cache.
_PLAN, _MESSAGES, _CALIBRATION = "engine.plan", "messages.json", "calibration.txt"


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine.

    Attributes:
        precision: ``fp32`` (TF32 off, which TensorRT leaves on by itself), ``tf32``, ``fp16`` (with TF32 off), or
            ``int8``, which allows float16 too: of a graph with QDQ nodes, or with `ranges` or a `calibrator`.
        strongly_typed: every type is the graph's own, so that ``fp16`` asks for a float16 graph; without it TensorRT
            chooses between float16 and float32 layer by layer, until 10.x.
        float32_nodes: names of ONNX nodes that ``fp16`` and ``int8`` leave in float32; not with strongly typed
            networks, whose graph says so itself.
        float16_nodes: names of ONNX nodes that ``int8`` leaves in float16.
        ranges: the largest magnitude of tensors, by TensorRT's name.
        calibrator: the one of TensorRT's that finds the ranges; empty for none.
        cache: text of a calibration cache, which the calibrator takes in place of images.
        min_batch: smallest batch, for a graph whose batch axis is dynamic; as are the next two.
        opt_batch: the batch that TensorRT tunes for.
        max_batch: largest batch.
        optimization_level: 0 to 5; 0 builds fastest and is right for correctness, 3 (TensorRT's own default) is
            what a latency figure needs.
        workspace: bytes of scratch memory that a layer may use.
        layers_as_outputs: names of further tensors to mark as outputs.  It keeps TensorRT from fusing across them, so
            the engine is not quite the one that is deployed.
    """

    precision: Literal["fp32", "tf32", "fp16", "int8"] = "fp32"
    strongly_typed: bool = False
    float32_nodes: tuple[str, ...] = ()
    float16_nodes: tuple[str, ...] = ()
    ranges: tuple[tuple[str, float], ...] = ()
    calibrator: Literal["", CalibratorKind] = ""
    cache: str = ""
    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 1
    optimization_level: int = 0
    workspace: int = 2 << 30
    layers_as_outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise AlignError(f"precision {self.precision!r} is unknown", f"give one of {', '.join(PRECISIONS)}")
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            batches = f"{self.min_batch}, {self.opt_batch}, {self.max_batch}"
            raise AlignError(f"batch sizes min, opt, max are {batches}", "give 1 <= min <= opt <= max")
        if self.optimization_level not in LEVELS:
            raise AlignError(f"optimization level {self.optimization_level} is unknown", "give one from 0 to 5")
        if self.workspace <= 0:
            raise AlignError(f"workspace {self.workspace}", "give a positive number of bytes")

    def fingerprint(self) -> str:
        """16 hex digits over everything that these options say."""
        return _hash({"recipe": RECIPE, **asdict(self)})[:16]


class Engine(NamedTuple):
    """A serialized engine, what TensorRT said while building it, and whether it was built earlier."""

    plan: bytes
    messages: list[Message]
    from_cache: bool


@contextmanager
def cuda_context() -> Iterator[None]:
    """Makes the GPU's primary context current, which TensorRT and torch use too; it may be nested."""
    primary = _primary_context()
    primary.push()
    try:
        yield
    finally:
        primary.pop()


def build_environment() -> dict[str, str]:
    """Those variables of `ENVIRONMENT` that are set."""
    return {name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)}


def cached_engine(onnx_path: Path, options: BuildOptions, images: CalibrationImages | None = None) -> Engine:
    """The engine of `onnx_path`, from the cache or built now; see `engine_key`.  A second process waits for the first.

    Raises:
        AlignError: TensorRT cannot run here, or cannot build it.
    """
    log, built = Log(), []

    def build(folder: Path) -> None:
        built.append(build_engine(onnx_path, options, log, images))
        (folder / _PLAN).write_bytes(built[0])
        (folder / _MESSAGES).write_text(json.dumps(log.messages), encoding="utf-8")
        if images:
            (folder / _CALIBRATION).write_text(images.cache, encoding="utf-8")

    with holding(engine_key(onnx_path, options, images), build) as folder:
        if built:
            return Engine(built[0], log.messages, False)
        if images:
            images.cache = (folder / _CALIBRATION).read_text(encoding="utf-8")
        messages = json.loads((folder / _MESSAGES).read_text(encoding="utf-8"))
        return Engine((folder / _PLAN).read_bytes(), [Message(*message) for message in messages], True)


def engine_key(onnx_path: Path, options: BuildOptions, images: CalibrationImages | None = None) -> Key:
    """What an engine is known by: the content of the ONNX file, its weight files and plugin library, the options, the
    `images` that a calibrator reads, and the build variables; made by TensorRT's version on a GPU.

    Raises:
        AlignError: TensorRT cannot run here, or a file cannot be read.
    """
    require()
    device = gpu()
    inputs = {
        "onnx_sha256": [file_digest(path) for path in [onnx_path, *_weight_files(onnx_path)]],
        "precision": options.precision,
        "options": options.fingerprint(),
        "images": images.identity if images else "",
        "environment": build_environment(),
        **plugin_identity(onnx_path),
    }
    versions = {
        "tensorrt": Capabilities.current().version,
        "gpu": device.name,
        "compute_capability": device.compute_capability,
    }
    return Key("engine", onnx_path.stem, inputs, versions)


def build_engine(onnx_path: Path, options: BuildOptions, log: Log, images: CalibrationImages | None = None) -> bytes:
    """Builds an engine on the GPU, now.

    Args:
        onnx_path: a graph of which at most the batch axis is dynamic.
        options: see `BuildOptions`.
        log: receives TensorRT's messages, also when the build fails.
        images: what `BuildOptions.calibrator` reads; receives the cache that it writes.

    Returns:
        The serialized engine.

    Raises:
        AlignError: a node that TensorRT cannot parse, an option that this version lacks, a build that fails.
    """
    require()
    import tensorrt as trt

    ability = Capabilities.current()
    with cuda_context(), listening(log) as logger:
        register_plugins(logger, onnx_path)
        try:
            builder = trt.Builder(logger)
        except TypeError:  # what pybind11 makes of a null pointer
            raise AlignError(f"TensorRT cannot start its builder: {_last(log)}", "check the GPU's driver") from None
        network = builder.create_network(_network_flags(options, ability))
        parser = trt.OnnxParser(network, logger)  # holds weights: it must live until the build is done
        if not parser.parse_from_file(str(onnx_path)):
            raise _parse_error(parser, onnx_path, ability, log)
        if options.strongly_typed and options.precision == "fp16":
            _require_float16(onnx_path)
        _mark_outputs(network, options.layers_as_outputs, onnx_path)
        config = _configure(builder, options, ability)
        _bind(network, config, options, onnx_path, ability)
        _add_profile(builder, network, config, options, onnx_path)
        calibrator = _add_int8(builder, network, config, options, images, log)  # lives until the build is done
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _build_error(onnx_path, ability, log)
        del calibrator
        return bytes(plan)


def _network_flags(options: BuildOptions, ability: Capabilities) -> int:
    import tensorrt as trt

    flags = 0
    if ability.has_explicit_batch_flag:
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    if options.strongly_typed and not ability.always_strongly_typed:
        if not ability.has_strongly_typed_flag:
            raise AlignError(f"TensorRT {ability.version} has no strongly typed networks", "build it without")
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return flags


def _configure(builder: Any, options: BuildOptions, ability: Capabilities) -> Any:
    """The builder configuration: precision, effort, workspace and tactic sources."""
    import tensorrt as trt

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what the engine inspector can tell
    if ability.has_optimization_level:
        config.builder_optimization_level = options.optimization_level
    if ability.has_tf32_flag:
        if options.precision == "tf32":
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)
    if options.precision in ("fp16", "int8") and not options.strongly_typed:
        if not (ability.has_fp16_flag and ability.has_int8_flag):
            raise AlignError(
                f"TensorRT {ability.version} has no {options.precision} flag",
                "convert the ONNX file to float16, or give it QDQ nodes, and build it strongly typed",
            )
        config.set_flag(trt.BuilderFlag.FP16)
        if options.precision == "int8":
            config.set_flag(trt.BuilderFlag.INT8)
    if ability.has_cublas_tactic_sources and os.environ.get(NO_CUBLAS) == "1":
        config.set_tactic_sources(0)
    return config


def _add_profile(builder: Any, network: Any, config: Any, options: BuildOptions, path: Path) -> None:
    """One optimization profile, when an input's batch axis is dynamic."""
    profile = builder.create_optimization_profile()
    batches = options.min_batch, options.opt_batch, options.max_batch
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        if -1 in shape[1:]:
            raise AlignError(f"{path}: input {tensor.name} is {list(shape)}", "export it with only the batch dynamic")
        smallest, best, largest = ((batch, *shape[1:]) for batch in batches)
        profile.set_shape(tensor.name, smallest, best, largest)
        dynamic = True
    if dynamic and config.add_optimization_profile(profile) < 0:
        raise AlignError(f"{path}: TensorRT refuses the batch profile {batches}", "give other batch sizes")


def _add_int8(
    builder: Any, network: Any, config: Any, options: BuildOptions, images: CalibrationImages | None, log: Log
) -> Any:
    """Ranges or a calibrator, where they are asked for; returns the calibrator."""
    import tensorrt as trt

    ability = Capabilities.current()
    if options.ranges:
        without = set_ranges(network, dict(options.ranges), ability)
        if without:
            log.add("WARNING", f"missing scale: {len(without)} tensors have no range, {', '.join(without[:3])}, ...")
    if not options.calibrator:
        return None
    calibrator = make_calibrator(options.calibrator, images, options.cache, ability)
    if ability.has_calibrators:
        config.int8_calibrator = calibrator
        if options.calibrator == "legacy":
            # It calibrates after fusion by itself, and finds no float kernel for a convolution fused with its SiLU.
            config.set_quantization_flag(trt.QuantizationFlag.CALIBRATE_BEFORE_FUSION)
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            one = tuple(1 if size < 0 else int(size) for size in tensor.shape)
            profile.set_shape(tensor.name, one, one, one)
        config.set_calibration_profile(profile)
    return calibrator


def _mark_outputs(network: Any, names: tuple[str, ...], path: Path) -> None:
    """Marks the named tensors as outputs, those that are outputs already excepted."""
    if not names:
        return
    tensors = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            tensor = layer.get_output(output)
            tensors[tensor.name] = tensor
    for name in names:
        if name not in tensors:
            near = ", ".join(difflib.get_close_matches(name, tensors, 3)) or "see the ONNX file"
            raise AlignError(f"{path}: TensorRT's network has no tensor {name!r}", f"tensors named alike: {near}")
        tensor = tensors[name]
        if not tensor.is_network_output:
            network.mark_output(tensor)


def _require_float16(path: Path) -> None:
    """Refuses a graph of which a strongly typed network would be float32 throughout."""
    graph = onnx.load(path, load_external_data=False).graph
    casts = (a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to")
    if onnx.TensorProto.FLOAT16 not in {*casts, *(weight.data_type for weight in graph.initializer)}:
        raise AlignError(
            f"{path}: nothing in it is float16, and a strongly typed network takes its types from the graph",
            "give the file that float16_model() makes",
        )


def _bind(network: Any, config: Any, options: BuildOptions, path: Path, ability: Capabilities) -> None:
    """Binds the layers of the named ONNX nodes to float32 or float16."""
    bound = {**dict.fromkeys(options.float16_nodes, "half"), **dict.fromkeys(options.float32_nodes, "float")}
    if not bound:
        return
    import tensorrt as trt

    if not ability.has_layer_precision:
        raise AlignError(
            f"TensorRT {ability.version} takes no precision for a layer", "build a float16 graph, strongly typed"
        )
    nodes = onnx.load(path, load_external_data=False).graph.node
    made = {name: bound[node.name] for node in nodes if node.name in bound for name in node.output}
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for number in range(layer.num_outputs):
            tensor = layer.get_output(number)
            # The parser may make several layers of a node; the last has the node's output, and often its name.
            kind = made.get(tensor.name) or bound.get(layer.name)
            if kind is None or tensor.dtype != trt.DataType.FLOAT:
                continue
            if kind == "half":
                layer.precision = trt.DataType.HALF
            else:
                layer.precision = trt.DataType.FLOAT
                layer.set_output_type(number, trt.DataType.FLOAT)


def _parse_error(parser: Any, path: Path, ability: Capabilities, log: Log) -> AlignError:
    """What the parser could not do, at which node of the file."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    found = []
    for index in range(parser.num_errors):
        parser_error = parser.get_error(index)
        place, number = "", parser_error.node()
        if 0 <= number < len(nodes):
            node = nodes[number]
            place = f"node {number} {node.name or '(unnamed)'} ({node.op_type}): "
        found.append(place + " ".join(str(parser_error.desc()).split())[:240])
    reason = "; ".join(found) or _last(log)
    return AlignError(f"{path}: TensorRT {ability.version} cannot parse {reason}", _mend(reason, ability))


def _build_error(path: Path, ability: Capabilities, log: Log) -> AlignError:
    """Why no engine came: a `BuildError`, but where memory ran out, of which another time it may come."""
    unranged = [line for line in warnings_of(log.messages) if line.startswith("missing scale")]
    reason = " ".join(log.errors(last=20) + unranged)
    kind = AlignError if "out of memory" in reason.lower() else BuildError
    what = f"{path}: TensorRT {ability.version} cannot build it: {_last(log)}"
    return kind(what, _mend(reason, ability))


def _mend(reason: str, ability: Capabilities) -> str:
    text = reason.lower()
    if "topk" in text:
        return f"TopK takes a constant K of at most {ability.topk_limit} in TensorRT: lower nms_pre and export again"
    if "plugin" in text or "no importer" in text:
        return "load the library of that plugin first, or export without the operator"
    if "could not find any implementation" in text and "missing scale" in text:
        return "give every tensor a range: `align quantize` writes them all"
    if "memory" in text:
        return "give more workspace, a smaller max batch, or free the GPU"
    return "look that node up in the ONNX file, and the message in the issues of NVIDIA/TensorRT"


def _last(log: Log) -> str:
    return "; ".join(log.errors()) or "no error message"


def _weight_files(path: Path) -> list[Path]:
    """Files beside an ONNX file that hold weights of it."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError:
        raise AlignError(f"{path}: not an ONNX file", "give the file that `align export` wrote") from None
    except OSError as error:
        raise AlignError(f"{path}: {error.strerror}", "give the path of an ONNX file") from None
    external = [weight for weight in graph.initializer if weight.data_location == onnx.TensorProto.EXTERNAL]
    names = {entry.value for weight in external for entry in weight.external_data if entry.key == "location"}
    return [path.parent / name for name in sorted(names)]


@functools.cache
def _primary_context() -> Any:
    import pycuda.driver as cuda

    cuda.init()
    return cuda.Device(0).retain_primary_context()


def _hash(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
