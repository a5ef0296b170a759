"""The RUN folder of many cases."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Case, Contestant, Setting, Work

if TYPE_CHECKING:
    from alignment.results import Alignment

#: Cases of one variant, as a run on every backend has them.
OF_A_VARIANT = 13
_number = itertools.count()


def run_of(setting: Setting) -> Alignment:
    """`size` cases with pictures in the setting's folder: two real ones on four images, under many names."""
    from alignment.case import Case as Alignable
    from alignment.pipeline import RunOptions, align_live
    from alignment.results import Alignment
    from benchmarks.cases.images import scoring_samples

    samples = scoring_samples(setting, 4)
    variant = samples.variant
    asked = [Alignable(variant.name, "onnxruntime", "fp32"), Alignable(variant.name, "onnxruntime", "fp16")]
    live, _ = align_live(variant, asked, samples, RunOptions(out=setting.folder))
    cases = []
    for index in range(setting.size):
        found = live[index % len(live)]
        name = f"{variant.name}{index // OF_A_VARIANT}"
        own = found.case.model_copy(update={"variant": name, "id": f"{name}-{index}-{found.case.id}"})
        cases.append(found.model_copy(update={"case": own}))
    return Alignment(created="2025-06-01T12:00:00+00:00", command="align run", cases=cases)


def _folder(setting: Setting) -> Path:
    """An empty RUN folder with the pictures."""
    folder = Path(tempfile.mkdtemp(dir=setting.folder))
    (folder / "pictures").symlink_to(setting.folder / "pictures")
    return folder


def ours(setting: Setting) -> Work:
    """``alignment.json``, ``report.html`` with its pictures, ``junit.xml``."""
    from alignment.report.run_folder import REPORT, write_run

    found = run_of(setting)

    def work() -> Path:
        folder = _folder(setting)
        write_run(found, folder)
        return folder / REPORT

    return work


def data_alone(setting: Setting) -> Work:
    """The same results as JSON, by pydantic."""
    found = run_of(setting)

    def work() -> None:
        (setting.folder / f"{next(_number)}.json").write_text(found.model_dump_json(indent=2), encoding="utf-8")

    return work


def judge(setting: Setting, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """MB of the page."""
    return {"ours": {"page, MB": results["ours"].stat().st_size / 1e6}} if "ours" in results else {}


CASE = Case(
    name="report",
    title="The RUN folder of a run: data, the page with its pictures, and JUnit; there is no peer, and the data as "
    "JSON is the floor",
    axis="cases",
    sizes=(26, 52, 104),
    variant="yolov8_embedded",
    contestants=(
        Contestant("ours", "ours", ours),
        Contestant("the data as JSON", "floor", data_alone),
    ),
    judge=judge,
)
