"""The CI files: they parse, hang together, and every command in them exists with the options that it is given."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from command_line import align
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from alignment.cli import app
from alignment.gate.policy import load_policy
from alignment.pytest_plugin import MARKERS

ROOT = Path(__file__).parent.parent
if not (ROOT / "tox.ini").is_file():
    pytest.skip("not in a checkout", allow_module_level=True)
GITHUB = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
GITLAB = yaml.safe_load((ROOT / ".gitlab-ci.yml").read_text())
DOCKERFILE = (ROOT / "ci" / "Dockerfile").read_text()
SCRIPTS = sorted((ROOT / "ci").glob("*.sh"))
#: What GitLab's file has beside jobs.
GLOBAL = {"stages", "workflow", "variables"}


def steps() -> list[dict[str, Any]]:
    return [step for job in GITHUB["jobs"].values() for step in job["steps"]]


def gitlab_jobs() -> dict[str, dict[str, Any]]:
    return {name: job for name, job in GITLAB.items() if name not in GLOBAL}


def shell() -> dict[str, str]:
    """Every piece of shell, by where it stands."""
    found = {path.name: path.read_text() for path in SCRIPTS}
    found |= {f"release.yml {i}": step["run"] for i, step in enumerate(steps()) if "run" in step}
    found |= {f".gitlab-ci.yml {name}": "\n".join(job["script"]) for name, job in gitlab_jobs().items()}
    ran = re.findall(r"^RUN (.*?[^\\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return found | {f"Dockerfile {i}": text for i, text in enumerate(ran)}


def commands(program: str, texts: Iterable[str] | None = None) -> Iterator[list[str]]:
    """The words of each command of a program, without the program, wherever it is run from."""
    for text in shell().values() if texts is None else texts:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                before = words[place - 1] if place else ""
                if Path(word).name == program and (not place or before in ("-m", "--", "alignment-gpu", "&&")):
                    rest = words[place + 1 :]
                    yield rest[: next((i for i, w in enumerate(rest) if w in ("&&", "||", ";", "|", ">>")), None)]


def options(words: list[str]) -> list[str]:
    """The options among words, up to ``--``."""
    words = words[: words.index("--")] if "--" in words else words
    return [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


@pytest.mark.parametrize("name", shell())
def test_shell_parses(name: str):
    done = subprocess.run(["bash", "-n"], input=shell()[name], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_executed_and_stop_at_the_first_failure(path: Path):
    assert path.stat().st_mode & 0o111
    assert "set -euo pipefail" in path.read_text()


def test_the_programs_that_matter_are_found():
    """The tests below look at something."""
    assert {words[0] for words in commands("align")} >= {"gate", "doctor"}
    assert list(commands("pytest"))
    assert list(commands("tox"))
    assert any("ci/records.sh" in text for text in shell().values())


def wrong(texts: Iterable[str] | None = None) -> list[str]:
    """What the commands ``align`` are given that does not exist."""
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = []
    for name, *words in commands("align", texts):
        offered = {option for parameter in known[name].params for option in parameter.opts} if name in known else {name}
        found += [f"{name} {option}" for option in options(words) if option not in offered]
        found += [] if name in known else [name]
    return found


def test_align_commands_exist_with_their_options():
    assert wrong() == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("align gate run --basline b", ["gate --basline"]),
        ("docker run --rm alignment-gpu \\\n  align run --recods=x && true --nothing", ["run --recods"]),
        ("tox exec -e conformance -- align release", ["release"]),
        ("align gate run --summary s # --basline", []),
        ("echo align gate --basline", []),
    ],
)
def test_what_does_not_exist_is_found(text: str, found: list[str]):
    assert wrong([text]) == found


def test_pytest_commands_have_options_that_exist_and_name_files_and_markers_that_do():
    command = [sys.executable, "-m", "pytest", "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", told))
    for words in [*commands("pytest"), *behind_tox()]:
        assert set(options(words)) <= known, words
        for word in words:
            assert not word.endswith(".py") or (ROOT / word).is_file(), word
        for place, word in enumerate(words):
            if word == "-m":
                assert set(re.findall(r"\w+", words[place + 1])) - {"and", "or", "not"} <= MARKERS.keys()


def behind_tox() -> Iterator[list[str]]:
    """What ``tox run -e conformance -- ...`` hands to pytest."""
    for words in commands("tox"):
        if words[0] == "run" and "--" in words:
            yield words[words.index("--") + 1 :]


def test_tox_commands_name_environments_and_options_that_exist():
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "tox.ini")
    for name, *words in commands("tox"):
        environments = words[words.index("-e") + 1].split(",")
        assert all(config.has_section(f"testenv:{one}") for one in environments)
        if find_spec("tox"):
            command = [sys.executable, "-m", "tox", name, "--help"]
            told = subprocess.run(command, capture_output=True, text=True, check=True)
            assert set(options(words)) <= set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", told.stdout)), words


def test_scripts_that_are_called_are_there():
    called = {name for text in shell().values() for name in re.findall(r"\bci/\w+\.sh", text)}
    assert called == {f"ci/{path.name}" for path in SCRIPTS}


def test_github_jobs_need_jobs_and_artifacts_that_are_there_and_actions_are_pinned():
    jobs = GITHUB["jobs"]
    for job in jobs.values():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= jobs.keys()
        assert job["timeout-minutes"]
    used = [step["uses"] for step in steps() if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used), used
    artifacts: dict[str, set[str]] = {"up": set(), "down": set()}
    for step in steps():
        for way in artifacts:
            if f"/{way}load-artifact" in step.get("uses", ""):
                artifacts[way].add(step["with"]["name"])
    assert artifacts["down"]
    assert artifacts["down"] <= artifacts["up"]


def test_gitlab_jobs_are_in_stages_and_need_earlier_ones():
    jobs = gitlab_jobs()
    for job in jobs.values():
        assert job["stage"] in GITLAB["stages"]
        for needed in job.get("needs", []):
            assert GITLAB["stages"].index(jobs[needed]["stage"]) < GITLAB["stages"].index(job["stage"])


def test_a_replay_that_failed_fails_the_job_though_the_gate_passes():
    replay = next(step for step in GITHUB["jobs"]["gate"]["steps"] if step.get("run") == "ci/replay.sh")
    counted = [step for step in steps() if step.get("if") == f"steps.{replay['id']}.outcome == 'failure'"]
    assert [step["run"].endswith("exit 1") for step in counted] == [True]
    for replayed, gated in ((0, 0), (1, 0), (0, 1), (1, 1)):
        functions = {"pip": 0, "ci/replay.sh": replayed, "ci/baseline_gitlab.sh": 0, "ci/gate.sh": gated}
        stubs = "".join(f"{name}() {{ return {status}; }}\n" for name, status in functions.items())
        text = "\n".join([stubs, "set -e", *GITLAB["gate"]["script"]])
        assert subprocess.run(["bash", "-c", text], check=False).returncode == max(replayed, gated)


def baseline(folder: Path, script: str, program: str, answers: str) -> tuple[int, str, bool]:
    """A script of ``ci/`` in a folder of its own with `program` replaced: status, stdout, whether it got a report."""
    (folder / "ci").mkdir()
    (folder / "bin").mkdir()
    (folder / "ci" / script).write_text((ROOT / "ci" / script).read_text())
    stub = folder / "bin" / program
    stub.write_text(f"#!/usr/bin/env bash\n{answers}\n")
    stub.chmod(0o755)
    given = {"GITHUB_REF_NAME": "v2.0", "CI_COMMIT_SHA": "HEAD", "CI_JOB_TOKEN": "t", "CI_API_V4_URL": "u"}
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "CI_PROJECT_ID": "1", "HOME": str(folder), **given}
    command = ["bash", str(folder / "ci" / script)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    return done.returncode, done.stdout.strip(), (folder / "baseline" / "alignment.json").is_file()


GET = 'download) [ "$3" = v1.0 ] || exit 9; mkdir -p baseline; echo > baseline/alignment.json;;'


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ("list) printf 'v2.0\\nv1.0\\n';; view) echo alignment.json;;", (0, "", True)),
        ("list) printf 'v2x0\\nv1.0\\n';; view) echo alignment.json;;", (9, "", False)),
        ("list) printf 'v1.0\\n';; view) echo report.html;;", (0, "release v1.0 has no report", False)),
        ("list) echo v2.0;;", (0, "there is no release yet", False)),
        ("list) ;;", (0, "there is no release yet", False)),
        ("list) exit 4;;", (4, "", False)),
        ("list) echo v1.0;; view) exit 4;;", (4, "", False)),
    ],
)
def test_github_gives_a_baseline_or_says_that_there_is_none_and_no_answer_is_a_failure(tmp_path, answers, found):
    assert baseline(tmp_path, "baseline_github.sh", "gh", f'case "$2" in {answers} {GET} esac') == found


@pytest.mark.parametrize(
    ("tags", "curl", "found"),
    [
        (["v1.0"], "echo > baseline/alignment.json; printf 200", (0, "", True)),
        (["v1.0"], "echo > baseline/alignment.json; printf 404", (0, "report of v1.0: HTTP 404", False)),
        (["v1.0"], "echo > baseline/alignment.json; printf 500", (1, "report of v1.0: HTTP 500", False)),
        (["v1.0"], "printf 000; exit 6", (6, "", False)),
        ([], "exit 9", (0, "there is no tag yet", False)),
    ],
)
def test_gitlab_gives_a_baseline_or_says_that_there_is_none_and_no_answer_is_a_failure(tmp_path, tags, curl, found):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e")
    subprocess.run([*git, "init", "--quiet"], check=True)
    for name in ("first", "second"):
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", name], check=True)
        for tag in tags if name == "first" else ():
            subprocess.run([*git, "tag", tag], check=True)
    assert baseline(tmp_path, "baseline_gitlab.sh", "curl", curl) == found
    assert GITLAB["gate"]["variables"]["GIT_DEPTH"] == "0"


@pytest.mark.parametrize(("records", "gate"), [(GITHUB["jobs"]["records"], GITHUB["jobs"]["gate"])])
def test_records_are_made_on_a_gpu_and_gated_without_one_and_no_fork_runs_there(records: dict, gate: dict):
    assert "gpu" in records["runs-on"]
    assert "gpu" not in gate["runs-on"]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in records["if"]
    assert GITLAB["records"]["tags"] == ["gpu"]
    assert "tags" not in GITLAB["gate"]


def test_the_dockerfile_is_one_and_installs_what_the_package_offers():
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).split("\n")
    known = ("ARG", "FROM", "RUN", "ENV", "COPY", "WORKDIR")
    assert all(line.startswith(known) for line in lines if line.strip())
    assert "FROM nvcr.io/nvidia/tensorrt:${TENSORRT}" in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = re.search(r"/src\[([\w,]+)\]", DOCKERFILE)
    assert asked
    assert set(asked[1].split(",")) <= project["optional-dependencies"].keys()
    for line in lines:
        if line.startswith("COPY"):
            assert all(source == "." or list(ROOT.glob(source)) for source in line.split()[1:-1]), line
    # One version of each everywhere.
    tox = (ROOT / "tox.ini").read_text()
    for pinned in re.findall(r"[\w-]+==[\w.]+", DOCKERFILE):
        assert pinned in tox


def test_the_policy_of_this_repository_lets_its_hard_variant_pass_and_the_packaged_one_does_not(tmp_path: Path):
    from alignment.engine import capabilities

    if capabilities.missing() is None:
        pytest.skip("TensorRT runs here: nothing is replayed")
    assert len(load_policy(ROOT / "ci" / "policy.yaml").rules) > len(load_policy().rules)
    command = ("run", "yolov6_embedded", "--backend", "onnxruntime,tensorrt", "--precision", "fp32,fp16,int8")
    routes = ("--route", "dynamic_range,implicit,implicit_entropy2,implicit_minmax,implicit_legacy")
    assert align(*command, *routes, "--out", tmp_path).exit_code == 0
    assert align("gate", tmp_path).exit_code == 1
    ours = align("gate", tmp_path, "--policy", ROOT / "ci" / "policy.yaml")
    assert ours.exit_code == 1  # `qdq` is required, and was not run
    assert [line for line in ours.stdout.splitlines() if "missing:" in line or "policy:" in line] == [
        "missing: the policy requires backend: tensorrt, precision: int8, route: qdq: no such case was run"
    ]
    qdq = ("run", "yolov6_embedded", "--backend", "tensorrt", "--precision", "int8", "--route", "qdq")
    assert align(*qdq, "--out", tmp_path / "qdq").exit_code == 0
    assert align("gate", tmp_path, tmp_path / "qdq", "--policy", ROOT / "ci" / "policy.yaml").exit_code == 0


def test_tox_installs_pinned_versions_of_all_that_it_asks_for():
    lines = (ROOT / "ci" / "constraints.txt").read_text().splitlines()
    parts = (line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in parts}
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    for name in ("conformance", "docs", "lint"):
        section = tox[f"testenv:{name}"]
        for extra in section["extras"].split():
            asked += project["optional-dependencies"][extra]
        asked += section.get("deps", "").split()
        assert "set_env" not in section, f"{name} would lose PIP_CONSTRAINT"
    assert tox["testenv"]["set_env"].endswith("constraints.txt")
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
