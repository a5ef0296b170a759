"""RTMDet-R with random weights: decoding and post-processing against mmyolo's own ``predict_by_feat``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lively import lively_variant

from alignment.data.preprocess import Transform, preprocess
from alignment.data.synthetic_rotated import draw
from alignment.nms.multiclass import postprocess
from alignment.variant import Nms, Variant

pytest.importorskip("mmyolo")
pytest.importorskip("mmrotate")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.rotated

# Scores of random weights crowd around 0.5.
NMS = Nms(score_threshold=0.8, iou_threshold=0.1, nms_pre=2000, max_per_image=2000)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def variant(tmp_path_factory) -> Variant:
    return lively_variant("rtmdet_r_embedded", tmp_path_factory.mktemp("lively"), (160, 192))


@pytest.fixture(scope="module")
def detector(variant) -> Any:
    from alignment.models.mmyolo_source import build_detector

    detector = build_detector(variant)
    module = detector.model.bbox_head.head_module
    with torch.no_grad():
        for distances, angles in zip(module.rtm_reg, module.rtm_ang, strict=True):
            distances.bias += 2  # most are positive, as a trained head's are
            angles.weight *= 5  # beyond le90
    return detector


@pytest.fixture(scope="module")
def inputs(variant) -> tuple[np.ndarray, list[Transform]]:
    """Three images whose sides are not multiples of each other: x and y are scaled a little differently."""
    images = [draw("val2017", index)[0] for index in range(3)]
    tensors, transforms = zip(*(preprocess(i, variant.input, variant.preprocess) for i in images), strict=True)
    assert any(t.scale[0] != t.scale[1] for t in transforms)
    return np.stack(tensors), list(transforms)


@pytest.fixture(scope="module")
def outputs(detector, inputs) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        values = detector(torch.from_numpy(inputs[0]))
    return {name: value.numpy() for name, value in zip(detector.output_names, values, strict=True)}


def mmyolos(detector: Any, outputs: dict[str, np.ndarray], metas: list[dict], **changes: Any) -> list[Any]:
    """The head's own post-processing of the raw outputs."""
    head = detector.model.bbox_head
    levels = [[torch.from_numpy(outputs[f"{kind}_s{s}"].copy()) for s in detector.strides] for kind in detector.kinds]
    config = copy.deepcopy(head.test_cfg)
    nms = changes.pop("iou_threshold", None)
    config.update(changes)
    if nms is not None:
        config.nms.iou_threshold = nms
    named = dict(zip(("cls_scores", "bbox_preds", "angle_preds"), levels, strict=True))
    return head.predict_by_feat(**named, batch_img_metas=metas, cfg=config, rescale="scale_factor" in metas[0])


def test_outputs_have_their_names_and_shapes(detector, outputs):
    assert detector.kinds == ["cls", "bbox", "angle"]
    depths = {"cls": 6, "bbox": 4, "angle": 1}
    shapes = {f"{kind}_s{s}": (3, depth, 160 // s, 192 // s) for kind, depth in depths.items() for s in (8, 16, 32)}
    priors = sum(160 * 192 // s**2 for s in (8, 16, 32))
    shapes = {"boxes": (3, priors, 5), "scores": (3, priors, 6), **shapes}
    assert {name: value.shape for name, value in outputs.items()} == shapes


@pytest.mark.parametrize("with_angle", [True, False])
def test_decoding_is_the_heads_own_to_the_bit(detector, inputs, outputs, with_angle, monkeypatch):
    """`decode_with_angle` False takes another coder, which decodes upright boxes and turns them about their centre."""
    from mmyolo.models.task_modules.coders import DistancePointBBoxCoder

    head = detector.model.bbox_head
    if not with_angle:
        monkeypatch.setattr(head, "bbox_coder", DistancePointBBoxCoder())
        monkeypatch.setitem(head.test_cfg, "decode_with_angle", False)
        with torch.inference_mode():
            values = detector(torch.from_numpy(inputs[0]))
        outputs = {name: value.numpy() for name, value in zip(detector.output_names, values, strict=True)}
    metas = [{"scale_factor": (1.0, 1.0)}] * 3
    monkeypatch.setattr("mmyolo.models.dense_heads.rtmdet_rotated_head.scale_boxes", lambda boxes, _: boxes)
    monkeypatch.setattr(head, "_bbox_post_process", lambda results, **_: results)
    found = mmyolos(detector, outputs, metas, score_thr=-1, nms_pre=10**6, multi_label=False)
    for index, theirs in enumerate(found):
        scores = outputs["scores"][index].max(1)
        order = torch.from_numpy(scores).sort(descending=True)[1].numpy()
        np.testing.assert_array_equal(outputs["boxes"][index][order], theirs.bboxes.tensor.numpy())
        np.testing.assert_array_equal(scores[order], theirs.scores.numpy())
    angles = outputs["boxes"][..., 4]
    assert (np.abs(angles) <= np.pi / 2).all() == with_angle, "only the coder brings angles into le90"
    assert np.ptp(angles) > 2, "the angles are alive"


SETTINGS = {
    "as it is": {},
    "much is suppressed": {"iou_threshold": 0.01},
    "little is suppressed": {"iou_threshold": 0.9},
    "one label a box": {"multi_label": False},
    "few": {"max_per_image": 7},
    "few candidates": {"nms_pre": 50},
    "nothing is left": {"score_threshold": 0.9999999},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_detections_are_mmyolos(detector, inputs, outputs, changes):
    """mmcv adds class × (largest coordinate + 1) to the centres, up to some 10 000 px: IoU moves by about 1e-5."""
    nms = NMS.model_copy(update=changes)
    metas = [{"scale_factor": t.scale, "ori_shape": t.original} for t in inputs[1]]
    found = mmyolos(
        detector,
        outputs,
        metas,
        multi_label=nms.multi_label,
        score_thr=nms.score_threshold,
        nms_pre=nms.nms_pre,
        max_per_img=nms.max_per_image,
        iou_threshold=nms.iou_threshold,
    )
    total = 0
    for index, theirs in enumerate(found):
        ours = postprocess(outputs["boxes"][index], outputs["scores"][index], inputs[1][index], nms)
        np.testing.assert_array_equal(ours.labels, theirs.labels.numpy())
        np.testing.assert_array_equal(ours.scores, theirs.scores.numpy())
        np.testing.assert_allclose(ours.boxes, theirs.bboxes.numpy(), rtol=1e-6, atol=1e-4)
        np.testing.assert_array_equal(ours.scores, outputs["scores"][index][ours.rows, ours.labels])
        assert ours.boxes.dtype == np.float32
        assert ours.boxes.shape == (len(ours), 5)
        total += len(ours)
    assert (total == 0) == (nms.score_threshold > 0.999)


coordinate, side = st.floats(-500, 500), st.floats(0.1, 500)
some_boxes = st.lists(st.tuples(coordinate, coordinate, side, side, st.floats(-np.pi / 2, np.pi / 2)), max_size=5)


@given(st.tuples(st.floats(0.1, 10), st.floats(0.97, 1.03)), some_boxes)
def test_the_way_back_is_that_of_mmrotate(scale, boxes):
    from alignment.models.mmyolo_source import require_mmrotate

    require_mmrotate()
    from mmrotate.structures.bbox import RotatedBoxes

    rows = np.array(boxes, np.float32).reshape(-1, 5)
    transform = Transform((scale[0], scale[0] * scale[1]), (7.0, 3.0), (480, 640))
    theirs = RotatedBoxes(torch.from_numpy(rows.copy()))
    theirs.translate_([-7.0, -3.0])
    theirs.rescale_([1 / s for s in transform.scale])
    ours = transform.to_original(rows)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.tensor.numpy(), rtol=2e-6, atol=1e-5)
    assert transform.clip(ours) is ours


@given(st.floats(0.1, 10), some_boxes)
def test_an_even_scale_keeps_the_angle_and_scales_the_rest(scale, boxes):
    rows = np.array(boxes, float).reshape(-1, 5)
    placed = rows * [scale, scale, scale, scale, 1] + [12, 5, 0, 0, 0]
    transform = Transform((scale, scale), (12.0, 5.0), (480, 640))
    np.testing.assert_allclose(transform.to_original(placed), rows, rtol=1e-9, atol=1e-9)
