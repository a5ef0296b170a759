"""The reference pages, made from the code: nothing is left out, and the table of NMS tells every choice."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from alignment import golden, pytest_plugin, variant
from alignment.gate import policy
from alignment.nms import implementations
from alignment.nms.semantics import Semantics
from alignment.onnx_head import OnnxHead
from alignment.reference import nms
from alignment.reference.command_line import commands
from alignment.reference.markdown import prose, table
from alignment.reference.pages import PAGES, home

COMMANDS = commands()


def rows(text: str) -> list[list[str]]:
    """The cells of all tables of a page."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_a_table_holds_bars_and_line_ends_in_its_cells():
    assert rows(table(["a", "b"], [["x|y", "1\n2"]])) == [["a", "b"], ["-", "-"], ["x\\|y", "1 2"]]


def test_a_docstring_is_markdown():
    text = "What ``it`` is.\n\nArgs:\n    first, second: of\n        two lines.\n    other_one: `x`."
    assert prose(text) == "What `it` is.\n\n- `first, second`: of two lines.\n- `other_one`: `x`."


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_one_title_and_whole_tables(name: str):
    text = PAGES[name]()
    assert re.findall(r"^# .+", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M) == [text.splitlines()[0]]
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(row) for row in rows(block)}) == 1, block


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_is_told_with_every_option(name: str):
    (section,) = re.findall(rf"^## align {name}\n(.*?)(?=^## |\Z)", PAGES["reference/cli.md"](), re.M | re.S)
    command = COMMANDS[name]
    assert " ".join(command.help.split()[:5]) in " ".join(section.split())
    told = rows(section)[2:]
    assert len(told) == len(command.params)
    for parameter, row in zip(command.params, told, strict=True):
        named = parameter.opts[0] != parameter.name
        assert all(f"`{option}`" in row[0] for option in parameter.opts + parameter.secondary_opts if named)
        assert (row[2] == "required") == parameter.required
        assert row[3] == " ".join(parameter.help.split()).replace("|", "\\|")
        if isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool):
            assert row[2] == f"`{parameter.default}`"


def test_values_of_options_have_type_choices_and_bounds():
    text = PAGES["reference/cli.md"]()
    assert "| `--device` | `cpu`, `cuda` | `cpu` |" in text
    assert "| `--level` | integer from 0 to 5 | `3` |" in text
    assert "| `--keep-float` | text, several |" in text
    assert "align partial VARIANT --out OUT_DIR [OPTIONS]" in text


def models(*roots: type[BaseModel]) -> set[type[BaseModel]]:
    """Models, and those that their fields are of."""
    found: set[type[BaseModel]] = set()

    def visit(kind: Any) -> None:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in found:
            found.add(kind)
            for field in kind.model_fields.values():
                visit(field.annotation)
        for inner in get_args(kind):
            visit(inner)

    for root in roots:
        visit(root)
    return found


@pytest.mark.parametrize(
    ("page", "root", "elsewhere"),
    [
        ("reference/golden.md", golden.Golden, set()),
        ("reference/variant.md", variant.Variant, set()),
        ("reference/policy.md", policy.Policy, set()),
    ],
)
def test_every_model_of_a_file_has_its_fields_on_the_page(page: str, root: type[BaseModel], elsewhere: set):
    text = PAGES[page]()
    for model in models(root):
        (section,) = re.findall(rf"^## {model.__name__}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        assert [row[0] for row in rows(section)[2:]] == [f"`{field}`" for field in model.model_fields]
    for title, anchor in re.findall(r"\[(\w+)\]\(#(\w+)\)", text):
        assert f"\n## {title}\n" in text
        assert anchor == title.lower()


def test_fields_have_type_limits_and_default():
    text = PAGES["reference/variant.md"]()
    assert "| `height` | integer, ≥ 32, ≤ 8192, a multiple of 32 | required |" in text
    assert '| `resize` | `letterbox`, `letterbox_top_left`, `stretch` | `"letterbox"` |' in text
    assert "| `strides` | list of integer, > 0 | `[8, 16, 32]` |" in text
    assert all(f"[{head.__name__}](#{head.__name__.lower()})" in text for head in get_args(OnnxHead))
    assert "| `ap` | [GoldenAp](#goldenap) or null | none |" in PAGES["reference/golden.md"]()


def test_golden_limits_are_told_by_precision():
    told = {row[0]: row[1:] for row in rows(PAGES["reference/golden.md"]()) if len(row) == 1 + len(golden.DEFAULTS)}
    for place, limits in enumerate(golden.DEFAULTS.values()):
        assert {name: row[place] for name, row in told.items() if name.startswith("`") and row[place]} == {
            f"`{name}`": f"{value:g}" for name, value in limits.items()
        }


def test_the_packaged_policy_is_shown_whole():
    assert policy.PACKAGED.read_text().strip() in PAGES["reference/policy.md"]()


def test_the_suite_is_told_with_every_marker_and_option():
    told = {row[0] for row in rows(PAGES["reference/suite.md"]())}
    assert {f"`{name}`" for name in pytest_plugin.MARKERS} <= told
    source = inspect.getsource(pytest_plugin.pytest_addoption)
    assert {f"`{name}`" for name in re.findall(r'"(--[a-z-]+)"', source)} <= told


def test_every_implementation_of_nms_has_a_column():
    known = {
        f for _, f in inspect.getmembers(implementations, inspect.isfunction)
        if inspect.signature(f).return_annotation == "Semantics"
    }  # fmt: skip
    assert {column.function for column in nms.columns()} == known
    assert len(known) >= 6


def test_the_table_of_nms_tells_every_field():
    assert nms.untold() == []


OTHER: dict[str, Any] = {
    "topk": 7, "background": 3, "floor": -1.0, "topk_unit": "anchors", "candidate_cap": 77, "ties": "falling",
    "frame": "original", "classes": "together", "split": 11, "iou_rounding": 0.25, "max_per_class": 5, "max_output": 9,
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Semantics)])
def test_a_choice_that_changes_changes_the_table(field: str):
    """A threshold is the parameter itself; every other field is told."""
    base = Semantics(0.5, 0.5, topk=3, classes="offset")
    other = OTHER.get(field, not getattr(base, field))
    changed = dataclasses.replace(base, **{field: other})
    cells = [[row.answer(one, {}) for row in nms.ROWS] for one in (base, changed)]
    assert (cells[0] == cells[1]) == (field in ("score_threshold", "iou_threshold"))


#: Read in the sources and headers of the implementations, by hand.
KNOWN = {
    ("passes", "EfficientNMS_TRT"): "score ≥ threshold",
    ("passes", "mmyolo, mmrotate"): "score > threshold",
    ("goes, of two boxes the lower", "EfficientNMS_TRT"): "IoU ≥ threshold",
    ("goes, of two boxes the lower", "mmyolo, mmrotate"): "IoU > threshold; rotated boxes, on the CPU: IoU ≥ threshold",
    ("goes, of two boxes the lower", "INMSLayer"): "IoU > threshold",
    ("at most, whatever is asked for", "EfficientNMS_TRT"): "5000",
    ("at most, whatever is asked for", "ONNX NonMaxSuppression"): "no cap",
    ("IoU in pixels of the", "mmyolo, mmrotate"): "original",
    ("what does not pass", "EfficientNMS_TRT"): "is dropped; threshold below 0.007: stays a candidate, of score -32768",
    ("classes are kept", "EfficientNMS_TRT"): "apart; `class_agnostic: 1`: together",
    ("go on to NMS", "EfficientNMSRotated_TRT"): "the best `pre_nms_topk` (row, class) pairs",
}


def test_the_table_of_nms_says_what_is_known():
    head, _, *told = rows(PAGES["reference/nms.md"]())
    cells = {(row[0].strip("*"), head[i]): row[i] for row in told for i in range(1, len(head))}
    assert {place: cells[place] for place in KNOWN} == KNOWN


def test_the_readme_is_the_home_page(tmp_path: Path):
    assert home("[a](docs/howto/a.md), [b](https://x/docs/b)") == "[a](howto/a.md), [b](https://x/docs/b)"
