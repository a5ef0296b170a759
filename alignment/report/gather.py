"""What lies in RUN folders, read into one report: results, and what other commands left beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alignment.errors import AlignError
from alignment.gate.results import GateResult
from alignment.inspection.saved import Inspection, load_inspection
from alignment.quantize.partial_result import PARTIAL, PartialResult
from alignment.quantize.sensitivity import Sensitivity
from alignment.report.run_folder import RESULTS, merge, read_run
from alignment.results import Alignment

GATE = "gate.json"
#: How the files are called that a report takes in beside `RESULTS`, and what reads each.
READERS: dict[str, Any] = {
    "*.sensitivity.json": Sensitivity.load,
    PARTIAL: PartialResult.load,
    "*.engine.json": load_inspection,
    GATE: GateResult.load,
}
#: Where they lie in a RUN folder; `align ladder` leaves its search in the second.
PLACES = (".", "partial")


class Source(NamedTuple):
    """A run that results are from."""

    path: str
    created: str
    command: str
    machine: dict[str, Any]


@dataclass
class Gathered:
    """All that one report shows.

    Attributes:
        alignment: cases, explanations and ladders, of all runs as one.
        runs: where they are from.
        folders: id of a case or an explanation → the RUN folder with its pictures.
        sensitivities, partials, engines, gates: what lay beside them.
        notes: what was left out, and why.
    """

    alignment: Alignment
    runs: list[Source] = field(default_factory=list)
    folders: dict[str, Path] = field(default_factory=dict)
    sensitivities: list[Sensitivity] = field(default_factory=list)
    partials: list[PartialResult] = field(default_factory=list)
    engines: list[Inspection] = field(default_factory=list)
    gates: list[GateResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def folder_of(self, identity: str) -> Path:
        """The RUN folder that a case or explanation is from."""
        return self.folders[identity]

    def add(self, found: Any) -> None:
        """Takes what one of `READERS` read; a verdict of the gate only when it is on one of these runs."""
        if isinstance(found, Sensitivity):
            self.sensitivities.append(found)
        elif isinstance(found, PartialResult):
            self.partials.append(found)
        elif isinstance(found, Inspection):
            self.engines.append(found)
        elif any(run.created == found.run.created for run in self.runs):
            self.gates.append(found)
        else:
            self.notes.append(f"{GATE}: of another run, {found.run.path} of {found.run.created}")


def beside(alignment: Alignment, folder: Path) -> Gathered:
    """A run that is written into `folder`, with what lies there."""
    found = Gathered(alignment, [_source(folder, alignment)], dict.fromkeys(_ids(alignment), folder))
    _add_folder(found, folder)
    return found


def gather(paths: Sequence[Path]) -> Gathered:
    """What lies in folders, and single files; of a case that is there twice the last counts, and a note says so.

    Args:
        paths: RUN folders, folders of other results, and files of these names.

    Raises:
        AlignError: a path is not there, is a file that no report takes, or holds nothing to report.
    """
    runs = [(path if path.is_dir() else path.parent, read_run(path)) for path in paths if _is_run(path)]
    parts = [alignment for _, alignment in runs]
    found = Gathered(merge(parts) if parts else Alignment(created="", command=""))
    for folder, alignment in runs:
        found.runs.append(_source(folder, alignment))
        twice = [identity for identity in _ids(alignment) if identity in found.folders]
        if twice:
            found.notes.append(f"{', '.join(twice)}: in more than one run, shown as in {folder}")
        found.folders.update(dict.fromkeys(_ids(alignment), folder))
    for path in paths:
        if path.is_dir():
            _add_folder(found, path)
        elif path.name != RESULTS:
            found.add(_reader(path)(path))
    if not (parts or found.sensitivities or found.partials or found.engines):
        where = ", ".join(map(str, paths))
        raise AlignError(f"{where}: nothing to report", f"name the folder of a finished run, which holds {RESULTS}")
    return found


def _is_run(path: Path) -> bool:
    if not path.exists():
        raise AlignError(f"{path} does not exist", "name the folder of a finished run")
    return path.name == RESULTS or (path / RESULTS).is_file()


def _source(folder: Path, alignment: Alignment) -> Source:
    return Source(folder.name, alignment.created, alignment.command, alignment.machine)


def _ids(alignment: Alignment) -> list[str]:
    return [*(case.case.id for case in alignment.cases), *(one.id for one in alignment.explanations)]


def _add_folder(found: Gathered, folder: Path) -> None:
    """What cannot be read is noted: a report is not lost by a damaged file beside the results."""
    for path in _files(folder):
        try:
            found.add(_reader(path)(path))
        except AlignError as error:
            found.notes.append(f"{path.relative_to(folder)}: left out: {error.what}")


def _files(folder: Path) -> Iterator[Path]:
    for place in PLACES:
        for pattern in READERS:
            yield from sorted((folder / place).glob(pattern))


def _reader(path: Path) -> Any:
    for pattern, reader in READERS.items():
        if path.match(pattern):
            return reader
    raise AlignError(f"{path}: no file that a report takes", f"name a folder, or one of {', '.join(READERS)}")
