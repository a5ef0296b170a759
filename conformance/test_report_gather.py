"""One report of several folders: everything is in it, nothing twice, damaged files are named, markup stays text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_line import align
from report_scenes import FAILS, MORE, VARIANT, search, sweep, write_everything
from test_report import INJECTION, Page, case

from alignment.case import Case
from alignment.errors import AlignError
from alignment.inspection.saved import load_inspection
from alignment.pipeline import RunOptions
from alignment.quantize.partial_result import PartialResult
from alignment.report.gather import Gathered, beside, gather
from alignment.report.html import render
from alignment.report.junit import to_junit
from alignment.report.markdown import to_markdown
from alignment.report.run_folder import merge, read_run, write_run
from alignment.report.variants import parts
from alignment.results import Alignment
from alignment.session import SessionOptions, command
from alignment.variant import golden_dir, load_variant


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("everything") / "run"
    write_everything(made)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Gathered:
    return gather([folder])


@pytest.fixture(scope="module")
def page(found: Gathered) -> str:
    return render(found)


def test_all_of_a_folder_is_taken_in(found: Gathered, folder: Path):
    assert found.alignment == merge([read_run(folder)])
    assert found.sensitivities == [sweep()]
    assert found.partials == [search()]
    assert [one.name for one in found.engines] == [f"{FAILS}-level0"]
    assert [one.verdict for one in found.gates] == ["stopped"]
    assert found.notes == []


def test_the_run_wrote_the_same_report(folder: Path, page: str):
    assert (folder / "report.html").read_text(encoding="utf-8") == page


def test_every_part_is_on_the_page(page: str):
    for heading in (
        "Verdicts",
        "Cases",
        "From FP32 to int8",
        "Stage by stage",
        "Divergences by cause",
        "Sensitivity of layers",
        "Partial quantization",
        "Inside the engine",
    ):
        assert re.search(rf"<h[23][^>]*>{heading}</h[23]>", page), heading
    for words in ("7.1 MB", "3.50 ms, batch 1, wall clock", "1 node in float", "<title>", "Built with"):
        assert words in page
    assert page.count('class="engine-graph"') == 1
    assert page.count('class="chart"') == 2 + 3  # AP and agreement by step; two Pareto fronts by share, one by time


def test_names_with_markup_stay_text(page: str):
    read = Page(page)
    assert len(read.all("script")) == 1
    assert not read.all("img")
    assert "<b>" not in page
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    assert INJECTION not in page
    identities = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(identities) == len(set(identities))


def test_the_policy_names_every_script_and_style(page: str):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    styles = re.findall(r"<style>", page)
    assert policy.partition("style-src")[2].partition(";")[0].count("sha256-") == len(styles) == 2
    assert " style=" not in page  # which the policy would drop


def test_a_gate_that_stopped_comes_first(page: str):
    assert "<h1>Stopped</h1>" in page
    assert page.index("What stops it") < page.index("Verdicts")
    assert f'<li><a href="#{FAILS}">' in page
    assert "First layers that answer otherwise" in page
    assert "<code>/backbone/" in page
    assert "What changed since the baseline" in page


def test_a_verdict_on_another_run_is_left_out(folder: Path, tmp_path: Path):
    write_run(Alignment(created="later", command="align run", cases=[case(MORE, "pass")]), tmp_path)
    shutil.copy(folder / "gate.json", tmp_path)
    found = gather([tmp_path])
    assert found.gates == []
    assert "of another run" in found.notes[0]
    assert "<h1>Aligned</h1>" in render(found)


def test_folders_are_joined_and_the_last_counts(folder: Path, tmp_path: Path):
    again = Alignment(
        created="2025-07-01", command="align run again", cases=[case(MORE, "fail"), case("z-a-fp32", "pass")]
    )
    write_run(again, tmp_path)
    found = gather([folder, tmp_path])
    assert [run.command for run in found.runs][1] == "align run again"
    assert {one.case.id: one.status for one in found.alignment.cases}[MORE] == "fail"
    assert found.folder_of(MORE) == tmp_path
    assert found.folder_of(FAILS) == folder
    assert found.notes == [f"{MORE}: in more than one run, shown as in {tmp_path}"]
    assert Page(render(found)).all("image")  # the pictures of the first are found in the first


def test_damaged_files_are_named_and_lose_nothing_else(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "run")
    names = ("a.sensitivity.json", "partial/partial.json", f"{FAILS}.engine.json", "gate.json")
    for name in names:
        path = tmp_path / "run" / name
        path.write_text(path.read_text()[:40])
    found = gather([tmp_path / "run"])
    assert {note.partition(": left out: ")[0] for note in found.notes} == set(names)
    assert "partial/partial.json: left out" in render(found)
    with pytest.raises(AlignError, match="no result of a search"):
        gather([tmp_path / "run" / "partial" / "partial.json"])


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"variant": 1}', "\xff"])
def test_what_is_no_search_is_one_line(tmp_path: Path, content: str | None):
    path = tmp_path / "partial.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(AlignError) as caught:
        PartialResult.load(path)
    assert str(path) in caught.value.what
    assert "\n" not in caught.value.what


def test_results_without_a_run_are_a_report_too(tmp_path: Path):
    sweep().save(tmp_path / "a.sensitivity.json")
    text = render(gather([tmp_path]))
    assert "<h1>Measured</h1>" in text
    assert "1 sweep" in text
    assert "Verdicts" not in text


def test_variants_take_what_is_theirs(found: Gathered):
    """By the longest name that fits; what fits none stands for itself."""
    engine = found.engines[0]
    others = [load_inspection(path) for path in sorted((golden_dir() / "engines").glob("yolov6*.engine.json"))]
    mixed = Gathered(
        found.alignment.model_copy(update={"cases": [*found.alignment.cases, case("yolov8-torch-fp32", "pass")]}),
        engines=[engine, *others],
    )
    by_name = {part.name: part for part in parts(mixed)}
    assert by_name[VARIANT].engines == [engine]
    assert by_name["yolov8"].engines == []
    assert [len(by_name[name].engines) for name in by_name if name.startswith("yolov6")] == [1]
    assert next(iter(by_name)) == VARIANT  # it has a case that fails


def test_steps_go_from_fp32_to_int8_and_then_up_the_ladder(found: Gathered):
    (part,) = (part for part in parts(found) if part.name == VARIANT)
    names = list(dict.fromkeys(row.step for row in part.rows))
    assert names[:3] == ["FP32", "FP16", "PTQ"]
    assert names[3].startswith("QAT")
    rung = next(row for row in part.rows if row.step == "PTQ")
    assert (rung.int8_macs, round(rung.change or 0, 4), rung.agreement_ap) == (0.9, -0.03, 0.9)
    sized = next(row for row in part.rows if row.size_bytes)
    assert (sized.backend, sized.reformats, sized.layers) == ("tensorrt", 4, 90)


def test_html_markdown_and_junit_say_the_same(folder: Path, page: str):
    """Of every case that ran: its AP, its verdict, and the checks that failed."""
    run = read_run(folder)
    tests = {one.attrib["name"]: one for one in ElementTree.fromstring(to_junit(run)).iter("testcase")}
    table = to_markdown(run)
    rows = {body["data-status"] for body in Page(page).all("tbody") if "data-status" in body}
    assert rows == {one.status for one in run.cases}
    for one in run.cases:
        word = "failure" if one.status == "fail" else "skipped" if one.status == "skip" else None
        assert [child.tag for child in tests[one.case.id] if child.tag != "system-out"] == ([word] if word else [])
        if one.scores and one.status == "fail":
            (failed,) = (check for stage in one.stages for check in stage.checks if not check.ok)
            assert f"{one.scores.reference_ap:.4f} → {one.scores.subject_ap:.4f}" in page
            assert f"{one.scores.reference_ap:.4f}" in table
            assert f"{failed.value:.2g} / " in table
            assert f"{failed.name} {failed.value:g}, allowed {failed.limit}" in (tests[one.case.id][0].text or "")
            assert re.search(rf'class="check bad"[^>]*>{failed.name} {failed.value:g}<', page)
            assert "**fails**" in table


def test_a_case_tells_the_command_that_runs_it_alone(tmp_path: Path):
    ran = ("run", "yolov8_embedded", "--backend", "onnxruntime,tensorrt", "--images", "2")
    align(*ran, "--precision", "fp32,fp16", "--out", tmp_path / "all")
    cases = {one.case.id: one for one in read_run(tmp_path / "all").cases}
    alone = "align run yolov8_embedded --backend onnxruntime --precision fp16 --images 2"
    first = cases["yolov8_embedded-onnxruntime-fp16"]
    assert first.command == alone
    assert f"<code>{alone}</code>" in (tmp_path / "all" / "report.html").read_text()
    assert cases["yolov8_embedded-tensorrt-fp32"].command.endswith("--backend tensorrt --precision fp32 --images 2")
    align(*alone.split()[1:], "--out", tmp_path / "alone")
    (again,) = read_run(tmp_path / "alone").cases
    assert (again.case, again.status, again.scores) == (first.case, first.status, first.scores)


def test_a_command_has_all_that_the_case_depends_on(tmp_path: Path):
    variant = load_variant("yolov8_embedded")
    how = RunOptions(golden=tmp_path / "my golden", batch=4)
    told = command(variant, Case("yolov8_embedded", "tensorrt", "int8", "qdq"), SessionOptions(tmp_path, 8, how))
    assert told == (
        f"align run yolov8_embedded --backend tensorrt --precision int8 --route qdq --data {tmp_path} --images 8 "
        f"--batch 4 --golden '{tmp_path}/my golden'"
    )
    assert command(variant, Case("yolov8_embedded", "torch", "fp32"), SessionOptions()) == (
        "align run yolov8_embedded --backend torch --precision fp32"
    )


class TestCommand:
    def test_one_folder(self, folder: Path, tmp_path: Path, page: str):
        shutil.copytree(folder, tmp_path / "run")
        (tmp_path / "run" / "report.html").unlink()
        result = align("report", tmp_path / "run")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == page

    def test_folder_and_files(self, folder: Path, tmp_path: Path):
        engine = next((golden_dir() / "engines").glob("yolov6*.engine.json"))
        result = align("report", folder, engine, "--out", tmp_path / "all.html")
        assert result.exit_code == 0, result.output
        text = (tmp_path / "all.html").read_text(encoding="utf-8")
        assert text.count('class="engine-graph"') == 2

    @pytest.mark.parametrize(
        ("name", "line"),
        [
            ("nowhere", "does not exist"),
            (".", "nothing to report"),
            ("other.json", "no file that a report takes"),
            ("a.sensitivity.json", "say where it goes: --out FILE"),
        ],
    )
    def test_wrong_usage_is_one_line(self, tmp_path: Path, name: str, line: str):
        (tmp_path / "other.json").write_text("{}")
        if name.endswith("sensitivity.json"):
            sweep().save(tmp_path / name)
        result = align("report", tmp_path / name)
        assert result.exit_code == 2
        assert line in result.stderr
        assert result.stderr.count("\n") == 1


def test_beside_reads_nothing_but_what_lies_there(tmp_path: Path):
    run = Alignment(created="x", command="align run", cases=[case(MORE, "pass")])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    sweep().save(tmp_path / "deep" / "a.sensitivity.json")
    assert beside(run, tmp_path).sensitivities == []
    assert json.loads(run.model_dump_json())["cases"]
