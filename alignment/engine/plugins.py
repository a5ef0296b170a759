"""The CUDA C++ plugins of ``plugins_src``: compiled into the cache where they are first asked for, and loaded.

A library is known by the sources, the compiler, the GPU architectures and the version of TensorRT's headers.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from alignment.cache import Key, kept
from alignment.engine.capabilities import Capabilities
from alignment.errors import AlignError

NAME = "efficient_nms_rotated"
#: GPUs that machine code is made for; newer ones take the PTX of the last.
ARCHITECTURES = (80, 89, 90)
#: How far the kernels' IoU can be off, at most (rotated_iou.h).
IOU_ERROR = 2e-5
KERNEL_SOURCES = ("efficient_nms_rotated.cu", "host.cpp")
PLUGIN_SOURCES = (*KERNEL_SOURCES, "plugin/plugin.cpp")
_VISIBILITY = "-Xcompiler=-fPIC,-fvisibility=hidden"
_SOURCE_SUFFIXES = {".h", ".cuh", ".cu", ".cpp"}
_HEADERS = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include", "/usr/local/include")
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}


def source_dir() -> Path:
    """The folder of the plugin's sources: of the wheel, or of the repository."""
    package = Path(__file__).parent.parent
    packaged = package / "_plugins_src" / NAME
    return packaged if packaged.exists() else package.parent / "plugins_src" / NAME


def find_nvcc() -> Path:
    """CUDA's compiler, the first of `nvccs`.

    Raises:
        AlignError: there is none.
    """
    for nvcc in nvccs():
        return nvcc
    raise AlignError("nvcc is not found", "install the CUDA toolkit and set CUDA_HOME, or pip install '.[plugin]'")


def nvccs() -> Iterator[Path]:
    """CUDA's compilers: on the PATH, below ``CUDA_HOME`` and ``CUDA_PATH``, of the wheel nvidia-cuda-nvcc."""
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    # A wheel of CUDA 13 puts it into nvidia/cu13, one of CUDA 12 into nvidia/cuda_nvcc.
    spec = importlib.util.find_spec("nvidia")
    for folder in map(Path, spec.submodule_search_locations or [] if spec else []):
        roots += [*sorted(folder.glob("cu[0-9]*"), reverse=True), folder / "cuda_nvcc"]
    yield from (root / "bin" / "nvcc" for root in roots if (root / "bin" / "nvcc").is_file())


def find_compiler() -> Path:
    """The C++ compiler: ``CXX``, g++ or c++.

    Raises:
        AlignError: there is none.
    """
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++")):
        if found := shutil.which(name):
            return Path(found)
    raise AlignError("no C++ compiler is found", "install g++, or set CXX")


def find_tensorrt_headers() -> Path:
    """The folder of ``NvInfer.h``: below ``TENSORRT_ROOT``, or of the system.

    Raises:
        AlignError: there is none.
    """
    root = os.environ.get("TENSORRT_ROOT")
    for folder in [Path(root) / "include", Path(root)] if root else map(Path, _HEADERS):
        if (folder / "NvInfer.h").is_file():
            return folder
    mend = "set TENSORRT_ROOT to the folder that holds include/NvInfer.h, as TensorRT's archive and repository have it"
    raise AlignError(f"TENSORRT_ROOT {root}: no NvInfer.h" if root else "TensorRT's headers are not found", mend)


def headers_version(headers: Path) -> str:
    """The version of TensorRT's headers in a folder, such as ``10.16.0``.

    Raises:
        AlignError: the header that says it is not there.
    """
    try:
        text = (headers / "NvInferVersion.h").read_text(errors="replace")
    except OSError as error:
        raise AlignError(f"{error.filename}: {error.strerror}", "copy all of TensorRT's headers there") from None
    # Newer headers name a number of another name.
    values: dict[str, str] = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", text))
    names = [f"NV_TENSORRT_{part}" for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(values.get(values.get(name, ""), values.get(name, "?")) for name in names)


def build_plugin() -> Path:
    """The library with the plugin, ``libefficient_nms_rotated.so``, for the TensorRT headers that are found.

    Raises:
        AlignError: nvcc or the headers are not found, or the sources do not compile.
    """
    headers = find_tensorrt_headers()
    command = [*_nvcc_command(), f"-isystem={headers}", f"-I{source_dir()}"]
    return _built(f"lib{NAME}.so", command, PLUGIN_SOURCES, f"TensorRT {headers_version(headers)}")


def build_kernels() -> Path:
    """The library with the C API alone, which needs no TensorRT: ``libefficient_nms_rotated_kernels.so``.

    Raises:
        AlignError: nvcc is not found, or the sources do not compile.
    """
    return _built(f"lib{NAME}_kernels.so", _nvcc_command(), KERNEL_SOURCES)


def build_for_cpu() -> Path:
    """The C API with kernels that run thread by thread on the CPU, to test them: ``..._cpu.so``, by a C++ compiler.

    Raises:
        AlignError: there is no C++ compiler, or the sources do not compile.
    """
    command = [str(find_compiler()), "-std=c++17", "-O2", "-shared", "-fPIC", "-w", "-DENR_EMULATED", "-xc++"]
    return _built(f"lib{NAME}_cpu.so", command, KERNEL_SOURCES)


def load_plugin(path: Path | None = None) -> ctypes.CDLL:
    """Loads the plugin into this process, where it enters itself in TensorRT's registry; again: does nothing.

    Args:
        path: the library; default: `build_plugin`'s.

    Raises:
        AlignError: TensorRT cannot be imported, or the library cannot be built or loaded; the headers found are of
            another major version, whose classes are laid out in another way.
    """
    if path is None:
        headers, current = find_tensorrt_headers(), Capabilities.current()
        version = headers_version(headers)
        if not current.takes_libraries_of(version):
            what = f"{headers}: headers of TensorRT {version}, but {current.version} is installed"
            raise AlignError(what, "set TENSORRT_ROOT to the headers of that version")
    return _loaded(Path(path or build_plugin()).resolve())


@cache
def _loaded(path: Path) -> ctypes.CDLL:
    Capabilities.current()  # which imports it
    try:
        # Python loads TensorRT for itself alone; the plugin has to see its symbols too.
        for library in _mapped("libnvinfer.so"):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise AlignError(f"{path}: {error}", "build it against the headers of the TensorRT that runs it") from None


def _mapped(name: str) -> list[str]:
    """Files of this process's memory map whose name begins so."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(name))


def _built(name: str, command: list[str], sources: tuple[str, ...], against: str = "") -> Path:
    """The library `name`, from the cache or compiled into it; `against`: what else decides what it is."""
    folder = source_dir()
    files = sorted(p for p in folder.rglob("*") if p.suffix in _SOURCE_SUFFIXES)
    parts = [f"{file.relative_to(folder)}\0".encode() + file.read_bytes() for file in files]
    inputs = {"sources_sha256": hashlib.sha256(b"".join(parts)).hexdigest(), "command": command}
    versions = {"compiler": _output([command[0], "--version"]), "headers": against}

    def compile_into(place: Path) -> None:
        _output([*command, *(str(folder / source) for source in sources), "-o", str(place / name)])

    return kept(Key("plugin", name, inputs, versions), compile_into) / name


def _nvcc_command() -> list[str]:
    nvcc, newest = find_nvcc(), ARCHITECTURES[-1]
    machine = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    code = [*machine, f"-gencode=arch=compute_{newest},code=compute_{newest}"]
    # The compiler of a wheel looks for libraries in lib64, and has them in lib.
    libraries = nvcc.parent.parent / "lib"
    places = [f"-L{libraries}"] if (libraries / "libcudart_static.a").is_file() else []
    return [str(nvcc), "-std=c++17", "-O3", "-shared", "-cudart=static", _VISIBILITY, *places, *code]


def _output(command: list[str]) -> str:
    """What a command prints.  Raises AlignError with the first error that it prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise AlignError(f"{command[0]}: {error.strerror}", "name a compiler that runs: CUDA_HOME, CXX") from None
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        errors = [line for line in lines if "error" in line] or lines or [f"status {done.returncode}"]
        raise AlignError(f"{command[0]}: {errors[0]}", "it needs a C++17 compiler that this CUDA supports")
    return done.stdout


class Params(ctypes.Structure):
    """``enr_params`` of efficient_nms_rotated.h; the fields are the plugin's attributes."""

    _fields_ = (
        ("score_threshold", ctypes.c_float),
        ("iou_threshold", ctypes.c_float),
        ("max_output_boxes", ctypes.c_int),
        ("background_class", ctypes.c_int),
        ("score_activation", ctypes.c_int),
        ("class_agnostic", ctypes.c_int),
        ("pre_nms_topk", ctypes.c_int),
    )

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Params:
        """From the attributes of a node; those that may be missing have the plugin's defaults."""
        return cls(**{"background_class": -1, **attributes})


@dataclass(frozen=True)
class Ious:
    """What `Kernels.ious` finds, ``[n]`` each.

    Attributes:
        iou: float32, off by at most `IOU_ERROR`.
        float32: as float32 alone has it.
        bound: float32, how far that can be off.
        suppressed: bool, whether the kernels take the IoU to exceed the threshold.
    """

    iou: np.ndarray
    float32: np.ndarray
    bound: np.ndarray
    suppressed: np.ndarray


class Kernels:
    """The C API of efficient_nms_rotated.h in a library.

    Raises:
        AlignError: the library cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise AlignError(f"{path}: {error}", "remove the file, so that it is compiled again") from None
        self._library.enr_workspace_bytes.restype = ctypes.c_size_t
        self._library.enr_error.restype = ctypes.c_char_p

    def ious(self, a: np.ndarray, b: np.ndarray, iou_threshold: float = 0.5) -> Ious:
        """IoUs of pairs of rotated boxes ``[n, 5]``, ``[n, 5]``, in float32, on the CPU."""
        a, b = (np.ascontiguousarray(boxes, np.float32) for boxes in (a, b))
        found = [np.empty(len(a), dtype) for dtype in (np.float32, np.float32, np.float32, np.bool_)]
        self._library.enr_ious_host(
            _pointer(a), _pointer(b), ctypes.c_size_t(len(a)), ctypes.c_float(iou_threshold), *map(_pointer, found)
        )
        return Ious(*found)

    def workspace_bytes(self, params: Params, shape: tuple[int, int, int], dtype: Any) -> int:
        """Bytes of device memory that `run` needs for scores of `shape` ``[batch, boxes, classes]``."""
        return int(self._library.enr_workspace_bytes(ctypes.byref(params), *shape, _DTYPES[np.dtype(dtype)]))

    def run(
        self,
        params: Params,
        shape: tuple[int, int, int],
        dtype: Any,
        pointers: tuple[int, int, int, int, int, int],
        workspace: tuple[int, int],
        stream: int = 0,
    ) -> None:
        """Enqueues rotated NMS on a CUDA stream.

        Args:
            params: the attributes.
            shape: of the scores, ``[batch, boxes, classes]``.
            dtype: of boxes and scores, float32 or float16.
            pointers: device addresses of boxes, scores, num_detections, detection_boxes, detection_scores and
                detection_classes, as the header describes them.
            workspace: device address and bytes.
            stream: a ``cudaStream_t``.

        Raises:
            AlignError: what the library says is wrong.
        """
        error = self._library.enr_run(
            ctypes.byref(params),
            *shape,
            _DTYPES[np.dtype(dtype)],
            *map(ctypes.c_void_p, pointers),
            ctypes.c_void_p(workspace[0]),
            ctypes.c_size_t(workspace[1]),
            ctypes.c_void_p(stream),
        )
        if error:
            raise AlignError(f"{NAME}: {self._library.enr_error(error).decode()}", "see efficient_nms_rotated.h")


def kernels(path: Path | None = None) -> Kernels:
    """The kernels' C API; `path`: the library, default `build_kernels`'s."""
    return Kernels(path or build_kernels())


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
