"""The folder that a trained variant lies in: its YAML file, weights, graphs and the papers of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from alignment.quantize import recipe
from alignment.storage import data_dir, writing
from alignment.variant import MMYoloSource, Variant, golden_dir, load_variant

if TYPE_CHECKING:
    from alignment.quantize.qat import Options, Outcome


#: Of the papers and of the options in them, what there is to read.
_TOLD = {"options", "images", "epochs", "best"}, {"labels", "distill", "learn_scales"}


def own_yaml(folder: Path, name: str) -> Path:
    """The YAML file of the variant that came of training the one of this name."""
    return folder / f"{name}_qat.yaml"


def papers(folder: Path, name: str) -> Path:
    """The file that says how it was trained, the last that is written."""
    return folder / f"{name}.qat.json"


def read_papers(folder: Path, name: str) -> dict[str, Any]:
    """What `Outcome.report` said of the training; empty where its file is not there, or says not all of `_TOLD`."""
    try:
        found = json.loads(papers(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    parts = (found, found.get("options")) if isinstance(found, dict) else (found, None)
    whole = all(isinstance(part, dict) and names <= part.keys() for part, names in zip(parts, _TOLD, strict=True))
    return found if whole else {}


def train_into(
    folder: Path, variant: Variant, options: Options, data: Path | None = None, progress: recipe.Progress | None = None
) -> tuple[Outcome, list[Path]]:
    """Quantizes a variant by its recipe, trains it, and writes all that came of it; what was killed goes on.

    Args:
        folder: where.
        variant: with an mmyolo source.
        options: how to train.
        data: COCO-layout root, for variants on COCO.
        progress: called with the stage, how much of it is done, and all.

    Returns:
        What came of training, and the paths.

    Raises:
        AlignError: see `alignment.quantize.recipe.quantize` and `alignment.quantize.qat.train`.
    """
    from alignment.models.mmyolo_source import require_mmyolo

    require_mmyolo()
    from alignment.quantize.qat import train

    checkpoint = folder / f"{variant.name}.qat.checkpoint.pth"
    quantized = recipe.quantize(variant, data, progress=progress, every=False)
    outcome = train(variant, quantized, options, checkpoint, data, progress)
    paths = _write(outcome, outcome.report(variant, options), variant, folder, data)
    checkpoint.unlink(missing_ok=True)
    return outcome, paths


def _write(outcome: Outcome, report: dict[str, Any], variant: Variant, folder: Path, data: Path | None) -> list[Path]:
    """The variant is read again for its graphs, so that what is written is what `align run` takes."""
    weights, own, told = (
        folder / f"{variant.name}.qat.npz",
        own_yaml(folder, variant.name),
        papers(folder, variant.name),
    )
    told.unlink(missing_ok=True)  # of an earlier training: killed from here on, the folder is not taken for a whole one
    outcome.trained.save(weights)
    with writing(own) as temporary:
        text = yaml.safe_dump(_fields(variant, weights.name), sort_keys=False, allow_unicode=True, width=1000)
        temporary.write_text(text, encoding="utf-8")
    graphs = recipe.quantize(load_variant(own), data).save(folder, variant.name)
    with writing(told) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return [own, weights, told, *graphs]


def _fields(variant: Variant, trained: str) -> dict[str, Any]:
    """The trained variant as YAML has it, under a name of its own: golden values are of one variant."""
    fields = variant.model_dump(mode="json", exclude_defaults=True, exclude={"notes"})
    source = variant.source
    assert isinstance(source, MMYoloSource)
    fields["source"]["checkpoint"] = _portable(source.checkpoint)
    if Path(source.config).is_absolute():
        fields["source"]["config"] = _portable(Path(source.config))
    quantization = {**variant.quantization.model_dump(mode="json", exclude_defaults=True), "trained": trained}
    return {**fields, "name": f"{variant.name}_qat", "quantization": quantization}


def _portable(path: Path) -> str:
    """A path by the variable that a variant's YAML may name it with, or in full."""
    absolute = path.absolute()
    for name, folder in (("GOLDEN", golden_dir()), ("ALIGN_DATA", data_dir())):
        if absolute.is_relative_to(folder.absolute()):
            return f"${{{name}}}/{absolute.relative_to(folder.absolute())}"
    return str(absolute)
