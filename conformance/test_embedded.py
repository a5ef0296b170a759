"""The detectors that ship with the repository: small, of some use, and one of them hard to quantize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from alignment.compare.coco_map import coco_ap
from alignment.data.coco import CocoDataset
from alignment.data.samples import Samples, dataset_root, open_samples
from alignment.export.onnx_export import exported
from alignment.golden import read_golden
from alignment.models.mmyolo_source import build_detector
from alignment.models.rescale import rescale_channels
from alignment.nms.multiclass import postprocess
from alignment.variant import Variant, golden_dir, load_variant, zoo

EMBEDDED = [path.stem for path in zoo() if load_variant(path.stem).embedded]
CALIBRATION_IMAGES = 32


def test_every_family_is_embedded():
    families = {"yolov5", "yolov6", "yolov7", "yolov8", "yolox", "ppyoloe", "rtmdet", "rtmdet_r"}
    assert {name.removesuffix("_embedded") for name in EMBEDDED} == families


def test_small():
    sizes = {name: load_variant(name).weights.stat().st_size for name in EMBEDDED}
    assert max(sizes.values()) <= 2e6, sizes
    assert sum(sizes.values()) <= 14e6, sizes


@pytest.mark.parametrize("name", EMBEDDED)
def test_golden_score_is_worth_defending(name):
    ap = read_golden(golden_dir(), name).cases[f"{name}-torch-fp32"].ap
    assert ap is not None
    assert ap.value >= 0.6


class _Images(CalibrationDataReader):
    def __init__(self, samples: Samples) -> None:
        self._samples = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        sample = next(self._samples, None)
        return None if sample is None else {"images": sample.tensor[None]}


def _ap(path: Path, variant: Variant, samples: Samples) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Fused int8 kernels saturate on CPUs without VNNI.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = {}
    for sample in samples:
        boxes, scores = session.run(["boxes", "scores"], {"images": sample.tensor[None]})
        found[sample.entry.id] = postprocess(boxes[0], scores[0], sample.transform, variant.nms)
    return coco_ap(samples.dataset, found)[0]


def test_yolov6_is_hard_to_quantize(tmp_path):
    """ONNX Runtime's own min-max quantization of every Conv, weights per channel."""
    variant = load_variant("yolov6_embedded")
    samples = open_samples(variant)
    root = dataset_root(variant)
    assert root
    plain = exported(variant).onnx
    quantized = tmp_path / "int8.onnx"
    quantize_static(
        str(plain),
        str(quantized),
        _Images(Samples(variant, CocoDataset.open(root, "train2017", CALIBRATION_IMAGES))),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    assert _ap(quantized, variant, samples) <= _ap(plain, variant, samples) - 0.03


def test_rescaling_leaves_the_function_alone():
    """Bit for bit: the factors are powers of two, and no weight comes near the ends of float32."""
    variant = load_variant("yolov6_embedded")
    detector = build_detector(variant)
    image = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [output.clone() for output in detector(image)]
        weights = {name: value.clone() for name, value in detector.state_dict().items()}
        rescale_channels(detector.model, seed=1)
        after = detector(image)
    assert any(not torch.equal(value, weights[name]) for name, value in detector.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
