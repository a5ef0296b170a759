"""The wheel in an environment of its own: the suite runs there on a variant of one's own, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from alignment.results import Alignment
from alignment.variant import ZOO

ROOT = Path(__file__).parent.parent
TORCH, ORT = "my_detector-torch-fp32", "my_detector-onnxruntime-fp32"
SUITE = ("-m", "pytest", "--pyargs", "conformance", "--variant", "my.yaml", "-m", "fp32_alignment", "--images", "4")


class Installed(NamedTuple):
    """The wheel, and the environment that it is installed in."""

    wheel: Path
    bin: Path

    def run(self, program: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
        """A program of that environment, with nothing of this process's paths and pytest options."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHON", "TOX_"))}
        command = [str(self.bin / program), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Builds the wheel and installs it alone; what it requires is lent by the environment of this test."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not in a checkout")
    if not find_spec("hatchling"):
        pytest.skip("hatchling, which builds the wheel, is not installed: pip install '.[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv")
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # After its own site-packages, so that the wheel comes before an `alignment` that is installed here.
    (site / "lent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True, capture_output=True, timeout=300)
    return Installed(wheel, python.parent)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder that holds nothing but a variant of one's own."""
    fields = yaml.safe_load((ZOO / "yolov8_embedded.yaml").read_text())
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**fields, "name": "my_detector"}))
    return tmp_path


def test_the_wheel_holds_library_suite_and_golden_values_and_nothing_else(installed: Installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(built["packages"])
    for name in (
        "conformance/__init__.py",
        "conformance/command_line.py",
        "conformance/test_fp32_alignment.py",
        "alignment/gate/policy.yaml",
        "alignment/report/alignment-1.schema.json",
        "alignment/zoo/yolov8_embedded.yaml",
        "alignment/_golden/yolov8_embedded.yaml",
    ):
        assert name in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".lock")]


def test_library_and_helpers_of_the_suite_are_those_of_the_wheel(installed: Installed, tmp_path: Path):
    program = "import alignment, conformance, command_line; print(alignment.__file__, command_line.__file__)"
    done = installed.run("python", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(str(installed.bin.parent) in path for path in done.stdout.split())


def test_the_suite_runs_on_a_variant_of_ones_own_and_the_gate_takes_its_report(installed: Installed, empty: Path):
    pytest.importorskip("mmyolo")
    done = installed.run("python", *SUITE, "--report", "run", cwd=empty)
    assert done.returncode == 0, done.stdout + done.stderr
    run = Alignment.model_validate_json((empty / "run" / "alignment.json").read_text())
    assert {c.case.id: c.status for c in run.cases if c.status != "skip"}.items() >= {
        TORCH: "pass",
        ORT: "pass",
    }.items()
    assert {c.case.variant for c in run.cases} == {"my_detector"}
    gated = installed.run("align", "gate", "run", "--baseline", "run", cwd=empty)
    assert gated.returncode == 0, gated.stdout + gated.stderr


def test_it_fails_where_the_variant_misses_golden_values_of_ones_own(installed: Installed, empty: Path):
    pytest.importorskip("mmyolo")
    tolerances = {"boxes": {"value": 1e-12, "origin": "absurd"}}
    golden = {"variant": "my_detector", "cases": {ORT: {"tolerances": tolerances}}}
    (empty / "golden").mkdir()
    (empty / "golden" / "my_detector.yaml").write_text(yaml.safe_dump(golden))
    done = installed.run("python", *SUITE, "--golden", "golden", cwd=empty)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differs first at decoded: boxes" in done.stdout


def test_with_a_variant_only_tests_that_take_one_are_collected(installed: Installed, empty: Path):
    (empty / "test_mine.py").write_text("def test_mine(): pass\n")
    arguments = ("--pyargs", "conformance", "test_mine.py", "--variant", "my.yaml", "--collect-only", "-q")
    done = installed.run("python", "-m", "pytest", *arguments, cwd=empty)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.partition("::")[0].split("/")[-1] for line in done.stdout.splitlines() if "::" in line}
    assert files == {
        "test_mine.py",
        "test_fp32_alignment.py",
        "test_fp16_alignment.py",
        "test_int8_alignment.py",
    }
