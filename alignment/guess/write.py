"""The YAML file of a variant, with the evidence of each field as a comment above it."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import yaml

from alignment.guess.findings import Finding, as_fields
from alignment.storage import writing
from alignment.variant import MMYoloSource, Variant

WIDTH = 110


def write_variant(path: Path, variant: Variant, findings: list[Finding], origin: str) -> None:
    """Writes ``NAME.yaml``.

    Args:
        path: the file.
        variant: whose name and source are written; all other fields are those of `findings`.
        findings: in any order; those of one group go together.
        origin: the command, for the first line.
    """
    with writing(path) as temporary:
        temporary.write_text(variant_text(path, variant, findings, origin), encoding="utf-8")


def header(origin: str) -> str:
    """The comment that the file begins with."""
    text = f"Written by `{origin}`.  Above each field its evidence, and how sure it is."
    return "\n".join(_comment(text, "")) + "\n"


def variant_text(path: Path, variant: Variant, findings: list[Finding], origin: str) -> str:
    """What `write_variant` writes."""
    fields = as_fields(findings)
    written: dict[str, Any] = {"name": variant.name, "source": _source(variant, path.parent, fields.pop("source", {}))}
    for group in ("input", "preprocess", "classes", "boxes", "nms", "dataset", "notes"):
        if group in fields:
            written[group] = fields[group]
    comments = {finding.field: f"{finding.sure}: {finding.evidence}" for finding in findings}
    return header(origin) + "\n".join(_lines(written, "", comments, {})) + "\n"


def _source(variant: Variant, folder: Path, head: dict[str, Any]) -> dict[str, Any]:
    source = variant.source
    if isinstance(source, MMYoloSource):
        options = {"options": source.options} if source.options else {}
        checkpoint = _beside(source.checkpoint, folder)
        return {"kind": "mmyolo", "config": source.config, "checkpoint": checkpoint, **options}
    return {"kind": "onnx", "file": _beside(source.file, folder), **head}


def _beside(path: Path, folder: Path) -> str:
    """Relative to the folder of the YAML where it lies in there, else as it is."""
    inside = path.absolute().is_relative_to(folder.absolute())
    return os.path.relpath(path.absolute(), folder.absolute()) if inside else str(path)


def _lines(
    node: dict[str, Any], prefix: str, comments: dict[str, str], said: dict[str, None], depth: int = 0
) -> list[str]:
    """The lines of a mapping; evidence that was said for the field before is not repeated."""
    lines: list[str] = []
    for key, value in node.items():
        field = f"{prefix}.{key}" if prefix else key
        margin = "  " * depth
        comment = comments.get(field)
        if comment is not None and comment not in said:
            said.clear()
            said[comment] = None
            lines += _comment(comment, margin)
        if isinstance(value, dict):
            lines += [f"{margin}{key}:", *_lines(value, field, comments, said, depth + 1)]
        else:
            lines.append(f"{margin}{key}: {_flow(value)}")
    return lines


def _comment(text: str, margin: str) -> list[str]:
    start = f"{margin}# "
    how = {"break_long_words": False, "break_on_hyphens": False, "fix_sentence_endings": True}
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start, **how)  # type: ignore[arg-type]


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump([value], default_flow_style=True, width=100_000, allow_unicode=True)
    return text.strip()[1:-1]
