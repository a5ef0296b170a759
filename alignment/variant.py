"""Variants: one detector to be deployed, described by one YAML file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from alignment.errors import AlignError
from alignment.storage import data_dir

ZOO = Path(__file__).parent / "zoo"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MMYoloSource(_Strict):
    """An mmyolo config with a checkpoint.

    `config` is a path inside mmyolo's own ``configs`` folder, or a file (relative to the YAML file); `options` are
    dotted keys that override it, as ``--cfg-options`` does; `imports` are modules to import first, which may register
    further model classes.
    """

    kind: Literal["mmyolo"]
    config: str
    checkpoint: Path
    options: dict[str, Any] = {}
    imports: list[str] = []


class OnnxHead(_Strict):
    """How the outputs of a bare ONNX file become boxes and scores.

    ``decoded``: `boxes` [B, N, 4] in pixels of the network input and `scores` [B, N, C] are outputs of the graph.
    ``yolox``: one output [B, N, 5 + C] (cx, cy, w, h, objectness, classes; scores after the sigmoid), its centre as
    offset from the cell and its size as logarithm, both in units of the stride.
    """

    layout: Literal["decoded", "yolox"]
    boxes: str = "boxes"
    scores: str = "scores"
    box_format: Literal["xyxy", "cxcywh"] = "xyxy"
    output: str | None = None
    strides: list[Annotated[int, Field(gt=0)]] = [8, 16, 32]


class OnnxSource(_Strict):
    """A bare ONNX file; torch is then absent from the comparison."""

    kind: Literal["onnx"]
    file: Path
    head: OnnxHead


class InputSize(_Strict):
    """The one input of a deployed engine, in pixels."""

    height: Annotated[int, Field(ge=32, multiple_of=32)]
    width: Annotated[int, Field(ge=32, multiple_of=32)]


class Preprocess(_Strict):
    """From a BGR uint8 image to the network's input.

    `resize`: ``letterbox`` (mmyolo: keep ratio, padding on both sides), ``letterbox_top_left`` (mmdet and YOLOX: keep
    ratio, padding right and below), ``stretch``.  `interpolation` ``auto`` is YOLOv5's: area to shrink, bilinear to
    enlarge.  `mean` and `std` are in the order of `channels`.
    """

    resize: Literal["letterbox", "letterbox_top_left", "stretch"] = "letterbox"
    interpolation: Literal["auto", "nearest", "bilinear", "bicubic", "area"] = "auto"
    pad_value: Annotated[int, Field(ge=0, le=255)] = 114
    channels: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)


class Nms(_Strict):
    """Post-processing as mmyolo's ``test_cfg`` says it."""

    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.001
    iou_threshold: Annotated[float, Field(gt=0, le=1)] = 0.65
    nms_pre: Annotated[int, Field(gt=0)] = 30000
    max_per_image: Annotated[int, Field(gt=0)] = 300
    multi_label: bool = True


class Variant(_Strict):
    """One detector to be deployed.  See `load_variant`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    source: Annotated[MMYoloSource | OnnxSource, Field(discriminator="kind")]
    input: InputSize
    preprocess: Preprocess = Preprocess()
    classes: Annotated[int, Field(gt=0)]
    nms: Nms = Nms()
    dataset: Literal["coco", "synthetic"] = "coco"
    notes: str = ""

    @field_validator("source", mode="before")
    @classmethod
    def _expand(cls, source: Any, info: ValidationInfo) -> Any:
        folder = (info.context or {}).get("folder", Path.cwd())
        if isinstance(source, dict):
            source = {**source, **{k: _path(source[k], folder) for k in ("checkpoint", "file") if k in source}}
        return source

    @model_validator(mode="after")
    def _nonzero_std(self) -> Variant:
        if 0 in self.preprocess.std:
            raise ValueError("preprocess.std must not hold 0")
        return self

    @property
    def has_torch(self) -> bool:
        """Whether a torch model stands behind the variant."""
        return self.source.kind == "mmyolo"

    @property
    def weights(self) -> Path:
        """The file that holds the weights."""
        return self.source.checkpoint if isinstance(self.source, MMYoloSource) else self.source.file

    @property
    def embedded(self) -> bool:
        """Whether all that the variant needs is part of the repository."""
        return self.dataset == "synthetic"

    def fingerprint(self) -> str:
        """16 hex digits over everything that can change the model's answers, the weights excepted."""
        fields = self.model_dump(mode="json", exclude={"name", "notes", "dataset"})
        source = fields["source"]
        for key in ("checkpoint", "file"):
            source.pop(key, None)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def golden_dir() -> Path:
    """The packaged golden folder: inside an installed package, or at the root of the repository."""
    inside = Path(__file__).parent / "_golden"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "golden"


def zoo() -> list[Path]:
    """The YAML files that ship with the package, by name."""
    return sorted(ZOO.glob("*.yaml"))


def load_variant(name: str | Path) -> Variant:
    """Reads a variant.

    Args:
        name: the name of a variant of the zoo, or the path of a YAML file.

    Raises:
        AlignError: naming file, field and allowed values.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = ZOO / f"{name}.yaml"
        if not path.is_file():
            names = ", ".join(p.stem for p in zoo())
            raise AlignError(f"no variant is named {str(name)!r}", f"give a YAML file or one of: {names}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AlignError(f"{path}: {error.strerror}", "give the path of a variant's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AlignError(f"{path}: not YAML: {' '.join(str(error).split())}", "mend the file") from None
    if not isinstance(fields, dict):
        raise AlignError(f"{path}: holds no fields", f"see {ZOO / 'yolov8_embedded.yaml'} for an example")
    try:
        return Variant.model_validate(fields, context={"folder": path.parent})
    except ValidationError as error:
        raise AlignError(f"{path}: {_first(error)}", "mend that field") from None


def _path(text: Any, folder: Path) -> Path:
    """Expands ``${ALIGN_DATA}`` (which has a default), ``${GOLDEN}`` and other environment variables."""
    known = {"ALIGN_DATA": str(data_dir().absolute()), "GOLDEN": str(golden_dir())}

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in known and name not in os.environ:
            raise ValueError(f"{text}: the environment variable {name} is not set")
        return known.get(name) or os.environ[name]

    return folder / re.sub(r"\$\{(\w+)\}", value, str(text))


def _first(error: ValidationError) -> str:
    """The first error in words: ``preprocess.resize: 'x' is not allowed: ...``."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("mmyolo", "onnx"))
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    if first["type"] == "extra_forbidden":
        shown = f"; allowed are {', '.join(_siblings(first['loc']))}"
    more = len(error.errors()) - 1
    return f"{field or 'variant'}: {first['msg']}{shown}" + (f"; and {more} more" if more else "")


def _siblings(place: tuple[int | str, ...]) -> list[str]:
    """The fields that may stand where pydantic found another one."""
    kinds: dict[Any, Any] = {"mmyolo": MMYoloSource, "onnx": OnnxSource}
    model: Any = Variant
    for part in place[:-1]:
        model = kinds.get(part) or model.model_fields[part].annotation
    return list(model.model_fields)
