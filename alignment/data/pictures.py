"""Pictures to look at a model with: of a dataset, of a folder without labels, or the drawn ones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from alignment.cache import Key, kept
from alignment.data.coco import CocoDataset, annotation_file, read_image
from alignment.data.synthetic import synthetic_root
from alignment.errors import AlignError
from alignment.storage import data_dir

SPLIT = "val2017"
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Pictures:
    """Where pictures are.

    Attributes:
        folder: that holds them.
        dataset: with their labels, None without any.
        origin: for people.
        given: whether the user named them.
    """

    folder: Path
    dataset: CocoDataset | None
    origin: str
    given: bool = False

    @property
    def categories(self) -> int | None:
        """Of the labels, None without any."""
        return len(self.dataset.category_ids) if self.dataset else None


def find_pictures(data: Path | None) -> Pictures:
    """The folder `data`, in COCO layout or of pictures alone; without one COCO below ``ALIGN_DATA``, or drawn shapes.

    Raises:
        AlignError: for a folder without pictures, or a dataset that cannot be read.
    """
    default = data_dir() / "coco"
    if data is not None and not annotation_file(data, SPLIT).is_file():
        if not files_in(data):
            mend = f"give --data a folder of pictures, or one with annotations/instances_{SPLIT}.json and {SPLIT}/"
            raise AlignError(f"{data}: neither pictures nor a dataset in COCO layout", mend)
        return Pictures(data, None, f"the pictures in {data}", True)
    if data is not None or annotation_file(default, SPLIT).is_file():
        root = data or default
        return Pictures(root / SPLIT, CocoDataset.open(root, SPLIT), str(root), data is not None)
    return Pictures(synthetic_root() / SPLIT, None, "drawn shapes")


def files_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())


def unlabelled_root(folder: Path, classes: int) -> Path:
    """A COCO-layout root in the cache with the pictures of `folder` (by a link), so many categories, and no labels.

    Raises:
        AlignError: for a picture that cannot be read.
    """
    paths = files_in(folder)
    stats = [(path.name, path.stat()) for path in paths]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    listed = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    inputs = {"folder": str(folder.absolute()), "files_sha256": listed, "classes": classes}

    def write(root: Path) -> None:
        (root / "annotations").mkdir()
        (root / SPLIT).symlink_to(folder.absolute(), target_is_directory=True)
        annotation_file(root, SPLIT).write_text(json.dumps(_annotations(paths, classes)))

    return kept(Key("unlabelled", folder.name, inputs), write)


def _annotations(paths: list[Path], classes: int) -> dict[str, list]:
    images = []
    for index, path in enumerate(paths, 1):
        height, width = read_image(path).shape[:2]
        images.append({"id": index, "file_name": path.name, "height": height, "width": width})
    categories = [{"id": index, "name": f"class {index}"} for index in range(classes)]
    return {"images": images, "annotations": [], "categories": categories}
