"""The RUN folder: ``alignment.json``, ``report.html``, ``junit.xml`` and the pictures that the first two point to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from alignment.errors import AlignError
from alignment.reading import checked, cut, read_json
from alignment.report.junit import to_junit
from alignment.results import SCHEMA_VERSION, Alignment, CaseResult, Explanation, Ladder
from alignment.storage import write_text

RESULTS = "alignment.json"
REPORT = "report.html"
JUNIT = "junit.xml"
#: The JSON Schema of `RESULTS`, as `json_schema` makes it: a change of it is a change of what others read.
SCHEMA = Path(__file__).with_name(f"alignment-{SCHEMA_VERSION}.schema.json")


def write_run(alignment: Alignment, folder: Path) -> None:
    """Writes ``alignment.json``, then ``report.html`` and ``junit.xml``, each whole or not at all.

    Floats that JSON has no word for are written as the strings ``"Infinity"``, ``"-Infinity"`` and ``"NaN"``, which
    `read_run` turns back.  The report takes in what other commands left in `folder`: see `alignment.report.gather`.

    Args:
        alignment: the results; pictures they name are already in `folder`.
        folder: the RUN folder, made when it does not exist.
    """
    from alignment.report.gather import beside
    from alignment.report.html import render

    write_text(folder / RESULTS, to_json(alignment))
    write_text(folder / REPORT, render(beside(alignment, folder)))
    write_text(folder / JUNIT, to_junit(alignment))


def to_json(result: BaseModel) -> str:
    """Typed results as strict JSON: floats that it has no word for are strings."""
    content = _finite(result.model_dump(mode="json"))
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_run(run: Path) -> Alignment:
    """Reads the results of a RUN: its folder, or its ``alignment.json``.

    Raises:
        AlignError: ``alignment.json`` is missing, not JSON, of another schema version, or not as the schema has it.
    """
    path = run if run.is_file() else run / RESULTS
    if not path.exists():
        raise AlignError(f"{path} does not exist", f"name the folder of a finished run, which holds {RESULTS}")
    content = read_json(path, "name the folder of a finished run", "run again: the file is damaged")
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        found = "no schema_version" if version is None else f"schema_version {cut(repr(version), 40)}"
        raise AlignError(
            f"{path} has {found}, this version of alignment reads {SCHEMA_VERSION}",
            "read it with the version that wrote it, or run again",
        )
    return checked(Alignment, content, path, "run again, or update alignment if a newer version wrote the file")


def merge(parts: list[Alignment]) -> Alignment:
    """Joins what the workers of one run found.

    Cases, explanations and ladders are ordered by id, and of one that occurs twice the last counts.  `created`,
    `command` and `machine` are those of the first part, `dataset` and `timing` are unions, where a later part replaces
    a key of an earlier one.

    Raises:
        AlignError: there is no part.
    """
    if not parts:
        raise AlignError("no results to merge", "run at least one case")
    cases: dict[str, CaseResult] = {}
    explanations: dict[str, Explanation] = {}
    ladders: dict[str, Ladder] = {}
    timing: dict[str, float] = {}
    for part in parts:
        timing.update(part.timing)
        explanations.update({one.id: one for one in part.explanations})
        ladders.update({one.variant: one for one in part.ladders})
        cases.update({case.case.id: case for case in part.cases})
    return Alignment(
        created=parts[0].created,
        command=parts[0].command,
        machine=parts[0].machine,
        dataset={name: value for part in parts for name, value in part.dataset.items()},
        timing=timing,
        cases=[cases[name] for name in sorted(cases)],
        explanations=[explanations[name] for name in sorted(explanations)],
        ladders=[ladders[name] for name in sorted(ladders)],
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of ``alignment.json``, as `write_run` writes it.

    Readers of one `SCHEMA_VERSION` pass over fields that they do not know, so the schema allows them.
    """
    found = Alignment.model_json_schema(mode="serialization", schema_generator=_Schema)
    return {
        "$schema": _Schema.schema_dialect,
        "$id": f"urn:alignment:run:{SCHEMA_VERSION}",
        **found,
        "required": ["schema_version", "created", "command"],
    }


class _Schema(GenerateJsonSchema):
    """Floats may be what `_finite` makes of them."""

    def float_schema(self, schema: Any) -> dict[str, Any]:
        """A number, or the name of one that JSON has not."""
        return {"anyOf": [super().float_schema(schema), {"enum": ["Infinity", "-Infinity", "NaN"]}]}


def _finite(value: Any) -> Any:
    """`value` with every infinity and NaN in it as a string that pydantic reads back as a float."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
