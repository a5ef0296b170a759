"""Every command of README and documentation exists as it is written; those that need no GPU, real data or minutes are
run, page by page, and print what the page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import align
from docs_not_run import NOT_RUN, reason
from documentation import PROGRAMS, ROOT, Command, Shown, commands, inline, name, pages, steps

from alignment.engine import capabilities
from alignment.pytest_plugin import MARKERS
from alignment.reference.command_line import commands as commands_of_align

if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("not in a checkout", allow_module_level=True)
ALIGN = commands_of_align()
EVERY = [command for page in pages() for command in commands(page)]
#: Images, where a page takes all and shows no output.
FEW = 4
NUMBER = re.compile(r"(?<![\d.])[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def options(words: list[str]) -> list[str]:
    """The options among words."""
    return [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


def joined(words: list[str]) -> list[str]:
    """The same, with the two words of a command of a group as one."""
    both = " ".join(words[:2])
    return [both, *words[2:]] if both in ALIGN else words


def wrong_align(words: list[str], inline: bool, synopsis: bool) -> str | None:
    """What the command line has against ``align`` with these words; in running text something may be left out."""
    if not words:
        return None if inline else "no command"
    words = joined(words)
    if words[0] not in ALIGN:
        return None if inline and any(name.startswith(f"{words[0]} ") for name in ALIGN) else f"no command {words[0]}"
    command = ALIGN[words[0]]
    offered = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    for option in options(words[1:]):
        if option not in offered:
            return f"no option {option}"
    if synopsis:
        return None
    try:
        command.make_context(words[0], words[1:])
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:  # of a usage error
            raise
        message = str(error.format_message())  # type: ignore[attr-defined]
        left_out = message.startswith("Missing") or "requires an argument" in message
        return None if inline and left_out else message
    return None


def complete(command: Command) -> bool:
    """Whether a command can be typed as it stands, which one in running text need not be."""
    program, *words = command.words
    if command.synopsis or not words or (command.inline and words[-1].startswith("--") and program != "align"):
        return False
    return program != "align" or wrong_align(words, False, False) is None


@pytest.fixture(scope="module")
def pytest_options() -> set[str]:
    """The options of pytest with its plugins."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stdout))


def wrong(command: Command, pytest_options: set[str]) -> str | None:
    """What does not exist of a command."""
    program, *words = command.words
    if program == "align":
        return wrong_align(words, command.inline, command.synopsis)
    if program == "pytest":
        unknown = [option for option in options(words) if option not in pytest_options]
        markers = re.findall(r"\w+", words[words.index("-m") + 1]) if "-m" in words else []
        unknown += [marker for marker in markers if marker not in {"and", "or", "not", *MARKERS}]
        return f"pytest has no {unknown}" if unknown else None
    if program == "python":
        return None if words[0] == "-m" and find_spec(words[1]) else f"no module: {words}"
    if program == "tox":
        config = ConfigParser(interpolation=None)
        config.read(ROOT / "tox.ini")
        asked = words[words.index("-e") + 1].split(",")
        missing = [environment for environment in asked if not config.has_section(f"testenv:{environment}")]
        return f"tox has no {missing}" if missing else None
    if program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = [extra for found in re.findall(r"\[([\w,]+)\]", command.text) for extra in found.split(",")]
        unknown = [extra for extra in extras if extra not in project["optional-dependencies"]]
        return f"no extra {unknown}" if unknown else None
    if program == "cmake":
        sources = [words[place + 1] for place, word in enumerate(words) if word == "-S"]
        return None if all((ROOT / source / "CMakeLists.txt").is_file() for source in sources) else "no CMakeLists.txt"
    return f"{program}: none of {PROGRAMS}"


@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_command_exists_as_it_is_written(page: Path, pytest_options: set[str]):
    found = {command.place: wrong(command, pytest_options) for command in commands(page)}
    assert {place: what for place, what in found.items() if what} == {}


def test_options_in_running_text_exist(pytest_options: set[str]):
    known = {option for c in ALIGN.values() for p in c.params for option in p.opts + p.secondary_opts} | pytest_options
    known |= {"--help", "--pyargs", "--no-deps"}
    for page in pages():
        for line, text in inline(page):
            if text.startswith("--"):
                assert set(options(shlex.split(text))) <= known, f"{name(page)}:{line}: {text}"


def test_each_reason_not_to_run_is_needed():
    texts = [command.text for command in EVERY if complete(command)]
    first = {next((pattern for pattern, _ in NOT_RUN if fnmatchcase(text, pattern)), None) for text in texts}
    assert {pattern for pattern, _ in NOT_RUN} - first == set()


def to_run(page: Path) -> list[Command | Shown]:
    """What a test does of a page: its files, and the commands that have no reason not to be run."""
    return [s for s in steps(page) if isinstance(s, Shown) or (complete(s) and reason(s.text) is None)]


RUN = [page for page in pages() if any(isinstance(step, Command) for step in to_run(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for the engines that GPUs built, on a machine without real data."""
    for needed in ("mmyolo", "mmrotate", "pytorch_quantization", "matplotlib"):
        if not find_spec(needed):
            pytest.skip(f"the pages need {needed}")
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "engines").symlink_to(ROOT / "golden" / "engines")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path / "no_data"))
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=name)
def test_commands_of_a_page_run_in_order_and_print_what_it_says(page: Path, folder: Path):
    for step in to_run(page):
        if isinstance(step, Shown):
            (folder / step.name).write_text(step.text)
            continue
        status, printed = run(step)
        assert status == step.status, f"{step.place}: {step.text}: exit status {status}\n{printed}"
        if step.prints is not None and capabilities.missing() is not None:  # TensorRT's answers are replayed
            missing = unlike(step.prints, printed)
            assert missing is None, f"{step.place}: {step.text}: prints no {missing!r}\n{printed}"


def run(command: Command) -> tuple[int, str]:
    """Exit status and output."""
    program, *words = command.words
    if program == "align":
        offered = {option for parameter in ALIGN[joined(words)[0]].params for option in parameter.opts}
        few = ["--images", FEW] if command.prints is None and "--images" in offered - set(words) else []
        done = align(*words, *few)
        return done.exit_code, done.stdout + (repr(done.exception) if done.exit_code not in (0, 1, 2) else done.stderr)
    assert program == "pytest", command
    plugged = any(entry.value == "alignment.pytest_plugin" for entry in entry_points(group="pytest11"))
    plugin = [] if plugged else ["-p", "alignment.pytest_plugin"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", *words]
    finished = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return finished.returncode, finished.stdout + finished.stderr


def unlike(said: tuple[str, ...], printed: str) -> str | None:
    """The first line of what a page says that is not printed there; None where all are.

    Numbers, spaces and the borders of tables count for nothing; ``...`` is any number of lines, or the rest of one.
    """
    lines = [bare for bare in map(plain, printed.splitlines()) if bare]
    place, gap = 0, False
    for line in said:
        if line.strip() == "...":
            gap = True
            continue
        if not plain(line):
            continue
        pattern = re.compile(re.escape(plain(line)).replace(re.escape("..."), ".*"))
        fits = [i for i in range(place, len(lines)) if pattern.fullmatch(lines[i])]
        if not fits or (fits[0] > place and not gap):
            return line
        place, gap = fits[0] + 1, False
    return None if gap or place == len(lines) else f"end before {lines[place]}"


def plain(line: str) -> str:
    """What counts of a line."""
    return re.sub(r"[\s\u2500-\u257f]", "", NUMBER.sub("#", line))


PLANTED = """# Planted
`align run --nothing`, `align nothing`, `align quantize`, `align partial VARIANT [--layers K]`, and `align explain`

```sh
align quantize --out int8   # no variant
align explain yolov8_embedded --images many
pytest -m nothing
tox run -e nothing
pip install '.[nothing]'
python -m benchmarks.nothing
rm -rf runs
align variants
```
"""


def test_what_does_not_exist_is_found(tmp_path: Path, pytest_options: set[str]):
    page = tmp_path / "planted.md"
    page.write_text(PLANTED)
    found = {command.text: wrong(command, pytest_options) for command in commands(page)}
    right = {"align quantize", "align partial VARIANT [--layers K]", "align explain", "align variants"}
    assert {text for text, what in found.items() if what is None} == right
    assert len(found) == 13
    assert found["align run --nothing"] == "no option --nothing"
    assert "Missing" in str(found["align quantize --out int8"])


CONSOLE = """```console
$ align variants
...
yolov8_embedded ...
...
$ align gate nothing
align: nothing: no such file
$ echo $?
2
```
"""


def test_commands_of_a_console_have_their_output_and_status(tmp_path: Path):
    page = tmp_path / "console.md"
    page.write_text(CONSOLE)
    first, second = commands(page)
    assert (first.text, first.status, first.prints) == ("align variants", 0, ("...", "yolov8_embedded ...", "..."))
    assert (second.text, second.status, second.prints) == ("align gate nothing", 2, ("align: nothing: no such file",))
    status, printed = run(first)
    assert status == 0
    assert unlike(first.prints, printed) is None
    assert run(second)[0] == 2


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (("a 1.5", "b 2"), None),
        (("a 7", "..."), None),
        (("...", "b +3e-05"), None),
        (("a ...", "b 1"), None),
        (("a 1",), "end before b#"),
        (("b 2",), "b 2"),
        (("a 1", "...", "c"), "c"),
        (("...", "b 2", "a 1"), "a 1"),
        (("a 1 2", "b 2"), "a 1 2"),
    ],
)
def test_output_that_is_not_printed_is_found(said: tuple[str, ...], found: str | None):
    assert unlike(said, "┃ a ┃ 1.25\n━━━━\n│ b  2 │\n") == found


def test_the_pages_that_are_run_are_those_that_tell_a_story():
    ran = {name(page): [step for step in to_run(page) if isinstance(step, Command)] for page in RUN}
    assert len(ran["docs/tutorial.md"]) >= 16
    assert {"README.md", "docs/howto/new-variant.md", "docs/howto/gate.md", "docs/howto/own-repository.md"} <= set(ran)
    told = {command.words[1] for found in ran.values() for command in found}
    assert set(ALIGN) - told == {"ladder", "cache ls", "cache prune"}
