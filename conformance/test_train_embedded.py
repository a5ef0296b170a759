"""The script that trains the embedded checkpoints: one short epoch through mmyolo's Runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.export.onnx_export import file_digest
from alignment.variant import load_variant, zoo

pytest.importorskip("mmyolo")
IMAGES = 32


def train(name: str, folder: Path) -> Path:
    """In a process of its own: the Runner sets seeds, threads and deterministic kernels for all that follows."""
    out = folder / "trained.pth"
    options = [
        "--epochs",
        "1",
        "--images",
        IMAGES,
        "--seed",
        3,
        "--workers",
        0,
        "--out",
        out,
        "--work",
        folder / "work",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "alignment.models.train_embedded", name, *map(str, options)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"wrote {out}" in done.stdout
    return out


def test_an_epoch_gives_a_checkpoint_that_fits_with_its_papers(tmp_path):
    import torch

    from alignment.models.checkpoint import load_state_dict
    from alignment.models.mmyolo_source import build_detector

    variant = load_variant("yolov5_embedded")
    path = train(variant.name, tmp_path)
    state, committed = load_state_dict(path), load_state_dict(variant.weights)
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in committed.items()}
    assert all(torch.isfinite(value).all() for value in state.values())
    assert path.stat().st_size <= 2e6
    source = variant.source.model_copy(update={"checkpoint": path})
    assert build_detector(variant.model_copy(update={"source": source}))
    papers = json.loads((tmp_path / "trained.pth.json").read_text())
    expected = {"variant": "yolov5_embedded", "seed": 3, "epochs": 1, "images": IMAGES, "resumed": False}
    assert {key: papers[key] for key in expected} == expected
    assert papers["device"].startswith("CPU ")
    assert papers["deterministic"] is True
    assert papers["versions"]["torch"] == torch.__version__
    assert papers["sha256"] == file_digest(path)


@pytest.mark.parametrize("name", [p.stem for p in zoo() if p.stem.endswith("_embedded")])
def test_every_family_has_a_training_configuration(name, tmp_path):
    """The papers' own losses and assigners, on the variant's own input."""
    variant = load_variant(name)
    if variant.rotated:
        pytest.importorskip("mmrotate")
    from alignment.models.train_embedded import EPOCHS, USUAL_EPOCHS, Schedule, train_config

    config = train_config(variant, tmp_path, tmp_path, Schedule(EPOCHS.get(name, USUAL_EPOCHS)))
    assert config.train_cfg.max_epochs >= 34
    assert config.randomness.seed == 0
    assert config.train_dataloader.dataset.type == ("YOLOv5DOTADataset" if variant.rotated else "YOLOv5CocoDataset")
    assert len(config.train_dataloader.dataset.metainfo.classes) == variant.classes
    assert config.load_from is None
