"""Where `align` may have to run: a full disk, no terminal, no colours, no UTF-8, no matplotlib."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from command_line import align, one_line
from fuzz_sound import Sound, place

from alignment.cli import app
from alignment.quantize.partial_result import Point
from alignment.quantize.sensitivity import LayerSensitivity, Sensitivity
from alignment.report.pareto import draw_pareto
from alignment.report.ranking import draw_ranking
from alignment.report.run_folder import read_run

PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
ENVIRONMENTS = {
    "no UTF-8": PLAIN,
    "ASCII alone": {**PLAIN, "PYTHONIOENCODING": "ascii"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
    "no colours": {"NO_COLOR": "1", "TERM": "dumb"},
    "colours asked for": {"FORCE_COLOR": "1", "COLUMNS": "20"},
    "no home": {"HOME": "/nowhere", "TERM": ""},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


def run(name: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "alignment.cli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **ENVIRONMENTS[name]},
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_help_is_there_everywhere(name):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert b"ladder" in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize("command", [command.callback.__name__ for command in app.registered_commands])
def test_the_help_of_every_command_can_be_said_in_ascii(command):
    from typer.testing import CliRunner

    result = CliRunner(charset="ascii").invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["ASCII alone"])
def test_a_run_with_names_from_all_over_the_world(name, sound, tmp_path):
    pytest.importorskip("torch")
    place(sound, tmp_path)
    data = shutil.copytree(sound.data, tmp_path / "bilder é")
    truth = data / "annotations" / "instances_val2017.json"
    truth.write_text(truth.read_text().replace('"name": "', '"name": "猫 × é '), encoding="utf-8")
    words = ["run", "tiny.yaml", "--backend", "onnxruntime", "--images", "2", "--data", "bilder é", "--out", "läuft"]
    done = run(name, *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert b"\x1b[" not in done.stdout
    (case,) = read_run(tmp_path / "läuft").cases
    assert "--data 'bilder é'" in case.command
    assert "--data &#39;bilder é&#39;" in (tmp_path / "läuft" / "report.html").read_text(encoding="utf-8")
    assert run(name, "report", "läuft", folder=tmp_path).returncode == 0
    wrong = run(name, "run", "ø.yaml", folder=tmp_path)
    assert wrong.returncode == 2
    assert one_line(wrong.stderr.decode(errors="replace")).startswith("align: ")


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files can have no more than so many bytes: what goes beyond is refused, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


COMMANDS = {
    "run": ["run", "tiny.yaml", "--backend", "onnxruntime", "--images", "2", "--out", "out", "--data", "data"],
    "records": ["run", "tiny.yaml", "--backend", "onnxruntime", "--images", "2", "--records", "out", "--data", "data"],
    "golden": ["run", "tiny.yaml", "--backend", "onnxruntime", "--images", "2", "--data", "data", "--golden", "out",
               "--update-golden", "why"],
    "quantize": ["quantize", "tiny.yaml", "--data", "data", "--out", "out"],
    "sensitivity": ["sensitivity", "tiny.yaml", "--data", "data", "--out", "out/a.sensitivity.json"],
    "partial": ["partial", "tiny.yaml", "--layers", "1", "--data", "data", "--out", "out"],
    "explain": ["explain", "decoded.yaml", "--images", "1", "--data", "data", "--out", "out"],
    "report": ["report", "run", "--out", "out/report.html"],
    "gate": ["gate", "run", "--json", "out/gate.json", "--summary", "out/gate.md"],
    "inspect": ["inspect", "run/yolov8_n-tensorrt-fp16.engine.json", "--out", "out"],
}  # fmt: skip


@pytest.mark.parametrize("room", [0, 20_000])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(name, room, sound, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    place(sound, tmp_path)
    (tmp_path / "data").symlink_to(sound.data)
    (tmp_path / "run").symlink_to(sound.run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    before = {}
    if room == 20_000:  # something is there already, which is not to be lost
        whole = align(*COMMANDS[name])
        assert whole.exit_code in (0, 1), whole.output
        before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with full_disk(room if room < 20_000 else min(map(len, before.values())) - 1):
        result = align(*COMMANDS[name])
    assert result.exit_code == 2, result.output
    assert "File too large" in one_line(result.stderr)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    for path, content in before.items():
        assert path.read_bytes() == content
    for path in (tmp_path / "out").rglob("*.yaml"):
        yaml.safe_load(path.read_text())


def test_no_matplotlib_is_told_before_anything_is_run(sound, tmp_path, monkeypatch):
    place(sound, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("alignment.quantize.sweep.sweep", lambda *_, **__: pytest.fail("it began"))
    for words in (
        ["partial", "tiny.yaml", "--layers", "1", "--out", "out"],
        ["sensitivity", "tiny.yaml", "--plot", "out/ranking.svg"],
    ):
        result = align(*words, "--data", sound.data)
        assert result.exit_code == 2, result.output
        assert "matplotlib" in one_line(result.stderr)
        assert not (tmp_path / "out").exists()


def test_a_report_needs_no_matplotlib(sound, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert align("report", sound.run, "--out", tmp_path / "report.html").exit_code == 0


NAMES = ["$a$b$c_{$", "猫/Conv", "<b>&amp;", "\\frac{", "$"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_plots_take_whatever_nodes_are_called(tmp_path):
    pytest.importorskip("matplotlib")
    layers = [LayerSensitivity(node=name, module="", macs=1, metrics={"agreement": 0.1}) for name in NAMES]
    shared = {"mode": "quantize-one", "part": "both", "identity": {}, "images": 1, "baseline": {"ap": 0.3}}
    draw_ranking(Sensitivity(variant="$a$b_{$", layers=tuple(layers), **shared), "agreement", tmp_path / "ranking.svg")
    points = [Point([name], 0.5 + 0.1 * place, 0.3, 0.01 * place, 0.9) for place, name in enumerate(NAMES)]
    draw_pareto(tmp_path / "pareto.svg", "$a$b_{$", points, points[0], {name: points[1] for name in NAMES})
    for name in ("ranking.svg", "pareto.svg"):
        root = ElementTree.parse(tmp_path / name).getroot()
        assert root.tag.endswith("svg")
        assert len(list(root.iter())) > 10
