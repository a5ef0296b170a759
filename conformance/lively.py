"""Variants whose weights are random and alive: no activation saturates, no BatchNorm, bias or scale is a no-op."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.variant import InputSize, Variant, load_variant

YOLOV7_L = {
    "name": "yolov7_l_narrow",
    "source": {
        "kind": "mmyolo",
        "config": "yolov7/yolov7_l_syncbn_fast_8x16b-300e_coco.py",
        "checkpoint": "absent.pth",
        "options": {
            "model.backbone.widen_factor": 0.125,
            "model.neck.widen_factor": 0.125,
            "model.bbox_head.head_module.widen_factor": 0.125,
            "model.bbox_head.head_module.num_classes": 6,
        },
    },
    "input": {"height": 64, "width": 96},
    "classes": 6,
    "dataset": "synthetic",
}


def lively_variant(name: str, folder: Path, size: tuple[int, int] | None = None, seed: int = 0) -> Variant:
    """A variant of the zoo, or ``yolov7_l_narrow``, with a checkpoint of random weights in `folder`.

    Args:
        size: (height, width) of the input, where it is to be another.
    """
    variant = Variant.model_validate(YOLOV7_L) if name == YOLOV7_L["name"] else load_variant(name)
    path = folder / f"{name}-{seed}.pth"
    if not path.is_file():
        _write(variant, path, seed)
    changes: dict[str, Any] = {"source": variant.source.model_copy(update={"checkpoint": path})}
    if size:
        changes["input"] = InputSize(height=size[0], width=size[1])
    return variant.model_copy(update=changes)


def _write(variant: Variant, path: Path, seed: int) -> None:
    import torch
    from torch import nn

    from alignment.models.mmyolo_source import load_config

    config = load_config(variant)
    from mmyolo.registry import MODELS

    generator = torch.Generator().manual_seed(seed)
    model = MODELS.build(config.model).train()

    def drawn(like: torch.Tensor, mean: float, deviation: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * deviation + mean

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # A bias means no BatchNorm follows, and mostly a sigmoid: smaller, so that scores stay apart.
                gain = 2.0 if module.bias is None else 0.3
                module.weight.copy_(drawn(module.weight, 0, (gain / module.weight[0].numel()) ** 0.5))
                if module.bias is not None:
                    module.bias.copy_(drawn(module.bias, 0, 0.5))
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(drawn(module.weight, 1, 0.2))
                module.bias.copy_(drawn(module.bias, 0, 0.3))
                module.momentum = 0.5
        for name, parameter in model.named_parameters():
            if name.endswith(("implicit", "alpha")):
                parameter.copy_(drawn(parameter, 0.7, 0.3))
        for _ in range(4):
            noise = torch.randn(2, 3, 128, 128, generator=generator)
            smooth = nn.functional.interpolate(noise[..., :8, :8], size=128, mode="bilinear")
            model.bbox_head.head_module(model.extract_feat(torch.cat([noise, smooth])))
    torch.save(model.state_dict(), path)
