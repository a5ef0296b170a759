"""Post-processing and explanation of one image of 8400 rows and 80 classes.

    python -m benchmarks.nms

Post-processing is compared with ONNX Runtime's NonMaxSuppression and OpenCV's batched NMS on the same pairs, one thread
each, in turns.  All take the boxes of score above 0.001; ours also says what became of every pair.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from onnx import TensorProto, helper

from alignment.data.preprocess import Transform
from alignment.nms.causes import Limits, Side
from alignment.nms.explain import explain
from alignment.nms.implementations import efficient_nms, mmyolo
from alignment.nms.semantics import run
from alignment.variant import Nms

REPEATS = 15
SCORE, IOU, KEPT = 0.001, 0.65, 300


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes ``[8400, 4]`` around 40 centres and scores ``[8400, 80]``, most of them 0, some 20000 above 0.001."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(40, 600, (40, 2))[rng.integers(0, 40, 8400)] + rng.normal(0, 12, (8400, 2))
    half = rng.uniform(15, 60, (8400, 2))
    scores = np.exp(-rng.exponential(6.0, (8400, 80))) * (rng.random((8400, 80)) < 0.05)
    return np.concatenate([centres - half, centres + half], 1).astype(np.float32), scores.astype(np.float32)


def onnx_runtime(boxes: np.ndarray, scores: np.ndarray) -> Callable[[], Any]:
    """NonMaxSuppression with `KEPT` boxes a class."""
    import onnxruntime

    constants = [
        helper.make_tensor("limit", TensorProto.INT64, [1], [KEPT]),
        helper.make_tensor("iou", TensorProto.FLOAT, [1], [IOU]),
        helper.make_tensor("score", TensorProto.FLOAT, [1], [SCORE]),
    ]
    graph = helper.make_graph(
        [helper.make_node("NonMaxSuppression", ["boxes", "scores", "limit", "iou", "score"], ["kept"])],
        "nms",
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, len(boxes), 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, scores.shape[1], len(boxes)]),
        ],
        [helper.make_tensor_value_info("kept", TensorProto.INT64, ["n", 3])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"boxes": boxes[None], "scores": np.ascontiguousarray(scores.T[None])}
    return lambda: session.run(None, feed)


def opencv(boxes: np.ndarray, scores: np.ndarray) -> Callable[[], Any]:
    """``cv2.dnn.NMSBoxesBatched``, which takes pairs that passed the threshold."""

    def call() -> Any:
        rows, labels = np.divmod(np.flatnonzero(scores.ravel() > SCORE), scores.shape[1])
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)[rows]
        batched: Any = cv2.dnn.NMSBoxesBatched  # which is said to take sequences alone
        return batched(xywh, scores[rows, labels], labels.astype(np.int32), SCORE, IOU, top_k=30000)

    return call


def milliseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    """Prints a line a case."""
    cv2.setNumThreads(1)
    boxes, scores = scene(0)
    transform = Transform((0.5, 0.5), (0.0, 80.0), (960, 1280))
    ours = mmyolo(Nms(score_threshold=SCORE, iou_threshold=IOU, max_per_image=KEPT))
    every_class = replace(ours, classes="apart", frame="input", max_output=None, max_per_class=KEPT)
    found = milliseconds(
        {
            "ours, best 300": lambda: run(ours, boxes, scores, transform),
            "ours, 300 a class": lambda: run(every_class, boxes, scores),
            "ONNX Runtime, 300 a class": onnx_runtime(boxes, scores),
            "OpenCV, all": opencv(boxes, scores),
        }
    )
    base = found["ours, 300 a class"]
    for name, value in found.items():
        print(f"{name}: {value:.1f} ms, {value / base:.2f} x ours of 300 a class")
    attributes = {"score_threshold": SCORE, "iou_threshold": IOU, "max_output_boxes": 1000}
    reference = mmyolo(Nms(score_threshold=SCORE, iou_threshold=IOU, max_per_image=1000))
    rng = np.random.default_rng(1)
    moved = (boxes + rng.normal(0, 5e-3, boxes.shape)).astype(np.float32)
    drifted = np.where(scores > 0, scores + rng.normal(0, 2e-5, scores.shape), 0).astype(np.float32)
    deployed = efficient_nms(attributes)
    for name, semantics, given in (
        ("EfficientNMS, inputs moved", deployed, (moved, drifted)),
        (
            "EfficientNMS after TopK 900, inputs moved",
            replace(deployed, topk=900, topk_unit="anchors"),
            (moved, drifted),
        ),
    ):
        sides = Side(reference, boxes, scores), Side(semantics, *given)
        causes = Counter(d.cause for d in explain(*sides, Limits(0.05, 2e-4), transform))

        def call(sides: tuple[Side, Side] = sides) -> Any:
            return explain(*sides, Limits(0.05, 2e-4), transform)

        took = milliseconds({name: call})[name]
        print(f"explain, {name}: {took:.1f} ms for {dict(causes)}")


if __name__ == "__main__":
    main()
