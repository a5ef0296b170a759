"""What this machine can and cannot run, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignment.cache import room
from alignment.engine import capabilities, plugins
from alignment.errors import QUANTIZATION_MEND, AlignError
from alignment.storage import cache_dir, data_dir
from alignment.variant import golden_dir

_HERE = "in the repository"
_PACKAGES = {
    "torch": "pip install 'torch>=2.4'",
    "mmyolo": f"pip install '.[mmyolo]' {_HERE}",
    "mmdet": f"pip install '.[mmyolo]' {_HERE}",
    "mmrotate": "for rotated boxes: pip install --no-deps mmrotate==1.0.0rc1",
    "e2cnn": f"for rotated boxes: pip install '.[rotated]' {_HERE}",
    "pytorch-quantization": f"for int8 in torch: {QUANTIZATION_MEND}",
    "onnx": f"pip install . {_HERE}",
    "onnxruntime": f"pip install . {_HERE}",
    "pycocotools": f"pip install . {_HERE}",
    "polygraphy": f"pip install '.[dev]' {_HERE}",
}


@dataclass(frozen=True)
class Diagnosis:
    """One line of the doctor's report."""

    what: str
    state: Literal["ok", "missing", "note"]
    detail: str


def examine() -> Iterator[Diagnosis]:
    """Looks at Python, packages, TensorRT, compilers, data and golden files; runs no model."""
    yield Diagnosis("python", "ok", sys.version.split()[0])
    for name, mend in _PACKAGES.items():
        try:
            yield Diagnosis(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Diagnosis(name, "missing", mend)
    yield _compiled_ops()
    reason = capabilities.missing()
    if reason is None:
        yield Diagnosis("tensorrt", "ok", capabilities.Capabilities.current().version)
    else:
        yield Diagnosis("tensorrt", "missing", f"{reason}; committed records are replayed instead")
    yield _versions()
    yield from _plugin_tools()
    data = data_dir()
    yield Diagnosis(
        "real data",
        "ok" if (data / "coco").is_dir() else "missing",
        f"{data}" if (data / "coco").is_dir() else f"{data / 'coco'} does not exist: set ALIGN_DATA or give --data",
    )
    records = sorted((golden_dir() / "records").glob("*.json"))
    yield Diagnosis("records", "ok" if records else "note", f"{len(records)} to replay in {golden_dir() / 'records'}")
    yield _cache()


def _cache() -> Diagnosis:
    size = sum(item.size for item in room.contents(describe=False))
    detail = f"{cache_dir()}: {room.human(size)} of {room.human(room.allowed())}"
    return Diagnosis("cache", "ok" if os.access(_existing(cache_dir()), os.W_OK) else "missing", detail)


def _versions() -> Diagnosis:
    """On which TensorRT the code was run, by the committed records, and which it was only held to by API names."""
    golden = golden_dir()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((golden / "records").glob("*.json"))]
    made_by = {((record["result"] or {}).get("provenance") or {}).get("tensorrt") for record in records}
    executed = sorted(version for version in made_by if version)
    listed = sorted((path.stem for path in (golden / "trt_api").glob("*.json")), key=lambda v: int(v.split(".")[0]))
    by_name = [version for version in listed if not any(ran.startswith(version) for ran in executed)]
    detail = f"executed: {', '.join(executed) or 'none'}; checked by API name only: {', '.join(by_name) or 'none'}"
    return Diagnosis("tensorrt versions", "note", detail)


def _plugin_tools() -> Iterator[Diagnosis]:
    """What compiles the plugin for rotated boxes."""
    try:
        yield Diagnosis("nvcc", "ok", str(plugins.find_nvcc()))
    except AlignError as error:
        yield Diagnosis("nvcc", "missing", f"for the plugin of rotated boxes: {error}")
    try:
        headers = plugins.find_tensorrt_headers()
        yield Diagnosis("tensorrt headers", "ok", f"{plugins.headers_version(headers)} in {headers}")
    except AlignError as error:
        yield Diagnosis("tensorrt headers", "missing", f"for the plugin of rotated boxes: {error}")


def _compiled_ops() -> Diagnosis:
    if importlib.util.find_spec("mmcv") is None:
        return Diagnosis("mmcv ops", "missing", _PACKAGES["mmyolo"])
    if importlib.util.find_spec("mmcv._ext") is not None:
        return Diagnosis("mmcv ops", "ok", "compiled mmcv")
    return Diagnosis("mmcv ops", "note", "mmcv-lite: the pure-torch stand-in serves NMS, rotated IoU and focal loss")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
