"""An mmyolo config with a checkpoint: what its test pipeline, preprocessor and head say of the deployed model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.data.pictures import find_pictures, unlabelled_root
from alignment.errors import AlignError
from alignment.guess.bare import Guessed
from alignment.guess.findings import Asked, Finding, as_fields, found_size, given
from alignment.storage import data_dir
from alignment.variant import Nms, Variant, variant_of

#: Their config has another nms_pre, or none, where mmyolo takes 100000.
_NMS = {
    "score_thr": "score_threshold",
    "nms_pre": "nms_pre",
    "max_per_img": "max_per_image",
    "multi_label": "multi_label",
}
DOTA_CLASSES = 15


@dataclass(frozen=True)
class ConfigSource:
    """What names an mmyolo model on the command line."""

    config: str
    checkpoint: Path
    options: dict[str, Any]


def guess_config(source: ConfigSource, name: str, data: Path | None, asked: Asked) -> Guessed:
    """Reads the config, and loads the checkpoint into its model.

    Raises:
        AlignError: for a config or checkpoint that cannot be used, and for a test pipeline of another form.
    """
    from alignment.models.mmyolo_source import build_detector, load_config

    if not source.checkpoint.is_file():
        raise AlignError(f"{source.checkpoint}: no such file", "give --checkpoint the weights of this config")
    path = Path(source.config)
    settled = {
        "kind": "mmyolo",
        # mmyolo's own configs by their name there, others wherever the command runs.
        "config": str(path.absolute()) if path.is_file() else source.config,
        "checkpoint": str(source.checkpoint.absolute()),
        **({"options": source.options} if source.options else {}),
    }
    unread = {"name": name, "source": settled, "input": {"height": 640, "width": 640}, "classes": 1}
    config = load_config(Variant.model_validate(unread))
    findings = read_config(config, source.config, asked)
    fields = as_fields(findings)
    variant = variant_of({"name": name, "source": settled, **fields}, source.config)
    build_detector(variant)
    dataset, root, pictures = _data(variant, data)
    variant = variant.model_copy(update={"dataset": dataset})
    findings.append(Finding("dataset", dataset, "certain", f"run on {pictures}"))
    return Guessed(variant, findings, root, pictures)


def read_config(config: Any, path: str, asked: Asked) -> list[Finding]:
    """Everything but name, source and dataset.

    Args:
        config: mmengine's Config.
        path: its file, for errors.
        asked: the command line's size and how images are fitted to it.

    Raises:
        AlignError: for what is no detector's config, and for a test pipeline of another form.
    """
    try:
        return _read(config, path, asked)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a config is Python: anything may stand there
        what = f"{path}: no detector's config: {type(error).__name__}: {error}"
        raise AlignError(what, "give one with model.bbox_head, model.test_cfg and test_dataloader") from None


def _read(config: Any, path: str, asked: Asked) -> list[Finding]:
    steps = {str(step["type"]).rsplit(".", 1)[-1]: step for step in _pipeline(config)}
    head = config.model.bbox_head
    classes = head.get("head_module", {}).get("num_classes", head.get("num_classes"))
    if not isinstance(classes, int):
        raise AlignError(
            f"{path}: its head says no num_classes", "give --option model.bbox_head.head_module.num_classes=N"
        )
    rotated = "Rotated" in str(head.type)
    findings = [*_geometry(steps, path, asked), *_values(config)]
    findings.append(Finding("classes", classes, "certain", "num_classes of the head"))
    if rotated:
        findings.append(Finding("boxes", "rotated", "certain", f"head {head.type}"))
    findings += _nms(config.model.test_cfg)
    if _rectangles(config):
        note = "square input; mmyolo's own test pipeline uses rectangular batch shapes"
        findings.append(Finding("notes", note, "certain", "batch_shapes_cfg of the test dataset"))
    return findings


def _pipeline(config: Any) -> list[Any]:
    dataset = config.test_dataloader.dataset
    while "pipeline" not in dataset:  # a wrapper
        dataset = dataset["dataset"]
    return list(dataset["pipeline"])


def _rectangles(config: Any) -> bool:
    dataset = config.test_dataloader.dataset
    return bool(dataset.get("batch_shapes_cfg"))


def _geometry(steps: dict[str, Any], path: str, asked: Asked) -> list[Finding]:
    """``input`` and how images are fitted to it, from the steps of the test pipeline by class."""
    resize = steps.get("Resize") or steps.get("FixShapeResize")
    if "LetterResize" in steps:
        step, way, pad = steps["LetterResize"], "letterbox", steps["LetterResize"]
        interpolation = "auto"
        said = " then ".join(name for name in ("YOLOv5KeepRatioResize", "LetterResize") if name in steps)
    elif resize is not None and resize.get("keep_ratio", False):
        step, way, pad = resize, "letterbox_top_left", steps.get("Pad", {})
        interpolation = resize.get("interpolation", "bilinear")
        said = f"{resize['type']} that keeps the ratio, then Pad"
    elif resize is not None:
        step, way, pad, interpolation = resize, "stretch", {}, resize.get("interpolation", "bilinear")
        said = f"{resize['type']} that does not keep the ratio"
    else:
        what = f"{path}: its test pipeline is {', '.join(steps)}, which fits images in a way that is unknown here"
        raise AlignError(what, "use LetterResize, Resize with Pad, or Resize")
    width, height = step["scale"] if "scale" in step else (step["width"], step["height"])
    size = asked.size or (height, width)
    origin = "given as --size" if asked.size else f"scale of {step['type']}"
    sides = found_size(path, size, origin, "give --size")
    sure = "likely" if steps.get("LetterResize", {}).get("allow_scale_up") else "certain"
    findings = [*sides, Finding("preprocess.resize", way, sure, said)]  # type: ignore[arg-type]
    if asked.resize:
        findings[-1] = given("preprocess.resize", asked.resize, "--resize")
    findings.append(Finding("preprocess.interpolation", interpolation, "certain", f"of {step['type']}"))
    if way != "stretch":
        findings.append(
            Finding("preprocess.pad_value", _pad_value(pad), "certain", f"pad_val of {pad.get('type', '')}")
        )
    return findings


def _pad_value(step: Any) -> int:
    value = step.get("pad_val", 0)
    value = value.get("img", 0) if isinstance(value, dict) else value
    return int(value[0] if isinstance(value, list | tuple) else value)


def _values(config: Any) -> list[Finding]:
    """``preprocess.channels``, ``mean`` and ``std``."""
    step = config.model.get("data_preprocessor") or {}
    evidence = "the model's data_preprocessor"
    order = "rgb" if step.get("bgr_to_rgb") else "bgr"
    mean, std = step.get("mean") or [0, 0, 0], step.get("std") or [1, 1, 1]
    return [
        Finding("preprocess.channels", order, "certain", f"bgr_to_rgb of {evidence}"),
        Finding("preprocess.mean", [float(v) for v in mean], "certain", evidence),
        Finding("preprocess.std", [float(v) for v in std], "certain", evidence),
    ]


def _nms(test: Any) -> list[Finding]:
    defaults = Nms()
    values = {field: test[key] for key, field in _NMS.items() if key in test}
    values["iou_threshold"] = test.get("nms", {}).get("iou_threshold", defaults.iou_threshold)
    findings = [Finding(f"nms.{field}", value, "certain", "test_cfg") for field, value in values.items()]
    if "nms_pre" not in test:
        said = f"test_cfg has none, and mmyolo then takes 100000; here {defaults.nms_pre}"
        findings.append(Finding("nms.nms_pre", defaults.nms_pre, "likely", said))
    return findings


def _data(variant: Variant, data: Path | None) -> tuple[str, Path | None, str]:
    """Which dataset, its root where it is not the default one, and what it is for people."""
    if variant.rotated and data is None and variant.classes == DOTA_CLASSES and (data_dir() / "dota8").is_dir():
        return "dota", None, str(data_dir() / "dota8")
    pictures = find_pictures(data)
    dataset = pictures.dataset
    if dataset is not None and pictures.given:
        dataset.require_classes(variant.classes, variant.name)
    if dataset is not None and pictures.categories == variant.classes and not variant.rotated:
        return "coco", data, pictures.origin
    if dataset is not None and variant.rotated and all("rbox" in a for a in dataset.truth["annotations"]):
        return "coco", data, pictures.origin
    return "coco", unlabelled_root(pictures.folder, variant.classes), f"{pictures.origin}, without labels"
