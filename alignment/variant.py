"""Variants: one detector to be deployed, described by one YAML file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator

from alignment.errors import AlignError
from alignment.onnx_head import DecodedHead, End2EndHead, OnnxHead, Strict, YoloHead, Yolov5RawHead, YoloxHead, settled
from alignment.reading import cut, first_error, read_yaml
from alignment.storage import data_dir

ZOO = Path(__file__).parent / "zoo"


class MMYoloSource(Strict):
    """An mmyolo config with a checkpoint.

    `config` is a path inside mmyolo's own ``configs`` folder, or a file (relative to the YAML file), which is then an
    absolute path here; `options` are dotted keys that override it, as ``--cfg-options`` does; `imports` are modules to
    import first, which may register further model classes.
    """

    kind: Literal["mmyolo"]
    config: str
    checkpoint: Path
    options: dict[str, Any] = {}
    imports: list[str] = []


class OnnxSource(Strict):
    """A bare ONNX file; torch is then absent from the comparison.  `head` says how its outputs become boxes."""

    kind: Literal["onnx"]
    file: Path
    head: Annotated[OnnxHead, Field(discriminator="layout")]


#: Pixels of an input's longest side.
LARGEST_SIDE = 8192


class InputSize(Strict):
    """The one input of a deployed engine, in pixels."""

    height: Annotated[int, Field(ge=32, le=LARGEST_SIDE, multiple_of=32)]
    width: Annotated[int, Field(ge=32, le=LARGEST_SIDE, multiple_of=32)]


class Preprocess(Strict):
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


class Nms(Strict):
    """Post-processing as mmyolo's ``test_cfg`` says it."""

    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.001
    iou_threshold: Annotated[float, Field(gt=0, le=1)] = 0.65
    nms_pre: Annotated[int, Field(gt=0)] = 30000
    max_per_image: Annotated[int, Field(gt=0)] = 300
    multi_label: bool = True


#: Raise it when the same recipe comes to mean another graph: int8 records are then stale.
RECIPE_MEANING = 2


class Quantization(Strict):
    """The recipe by which a variant goes to int8.

    `method` turns an activation's values into a range, `weights` those of a weight's channel; see
    `alignment.quantize.observers`.  `policy` says where quantizers go, see `alignment.quantize.placement`;
    `keep_float` are names of ONNX nodes, with wildcards, that stay float beside those that the policy leaves.
    `images` are calibrated on, the first of ``train2017``.

    `calibration` ``separate`` takes ranges of activations in the float network, ``joint`` with quantized weights.
    `rounding` of weights, `bias_correction` and `equalization`: see the modules of these names in
    `alignment.quantize`.  `trained` is a file of ``align qat``, whose weights, biases and scales take the place of what
    these find.
    """

    method: Literal["minmax", "moving_average", "percentile", "histogram", "entropy", "mse"] = "mse"
    weights: Literal["minmax", "mse"] = "minmax"
    policy: Literal["tensorrt", "conv-only", "full"] = "tensorrt"
    keep_float: list[str] = []
    images: Annotated[int, Field(gt=0)] = 64
    calibration: Literal["separate", "joint"] = "separate"
    rounding: Literal["nearest", "adaround", "brecq"] = "nearest"
    bias_correction: bool = False
    equalization: bool = False
    trained: Path | None = None

    @property
    def searched(self) -> bool:
        """Whether weights or biases were changed for a network that is all int8: in one that is float they are off."""
        return self.rounding != "nearest" or self.bias_correction or self.trained is not None

    def fingerprint(self) -> str:
        """16 hex digits over all that the recipe says, and what it means."""
        fields = {"meaning": RECIPE_MEANING, **self.model_dump(mode="json", exclude={"trained"})}
        if self.trained is not None:
            # Where the file lies means nothing; one that is not there is refused where it is read.
            content = self.trained.read_bytes() if self.trained.is_file() else b""
            fields["trained"] = hashlib.sha256(content).hexdigest()
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


#: The changes to a recipe after which every layer is on its own.
PLAIN: dict[str, Any] = {"keep_float": [], "rounding": "nearest", "bias_correction": False, "trained": None}


class Variant(Strict):
    """One detector to be deployed.  See `load_variant`.

    `boxes` are ``horizontal`` (x1, y1, x2, y2) or ``rotated`` (cx, cy, w, h, angle in radians).  `dataset` says on
    which images it is scored: ``coco`` and ``dota`` are looked for below ``ALIGN_DATA``, the synthetic ones are drawn.
    `float32_nodes` are names of ONNX nodes, with wildcards, that FP16 leaves in float32 beside those that decode: the
    mend for values that float16 cannot hold.  `quantization` says how it goes to int8.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=100)]
    source: Annotated[MMYoloSource | OnnxSource, Field(discriminator="kind")]
    input: InputSize
    preprocess: Preprocess = Preprocess()
    classes: Annotated[int, Field(gt=0)]
    boxes: Literal["horizontal", "rotated"] = "horizontal"
    nms: Nms = Nms()
    float32_nodes: list[str] = []
    quantization: Quantization = Quantization()
    dataset: Literal["coco", "synthetic", "dota", "synthetic_rotated"] = "coco"
    notes: str = ""
    _arguments: str = PrivateAttr("")

    @field_validator("source", mode="before")
    @classmethod
    def _expand(cls, source: Any, info: ValidationInfo) -> Any:
        folder = (info.context or {}).get("folder", Path.cwd())
        if not isinstance(source, dict):
            return source
        source = {**source, **{k: _path(source[k], folder) for k in ("checkpoint", "file") if k in source}}
        if isinstance(source.get("config"), str) and (own := _path(source["config"], folder)).is_file():
            source["config"] = str(own.absolute())
        return source

    @field_validator("quantization", mode="before")
    @classmethod
    def _find_trained(cls, recipe: Any, info: ValidationInfo) -> Any:
        if isinstance(recipe, dict) and isinstance(recipe.get("trained"), str):
            folder = (info.context or {}).get("folder", Path.cwd())
            recipe = {**recipe, "trained": _path(recipe["trained"], folder)}
        return recipe

    @model_validator(mode="after")
    def _nonzero_std(self) -> Variant:
        if 0 in self.preprocess.std:
            raise ValueError("preprocess.std must not hold 0")
        return self

    @model_validator(mode="after")
    def _keeps_rectangles(self) -> Variant:
        if self.rotated and self.preprocess.resize == "stretch":
            raise ValueError(
                "preprocess.resize must be letterbox or letterbox_top_left with rotated boxes: "
                "a rotated rectangle that is stretched is no rectangle"
            )
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> Variant:
        layout = self.source.head.layout if isinstance(self.source, OnnxSource) else None
        if layout and self.rotated and layout not in ("decoded", "yolov8", "end2end"):
            known = "'decoded', 'yolov8' and 'end2end'"
            raise ValueError(f"boxes: no rotated ones in source.head.layout {layout!r}, but in {known}")
        if self.ends_in_nms and self.nms != Nms():
            raise ValueError("nms: source.head.layout 'end2end' has its NMS in the graph: remove nms")
        return self

    @property
    def arguments(self) -> str:
        """What stands for it on a command line: ``yolov8_n --size 384x640``, or the path of its YAML file."""
        return self._arguments or self.name

    @property
    def ends_in_nms(self) -> bool:
        """Whether the graph gives detections, so that there is nothing decoded to compare and no NMS to run."""
        return isinstance(self.source, OnnxSource) and self.source.head.layout == "end2end"

    @property
    def has_torch(self) -> bool:
        """Whether a torch model stands behind the variant."""
        return self.source.kind == "mmyolo"

    @property
    def rotated(self) -> bool:
        """Whether its boxes have an angle."""
        return self.boxes == "rotated"

    @property
    def weights(self) -> Path:
        """The file that holds the weights."""
        return self.source.checkpoint if isinstance(self.source, MMYoloSource) else self.source.file

    @property
    def embedded(self) -> bool:
        """Whether all that the variant needs is part of the repository."""
        return self.dataset.startswith("synthetic")

    def fingerprint(self) -> str:
        """16 hex digits over everything that can change the model's answers in float, the weights excepted."""
        fields = self.model_dump(mode="json", exclude={"name", "notes", "dataset", "quantization"})
        if not self.rotated:
            del fields["boxes"]
        if not self.float32_nodes:
            del fields["float32_nodes"]
        source = fields["source"]
        for key in ("checkpoint", "file"):
            source.pop(key, None)
        if isinstance(self.source, OnnxSource):
            source["head"] = settled(self.source.head)
        elif Path(self.source.config).is_absolute():
            # Where the file lies means nothing.
            source["config"] = hashlib.sha256(Path(self.source.config).read_bytes()).hexdigest()
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
    fields = read_yaml(path, "give the path of a variant's YAML file", "mend the file")
    if not isinstance(fields, dict):
        raise AlignError(f"{path}: holds no fields", f"see {ZOO / 'yolov8_embedded.yaml'} for an example")
    variant = variant_of(fields, path, path.parent)
    if path.parent != ZOO:
        variant._arguments = shlex.quote(str(path))
    return variant


def variant_of(fields: dict[str, Any], origin: Path | str, folder: Path | None = None) -> Variant:
    """The variant that fields describe.

    Args:
        fields: as the YAML has them.
        origin: where they come from, for errors.
        folder: that relative paths start from.

    Raises:
        AlignError: naming origin, field and allowed values.
    """
    try:
        return Variant.model_validate(fields, context={"folder": folder} if folder else None)
    except ValidationError as error:
        raise AlignError(f"{origin}: {first_error(error, 'variant', _TAGS, _siblings)}", "mend that field") from None


def resized(variant: Variant, height: int, width: int) -> Variant:
    """The variant with another input, under a name of its own: golden values and records are of one size.

    Raises:
        AlignError: for a size that no network takes, or a bare ONNX file, whose size is its own.
    """
    if (height, width) == (variant.input.height, variant.input.width):
        return variant
    if not variant.has_torch:
        raise AlignError(f"{variant.name}: the size of an ONNX file is its own", "export the file in that size")
    try:
        size = InputSize(height=height, width=width)
    except ValidationError as error:
        raise AlignError(f"size {height}x{width}: {first_error(error, 'size')}", "give multiples of 32") from None
    found = variant.model_copy(update={"name": f"{variant.name}_{height}x{width}", "input": size})
    found._arguments = f"{variant.arguments} --size {height}x{width}"
    return found


def with_quantization(variant: Variant, changes: dict[str, Any]) -> Variant:
    """The variant with other fields in its recipe.  Raises AlignError naming the field and what it allows."""
    try:
        recipe = Quantization.model_validate({**variant.quantization.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise AlignError(f"{name} {first.get('input')!r}: {first['msg']}", f"choose another {name}") from None
    return variant.model_copy(update={"quantization": recipe})


def _path(text: Any, folder: Path) -> Path:
    """Expands ``${ALIGN_DATA}`` (which has a default), ``${GOLDEN}`` and other environment variables."""
    known = {"ALIGN_DATA": str(data_dir().absolute()), "GOLDEN": str(golden_dir())}

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in known and name not in os.environ:
            raise ValueError(f"{cut(text, 100)}: the environment variable {name} is not set")
        return known.get(name) or os.environ[name]

    found = folder / re.sub(r"\$\{(\w+)\}", value, str(text))
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in found.parts):
        raise ValueError(f"{cut(text, 60)}: longer than a file name can be")
    return found


_TAGS: dict[Any, type[BaseModel]] = {
    "mmyolo": MMYoloSource,
    "onnx": OnnxSource,
    "decoded": DecodedHead,
    "yolox": YoloxHead,
    "yolov5": YoloHead,
    "yolov8": YoloHead,
    "yolov5_raw": Yolov5RawHead,
    "end2end": End2EndHead,
}


def _siblings(place: tuple[int | str, ...]) -> list[str]:
    """The fields that may stand where pydantic found another one."""
    model: Any = Variant
    for part in place[:-1]:
        model = _TAGS.get(part) or model.model_fields[part].annotation
    return list(model.model_fields)
