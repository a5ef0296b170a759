"""The ladder from float to int8: its numbers are those of `align run`, each measured once, and the report has them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import yaml
from command_line import align, one_line
from test_report import Page

from alignment import ladder, session
from alignment.case import cases_of
from alignment.data.samples import open_samples
from alignment.errors import AlignError
from alignment.export.onnx_export import exported
from alignment.ladder import Step, measure, trained_step
from alignment.quantize import qat_files
from alignment.quantize.keep_float import write_keep_float
from alignment.report.ladder import cell, to_markdown
from alignment.report.run_folder import merge, read_run, write_run
from alignment.report.variants import VariantPart
from alignment.results import Alignment, Ladder, Rung, RungScore
from alignment.variant import Quantization, Variant, load_variant, with_quantization

pytestmark = pytest.mark.qat
NODE = "/detector/backbone/stage1/stage1.0/conv/Conv"
IMAGES, BACKENDS = 4, ("torch", "onnxruntime")
QUICK = ("--epochs", 1, "--images", 8, "--held-out", 4, "--distill", "logits")


@pytest.fixture(scope="module")
def light() -> Variant:
    pytest.importorskip("mmyolo")
    pytest.importorskip("pytorch_quantization")
    return with_quantization(load_variant("yolov5_embedded"), {"images": IMAGES})


@pytest.fixture(scope="module")
def steps(light) -> list[Step]:
    kept = with_quantization(light, {"keep_float": [NODE]})
    return [Step("FP32", light, int8=False), Step("PTQ", light), Step("partial", kept)]


@pytest.fixture(scope="module")
def found(light, steps) -> Ladder:
    return measure(steps, open_samples(light, limit=IMAGES), BACKENDS)


def test_numbers_are_those_of_align_run(steps, found):
    for step, rung in zip(steps, found.rungs, strict=True):
        cases = cases_of(step.variant, BACKENDS, ("int8" if step.int8 else "fp32",))
        results, _, _ = session.run_cases(step.variant, cases, session.SessionOptions(images=IMAGES))
        for case, result in zip(cases, results, strict=True):
            score = rung.on(case.backend)
            assert score.ap == result.scores.subject_ap
            if step.int8:
                assert score.agreement_ap == result.scores.agreement_ap < 1
                assert found.ap_change(rung, case.backend) == score.ap - found.rungs[0].on(case.backend).ap
            else:
                assert score.agreement_ap == 1
                assert found.ap_change(rung, case.backend) == 0
    assert found.reference == "yolov5_embedded-torch-fp32"


def test_shares(found):
    float32, ptq, kept = found.rungs
    assert float32.int8_macs == 0
    assert 0 < kept.int8_macs < ptq.int8_macs < 1
    assert kept.float_nodes == ptq.float_nodes + 1 < float32.float_nodes


class TestOnce:
    """A score is measured once, whenever and wherever that was."""

    @pytest.fixture
    def opened(self, monkeypatch) -> list[str]:
        """The cases that were run."""
        cases: list[str] = []

        def watched(variant, case, *arguments, **options):
            cases.append(case.id)
            return open_runner(variant, case, *arguments, **options)

        open_runner = ladder.open_runner
        monkeypatch.setattr(ladder, "open_runner", watched)
        return cases

    def test_killed_and_run_again(self, light, steps, found, opened):
        samples, states = open_samples(light, limit=IMAGES), []

        def kill(now: Ladder) -> None:
            states.append(now.model_copy(deep=True))
            if len(states) == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure(steps, samples, BACKENDS, keep=kill)
        again = measure(steps, samples, BACKENDS, states[-1], keep=lambda now: states.append(now))
        assert again == found
        assert len(states) == 6
        opened.clear()
        assert measure(steps, samples, BACKENDS, again) == found
        assert opened == []

    def test_of_another_backend_elsewhere(self, light, steps, found, opened):
        """What a GPU measured stays, but for the rung whose recipe is another by now."""
        samples, theirs = open_samples(light, limit=IMAGES), found.model_copy(deep=True)
        keys = ladder._Keys(samples, None)
        for step, rung in zip(steps, theirs.rungs, strict=True):
            rung.scores.append(RungScore(backend="tensorrt", ap=0.5, agreement_ap=0.75, key=keys.of(step, "tensorrt")))
        changed = replace(steps[2], variant=with_quantization(light, {"keep_float": ["/detector/neck/*"]}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ladder.capabilities, "missing", lambda: "no GPU")
            again = measure([*steps[:2], changed], samples, ("tensorrt", *BACKENDS), theirs)
            assert measure(steps, samples, ("tensorrt", *BACKENDS), theirs).missing == {}
        assert [rung.on("tensorrt") is not None for rung in again.rungs] == [True, True, False]
        assert again.missing == {"tensorrt": "no GPU"}
        assert opened == ["yolov5_embedded-torch-fp32", *(f"yolov5_embedded-{name}-int8-qdq" for name in BACKENDS)]

    def test_other_images_are_other_scores(self, light, steps, found, opened):
        measure(steps[:1], open_samples(light, limit=2), ("onnxruntime",), found)
        assert opened == ["yolov5_embedded-torch-fp32", "yolov5_embedded-onnxruntime-fp32"]


@pytest.fixture(scope="module")
def trained(light, tmp_path_factory) -> SimpleNamespace:
    """Trained from all in int8, and with a node in float."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = Quantization(**{**load_variant("yolov5_embedded").quantization.model_dump(), "images": IMAGES})
    write_keep_float(folder / "partial" / "keep_float.yaml", "v", exported(light).onnx, {NODE: "so"}, recipe)
    for name, options in (("qat", ()), ("qat_partial", ("--from", folder / "partial"))):
        planted = folder / "planted.yaml"
        fields = light.model_dump(mode="json", exclude_defaults=True)
        planted.write_text(yaml.safe_dump(fields))
        result = align("qat", planted, *options, *QUICK, "--out", folder / name)
        assert result.exit_code in (0, 1), result.output
    return SimpleNamespace(folder=folder, yaml=folder / "planted.yaml")


class TestCommand:
    def test_one_report_of_the_whole_ladder(self, light, trained, tmp_path):
        pytest.importorskip("matplotlib")
        asked = ("ladder", trained.yaml, "--images", IMAGES, "--backend", "onnxruntime", "--out", trained.folder)
        result = align(*asked)
        assert result.exit_code == 0, result.output
        (found,) = read_run(trained.folder).ladders
        names = [rung.name for rung in found.rungs]
        assert names == [
            "FP32",
            "PTQ",
            "partial",
            "QAT from PTQ, labels + distillation",
            "QAT from partial, labels + distillation",
        ]
        own = load_variant(trained.folder / "qat_partial" / "yolov5_embedded_qat.yaml")
        case = cases_of(own, ("onnxruntime",), ("int8",))
        (of_run,), _, _ = session.run_cases(own, case, session.SessionOptions(images=IMAGES))
        assert found.rungs[4].on("onnxruntime").agreement_ap == of_run.scores.agreement_ap
        assert re.match(
            r"trained on 8 images, by labels, logits of the float model, scales learnt: ", found.rungs[3].how
        )
        page = (trained.folder / "report.html").read_text()
        for rung in found.rungs:
            shown = cell(found, rung, "onnxruntime")
            assert shown in result.stdout
            assert shown in (trained.folder / "ladder.md").read_text()
            assert all(f">{part}</td>" in page for part in shown.split(" / "))
        assert [one["class"] for one in Page(page).all("svg") if one.get("class") == "chart"] == ["chart", "chart"]
        assert to_markdown(found) in align("table", trained.folder).stdout
        before = (trained.folder / "alignment.json").read_text()
        assert align(*asked).exit_code == 0
        scores = [json.loads(text)["ladders"] for text in (before, (trained.folder / "alignment.json").read_text())]
        assert scores[0] == scores[1]

    def test_rungs_that_are_not_there_are_made(self, trained, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        from alignment.models.mmyolo_source import require_mmyolo

        require_mmyolo()
        from alignment.quantize import qat

        monkeypatch.setattr(qat, "Options", partial(qat.Options, epochs=1, images=8, held_out=4, distill=()))
        monkeypatch.setattr("alignment.quantize.partial.Search", quick_search())
        asked = ("ladder", trained.yaml, "--images", 2, "--layers", 1, "--backend", "onnxruntime", "--out", tmp_path)
        result = align(*asked)
        assert result.exit_code == 0, result.output
        (found,) = read_run(tmp_path).ladders
        assert [rung.name for rung in found.rungs][3:] == ["QAT from PTQ, labels", "QAT from partial, labels"]
        made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*") if path.is_file()}
        assert {path.parent.name for path in made} == {"partial", "qat", "qat_partial"}
        assert align(*asked).exit_code == 0
        assert all(path.stat().st_mtime_ns == time for path, time in made.items())

    def test_a_file_brings_its_recipe_to_the_whole_ladder(self, light, tmp_path):
        pytest.importorskip("matplotlib")
        recipe = light.quantization.model_copy(update={"policy": "full"})
        write_keep_float(tmp_path / "the k.yaml", "v", exported(light).onnx, {NODE: "so"}, recipe)
        given = ("--until", "partial", "--partial", tmp_path / "the k.yaml", "--images", 2, "--backend", "onnxruntime")
        result = align("ladder", "yolov5_embedded", *given, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert "the k.yaml: its recipe is taken: policy full" in result.stdout
        (found,) = read_run(tmp_path / "out").ladders
        assert found.recipe["policy"] == "full"
        assert shlex.split(found.rungs[2].command)[-4:-2] == ["--keep-float", str(tmp_path / "the k.yaml")]
        command = found.rungs[1].command
        assert command == "align quantize yolov5_embedded --policy full --images 4 --out DIR"
        assert align(*command.replace("DIR", str(tmp_path / "q")).split()[1:]).exit_code == 0
        assert found.rungs[1].int8_macs == 1

    def test_what_align_run_left_in_the_folder_stays(self, tmp_path):
        pytest.importorskip("mmyolo")
        pytest.importorskip("matplotlib")
        quick = ("yolov5_embedded", "--images", 2, "--backend", "onnxruntime", "--out", tmp_path)
        assert align("run", *quick).exit_code in (0, 1)
        before = read_run(tmp_path)
        result = align("ladder", *quick, "--until", "ptq")
        assert result.exit_code == 0, result.output
        after = read_run(tmp_path)
        assert after.cases == before.cases != []
        assert after.dataset == before.dataset != {}
        assert [one.variant for one in after.ladders] == ["yolov5_embedded"]
        assert align("run", *quick).exit_code in (0, 1)
        assert read_run(tmp_path).ladders == after.ladders

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            (["--backend", "tvm"], "--backend tvm: no such backend: choose from torch, onnxruntime, tensorrt"),
            (["--partial", "none.yaml"], "none.yaml: No such file"),
            (["--until", "all"], "--until"),
            (["--backend", ","], "--backend ',': none: choose from torch, onnxruntime, tensorrt"),
            (["--qat", "none.yaml"], "none.yaml: No such file"),
            (["--qat", "yolov5_embedded"], "yolov5_embedded: not trained: give the NAME_qat.yaml"),
            (["--until", "partial", "--qat", "a"], "--qat: no such rung with --until partial: leave it out, or give"),
            (["--until", "ptq", "--partial", "a"], "--partial: no such rung with --until ptq: leave it out, or give"),
        ],
    )
    def test_wrong_usage_is_one_line(self, tmp_path, options, line):
        pytest.importorskip("mmyolo")
        pytest.importorskip("matplotlib")
        result = align("ladder", "yolov5_embedded", *options, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert line in one_line(result.stderr) if "--until" not in options else line in result.stderr
        assert not (tmp_path / "out").exists()


def quick_search():
    from alignment.quantize.search import Search

    return lambda rankings, objective, *_: Search(rankings, objective, tries=1, swaps=0)


class TestTrainedRung:
    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"options": {}, "images": 1, "epochs": [1], "best": 0}'])
    def test_papers_that_do_not_say_all(self, light, trained, tmp_path, content):
        for file in (trained.folder / "qat").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "yolov5_embedded.qat.json").write_text(content)
        step = trained_step(tmp_path, light, None)
        assert (step.name, step.how) == ("QAT from PTQ", "trained")

    def test_papers_of_an_earlier_training_go_before_its_weights_do(self, light, tmp_path):
        """Else a folder that was killed between is taken for a whole one."""
        told = qat_files.papers(tmp_path, light.name)
        told.write_text("{}")

        def killed(path):
            raise KeyboardInterrupt

        outcome = SimpleNamespace(trained=SimpleNamespace(save=killed))
        with pytest.raises(KeyboardInterrupt):
            qat_files._write(outcome, {}, light, tmp_path, None)
        assert not told.exists()

    def test_of_another_recipe(self, light, trained):
        other = with_quantization(light, {"policy": "conv-only"})
        with pytest.raises(AlignError, match=r"trained with policy tensorrt, but the ladder is of policy conv-only"):
            trained_step(trained.folder / "qat", other, None)

    def test_of_another_network(self, light, trained):
        other = light.model_copy(update={"nms": light.nms.model_copy(update={"iou_threshold": 0.5})})
        with pytest.raises(AlignError, match=r"another network than yolov5_embedded"):
            trained_step(trained.folder / "qat", other, None)

    def test_not_trained(self, light, trained):
        with pytest.raises(AlignError, match=r"planted\.yaml: not trained"):
            trained_step(trained.yaml, light, None)

    def test_begun_elsewhere(self, light, trained):
        assert trained_step(trained.folder / "qat_partial", light, None).name.startswith("QAT from 1 kept in float")


def planted(**more) -> Ladder:
    """Without truth, on a backend that one rung was not measured on."""
    scores = [RungScore(backend=name, ap=-1, agreement_ap=0.25) for name in BACKENDS]
    rungs = [
        Rung(name="FP32", float_nodes=9, int8_macs=0, scores=scores[:1]),
        Rung(name="<b>PTQ", how="<script>", float_nodes=2, int8_macs=0.5, scores=scores),
    ]
    return Ladder(variant="v", images=3, reference="v-torch-fp32", rungs=rungs, **more)


class TestReport:
    def test_without_truth(self):
        assert cell(planted(), planted().rungs[1], "torch") == "- / - / 0.2500"
        assert cell(planted(), planted().rungs[0], "onnxruntime") == "-"
        legend, *drawn = VariantPart("v", ladder=planted()).plots
        assert len(drawn) == 1  # agreement alone
        assert "<b>PTQ" not in drawn[0]
        assert all(backend in legend for backend in ("torch", "onnxruntime"))

    def test_markdown(self):
        lines = to_markdown(planted(missing={"tensorrt": "no GPU"})).splitlines()
        assert lines[2] == "| rung | nodes in float | multiplications in int8 | torch | onnxruntime |"
        assert lines[5] == "| <b>PTQ | 2 | 50.0% | - / - / 0.2500 | - / - / 0.2500 |"
        assert lines[-1] == "- tensorrt: not measured: no GPU"

    def test_folder(self, tmp_path):
        run = Alignment(created="2025-06-01", command="align ladder v", ladders=[planted()])
        write_run(run, tmp_path)
        assert read_run(tmp_path) == run
        page = (tmp_path / "report.html").read_text()
        assert "<b>PTQ" not in page
        assert "2 rungs from float to int8" in page
        other = planted(missing={"tensorrt": "no GPU"})
        assert merge([run, run.model_copy(update={"ladders": [other]})]).ladders == [other]
