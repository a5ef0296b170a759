"""A bare ONNX file that nobody described: from its graph and what it answers to the fields of a variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.case import Case
from alignment.data.coco import ImageEntry, read_image
from alignment.data.pictures import Pictures, files_in, find_pictures, unlabelled_root
from alignment.data.preprocess import preprocess
from alignment.guess.findings import Asked, Finding, as_fields, require_settled
from alignment.guess.head import HeadFound, Look, find_head
from alignment.guess.jury import Jury
from alignment.guess.maps import ANCHORS
from alignment.guess.onnx_facts import find_size, read_onnx
from alignment.guess.preprocess import (
    FIRST,
    MORE,
    RANGES,
    find_anchors,
    find_preprocess,
    hypotheses,
    hypothesis,
    usual_of,
)
from alignment.models.onnx_heads import Named
from alignment.runners.base import Runner
from alignment.runners.open import open_model
from alignment.variant import InputSize, Variant, variant_of

#: Pictures on which the outputs are looked at.
LOOKED_AT = 2
#: What NMS of a family is usual, where it is not 0.65.
IOU_THRESHOLDS = {"yolov8": 0.7}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Guessed:
    """What a model was found to be.

    Attributes:
        variant: to run.
        findings: field by field, in the order of the YAML.
        data: the dataset to run it on, None for the one that its `dataset` names.
        pictures: where those come from, for people.
    """

    variant: Variant
    findings: list[Finding]
    data: Path | None
    pictures: str


def guess_onnx(path: Path, name: str, data: Path | None, asked: Asked, progress: Progress) -> Guessed:
    """Looks at a file, and runs it on a few pictures.

    Args:
        path: the file.
        name: of the variant.
        data: a folder in COCO layout, or of pictures; default: see `alignment.data.pictures.find_pictures`.
        asked: what the command line settles.
        progress: stage, steps done, steps in all.

    Raises:
        AlignError: for a file that is no detector of a known layout, and for what stays open.
    """
    facts = read_onnx(path)
    pictures = find_pictures(data)
    findings = find_size(facts, asked)
    sides = as_fields(findings)["input"]
    size = InputSize(**sides)
    with open_model(path, Case(name, "onnxruntime", "fp32")) as runner:
        entries = _entries(pictures)
        answers = look_at(runner, entries, size, asked, progress)
        head = find_head(Look(facts, size, answers, asked, pictures.categories))
        unsettled = [f for f in head.findings if f.field == "source.head.anchors" and f.sure == "open"]
        require_settled(path, [f for f in head.findings if f not in unsettled or not _three_by_three(head)])
        tried = [replace(f, value=ANCHORS["yolov5"]) if f in unsettled else f for f in head.findings]
        variant = _variant(name, path, [*findings, *tried])
        labelled = _labelled(pictures, variant)
        jury = _jury(runner, entries, pictures, labelled, progress)
        usual = usual_of(facts, head.family)
        prepared = find_preprocess(facts, variant, jury, usual, asked)
        if unsettled:
            found = _settle_anchors(variant, prepared, jury, unsettled[0])
            head = replace(head, findings=[found if f in unsettled else f for f in head.findings])
    findings = [*head.findings, *findings, *prepared]
    require_settled(path, findings)
    if head.layout != "end2end":
        iou = 0.1 if variant.rotated else IOU_THRESHOLDS.get(head.family, 0.65)
        findings.append(Finding("nms.iou_threshold", iou, "likely", "the usual one: set it as the model is deployed"))
    findings.append(Finding("dataset", "coco", "certain", f"run on {pictures.origin}"))
    variant = _variant(name, path, findings)
    root = data if labelled else unlabelled_root(pictures.folder, variant.classes)
    return Guessed(variant, findings, root, pictures.origin if labelled else f"{pictures.origin}, without labels")


def _entries(pictures: Pictures) -> list[ImageEntry]:
    if pictures.dataset is not None:
        return pictures.dataset.images
    return [ImageEntry(index, path.name, path) for index, path in enumerate(files_in(pictures.folder), 1)]


def look_at(
    runner: Runner, entries: list[ImageEntry], size: InputSize, asked: Asked, progress: Progress
) -> list[Named]:
    """What the model says of the first pictures, prepared in every way that the command line leaves."""
    ways = [hypothesis(kind, order) for kind, order in hypotheses(asked)]
    answers = []
    for entry in entries[:LOOKED_AT]:
        image = read_image(entry.path)
        for way in ways:
            answers.append(runner.run(preprocess(image, size, way)[0][None]))
            progress("outputs", len(answers), len(ways) * min(LOOKED_AT, len(entries)))
    return answers


def _jury(runner: Runner, entries: list[ImageEntry], pictures: Pictures, labelled: bool, progress: Progress) -> Jury:
    done = 0
    # At least: ranges that are as good as each other are shown all pictures.
    least = len(RANGES) * 2 * min(FIRST, len(entries)) + 3 * min(MORE, len(entries))

    def moved() -> None:
        nonlocal done
        done += 1
        progress("preprocess", done, max(done, least))

    return Jury(runner, entries, pictures.dataset if labelled else None, moved)


def _labelled(pictures: Pictures, variant: Variant) -> bool:
    """Whether the labels are of such a model.  Raises AlignError where the user gave them for it and they are not."""
    dataset = pictures.dataset
    if dataset is None:
        return False
    if pictures.given:
        dataset.require_classes(variant.classes, variant.name)
        if variant.rotated:
            dataset.require_rotated(variant.name)
    fits = len(dataset.category_ids) == variant.classes
    return fits and (not variant.rotated or all("rbox" in a for a in dataset.truth["annotations"]))


def _three_by_three(head: HeadFound) -> bool:
    """Whether the known tables of anchors could be those of this head."""
    strides = next((f.value for f in head.findings if f.field == "source.head.strides"), None)
    return strides == [8, 16, 32]


def _settle_anchors(variant: Variant, prepared: list[Finding], jury: Jury, unsettled: Finding) -> Finding:
    if any(finding.sure == "open" for finding in prepared):
        return unsettled
    fields = as_fields(prepared)["preprocess"]
    return find_anchors(_with(variant, {"preprocess": fields}), jury, unsettled)


def _variant(name: str, path: Path, findings: list[Finding]) -> Variant:
    fields = as_fields(findings)
    source = {"kind": "onnx", "file": str(path.absolute()), **fields.pop("source")}
    return variant_of({"name": name, "source": source, **fields}, path)


def _with(variant: Variant, changes: dict) -> Variant:
    return Variant.model_validate({**variant.model_dump(), **changes})
