"""What `align` reads from outside: how an input of each kind is spoilt, and which command reads it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from random import Random

import fuzz_pictures  # noqa: F401 - adds its surfaces
import numpy as np
import onnx
import yaml
from command_line import CHECKPOINT
from fuzz_arrays import Executed, spoilt_arrays
from fuzz_graph import spoilt_onnx
from fuzz_mutations import HOSTILE, MARKUP, spoilt_bytes, spoilt_json, spoilt_tree, spoilt_yaml
from fuzz_sound import DECODED, SURFACES, Input, Sound, place, surface

from alignment.variant import golden_dir

__all__ = ["SURFACES", "Input", "Sound", "place"]


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
        ("model", "decoded", "tiny", "data", ".onnx", "the variant's YAML"),
    )


@surface("variant YAML, of mmyolo")
def variant_torch(rng: Random, sound: Sound, folder: Path) -> Input:
    (folder / "planted.yaml").write_bytes(spoilt_yaml(rng, sound.torch_variant))
    words = ["run", "planted.yaml", "--data", str(sound.data), "--backend", "torch", "--images", "1", "--out", "out"]
    return Input(words, ["planted.yaml"], (CHECKPOINT.stem, "data", ".pth", ".py", "the variant's YAML", "checkpoint"))


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
            path.write_bytes(pickle.dumps(rng.choice((Executed(), {"state_dict": Executed()}, [1], 7))))
        case 5:
            torch.save({"state_dict": {**state, "more": Executed()}, "meta": Executed()}, path)
        case 6:
            torch.save(spoilt_tree(rng, {"state_dict": {"a": 1, "b": [2]}, "meta": {"c": "d"}}), path)
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
        return Input(words, spoilt, ("of its reference",))
    pair = [f"records/{stem}.json", "records/yolov8_embedded-tensorrt-fp16.json"]
    rng.shuffle(pair)
    return Input(["explain", *pair, "--out", "out"], spoilt, ("of one variant",))


@surface("TensorRT calibration cache")
def trt_cache(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    names = ("image", "a", "b", "c", "d", "y", "nowhere")
    digits = dict.fromkeys(names, "3c010a14")
    if rng.random() < 0.6:
        digits[rng.choice(names)] = rng.choice(_DIGITS)
    lines = ["TRT-8601-EntropyCalibration2", *(f"{name}: {scale}" for name, scale in digits.items())]
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


@surface("cache entries")
def cached(rng: Random, sound: Sound, folder: Path) -> Input:
    place(sound, folder)
    sound.quantized  # noqa: B018 - fills the cache
    cache, own = Path(os.environ["ALIGN_CACHE"]), folder / "cache"
    kind = rng.choice(sorted({path.parent.name for path in cache.glob("entries/*/tiny-*")}))
    path = rng.choice(sorted(path for path in cache.glob(f"entries/{kind}/tiny-*/*") if path.is_file()))
    shutil.copytree(cache, own, symlinks=True, ignore=shutil.ignore_patterns("locks", "leases", "images"))
    spoil = spoilt_arrays if path.suffix == ".npz" else spoilt_bytes
    if path.suffix == ".json" and rng.random() < 0.7:
        content = spoilt_json(rng, json.loads(path.read_text()))
    else:
        content = spoil(rng, path.read_bytes())
    (own / path.relative_to(cache)).write_bytes(content)
    command = rng.choice((["quantize"], ["sensitivity"], ["partial", "--layers", "1"], ["cache"]))
    if command[0] == "cache":
        return Input(["cache", *rng.choice((["ls"], ["prune"]))], [])
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
    # Not --update-golden, whose default folder is the package's own.
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
