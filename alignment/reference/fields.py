"""Typed files in tables: each model with what it says of itself, and its fields with type, limits and default."""

from __future__ import annotations

import inspect
import json
from typing import Any

from pydantic import BaseModel

from alignment.reference.markdown import code, prose, table

_LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "a multiple of {}",
    "pattern": "matching `{}`",
    "minItems": "{} or more",
}
_PLAIN = {"number": "number", "integer": "integer", "string": "text", "boolean": "true or false", "null": "null"}


def sections(*models: type[BaseModel]) -> list[str]:
    """Each model as a section of its name: its docstring, then a row a field."""
    return [_section(model) for model in models]


def _section(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    required = schema.get("required", [])
    rows = [
        [code(name), words(field), "required" if name in required else _default(field)]
        for name, field in schema["properties"].items()
    ]
    text = prose(inspect.cleandoc(model.__doc__ or ""))
    return f"## {model.__name__}\n\n{text}\n\n{table(['field', 'value', 'default'], rows)}"


def words(field: dict[str, Any]) -> str:
    """What a field of a JSON Schema takes, in words; another model is a link to its section."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in field:
        return code(field["const"])
    if "enum" in field:
        return ", ".join(map(code, field["enum"]))
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(words(arm) for arm in field[several])
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}: {words(field['prefixItems'][0])}"
        return f"list of {words(field['items'])}" + _limits(field)
    if field.get("type") == "object":
        inner = field.get("additionalProperties")
        keys = field.get("propertyNames", {}).get("enum")
        named = f" by {', '.join(map(code, keys))}" if keys else " by name"
        return (words(inner) if isinstance(inner, dict) else "any value") + named
    shown = "path" if field.get("format") == "path" else _PLAIN.get(field.get("type", ""), "any value")
    return shown + _limits(field)


def _limits(field: dict[str, Any]) -> str:
    return "".join(f", {text.format(field[key])}" for key, text in _LIMITS.items() if key in field)


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if isinstance(value, dict) and value:  # another model's, which has a table of its own
        return "its defaults"
    return "none" if value in (None, [], {}, "") else code(json.dumps(value, ensure_ascii=False))
