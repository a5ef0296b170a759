"""Post-processing of images of 8400 rows and 80 classes: our oracles beside compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.harness import Case, Contestant, Setting, Work

SCORE, IOU, KEPT = 0.001, 0.65, 300
ROWS, CLASSES = 8400, 80
Scene = tuple[np.ndarray, np.ndarray]


def scene(seed: int) -> Scene:
    """Boxes ``[8400, 4]`` around 40 centres and scores ``[8400, 80]``, most of them 0, some 20000 above 0.001."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(40, 600, (40, 2))[rng.integers(0, 40, ROWS)] + rng.normal(0, 12, (ROWS, 2))
    half = rng.uniform(15, 60, (ROWS, 2))
    scores = np.exp(-rng.exponential(6.0, (ROWS, CLASSES))) * (rng.random((ROWS, CLASSES)) < 0.05)
    return np.concatenate([centres - half, centres + half], 1).astype(np.float32), scores.astype(np.float32)


def each(keep: Callable[[Scene], Callable[[], np.ndarray]]) -> Callable[[Setting], Work]:
    """A contestant of what prepares one image and gives the pairs (row × classes + class) that are kept."""

    def prepare(setting: Setting) -> Work:
        calls = [keep(scene(seed)) for seed in range(setting.size)]
        return lambda: [call() for call in calls]

    return prepare


def ours(every_class: bool) -> Callable[[Scene], Callable[[], np.ndarray]]:
    """The oracle, which also says what became of every pair: of 300 boxes of each class, as ONNX has it, or of the best
    300, as mmyolo has it."""

    def keep(given: Scene) -> Callable[[], np.ndarray]:
        from alignment.nms.implementations import mmyolo, onnx_nms
        from alignment.nms.semantics import run
        from alignment.variant import Nms

        best = mmyolo(Nms(score_threshold=SCORE, iou_threshold=IOU, max_per_image=KEPT))
        semantics = onnx_nms(SCORE, IOU, KEPT) if every_class else replace(best, frame="input")

        def call() -> np.ndarray:
            fates = run(semantics, *given)
            kept = fates.kept
            return fates.rows[kept] * CLASSES + fates.labels[kept]

        return call

    return keep


def onnx_runtime(given: Scene) -> Callable[[], np.ndarray]:
    """NonMaxSuppression with `KEPT` boxes a class, in one thread."""
    import onnxruntime
    from onnx import TensorProto, helper

    boxes, scores = given
    constants = [
        helper.make_tensor("limit", TensorProto.INT64, [1], [KEPT]),
        helper.make_tensor("iou", TensorProto.FLOAT, [1], [IOU]),
        helper.make_tensor("score", TensorProto.FLOAT, [1], [SCORE]),
    ]
    graph = helper.make_graph(
        [helper.make_node("NonMaxSuppression", ["boxes", "scores", "limit", "iou", "score"], ["kept"])],
        "nms",
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, ROWS, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, CLASSES, ROWS]),
        ],
        [helper.make_tensor_value_info("kept", TensorProto.INT64, ["n", 3])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"boxes": boxes[None], "scores": np.ascontiguousarray(scores.T[None])}

    def call() -> np.ndarray:
        kept = session.run(None, feed)[0]
        return kept[:, 2] * CLASSES + kept[:, 1]

    return call


def opencv(given: Scene) -> Callable[[], np.ndarray]:
    """``cv2.dnn.NMSBoxesBatched``, which takes pairs that passed the threshold and keeps as many as are left."""
    import cv2

    cv2.setNumThreads(1)
    boxes, scores = given

    def call() -> np.ndarray:
        rows, labels = np.divmod(np.flatnonzero(scores.ravel() > SCORE), CLASSES)
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)[rows]
        batched: Any = cv2.dnn.NMSBoxesBatched  # which is said to take sequences alone
        kept = np.asarray(batched(xywh, scores[rows, labels], labels.astype(np.int32), SCORE, IOU, top_k=30000), int)
        return rows[kept] * CLASSES + labels[kept]

    return call


def of_torch(batched: str) -> Callable[[Scene], Callable[[], np.ndarray]]:
    """`batched_nms` of torchvision or mmcv over the pairs that passed the threshold."""

    def keep(given: Scene) -> Callable[[], np.ndarray]:
        import torch

        boxes, scores = map(torch.from_numpy, given)
        if batched == "torchvision":
            from torchvision.ops import batched_nms

            def nms(boxes: Any, scores: Any, labels: Any) -> Any:
                return batched_nms(boxes, scores, labels, IOU)
        else:
            from mmcv.ops import batched_nms as mmcv_nms

            def nms(boxes: Any, scores: Any, labels: Any) -> Any:
                return mmcv_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": IOU})[1]

        def call() -> np.ndarray:
            passed = scores > SCORE
            rows, labels = passed.nonzero(as_tuple=True)
            kept = nms(boxes[rows], scores[passed], labels)
            return (rows[kept] * CLASSES + labels[kept]).numpy()

        return call

    return keep


def judge(setting: Setting, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many pairs each keeps, and which share of ours and its own it has in common with ours."""
    first = results.get("ours, 300 a class")
    scores = {}
    for name, found in results.items():
        scores[name] = {"kept": float(sum(map(len, found)))}
        if first is not None:
            both = sum(len(np.intersect1d(a, b)) for a, b in zip(first, found, strict=True))
            scores[name]["in common"] = both / max(
                1, sum(len(np.union1d(a, b)) for a, b in zip(first, found, strict=True))
            )
    return scores


CASE = Case(
    name="nms",
    title="Post-processing of images of 8400 rows and 80 classes, some 20000 pairs above the score threshold; ours "
    "also says what became of each, and all but ours, best 300, keep 300 or more of every class",
    axis="images",
    sizes=(1, 2, 4),
    contestants=(
        Contestant("ours, 300 a class", "ours", each(ours(every_class=True))),
        Contestant("ours, best 300", "ours", each(ours(every_class=False))),
        Contestant("ONNX Runtime, NonMaxSuppression", "peer", each(onnx_runtime), ("onnxruntime",)),
        Contestant("OpenCV, NMSBoxesBatched", "peer", each(opencv), ("opencv-python",)),
        Contestant("torchvision, batched_nms", "peer", each(of_torch("torchvision")), ("torchvision",)),
        Contestant("mmcv, batched_nms", "peer", each(of_torch("mmcv")), ("mmcv-lite", "mmcv")),
    ),
    judge=judge,
)
