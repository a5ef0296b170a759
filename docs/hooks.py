"""MkDocs: pages that are made of the code, of the README and of the plugin's notes."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from alignment.reference.pages import PAGES, home

ROOT = Path(__file__).parent.parent
NOTES = ROOT / "plugins_src" / "efficient_nms_rotated" / "NOTES.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them to the files of ``docs/``."""
    made = {name: page() for name, page in PAGES.items()}
    made["index.md"] = home((ROOT / "README.md").read_text(encoding="utf-8"))
    made["explanation/plugin.md"] = NOTES.read_text(encoding="utf-8")
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files
