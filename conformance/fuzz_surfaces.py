"""What `align` reads from outside: a sound input of each kind, how it is spoilt, and which command reads it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import onnx
import yaml
from command_line import CHECKPOINT, align, dataset, truth_path, variant_file
from fuzz_mutations import (
    HOSTILE,
    MARKUP,
    Executed,
    spoilt_arrays,
    spoilt_bytes,
    spoilt_json,
    spoilt_onnx,
    spoilt_tree,
    spoilt_yaml,
)
from onnx import TensorProto, helper, numpy_helper
from report_scenes import write_everything

from alignment.variant import golden_dir

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


def _commands(rng: Random, sound: Sound, file: str) -> list[str]:
    """A command that reads a variant of an ONNX file."""
    data = ["--data", str(sound.data)]
    explain = ["explain", file, "--images", "1", "--out", "out", *data]
    if file == "decoded.yaml" and rng.random() < 0.4:
        return explain
    return rng.choice(
        [
            ["run", file, "--backend", "onnxruntime", "--images", "2", "--out", "out", *data],
            ["run", file, "--backend", "onnxruntime", "--images", "2", "--batch", "2", "--out", "out", *data],
            ["run", file, "--backend", "onnxruntime", "--precision", "fp16", "--images", "1", "--out", "out", *data],
            ["run", file, "--backend", "onnxruntime", "--precision", "int8", "--images", "1", "--out", "out", *data],
            ["layers", file, *data],
            ["quantize", file, "--out", "out", *data],
        ]
    )


@surface("variant YAML, of ONNX")
def variant_onnx(rng: Random, sound: Sound, folder: Path) -> Input:
    head = rng.choice(
        (
            {"layout": "yolov8"},
            {"layout": "yolov5", "transposed": False, "box_format": "xyxy"},
            {"layout": "yolox", "strides": [8]},
            {"layout": "yolov8", "output": "y", "scores_activation": "sigmoid"},
            DECODED,
        )
    )
    kind = "decoded" if head is DECODED else "tiny"
    source = {"kind": "onnx", "file": "decoded.onnx" if head is DECODED else "model.onnx", "head": head}
    place(sound, folder)
    (folder / f"{kind}.yaml").write_bytes(spoilt_yaml(rng, {**sound.variant, "name": kind, "source": source}))
    return Input(
        _commands(rng, sound, f"{kind}.yaml"),
        [f"{kind}.yaml"],
        ("model", "decoded", "tiny", "data", ".onnx", "in the variant's YAML"),
    )


@surface("variant YAML, of mmyolo")
def variant_torch(rng: Random, sound: Sound, folder: Path) -> Input:
    (folder / "planted.yaml").write_bytes(spoilt_yaml(rng, sound.torch_variant))
    words = ["run", "planted.yaml", "--data", str(sound.data), "--backend", "torch", "--images", "1", "--out", "out"]
    return Input(
        words, ["planted.yaml"], (CHECKPOINT.stem, "data", ".pth", ".py", "in the variant's YAML", "checkpoint")
    )


@surface("golden YAML")
def golden(rng: Random, sound: Sound, folder: Path) -> Input:
    fields = yaml.safe_load((golden_dir() / "yolov8_embedded.yaml").read_text())
    fields["cases"] = dict(list(fields["cases"].items())[:3])
    fields["overlays"] = fields["overlays"][:2]
    if rng.random() < 0.5:
        fields["cases"]["tiny-onnxruntime-fp32"] = next(iter(fields["cases"].values()))
        fields["variant"] = "tiny"
        place(sound, folder)
        words = ["run", "tiny.yaml", "--backend", "onnxruntime", "--images", "1", "--data", str(sound.data)]
        (folder / "tiny").mkdir()
        (folder / "tiny" / "tiny.yaml").write_bytes(spoilt_yaml(rng, fields))
        words += ["--golden", "tiny", "--out", "out"]
        words += ["--update-golden", "why"] if rng.random() < 0.4 else []
        return Input(words, ["tiny/tiny.yaml"])
    (folder / "yolov8_embedded.yaml").write_bytes(spoilt_yaml(rng, fields))
    pair = [str(golden_dir() / "records" / f"yolov8_embedded-tensorrt-{kind}.json") for kind in ("fp32", "fp16")]
    return Input(["explain", *pair, "--golden", ".", "--out", "out"], ["yolov8_embedded.yaml"])


POLICY = {
    "schema_version": 1,
    "rules": [
        {"precision": "fp32", "max_delta_ap": 0.01, "min_agreement": 0.99},
        {"variant": "yolov8*", "backend": "tensorrt", "route": "*", "max_latency_ratio": 1.1, "max_reformats": 4},
    ],
    "require": [{"variant": "yolov8_n", "backend": "tensorrt"}],
    "missing": "stop",
    "improvements": "allow",
    "layers": "stop",
}


@surface("policy YAML")
def policy(rng: Random, sound: Sound, folder: Path) -> Input:
    (folder / "policy.yaml").write_bytes(spoilt_yaml(rng, POLICY))
    words = ["gate", str(sound.run), "--policy", "policy.yaml", "--json", "verdict.json", "--summary", "verdict.md"]
    return Input(words + (["--baseline", str(sound.run)] if rng.random() < 0.5 else []), ["policy.yaml"])


@surface("keep_float.yaml")
def keep_float(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    fields = yaml.safe_load((sound.quantized / "partial" / "keep_float.yaml").read_text())
    (folder / "keep_float.yaml").write_bytes(spoilt_yaml(rng, fields))
    words = ["quantize", "tiny.yaml", "--out", "out", "--data", str(sound.data), "--keep-float", "keep_float.yaml"]
    return Input(words, ["keep_float.yaml"], ("tiny: has no torch model",))


@surface("ONNX file")
def onnx_graph(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    (folder.parent / "outside.bin").write_bytes(bytes(10**5))
    (folder / "link.bin").symlink_to("/etc/passwd")
    if rng.random() < 0.4:
        (folder / "decoded.onnx").write_bytes(spoilt_onnx(rng, sound.decoded_graph))
        return Input(_commands(rng, sound, "decoded.yaml"), ["decoded.onnx"], ("node ", "tensor "))
    (folder / "model.onnx").write_bytes(spoilt_onnx(rng, sound.graph))
    return Input(_commands(rng, sound, "tiny.yaml"), ["model.onnx"], ("node ", "tensor "))


@surface("ONNX file, guessed")
def guessed(rng: Random, sound: Sound, folder: Path) -> Input:
    (folder / "model.onnx").write_bytes(spoilt_onnx(rng, sound.detector))
    words = ["new", "fuzzed", "--onnx", "model.onnx", "--data", str(sound.data), "--images", "2", "--out", "out"]
    return Input(words, ["model.onnx"])


@surface("QDQ graph")
def qdq_graph(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    whole = onnx.load(next((sound.quantized / "int8").glob("*.qdq.onnx")))
    (folder / "qdq.onnx").write_bytes(spoilt_onnx(rng, whole))
    data = ["--data", str(sound.data)]
    words = ["culprit", "tiny.yaml", "--backend", "simulated", "--images", "1", "--limit", "6", "--out", "out", *data]
    words += rng.choice(
        (["--qdq", "qdq.onnx"], ["--reference", "qdq.onnx"], ["--qdq", "qdq.onnx", "--fault", "scale:first"])
    )
    if rng.random() < 0.3:
        engine = next(iter(sorted((golden_dir() / "engines").iterdir())))
        words = ["inspect", str(engine), "--onnx", "qdq.onnx", "--out", "out"]
    return Input(words, ["qdq.onnx"], ("QDQ graph", "at y", "tensor ", "node "))


@surface("checkpoint")
def checkpoint(rng: Random, sound: Sound, folder: Path) -> Input:
    import torch

    state, path = dict(sound.checkpoint), folder / "weights.pth"
    old = rng.random() < 0.3
    match rng.randrange(10):
        case 0 | 1 | 2 | 3:
            stream = io.BytesIO()
            torch.save({"state_dict": state}, stream, _use_new_zipfile_serialization=not old)
            path.write_bytes(spoilt_bytes(rng, stream.getvalue()))
        case 4:
            path.write_bytes(
                pickle.dumps(rng.choice((Executed(), {"state_dict": Executed()}, [1], state.keys().__len__())))
            )
        case 5:
            torch.save({"state_dict": {**state, "more": Executed()}, "meta": Executed()}, path)
        case 6:
            torch.save(_plain_hostile(spoilt_tree(rng, {"state_dict": {"a": 1, "b": [2]}, "meta": {"c": "d"}})), path)
        case _:
            for key in rng.sample(list(state), rng.choice((1, 1, 5))):
                match rng.randrange(9):
                    case 0:
                        del state[key]
                    case 1:
                        state[key + rng.choice(("x", MARKUP, ""))] = state.pop(key)
                    case 2:
                        state[key] = state[key].reshape(-1)[:-1].clone()
                    case 3:
                        state[key] = torch.full_like(state[key], rng.choice((float("nan"), float("inf"), 60_000.0)))
                    case 4:
                        state[key] = state[key].to(rng.choice((torch.float64, torch.int8, torch.bool, torch.complex64)))
                    case 5:
                        state[key] = rng.choice((state[key].to_sparse(), torch.empty(state[key].shape, device="meta")))
                    case 6:
                        state[key] = rng.choice((None, 1.0, "x", [1], state[key].numpy()))
                    case 7:
                        state[key] = torch.zeros(1).expand(state[key].shape)
                    case _:
                        state[key] = torch.zeros(1).expand(10 ** rng.choice((6, 12)))
            key = rng.choice(("state_dict", "ema_state_dict", "model", ""))
            torch.save({key: state} if key else state, path, _use_new_zipfile_serialization=not old)
    fields = {**sound.torch_variant, "source": {**sound.torch_variant["source"], "checkpoint": "weights.pth"}}
    (folder / "planted.yaml").write_text(yaml.safe_dump(fields))
    words = ["run", "planted.yaml", "--data", str(sound.data), "--backend", "torch", "--images", "1", "--out", "out"]
    return Input(words, ["weights.pth"])


def _plain_hostile(content: Any) -> Any:
    """Without what pickle cannot write."""
    return content


@surface("trained weights (.qat.npz)")
def trained(rng: Random, sound: Sound, folder: Path) -> Input:
    from alignment.quantize.trained import Trained, identity_of
    from alignment.variant import load_variant

    place(sound, folder)
    arrays = {"w0": np.zeros((8, 3, 8, 8), np.float32), "w1": np.zeros((10, 8, 1, 1), np.float32)}
    scales = {name: np.float32(0.1) for name in ("image", "b")}
    weight_scales = {"w0": np.full(8, 0.1, np.float32), "w1": np.full(10, 0.1, np.float32)}
    identity = identity_of(load_variant(folder / "tiny.yaml"))
    Trained(arrays, {"first": np.zeros(8, np.float32)}, scales, weight_scales, identity).save(folder / "tiny.qat.npz")
    path = folder / "tiny.qat.npz"
    path.write_bytes(spoilt_arrays(rng, path.read_bytes()))
    fields = {**sound.variant, "quantization": {**sound.variant["quantization"], "trained": "tiny.qat.npz"}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(fields))
    return Input(["quantize", "tiny.yaml", "--out", "out", "--data", str(sound.data)], ["tiny.qat.npz"])


def _pictures(rng: Random, folder: Path) -> list[str]:
    """Spoils pictures in a folder; their names."""
    names = sorted(path.name for path in folder.iterdir())
    for name in (chosen := rng.sample(names, rng.choice((1, 1, 3)))):
        path = folder / name
        pixels = cv2.imread(str(path))
        match rng.randrange(10):
            case 0 | 1 | 2:
                path.write_bytes(spoilt_bytes(rng, path.read_bytes()))
            case 3:
                quality = [cv2.IMWRITE_JPEG_QUALITY, 80]
                whole = cv2.imencode(".jpg", pixels, quality)[1].tobytes()
                path.write_bytes(spoilt_bytes(rng, whole))
            case 4:
                kind = rng.choice((".png", ".tiff", ".jp2", ".webp", ".bmp", ".pgm", ".hdr", ".pfm", ".gif"))
                picture = pixels.astype(np.float32) if kind in (".hdr", ".pfm") else pixels
                try:
                    whole = bytes(cv2.imencode(kind, picture)[1])
                except (cv2.error, TypeError):  # a format that this OpenCV does not write
                    whole = b""
                path.write_bytes(spoilt_bytes(rng, whole) if rng.random() < 0.6 else whole)
            case 5:
                deep = rng.choice(
                    (pixels.astype(np.uint16) * 257, pixels[..., 0], cv2.cvtColor(pixels, cv2.COLOR_BGR2BGRA))
                )
                path.write_bytes(cv2.imencode(".png", deep)[1].tobytes())
            case 6:
                path.write_bytes(
                    png(*rng.choice(((0, 5), (5, 0), (2**31 - 1, 1), (30_000, 30_000), (1, 10**6), (65_535, 65_535))))
                )
            case 7:
                height, width = rng.choice(((1, 1), (1, 5000), (5000, 1), (3, 7), (2000, 2000)))
                path.write_bytes(cv2.imencode(".png", np.full((height, width, 3), 7, np.uint8))[1].tobytes())
            case 8:
                head, rest = path.read_bytes()[:16], path.read_bytes()[24:]
                sides = rng.choice(((0, 0), (2**31, 2**31), (10**5, 10**5), (7, 7)))
                path.write_bytes(head + b"".join(side.to_bytes(4, "big") for side in sides) + rest)
            case _:
                path.unlink()
                match rng.randrange(4):
                    case 0:
                        path.mkdir()
                    case 1:
                        path.symlink_to(name)
                    case 2:
                        path.symlink_to("/dev/zero")
                    case _:
                        path.write_text("P6 99999 99999 255\n")
    return chosen


def png(width: int, height: int) -> bytes:
    """A PNG of one colour, of any size, in few bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = bytes(1 + min(width, 10**6) // 8)
    packer, rows = zlib.compressobj(1), []
    for _ in range(min(height, 40_000)):
        rows.append(packer.compress(row))
    content = b"".join(rows) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@surface("images")
def images(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    data = own_data(sound, folder)
    if rng.random() < 0.2:
        spoilt = [f"data/val2017/{name}" for name in _pictures(rng, data / "val2017")]
        (folder / "model.onnx").write_bytes(sound.detector.SerializeToString())
        words = ["new", "fuzzed", "--onnx", "model.onnx", "--data", "data/val2017", "--images", "2", "--out", "out"]
        return Input(words, spoilt)
    split = rng.choice(("val2017", "val2017", "train2017"))
    spoilt = [f"data/{split}/{name}" for name in _pictures(rng, data / split)]
    if split == "train2017":
        return Input(["quantize", "tiny.yaml", "--data", "data", "--out", "out"], spoilt)
    words = rng.choice(
        (["run", "tiny.yaml", "--backend", "onnxruntime"], ["layers", "tiny.yaml"], ["explain", "decoded.yaml"])
    )
    return Input([*words, "--data", "data", *(["--out", "out"] if words[0] != "layers" else [])], spoilt)


def _named(rng: Random, truth: dict[str, Any]) -> dict[str, Any]:
    for category in truth["categories"]:
        category["name"] = rng.choice((MARKUP, category["name"]))
    return truth


@surface("COCO annotations")
def annotations(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    data = own_data(sound, folder)
    split = rng.choice(("val2017", "val2017", "val2017", "train2017"))
    path = data / "annotations" / f"instances_{split}.json"
    truth = _named(rng, json.loads(path.read_text()))
    path.write_bytes(spoilt_json(rng, truth))
    if split == "train2017":
        words = ["quantize", "tiny.yaml"]
    else:
        words = rng.choice(
            (
                ["run", "tiny.yaml", "--backend", "onnxruntime"],
                ["run", "tiny.yaml", "--backend", "onnxruntime"],
                ["explain", "decoded.yaml"],
                ["new", "fuzzed", "--onnx", "model.onnx", "--images", "2"],
            )
        )
        if words[0] == "new":
            (folder / "model.onnx").write_bytes(sound.detector.SerializeToString())
    return Input([*words, "--data", "data", "--out", "out"], [str(path.relative_to(folder))])


@surface("DOTA annotations")
def dota(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    root = shutil.copytree(sound.tiles, folder / "tiles")
    truth = _named(rng, json.loads((root / "dota8.json").read_text()))
    (root / "dota8.json").write_bytes(spoilt_json(rng, truth))
    # Rotated: the last of six classes is the angle.
    fields = {**sound.variant, "boxes": "rotated", "classes": CLASSES - 1, "dataset": "dota"}
    if rng.random() < 0.5:
        fields["dataset"] = "coco"
    else:
        for entry in truth["categories"][CLASSES - 1 :]:
            truth["categories"].remove(entry)
        truth["annotations"] = [
            a for a in truth["annotations"] if a["category_id"] in {c["id"] for c in truth["categories"]}
        ]
        (root / "dota8.json").write_bytes(spoilt_json(rng, truth))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(fields))
    words = ["run", "tiny.yaml", "--backend", "onnxruntime", "--data", "tiles", "--out", "out"]
    return Input(words, ["tiles/dota8.json"])


@surface("records")
def records(rng: Random, sound: Sound, folder: Path) -> Input:
    stem = rng.choice(("yolov8_embedded-tensorrt-fp32", "yolov8_embedded-torch-fp32"))
    source = golden_dir() / "records"
    kept = folder / "records"
    kept.mkdir()
    names = [stem, "yolov8_embedded-tensorrt-fp16", "yolov8_embedded-torch-fp32", "yolov8_embedded-tensorrt-int8-qdq"]
    for name in dict.fromkeys(names):
        for ending in (".json", ".npz"):
            shutil.copy(source / f"{name}{ending}", kept)
    stem = rng.choice(names)
    spoilt = [f"records/{stem}.json"]
    if rng.random() < 0.5:
        path = kept / f"{stem}.json"
        path.write_bytes(spoilt_json(rng, json.loads(path.read_text())))
    else:
        path = kept / f"{stem}.npz"
        path.write_bytes(spoilt_arrays(rng, path.read_bytes()))
    if rng.random() < 0.5:
        words = ["run", "yolov8_embedded", "--backend", "tensorrt", "--golden", ".", "--precision", "fp32,fp16,int8"]
        words += ["--route", "qdq", "--images", "3", "--out", "out"]
        return Input(words, spoilt)
    pair = [f"records/{stem}.json", "records/yolov8_embedded-tensorrt-fp16.json"]
    rng.shuffle(pair)
    return Input(["explain", *pair, "--out", "out"], spoilt)


@surface("TensorRT calibration cache")
def trt_cache(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    names = ("image", "a", "b", "c", "d", "y", "nowhere")
    lines = ["TRT-8601-EntropyCalibration2", *(f"{name}: {rng.choice(_DIGITS)}" for name in names)]
    text = "\n".join(lines) + "\n"
    content = spoilt_bytes(rng, text.encode()) if rng.random() < 0.6 else text.encode()
    (folder / "table.cache").write_bytes(content)
    words = ["quantize", "tiny.yaml", "--out", "out", "--data", str(sound.data), "--ranges", "table.cache"]
    return Input(words, ["table.cache"], ("--ranges",))


_DIGITS = (
    "3c010a14",
    "3f800000",
    "00000000",
    "7fc00000",
    "7f800000",
    "ff800000",
    "80000000",
    "bf800000",
    "00000001",
    "7f7fffff",
    "",
    "zz",
    "3c01",
    "3c010a1400",
    "\0",
    "3c 01 0a 14",
    "３c010a14",
)


@surface("cached calibration")
def cached(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    cache = Path(os.environ["ALIGN_CACHE"])
    sound.quantized  # noqa: B018 - fills the cache
    kinds = [path for name in ("calibration", "sensitivity", "scores") for path in (cache / name).rglob("tiny*")]
    kinds = [path for path in kinds if path.is_file()] + [
        p for path in kinds if path.is_dir() for p in path.rglob("*.*")
    ]
    path = rng.choice(sorted(kinds))
    spoil = spoilt_arrays if path.suffix == ".npz" else spoilt_bytes
    kept = path.read_bytes()
    spoilt = spoil(rng, kept)
    own = folder / "cache"
    shutil.copytree(cache, own, symlinks=True, ignore=shutil.ignore_patterns("locks"))
    (own / path.relative_to(cache)).write_bytes(spoilt)
    command = rng.choice((["quantize"], ["sensitivity"], ["partial", "--layers", "1"]))
    out = "a.sensitivity.json" if command[0] == "sensitivity" else "out"
    words = [command[0], "tiny.yaml", *command[1:], "--data", str(sound.data), "--out", out]
    return Input(words, [f"cache/{path.relative_to(cache)}"])


@surface("alignment.json")
def run_folder(rng: Random, sound: Sound, folder: Path) -> Input:
    shutil.copytree(sound.run, folder / "run")
    path = folder / "run" / "alignment.json"
    path.write_bytes(spoilt_json(rng, json.loads(path.read_text())))
    words = rng.choice(
        (
            ["report", "run", "--out", "out.html"],
            ["report", "run", str(sound.run), "--out", "out.html"],
            ["gate", "run", "--json", "verdict.json", "--summary", "verdict.md"],
            ["gate", "run", "--baseline", str(sound.run), "--json", "verdict.json", "--summary", "verdict.md"],
            ["gate", str(sound.run), "--baseline", "run", "--json", "verdict.json", "--summary", "verdict.md"],
            ["table", "run", str(sound.run)],
        )
    )
    return Input(words, ["run/alignment.json"])


@surface("results beside a run")
def beside(rng: Random, sound: Sound, folder: Path) -> Input:
    shutil.copytree(sound.run, folder / "run")
    files = ["a.sensitivity.json", "partial/partial.json", "gate.json"]
    engine = next(path.name for path in (folder / "run").glob("*.engine.json"))
    name = rng.choice([*files, engine])
    path = folder / "run" / name
    path.write_bytes(spoilt_json(rng, json.loads(path.read_text())))
    words = ["report", *rng.choice((["run"], [f"run/{name}"], ["run", f"run/{name}"])), "--out", "out.html"]
    if name == engine and rng.random() < 0.3:
        words = ["gate", "run"]
    return Input(words, [f"run/{name}"])


@surface("engine.json")
def engines(rng: Random, sound: Sound, folder: Path) -> Input:
    source = golden_dir() / "engines" / "yolov6_embedded-tensorrt-int8-qdq-level0.engine.json"
    fields = json.loads(source.read_text())
    if rng.random() < 0.5:
        inner = json.loads(fields["inspector"], strict=False)
        inner["Layers"] = inner["Layers"][: rng.choice((2, 30))]
        fields["inspector"] = spoilt_json(rng, inner).decode("utf-8", "replace")
        content = json.dumps(fields).encode() if rng.random() < 0.6 else fields["inspector"].encode("utf-8", "replace")
    else:
        content = spoilt_json(rng, fields)
    (folder / "one.engine.json").write_bytes(content)
    words = ["inspect", "one.engine.json", *([str(source)] if rng.random() < 0.2 else []), "--out", "out"]
    return Input(words, ["one.engine.json"])


@surface("ranking (.sensitivity.json)")
def ranking(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    fields = json.loads((sound.quantized / "a.sensitivity.json").read_text())
    (folder / "a.sensitivity.json").write_bytes(spoilt_json(rng, fields))
    words = ["partial", "tiny.yaml", "--ranking", "a.sensitivity.json", "--layers", "1", "--out", "out"]
    return Input([*words, "--data", str(sound.data)], ["a.sensitivity.json"], ("--ranking",))


@surface("options")
def options(rng: Random, sound: Sound, folder: Path) -> Input:
    """Arguments that fit no option: the only surface without a file."""
    place(sound, folder)
    words = [*_commands(rng, sound, "decoded.yaml")]
    values = [str(value)[:200].replace("\0", "") for value in HOSTILE if isinstance(value, str | int | float)]
    values += [
        "tiny.yaml",
        ".",
        "model.onnx",
        "/dev/null",
        "/dev/full",
        "1",
        "2",
        "13",
        "fp32",
        "torch",
        "qdq",
        "-",
        "--",
    ]
    values = [value.encode("utf-8", "replace").decode() for value in values]
    names = (
        "--backend",
        "--precision",
        "--route",
        "--images",
        "--size",
        "--batch",
        "--out",
        "--golden",
        "--records",
        "--opset",
        "--topk",
        "--nms",
        "--outputs",
        "--score-threshold",
        "--method",
        "--policy",
        "--keep-float",
        "--rounding",
        "--ranges",
        "--show",
        "--data",
        "--strict",
        "--update-golden",
        "--deployed-iou-threshold",
    )
    for _ in range(rng.choice((1, 2, 3))):
        at = rng.randrange(2, len(words) + 1)  # the variant stays: without one all of the zoo would run
        match rng.randrange(3):
            case 0 if at < len(words):
                words[at] = rng.choice(values)
            case 1 if at < len(words):
                del words[at]
            case _:
                words[at:at] = [rng.choice(names), rng.choice(values)]
    return Input(words, [])
