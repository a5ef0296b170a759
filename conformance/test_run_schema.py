"""The JSON Schema of ``alignment.json``: it is the committed one, real runs validate, and what is wrong does not."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import RUN, align
from test_report import alignment, folder  # noqa: F401 - fixtures: a run with everything in it, infinities too

from alignment.report.run_folder import SCHEMA, json_schema
from alignment.results import SCHEMA_VERSION

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], place: str = "$") -> Iterator[str]:
    """Where `value` is not as `schema` has it: the part of JSON Schema 2020-12 that pydantic writes for results."""
    known = {"$ref", "$schema", "$id", "$defs", "title", "description", "default", "additionalProperties"}
    known |= {
        "anyOf",
        "const",
        "enum",
        "type",
        "properties",
        "required",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
    }
    assert schema.keys() <= known, schema.keys() - known
    if "$ref" in schema:
        yield from faults(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, place)
    if "anyOf" in schema and all(list(faults(value, one, root, place)) for one in schema["anyOf"]):
        yield f"{place}: {value!r} fits none"
    if "const" in schema and value != schema["const"]:
        yield f"{place}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place}: {value!r} is not in {schema['enum']}"
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        yield f"{place}: {value!r} is no {kind}"
    elif isinstance(value, dict):
        yield from (f"{place}: lacks {name}" for name in schema.get("required", []) if name not in value)
        other = schema.get("additionalProperties")
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, other if isinstance(other, dict) else {})
            yield from faults(item, inner, root, f"{place}.{name}")
    elif isinstance(value, list):
        first = schema.get("prefixItems", [])
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{place}: {len(value)} items"
        for index, item in enumerate(value):
            inner = first[index] if index < len(first) else schema.get("items", {})
            yield from faults(item, inner, root, f"{place}[{index}]")


def invalid(content: Any) -> list[str]:
    return list(faults(content, SCHEMA_FILE, SCHEMA_FILE))


SCHEMA_FILE = json.loads(SCHEMA.read_text(encoding="utf-8"))


def test_the_committed_schema_is_that_of_the_models():
    """Where it is not: `align schema > FILE`.  Is a field other than added as optional?  Then raise SCHEMA_VERSION."""
    assert json_schema() == SCHEMA_FILE
    assert json.loads(align("schema").stdout) == SCHEMA_FILE
    assert SCHEMA.name == f"alignment-{SCHEMA_VERSION}.schema.json"
    assert SCHEMA_FILE["$id"].endswith(f":{SCHEMA_VERSION}")


@pytest.fixture
def content(folder: Path) -> dict[str, Any]:  # noqa: F811
    return json.loads((folder / "alignment.json").read_text(encoding="utf-8"))


def test_a_run_with_everything_in_it_validates(content: dict[str, Any]):
    assert '"Infinity"' in json.dumps(content)
    assert invalid(content) == []


def test_a_real_run_validates(tmp_path: Path):
    pytest.importorskip("mmyolo")
    assert align(*RUN, "--out", tmp_path).exit_code == 0
    real = json.loads((tmp_path / "alignment.json").read_text(encoding="utf-8"))
    assert any(case["signature"] for case in real["cases"])
    assert invalid(real) == []


PLANTED: dict[str, Any] = {
    "another version": lambda run: run.update(schema_version=SCHEMA_VERSION + 1),
    "an older version": lambda run: run.update(schema_version=SCHEMA_VERSION - 1),
    "no version": lambda run: run.pop("schema_version"),
    "no command": lambda run: run.pop("command"),
    "an unknown status": lambda run: run["cases"][1].update(status="maybe"),
    "a case without id": lambda run: run["cases"][1]["case"].pop("id"),
    "a number as text": lambda run: run["cases"][1]["scores"].update(subject_ap="high"),
    "a number as truth": lambda run: run["cases"][1].update(images=True),
    "a box of three numbers": lambda run: run["cases"][1]["worst"][0]["reference"][0]["xyxy"].pop(),
    "a stage that is none": lambda run: run["cases"][1]["stages"][0].update(name="cooked"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_what_is_planted_is_found(content: dict[str, Any], fault: str):
    planted = copy.deepcopy(content)
    PLANTED[fault](planted)
    assert invalid(planted)


def test_an_optional_field_may_be_missing_and_a_later_one_be_there(content: dict[str, Any]):
    content["cases"][1].pop("timing")
    content["cases"][1]["later"] = 1
    assert invalid(content) == []
