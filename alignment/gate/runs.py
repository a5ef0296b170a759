"""Several RUNs that are released as one."""

from __future__ import annotations

from pathlib import Path

from alignment.errors import AlignError
from alignment.report.run_folder import merge, read_run
from alignment.results import Alignment

MEND = "give each case in one RUN, all of a variant on one set of images"


def read_runs(paths: list[Path]) -> Alignment:
    """RUNs as one; a case that one of them skipped is that of another.

    Raises:
        AlignError: as `read_run`; and for what two RUNs hold, of which one would hide the other.
    """
    parts = [read_run(path) for path in paths]
    held: dict[tuple[str, str], Path] = {}
    prints: dict[str, tuple[Path, object]] = {}
    for path, part in zip(paths, parts, strict=True):
        names = [("case", case.case.id) for case in part.cases if case.status != "skip"]
        names += [("explanation", one.id) for one in part.explanations]
        for kind, name in names:
            if (kind, name) in held:
                raise AlignError(f"{path}: {kind} {name} is in {held[kind, name]} too", MEND)
            held[kind, name] = path
        for variant in {case.case.variant for case in part.cases if case.status != "skip"}:
            found = part.dataset_of(variant).get("fingerprint")
            other, known = prints.setdefault(variant, (path, found))
            if found != known:
                raise AlignError(f"{path}: {variant} was run on images {found}, in {other} on {known}", MEND)
    for part in parts:
        part.cases = [c for c in part.cases if c.status != "skip" or ("case", c.case.id) not in held]
    return merge(parts)
