"""The embedded detector's graph, its boxes and scores re-arranged by ONNX nodes into the layouts of other exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INT32 = TensorProto.INT32
KEPT = 300
JUNK_SCORE = 0.9


class Graph:
    """A detector with outputs ``boxes`` [B, N, 4] and ``scores`` [B, N, C], to which nodes are added."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self._count = 0

    def add(self, op: str, *inputs: str | np.ndarray | list, outputs: int = 1, **attributes: Any) -> str:
        """Adds a node; arrays become initializers.  Returns the name of its last output."""
        self._count += 1
        output = f"added_{self._count}"
        names = []
        for place, value in enumerate(inputs):
            if not isinstance(value, str):
                array = np.array(value, np.int64) if isinstance(value, list) else value
                value = f"{output}_{place}"
                self.model.graph.initializer.append(numpy_helper.from_array(array, value))
            names.append(value)
        results = [*(f"{output}_also_{i}" for i in range(1, outputs)), output]
        self.model.graph.node.append(helper.make_node(op, names, results, name=output, **attributes))
        return output

    def cast(self, value: str, kind: int = TensorProto.FLOAT) -> str:
        return self.add("Cast", value, to=kind)

    def cut(self, value: str, start: int, end: int, axis: int = 2) -> str:
        return self.add("Slice", value, [start], [end], [axis])

    def save(self, path: Path, outputs: dict[str, str]) -> Path:
        """Writes the graph with `outputs` (name → tensor) alone."""
        del self.model.graph.output[:]
        for name, value in outputs.items():
            self.model.graph.node.append(helper.make_node("Identity", [value], [name]))
        inferred = onnx.shape_inference.infer_shapes(self.model, strict_mode=True, data_prop=True).graph.value_info
        self.model.graph.output.extend(value for value in inferred if value.name in outputs)
        onnx.checker.check_model(self.model)
        onnx.save(self.model, path)
        return path


def centred(graph: Graph) -> str:
    """The boxes as cx, cy, w, h."""
    low, high = graph.cut("boxes", 0, 2), graph.cut("boxes", 2, 4)
    centre = graph.add("Mul", graph.add("Add", low, high), np.float32(0.5))
    return graph.add("Concat", centre, graph.add("Sub", high, low), axis=2)


def logits(graph: Graph, scores: str) -> str:
    safe = graph.add("Clip", scores, np.float32(1e-7), np.float32(1 - 1e-6))
    return graph.add("Log", graph.add("Div", safe, graph.add("Sub", np.float32(1), safe)))


def turned(graph: Graph, value: str) -> str:
    return graph.add("Transpose", value, perm=[0, 2, 1])


def shares(graph: Graph) -> tuple[str, str]:
    """Objectness [B, N, 1] and class scores whose product is the scores."""
    best = graph.add("ReduceMax", "scores", axes=[2], keepdims=1)
    objectness = graph.add("Sqrt", graph.add("Max", best, np.float32(1e-12)))
    return objectness, graph.add("Div", "scores", objectness)


def yolov8(graph: Graph) -> dict[str, str]:
    return {"output0": turned(graph, graph.add("Concat", centred(graph), "scores", axis=2))}


def yolov8_logits(graph: Graph) -> dict[str, str]:
    return {"output0": turned(graph, graph.add("Concat", centred(graph), logits(graph, "scores"), axis=2))}


def yolov5(graph: Graph) -> dict[str, str]:
    return {"output": graph.add("Concat", centred(graph), *shares(graph), axis=2)}


def yolov5_beside_others(graph: Graph) -> dict[str, str]:
    return {"map": turned(graph, "scores"), **yolov5(graph)}


def yolov5_transposed(graph: Graph) -> dict[str, str]:
    return {"output": turned(graph, yolov5(graph)["output"])}


def yolov5_logits(graph: Graph) -> dict[str, str]:
    parts = [logits(graph, part) for part in shares(graph)]
    return {"output": graph.add("Concat", centred(graph), *parts, axis=2)}


def yolox(graph: Graph) -> dict[str, str]:
    """Offsets from the cells and logarithms of the sizes, in strides; an input of 320 × 320."""
    cells, strides = [], []
    for stride in (8, 16, 32):
        y, x = np.mgrid[: 320 // stride, : 320 // stride]
        cells.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((x.size, 1), stride))
    boxes = graph.add("Div", centred(graph), np.concatenate(strides).astype(np.float32))
    centre = graph.add("Sub", graph.cut(boxes, 0, 2), np.concatenate(cells).astype(np.float32))
    size = graph.add("Log", graph.cut(boxes, 2, 4))
    return {"output": graph.add("Concat", centre, size, *shares(graph), axis=2)}


def decoded(graph: Graph) -> dict[str, str]:
    return {"boxes_": "boxes", "scores_": "scores"}


def decoded_centred(graph: Graph) -> dict[str, str]:
    return {"boxes_": centred(graph), "scores_": "scores"}


def ppyoloe(graph: Graph) -> dict[str, str]:
    return {"boxes_": "boxes", "scores_": turned(graph, "scores")}


def decoded_logits(graph: Graph) -> dict[str, str]:
    return {"boxes_": "boxes", "scores_": logits(graph, "scores")}


def shifted_classes(graph: Graph) -> dict[str, str]:
    classes = graph.add("Concat", graph.cut("scores", 5, 6), graph.cut("scores", 0, 5), axis=2)
    return {"boxes_": "boxes", "scores_": classes}


def odd_padding(graph: Graph) -> dict[str, str]:
    """A convolution that changes nothing, with padding that the float64 evaluator does not know."""
    image = graph.add("Unsqueeze", "scores", [1])
    same = graph.add("Conv", image, np.ones((1, 1, 1, 1), np.float32), auto_pad="SAME_UPPER", kernel_shape=[1, 1])
    return {"boxes_": "boxes", "scores_": graph.add("Squeeze", same, [1])}


def yolov5_maps(graph: Graph) -> dict[str, str]:
    """mmyolo's raw outputs of 3 anchors and 6 classes as YOLOv5's maps: [B, 3, H, W, 11], the middle one flat."""
    maps = {}
    for stride in (8, 16, 32):
        side = 320 // stride
        kinds = (("bbox", 4), ("obj", 1), ("cls", 6))
        parts = [graph.add("Reshape", f"{k}_s{stride}", [-1, 3, depth, side, side]) for k, depth in kinds]
        level = graph.add("Concat", *parts, axis=2)
        if stride == 16:
            maps[f"map_{stride}"] = graph.add("Reshape", level, [-1, 33, side, side])
        else:
            maps[f"map_{stride}"] = graph.add("Transpose", level, perm=[0, 1, 3, 4, 2])
    return maps


def kept(graph: Graph) -> str:
    """ONNX NMS by class, the best `KEPT` over all images: [n, 7], batch index, box, label, score."""
    scores = turned(graph, "scores")
    limits = [KEPT], np.array([0.7], np.float32), np.array([0.001], np.float32)
    chosen = graph.add("NonMaxSuppression", "boxes", scores, *limits)
    image, label, row = (graph.cut(chosen, i, i + 1, axis=1) for i in range(3))
    boxes = graph.add("GatherND", "boxes", graph.add("Concat", image, row, axis=1))
    values = graph.add("GatherND", scores, chosen)
    table = [graph.cast(image), boxes, graph.cast(label), graph.add("Unsqueeze", values, [1])]
    count = graph.add("Min", graph.add("Shape", values), [KEPT])
    return graph.add("Gather", graph.add("Concat", *table, axis=1), graph.add("TopK", values, count, outputs=2))


def padded(graph: Graph, rows: str, score: float) -> str:
    """[1, KEPT, 7]: the rows, then boxes that look real, of every class and the given score."""
    junk = np.tile(np.array([0, 40, 40, 200, 200, 0, score], np.float32), (KEPT, 1))
    junk[:, 5] = np.arange(KEPT) % 6
    return graph.add("Unsqueeze", graph.cut(graph.add("Concat", rows, junk, axis=0), 0, KEPT, axis=0), [0])


def yolov7(graph: Graph) -> dict[str, str]:
    return {"output": kept(graph)}


def yolov10(graph: Graph) -> dict[str, str]:
    rows = padded(graph, kept(graph), 0.0)
    return {"output0": graph.add("Concat", *(graph.cut(rows, i, j) for i, j in ((1, 5), (6, 7), (5, 6))), axis=2)}


def labels_from_one(graph: Graph) -> dict[str, str]:
    return {"output0": graph.add("Add", yolov10(graph)["output0"], np.array([0, 0, 0, 0, 0, 1], np.float32))}


def efficient_nms(graph: Graph) -> dict[str, str]:
    """What lies beyond the count looks like detections."""
    found = kept(graph)
    count = graph.cast(graph.add("Unsqueeze", graph.cut(graph.add("Shape", found), 0, 1, axis=0), [0]), INT32)
    rows = padded(graph, found, JUNK_SCORE)
    scores, labels = (graph.add("Squeeze", graph.cut(rows, i, i + 1), [2]) for i in (6, 5))
    return {
        "num_dets": count,
        "det_boxes": graph.cut(rows, 1, 5),
        "det_scores": scores,
        "det_classes": graph.cast(labels, INT32),
    }


def plugin(graph: Graph) -> dict[str, str]:
    """As mmyolo exports for TensorRT."""
    graph.model.opset_import.append(helper.make_opsetid("TRT", 1))
    return {"boxes_": graph.add("EfficientNMS_TRT", "boxes", "scores", domain="TRT"), "scores_": "scores"}


def mmdeploy(graph: Graph) -> dict[str, str]:
    rows = padded(graph, kept(graph), 0.0)
    dets = graph.add("Concat", graph.cut(rows, 1, 5), graph.cut(rows, 6, 7), axis=2)
    labels = graph.cast(graph.add("Squeeze", graph.cut(rows, 5, 6), [2]), INT32)
    return {"dets": dets, "labels": labels}
