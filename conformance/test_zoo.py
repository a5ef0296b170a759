"""The zoo's mmyolo variants say what mmyolo's own configs say, and those of full size build and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from alignment.variant import MMYoloSource, Nms, Variant, load_variant, zoo

pytest.importorskip("mmyolo")

MMYOLO = [variant for variant in (load_variant(path) for path in zoo()) if variant.has_torch]
FULL_SIZE = [variant for variant in MMYOLO if not variant.embedded]
#: Fields of `nms` that are not as mmyolo has them; the variant's notes say each, and why.
YOLOX = {"nms_pre", "max_per_image"}
ROTATED = {"nms_pre"}
DEVIATIONS = {
    **dict.fromkeys(("yolox_embedded", "yolox_tiny", "yolox_s"), YOLOX),
    "yolox_nano": {*YOLOX, "multi_label"},
    **dict.fromkeys(("rtmdet_r_embedded", "rtmdet_r_tiny", "rtmdet_r_s"), ROTATED),
}


def name(variant: Variant) -> str:
    return variant.name


def config_of(variant: Variant) -> Any:
    if variant.rotated:
        pytest.importorskip("mmrotate")
    from alignment.models.mmyolo_source import load_config

    return load_config(variant)


def nms_of(config: Any) -> dict[str, object]:
    """A ``test_cfg`` in the words of `Nms`, as ``YOLOv5Head.predict_by_feat`` takes it; no limit is None."""
    settings = config.model.test_cfg
    return {
        "score_threshold": settings.score_thr,
        "iou_threshold": settings.nms.iou_threshold,
        "nms_pre": settings.get("nms_pre", 100000),
        "max_per_image": None if settings.get("yolox_style") else settings.max_per_img,
        "multi_label": settings.multi_label,
    }


@pytest.mark.parametrize("variant", MMYOLO, ids=name)
def test_nms_is_the_configs_or_the_notes_say_what_is_not(variant: Variant):
    theirs = nms_of(config_of(variant))
    assert set(theirs) == set(Nms.model_fields)
    deviating = {field for field, value in theirs.items() if getattr(variant.nms, field) != value}
    assert deviating == DEVIATIONS.get(variant.name, set())
    assert [field for field in deviating if field not in variant.notes] == []


@pytest.mark.parametrize("variant", MMYOLO, ids=name)
def test_input_is_the_configs(variant: Variant):
    config = config_of(variant)
    theirs = config.model.data_preprocessor
    settings = variant.preprocess
    assert tuple(theirs.get("mean", (0, 0, 0))) == settings.mean
    assert tuple(theirs.get("std", (1, 1, 1))) == settings.std
    assert theirs.get("bgr_to_rgb", False) is (settings.channels == "rgb")
    if not variant.embedded:
        steps = [step for step in config.test_pipeline if "Resize" in step.type]
        sizes = [step.get("scale") or (step.get("width"), step.get("height")) for step in steps]
        assert {(variant.input.width, variant.input.height)} == set(map(tuple, sizes))


@pytest.mark.parametrize("variant", FULL_SIZE, ids=name)
def test_the_model_builds_with_the_classes_of_the_yaml(variant: Variant):
    config = config_of(variant)
    from mmyolo.registry import MODELS

    head = MODELS.build(config.model).bbox_head
    assert head.num_classes == variant.classes
    assert hasattr(head, "angle_coder") is variant.rotated


@pytest.mark.parametrize("variant", [v for v in FULL_SIZE if v.name in ("yolov5_n", "yolox_nano")], ids=name)
def test_it_exports_with_any_weights(variant: Variant, tmp_path: Path):
    import torch
    from mmyolo.registry import MODELS

    from alignment.export.onnx_export import ExportOptions, export

    config = config_of(variant)
    torch.manual_seed(0)
    weights = tmp_path / "random.pth"
    torch.save(MODELS.build(config.model).state_dict(), weights)
    assert isinstance(variant.source, MMYoloSource)
    source = variant.source.model_copy(update={"checkpoint": weights})
    made = export(variant.model_copy(update={"source": source}), tmp_path, ExportOptions(outputs="decoded"))
    boxes, scores = onnx.load(made.onnx).graph.output
    priors = sum((variant.input.height // s) * (variant.input.width // s) for s in (8, 16, 32))
    priors *= 3 if variant.name == "yolov5_n" else 1
    shapes = [[d.dim_value or d.dim_param for d in o.type.tensor_type.shape.dim] for o in (boxes, scores)]
    assert shapes == [["batch", priors, 4], ["batch", priors, 80]]
