"""Preprocessed images, ready before a turn begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness import Setting

if TYPE_CHECKING:
    from alignment.data.samples import Samples


class Images:
    """Preprocessed images ``[1, 3, H, W]`` that lie in files and are read one at a time.

    It is a CalibrationDataReader of ONNX Runtime's and of modelopt's, which takes some methods more.
    """

    def __init__(self, paths: list[Path], name: str) -> None:
        self.paths, self.name = paths, name
        self.rewind()

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.load(path)[None] for path in self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one, None at the end."""
        image = next(self._rest, None)
        return None if image is None else {self.name: image}

    def get_first(self) -> dict[str, np.ndarray]:
        """The first one."""
        return {self.name: next(iter(self))}

    def rewind(self) -> None:
        """Begins anew."""
        self._rest = iter(self)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Goes on with these."""
        self._rest = (np.load(path)[None] for path in self.paths[start_index:end_index])


def model_of(setting: Setting) -> Path:
    """The variant's ONNX file."""
    from alignment.export.onnx_export import exported
    from alignment.variant import load_variant

    return exported(load_variant(setting.variant)).onnx


def images_of(setting: Setting) -> Images:
    """The first `size` training images, preprocessed into files that all contestants share."""
    import onnx

    samples = training_samples(setting)
    name = onnx.load(model_of(setting), load_external_data=False).graph.input[0].name
    paths = [setting.folder / f"image-{entry.id}.npy" for entry in samples.dataset.images]
    for path, entry in zip(paths, samples.dataset.images, strict=True):
        if not path.is_file():
            np.save(path, samples.load(entry).tensor)
    return Images(paths, name)


def training_samples(setting: Setting) -> Samples:
    """The first `size` images that int8 is calibrated on, from files as they are."""
    from alignment.data.samples import CALIBRATION_SPLIT, open_samples
    from alignment.variant import load_variant

    return open_samples(load_variant(setting.variant), limit=setting.size, split=CALIBRATION_SPLIT)


def in_memory(samples: Samples) -> Samples:
    """The same samples, preprocessed once and kept."""
    from alignment.data.samples import Samples

    kept = {sample.entry.id: sample for sample in samples}
    ready = Samples(samples.variant, samples.dataset)
    ready.load = lambda entry: kept[entry.id]  # type: ignore[method-assign]
    return ready


def scoring_samples(setting: Setting, limit: int | None = None) -> Samples:
    """The first images of the other split, as many as the setting's size or `limit`."""
    from alignment.data.samples import open_samples
    from alignment.variant import load_variant

    return open_samples(load_variant(setting.variant), limit=limit or setting.size)
