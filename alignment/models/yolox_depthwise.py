"""YOLOX-nano as it was published: depthwise bottlenecks.

mmyolo's YOLOX backbone and neck take ``use_depthwise`` without handing it to their CSP layers, so the 3x3 convolution
of every bottleneck stays a full one and published nano weights do not fit.  These subclasses make it depthwise.
"""

from __future__ import annotations

from typing import Any

from mmcv.cnn import DepthwiseSeparableConvModule
from mmdet.models.layers.csp_layer import DarknetBottleneck
from mmyolo.models.backbones import YOLOXCSPDarknet
from mmyolo.models.necks import YOLOXPAFPN
from mmyolo.registry import MODELS
from torch import nn


def _depthwise(layer: nn.Module, owner: Any) -> nn.Module:
    for block in layer.modules():
        if isinstance(block, DarknetBottleneck):
            full = block.conv2.conv
            block.conv2 = DepthwiseSeparableConvModule(
                full.in_channels,
                full.out_channels,
                kernel_size=3,
                padding=1,
                norm_cfg=owner.norm_cfg,
                act_cfg=owner.act_cfg,
            )
    return layer


@MODELS.register_module()
class YOLOXDepthwiseBackbone(YOLOXCSPDarknet):
    """YOLOXCSPDarknet whose bottlenecks are depthwise."""

    def build_stage_layer(self, stage_idx: int, setting: list) -> list:
        """The layers of one stage."""
        return [_depthwise(layer, self) for layer in super().build_stage_layer(stage_idx, setting)]


@MODELS.register_module()
class YOLOXDepthwiseNeck(YOLOXPAFPN):
    """YOLOXPAFPN whose bottlenecks are depthwise."""

    def build_top_down_layer(self, idx: int) -> nn.Module:
        """One layer of the way down."""
        return _depthwise(super().build_top_down_layer(idx), self)

    def build_bottom_up_layer(self, idx: int) -> nn.Module:
        """One layer of the way up."""
        return _depthwise(super().build_bottom_up_layer(idx), self)
