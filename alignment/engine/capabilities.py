"""What a TensorRT version can do, and whether this machine can run it.

The only module that looks at the version: the others ask `Capabilities` by name.  "Bindings" below are the names that
the real Python bindings of 8.6.1, 10.16.1 and 11.4.0 offer (``golden/trt_api``); the suite checks `BEHIND` and every
use of TensorRT in this package against them.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from alignment.errors import AlignError

OLDEST = (8, 6)
_RELEASE = re.compile(r"(\d+)\.(\d+)")

# Names that some versions lack -> the capability that is true exactly where the name exists.
BEHIND = {
    "BuilderFlag.FP16": "has_fp16_flag",
    "BuilderFlag.INT8": "has_int8_flag",
    "BuilderFlag.TF32": "has_tf32_flag",
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": "has_layer_precision",
    "BuilderFlag.PREFER_PRECISION_CONSTRAINTS": "has_layer_precision",
    "DataType.INT64": "has_int64",
    "IBuilderConfig.builder_optimization_level": "has_optimization_level",
    "IBuilderConfig.int8_calibrator": "has_calibrators",
    "IBuilderConfig.set_calibration_profile": "has_calibrators",
    "IBuilderConfig.set_quantization_flag": "has_calibrators",
    "IInt8EntropyCalibrator": "has_calibrators",
    "IInt8EntropyCalibrator2": "has_calibrators",
    "IInt8LegacyCalibrator": "has_calibrators",
    "IInt8MinMaxCalibrator": "has_calibrators",
    "ILayer.precision": "has_layer_precision",
    "ILayer.set_output_type": "has_layer_precision",
    "INetworkDefinition.add_plugin_v3": "has_plugin_v3",
    "ITensor.dynamic_range": "has_dynamic_range",
    "ITensor.set_dynamic_range": "has_dynamic_range",
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": "has_explicit_batch_flag",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": "has_strongly_typed_flag",
    "QuantizationFlag": "has_calibrators",
    "QuantizationFlag.CALIBRATE_BEFORE_FUSION": "has_calibrators",
    "TacticSource.CUBLAS": "has_cublas_tactic_sources",
    "TacticSource.CUBLAS_LT": "has_cublas_tactic_sources",
    "TacticSource.CUDNN": "has_cublas_tactic_sources",
}


@dataclass(frozen=True)
class Capabilities:
    """What TensorRT `version` ("10.16.1.11") can do.  Make one with `of` or `current`."""

    version: str

    @classmethod
    def of(cls, version: str) -> Capabilities:
        """Capabilities of a version given as text.

        Raises:
            AlignError: the text is no version.
        """
        if not _RELEASE.match(version):
            raise AlignError(f"{version!r} is no TensorRT version", "give one such as 8.6.1")
        return cls(version)

    @classmethod
    def current(cls) -> Capabilities:
        """Capabilities of the installed TensorRT.

        Raises:
            AlignError: TensorRT cannot be imported.
        """
        try:
            import tensorrt as trt
        except (ImportError, OSError) as error:
            raise AlignError(f"TensorRT cannot be imported ({error})", "see `align doctor`") from None
        return cls.of(trt.__version__)

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        found = _RELEASE.match(self.version)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def supported(self) -> bool:
        """Whether this package supports the version at all: 8.6, 10 and 11 are what it is written for."""
        return self.release >= OLDEST

    def takes_libraries_of(self, version: str) -> bool:
        """Whether a plugin that was compiled against the headers of `version` can be loaded: of the same major one."""
        return Capabilities.of(version)._major == self._major

    @property
    def _major(self) -> int:
        return self.release[0]

    @property
    def has_fp16_flag(self) -> bool:
        """Weakly typed FP16: until 10.x, deprecated there in favour of strong typing.  Bindings."""
        return self.release < (11, 0)

    @property
    def has_int8_flag(self) -> bool:
        """The INT8 builder flag, which weakly typed QDQ graphs need too: until 10.x.  Bindings."""
        return self.release < (11, 0)

    @property
    def has_tf32_flag(self) -> bool:
        """TF32, on by default and the usual "FP32 mismatch": every supported version.  Bindings."""
        return True

    @property
    def has_layer_precision(self) -> bool:
        """Precision and output type per layer, with OBEY and PREFER: until 10.x.  Bindings."""
        return self.release < (11, 0)

    @property
    def has_calibrators(self) -> bool:
        """``IInt8*Calibrator``: until 10.x, deprecated in 10.1.  Bindings, NvInfer.h."""
        return self.release < (11, 0)

    @property
    def has_dynamic_range(self) -> bool:
        """``ITensor.set_dynamic_range``: until 10.x, deprecated in 10.1.  Bindings, NvInfer.h."""
        return self.release < (11, 0)

    @property
    def has_int64(self) -> bool:
        """INT64 tensors; before 10.0 the parser casts INT64 to INT32.  Bindings."""
        return self.release >= (10, 0)

    @property
    def has_explicit_batch_flag(self) -> bool:
        """The EXPLICIT_BATCH network flag: needed before 10.0, ignored in 10.x, gone in 11.  Bindings."""
        return self.release < (11, 0)

    @property
    def has_strongly_typed_flag(self) -> bool:
        """The STRONGLY_TYPED network flag: from 10.0; still a name in 11, which ignores it.  Bindings."""
        return self.release >= (10, 0)

    @property
    def always_strongly_typed(self) -> bool:
        """Every network takes its types from the graph: from 11.0.  Docstring of that flag in 11.4.0."""
        return self.release >= (11, 0)

    @property
    def has_cublas_tactic_sources(self) -> bool:
        """CUBLAS, CUBLAS_LT and CUDNN among the tactic sources: until 10.x (off by default there).  Bindings."""
        return self.release < (11, 0)

    @property
    def has_optimization_level(self) -> bool:
        """``builder_optimization_level``: from 8.6.  Bindings, NvInfer.h of 8.6."""
        return self.release >= (8, 6)

    @property
    def has_plugin_v3(self) -> bool:
        """IPluginV3 and ``add_plugin_v3``: from 10.0; ``add_plugin_v2`` and V2 plugins are deprecated.  Bindings."""
        return self.release >= (10, 0)

    @property
    def topk_limit(self) -> int:
        """Largest K of TopK: 3840 from 7.0 to 11.1 (NvInfer.h); 3841 seen to fail the build on 8.6."""
        return 3840

    @property
    def nms_candidates(self) -> int:
        """Most (box, class) pairs that EfficientNMS_TRT considers: 4096 to 8.4, 5000 from 8.5.

        From the plugin's source, plugin/efficientNMSPlugin; 2000 on GPUs with few registers.  Its README still says
        4096.
        """
        return 5000 if self.release >= (8, 5) else 4096

    @property
    def nms_class_agnostic(self) -> bool:
        """Whether EfficientNMS_TRT heeds the attribute ``class_agnostic``.

        The plugin's source has it from 8.6 on, but the library in the wheel of 8.6.0, which the bindings of 8.6.1 load,
        passes over it (golden/efficient_nms): counted on from 10.0.
        """
        return self.release >= (10, 0)

    @property
    def int8_routes(self) -> tuple[str, ...]:
        """How int8 can reach this version: only explicit QDQ where calibrators and dynamic ranges are gone."""
        implicit = ("implicit",) if self.has_calibrators else ()
        ranges = ("dynamic_range",) if self.has_dynamic_range else ()
        return (*implicit, *ranges, "qdq")


@dataclass(frozen=True)
class Gpu:
    """The first visible CUDA device; `driver_cuda` is the newest CUDA that the driver supports ("13.0")."""

    name: str
    compute_capability: str
    driver_cuda: str


def gpu() -> Gpu:
    """The device that engines are built for and run on (``CUDA_VISIBLE_DEVICES`` chooses it)."""
    import pycuda.driver as cuda

    cuda.init()
    device = cuda.Device(0)
    number = cuda.get_driver_version()
    compute = ".".join(map(str, device.compute_capability()))
    return Gpu(device.name(), compute, f"{number // 1000}.{number % 1000 // 10}")


def missing() -> str | None:
    """Why TensorRT cannot run on this machine, with the mend; None when it can."""
    return _missing_tensorrt() or _missing_device()


def require() -> None:
    """Raises what `missing` says.

    Raises:
        AlignError: TensorRT cannot run here.
    """
    reason = missing()
    if reason:
        raise AlignError(reason)


def _missing_tensorrt() -> str | None:
    oldest = ".".join(map(str, OLDEST))
    if importlib.util.find_spec("tensorrt") is None:
        return f"tensorrt is not installed: pip install 'tensorrt>={oldest}' on a machine with an NVIDIA GPU"
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        return f"tensorrt does not import ({_line(error)}): put its libraries on LD_LIBRARY_PATH"
    if not Capabilities.of(trt.__version__).supported:
        return f"TensorRT {trt.__version__} is too old: install {oldest} or newer"
    return None


def _missing_device() -> str | None:
    if importlib.util.find_spec("pycuda") is None:
        return "pycuda is not installed: pip install pycuda (compiles with nvcc)"
    try:
        import pycuda.driver as cuda
    except (ImportError, OSError) as error:
        return f"pycuda does not import ({_line(error)}): install the NVIDIA driver, whose libcuda.so.1 it needs"
    try:
        cuda.init()
        count = cuda.Device.count()
    except cuda.Error as error:
        return f"CUDA does not start ({_line(error)}): check the driver with nvidia-smi"
    return None if count else "no CUDA device is visible: check CUDA_VISIBLE_DEVICES and nvidia-smi"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
