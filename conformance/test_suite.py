"""The suite itself, as a user runs it: workers change nothing, ``--strict`` fails skips, golden files are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignment.engine import capabilities
from alignment.results import Alignment, CaseResult

ROOT = Path(__file__).parent.parent
TORCH, ORT, TRT = (f"yolov8_embedded-{backend}-fp32" for backend in ("torch", "onnxruntime", "tensorrt"))
ORT16, TRT16 = (f"yolov8_embedded-{backend}-fp16" for backend in ("onnxruntime", "tensorrt"))


def suite(*options: object, precisions: tuple[str, ...] = ("fp32",), addopts: str = "") -> subprocess.CompletedProcess:
    """``pytest -m fp32_alignment`` on six images of the embedded variant, with a golden folder that holds nothing."""
    pytest.importorskip("mmyolo")
    files = [str(ROOT / "conformance" / f"test_{precision}_alignment.py") for precision in precisions]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-rs"]
    command += ["-m", " or ".join(f"{precision}_alignment" for precision in precisions)]
    command += ["--variant", "yolov8_embedded", "--images", "6", "-p", "no:cacheprovider"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTEST_ADDOPTS": addopts}
    return subprocess.run(
        [*command, *map(str, options)],
        cwd=ROOT,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def numbers(case: CaseResult) -> dict:
    """All that does not depend on the clock."""
    return case.model_dump(exclude={"timing", "provenance", "reference_provenance"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, tuple[subprocess.CompletedProcess, Path]]:
    """The suite without workers, and with two, ``--records`` and ``--strict``, which changes the exit status alone."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "golden").mkdir()
    done = {}
    for workers, options in ((0, ()), (2, ("--strict", "--records", folder / "records"))):
        out = folder / f"n{workers}"
        done[workers] = suite("-n", workers, "--report", out, "--golden", folder / "golden", *options), out
    return done


def test_two_workers_find_what_none_finds(runs):
    results = []
    for done, out in runs.values():
        assert (out / "report.html").is_file(), done.stdout + done.stderr
        results.append(Alignment.model_validate_json((out / "alignment.json").read_text()))
    alone, shared = results
    assert {c.case.id for c in alone.cases} == {TORCH, ORT, TRT}
    assert {c.case.id: c.status for c in alone.cases if c.status != "skip"}.items() >= {
        TORCH: "pass",
        ORT: "pass",
    }.items()
    assert {c.case.id: numbers(c) for c in shared.cases} == {c.case.id: numbers(c) for c in alone.cases}
    assert shared.dataset == alone.dataset
    assert shared.aligned
    assert alone.aligned


def test_the_report_holds_every_picture_that_it_names(runs):
    for _, out in runs.values():
        run = Alignment.model_validate_json((out / "alignment.json").read_text())
        named = {worst.picture for case in run.cases for worst in case.worst}
        assert named
        assert {p.relative_to(out).as_posix() for p in (out / "pictures").iterdir()} == named


def test_what_cannot_be_run_is_skipped_with_its_reason_and_with_strict_it_fails(runs):
    reason = capabilities.missing()
    if reason is None:
        pytest.skip("TensorRT runs here")
    (plain, _), (strict, _) = runs[0], runs[2]
    assert plain.returncode == 0
    assert "2 passed, 1 skipped" in plain.stdout
    assert strict.returncode == 1
    assert "2 passed, 1 error" in strict.stdout
    for done in (plain, strict):
        assert reason[:40] in done.stdout


COUNTER = """
import os
from alignment import pipeline
opened = pipeline.open_runner
def counting(variant, case, *rest):
    with open(os.environ["OPENED"], "a") as file:
        file.write(case.id + "\\n")
    return opened(variant, case, *rest)
pipeline.open_runner = counting
"""


@pytest.mark.parametrize(("workers", "precisions"), [(0, ("fp16",)), (2, ("fp16", "fp32"))])
def test_both_precisions_of_a_variant_run_together_and_each_marker_brings_its_own(
    tmp_path, monkeypatch, workers, precisions
):
    (tmp_path / "counter.py").write_text(COUNTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("OPENED", str(tmp_path / "opened"))
    options = "-p", "counter", "-n", workers, "--report", tmp_path / "out", "--golden", tmp_path / "golden"
    done = suite(*options, precisions=precisions)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = Alignment.model_validate_json((tmp_path / "out" / "alignment.json").read_text()).cases
    both = "fp32" in precisions
    assert {c.case.id for c in cases} == {ORT16, TRT16, *((TORCH, ORT, TRT) if both else ())}
    live = [line for line in (tmp_path / "opened").read_text().splitlines() if "tensorrt" not in line]
    assert sorted(live) == sorted([TORCH, ORT16, *([ORT] if both else [])])


@pytest.mark.parametrize(
    "error", ["RuntimeError('out of\\nmemory')", "AlignError('a.pth: is no checkpoint', 'get one')"]
)
def test_what_breaks_a_variant_fails_its_cases_in_the_report_so_that_a_gate_sees_it(tmp_path, monkeypatch, error):
    lines = ("from alignment import session", "from alignment.errors import AlignError")
    broken = ("def run_cases(*_):", "    print('ran', 'once')", f"    raise {error}", "session.run_cases = run_cases")
    (tmp_path / "breaker.py").write_text("\n".join([*lines, *broken]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = suite("-p", "breaker", "-s", "--report", tmp_path / "run")
    assert (done.returncode, done.stdout.count("ran once\n")) == (1, 1), done.stdout + done.stderr
    found = Alignment.model_validate_json((tmp_path / "run" / "alignment.json").read_text())
    assert {c.case.id: c.status for c in found.cases} == dict.fromkeys((TORCH, ORT, TRT), "fail")
    assert {c.reason for c in found.cases} <= {"RuntimeError: out of memory", "a.pth: is no checkpoint: get one"}
    assert (tmp_path / "run" / "report.html").is_file()


def test_update_golden_writes_the_file_and_the_next_run_holds_to_it(tmp_path):
    done = suite("--update-golden", "new machine", "--golden", tmp_path)
    assert done.returncode == 0, done.stdout
    path = tmp_path / "yolov8_embedded.yaml"
    golden = yaml.safe_load(path.read_text())
    assert set(golden["cases"]) >= {TORCH, ORT}
    tolerances = golden["cases"][ORT]["tolerances"]
    assert all("new machine" in tolerance["origin"] for tolerance in tolerances.values())
    assert golden["cases"][ORT]["ap"]["images"] == 6

    tolerances["boxes"]["value"] = 1e-9
    golden["cases"][TORCH]["ap"]["value"] += 0.1
    path.write_text(yaml.safe_dump(golden))
    failing = suite("--golden", tmp_path)
    assert failing.returncode == 1
    assert "2 failed" in failing.stdout
    assert "differs first at decoded: boxes" in failing.stdout
    assert "differs first at map: ap" in failing.stdout


def test_records_of_what_is_run_are_written_by_whichever_worker_ran_it(runs):
    _, out = runs[2]
    written = {path.name for path in (out.parent / "records").iterdir()}
    assert written >= {f"{case}.{end}" for case in (TORCH, ORT) for end in ("json", "npz")}


def test_an_unknown_variant_is_a_usage_error():
    done = suite("--variant", "yolov9000")
    said = done.stdout + done.stderr
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said.count("no variant is named 'yolov9000'") == 1
    assert len(said.strip().splitlines()) <= 3, said


@pytest.mark.parametrize("where", ["PYTEST_ADDOPTS", "addopts"])
def test_strict_counts_wherever_pytest_takes_options_from(tmp_path, where):
    if capabilities.missing() is None:
        pytest.skip("TensorRT runs here")
    given = ("-o", "addopts=--strict") if where == "addopts" else ()
    addopts = "--strict" if where == "PYTEST_ADDOPTS" else ""
    done = suite(*given, "--golden", tmp_path, "-k", "tensorrt", addopts=addopts)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 error" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--images", "0", "0 is no number of images: give 1 or more"),
        ("--images", "-3", "-3 is no number of images: give 1 or more"),
        ("--images", "six", "six is no number of images: give 1 or more"),
        ("--report", __file__, f"--report {__file__}: Not a directory"),
        ("--records", __file__, f"--records {__file__}: Not a directory"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(option, value, named):
    done = suite(option, value)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert named in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
