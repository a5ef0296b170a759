"""Surfaces of datasets: pictures, and annotations in COCO's and DOTA's layouts."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import yaml
from fuzz_mutations import MARKUP, spoilt_bytes, spoilt_json
from fuzz_sound import CLASSES, Input, Sound, own_data, place, surface


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

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = bytes(1 + min(width, 32_000) // 8)
    packer, rows = zlib.compressobj(1), []
    for _ in range(min(height, 30_000)):
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
