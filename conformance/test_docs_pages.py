"""The pages that are written by hand hold together: fences, links, navigation, and the YAML that they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from documentation import LANGUAGES, ROOT, blocks, name, pages
from pydantic import TypeAdapter

from alignment.gate.policy import load_policy
from alignment.onnx_head import OnnxHead
from alignment.reference.pages import PAGES
from alignment.variant import load_variant

if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("not in a checkout", allow_module_level=True)
#: Pages that are made of other files of the repository.
COPIED = {"index.md": "README.md", "explanation/plugin.md": "plugins_src/efficient_nms_rotated/NOTES.md"}
BY_HAND = {page.relative_to(ROOT / "docs").as_posix() for page in pages() if page.name != "README.md"}


@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_fence_has_a_language_that_tests_know(page: Path):
    assert {block.language for block in blocks(page)} <= set(LANGUAGES)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_lead_somewhere(page: Path):
    made = {ROOT / "docs" / place for place in (*PAGES, *COPIED)}
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", page.read_text()):
        if not link.startswith("http"):
            target = (page.parent / link).resolve()
            assert target.is_file() or target in made, link


def test_every_page_is_in_the_navigation_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return [leaf for one in inner for leaf in leaves(one)]  # type: ignore[union-attr]

    placed = leaves(config["nav"])
    assert sorted(placed) == sorted({*BY_HAND, *PAGES, *COPIED})
    assert config["strict"]
    assert config["theme"]["font"] is False


def test_yaml_that_pages_show_is_what_it_says(tmp_path: Path):
    """Whole files are variants and policies; heads fit their layout."""
    seen = set()
    for page in pages():
        for block in blocks(page):
            if block.language != "yaml":
                continue
            text = "\n".join(block.lines)
            for head in re.split(r"^(?=head:)", text, flags=re.MULTILINE)[1:]:
                TypeAdapter(OnnxHead).validate_python(yaml.safe_load(head)["head"])
                seen.add("head")
            path = tmp_path / "shown.yaml"
            path.write_text(text)
            if "\nsource:" in text:
                load_variant(path)
                seen.add("variant")
            if "rules:" in text:
                load_policy(path)
                seen.add("policy")
    assert seen == {"head", "variant", "policy"}


def test_pages_say_nothing_twice():
    """No paragraph, table row or block stands on two pages."""
    found: dict[str, str] = {}
    for page in pages():
        for paragraph in re.split(r"\n\s*\n|\n(?=\| )", page.read_text()):
            said = " ".join(paragraph.split())
            if len(said) > 120:
                assert found.setdefault(said, name(page)) == name(page), said
