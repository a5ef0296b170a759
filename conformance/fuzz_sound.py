"""Sound inputs of every kind, and the table of surfaces whose functions spoil them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import yaml
from command_line import CHECKPOINT, align, dataset, truth_path, variant_file
from onnx import TensorProto, helper, numpy_helper
from report_scenes import write_everything

CLASSES = 6
DECODED = {"layout": "decoded", "boxes": "boxes", "scores": "scores", "box_format": "cxcywh"}


@dataclass
class Input:
    """One command on one spoilt input.

    Attributes:
        arguments: of `align`; paths relative to the folder that it runs in.
        spoilt: the files that were spoilt.
        also: what a message may name in their place: the other half of what does not fit.
    """

    arguments: list[str]
    spoilt: list[str] = field(default_factory=list)
    also: tuple[str, ...] = ()


class Sound:
    """Sound inputs of every kind, each made when it is first asked for.

    Args:
        folder: to put them into.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def data(self) -> Path:
        """Three pictures in COCO layout, for scoring and for calibration."""
        root = dataset(self.folder)
        shutil.copytree(root / "val2017", root / "train2017")
        shutil.copy(truth_path(root), root / "annotations" / "instances_train2017.json")
        return root

    @cached_property
    def tiles(self) -> Path:
        """The same three in DOTA's layout, with their boxes as quadrilaterals."""
        root = self.folder / "tiles"
        shutil.copytree(self.data / "val2017", root / "images")
        truth = json.loads(truth_path(self.data).read_text())
        for entry in truth["annotations"]:
            x, y, w, h = entry["bbox"]
            entry["poly"] = [x, y, x + w, y, x + w, y + h, x, y + h]
        (root / "dota8.json").write_text(json.dumps(truth))
        return root

    @cached_property
    def graph(self) -> onnx.ModelProto:
        """A detector of two convolutions in YOLOv8's layout, ``[1, 4 + 6, 16]``."""
        draw = np.random.default_rng(0)
        arrays = {
            "w0": draw.normal(0, 0.1, (8, 3, 8, 8)).astype(np.float32),
            "b0": draw.normal(0, 0.1, 8).astype(np.float32),
            "w1": draw.normal(0, 2, (4 + CLASSES, 8, 1, 1)).astype(np.float32),
            "b1": np.array([16, 16, 9, 9, *[-4] * CLASSES], np.float32),
            "shape": np.array([0, 4 + CLASSES, 16], np.int64),
            "parts": np.array([4, CLASSES], np.int64),
        }
        nodes = [
            helper.make_node("Conv", ["image", "w0", "b0"], ["a"], name="first", strides=[8, 8], kernel_shape=[8, 8]),
            helper.make_node("Relu", ["a"], ["b"], name="act"),
            helper.make_node("Conv", ["b", "w1", "b1"], ["c"], name="second", kernel_shape=[1, 1]),
            helper.make_node("Reshape", ["c", "shape"], ["d"], name="rows"),
            helper.make_node("Split", ["d", "parts"], ["boxes", "logits"], name="split", axis=1),
            helper.make_node("Sigmoid", ["logits"], ["scores"], name="sigmoid"),
            helper.make_node("Concat", ["boxes", "scores"], ["y"], name="join", axis=1),
        ]
        made = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4 + CLASSES, 16])],
            [numpy_helper.from_array(array, name) for name, array in arrays.items()],
        )
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    @cached_property
    def decoded_graph(self) -> onnx.ModelProto:
        """The same with outputs ``boxes`` ``[1, 16, 4]`` and ``scores`` ``[1, 16, 6]``."""
        made = onnx.ModelProto()
        made.CopyFrom(self.graph)
        made.graph.node.pop()
        del made.graph.output[:]
        for name, inner, width in (("boxes", "corners", 4), ("scores", "columns", CLASSES)):
            node = next(node for node in made.graph.node if name in node.output)
            node.output[list(node.output).index(name)] = inner
            if name == "boxes":
                centre = helper.make_node("Abs", [inner], ["sides"], name="sides")
                made.graph.node.append(centre)
                inner = "sides"
            made.graph.node.append(helper.make_node("Transpose", [inner], [name], name=f"turn_{name}", perm=[0, 2, 1]))
            made.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16, width]))
        return made

    @cached_property
    def detector(self) -> onnx.ModelProto:
        """The embedded detector in YOLOv8's layout, of which `align new` finds out everything."""
        from onnx_layouts import Graph, yolov8

        from alignment.export.onnx_export import exported
        from alignment.variant import load_variant

        graph = Graph(exported(load_variant("yolov8_embedded")).onnx)
        return onnx.load(graph.save(self.folder / "detector.onnx", yolov8(graph)))

    @cached_property
    def variant(self) -> dict[str, Any]:
        """Of `graph`, in a file ``model.onnx`` beside it."""
        return {
            "name": "tiny",
            "source": {"kind": "onnx", "file": "model.onnx", "head": {"layout": "yolov8"}},
            "input": {"height": 32, "width": 32},
            "classes": CLASSES,
            "dataset": "coco",
            "quantization": {"images": 2, "policy": "conv-only"},
        }

    @cached_property
    def torch_variant(self) -> dict[str, Any]:
        """The embedded detector, with every field named."""
        fields = yaml.safe_load(variant_file(self.folder).read_text())
        return {
            "preprocess": {"resize": "letterbox", "mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0]},
            "nms": {"score_threshold": 0.001, "iou_threshold": 0.65, "nms_pre": 30000, "max_per_image": 300},
            "quantization": {"method": "mse", "images": 2, "keep_float": [], "rounding": "nearest"},
            "float32_nodes": ["a*"],
            "notes": "",
            **fields,
        }

    @cached_property
    def quantized(self) -> Path:
        """What `align quantize` and others make of the tiny variant."""
        folder = self.folder / "tiny"
        folder.mkdir()
        place(self, folder)
        for words in (
            ["quantize", "tiny.yaml", "--data", str(self.data), "--out", "int8"],
            ["sensitivity", "tiny.yaml", "--data", str(self.data), "--out", "a.sensitivity.json"],
            ["partial", "tiny.yaml", "--data", str(self.data), "--layers", "1", "--out", "partial"],
        ):
            here = Path.cwd()
            os.chdir(folder)
            done = align(*words)
            os.chdir(here)
            assert done.exit_code == 0, done.output
        return folder

    @cached_property
    def run(self) -> Path:
        """A RUN folder that holds everything, markup in its names."""
        folder = self.folder / "run"
        write_everything(folder)
        return folder

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """The state dict of the embedded detector."""
        import torch

        return torch.load(CHECKPOINT, weights_only=True)


def place(sound: Sound, folder: Path) -> None:
    """Puts the tiny variant into a folder, as ``tiny.yaml`` and ``decoded.yaml``."""
    (folder / "model.onnx").write_bytes(sound.graph.SerializeToString())
    (folder / "decoded.onnx").write_bytes(sound.decoded_graph.SerializeToString())
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sound.variant))
    source = {"kind": "onnx", "file": "decoded.onnx", "head": DECODED}
    (folder / "decoded.yaml").write_text(yaml.safe_dump({**sound.variant, "name": "decoded", "source": source}))


def own_data(sound: Sound, folder: Path) -> Path:
    """A copy of the pictures that may be spoilt."""
    return Path(shutil.copytree(sound.data, folder / "data"))


Make = Callable[[Random, Sound, Path], Input]
SURFACES: dict[str, Make] = {}


def surface(name: str) -> Callable[[Make], Make]:
    """Adds a surface under a name."""

    def add(make: Make) -> Make:
        SURFACES[name] = make
        return make

    return add
