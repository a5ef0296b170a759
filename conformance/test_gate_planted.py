"""A checkpoint with one layer perturbed: the gate stops it against the last release, and names that layer."""

from __future__ import annotations

import pytest
import yaml
from command_line import CHECKPOINT, align

from alignment.gate.results import GateResult
from alignment.variant import ZOO

LAYER = "backbone.stage3.0.conv"
BACKENDS = ("--backend", "torch,onnxruntime", "--images", "16")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[GateResult, str, str]:
    """What the gate finds of a run with every fourth channel of one convolution tripled: result, stdout, Markdown."""
    pytest.importorskip("mmyolo")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("gate")
    weights = torch.load(CHECKPOINT, weights_only=True)
    weights[f"{LAYER}.weight"][::4] *= 3
    torch.save(weights, folder / "perturbed.pth")
    fields = yaml.safe_load((ZOO / "yolov8_embedded.yaml").read_text())
    fields["source"]["checkpoint"] = "perturbed.pth"
    (folder / "yolov8_embedded.yaml").write_text(yaml.safe_dump(fields))
    for name, variant in (("released", "yolov8_embedded"), ("candidate", folder / "yolov8_embedded.yaml")):
        # Backends agree with each other in both: only the gate can tell that the second is worse.
        assert align("run", variant, *BACKENDS, "--out", folder / name).exit_code == 0
    assert align("gate", folder / "released", "--baseline", folder / "released").exit_code == 0
    written = ("--json", folder / "gate.json", "--summary", folder / "summary.md")
    done = align("gate", folder / "candidate", "--baseline", folder / "released", *written)
    assert done.exit_code == 1, done.output
    result = GateResult.model_validate_json((folder / "gate.json").read_text())
    return result, done.stdout, (folder / "summary.md").read_text()


def test_both_backends_are_stopped_as_regressions(planted):
    result, _, _ = planted
    assert {(f.kind, f.case) for f in result.stopping} == {
        ("regression", "yolov8_embedded-torch-fp32"),
        ("regression", "yolov8_embedded-onnxruntime-fp32"),
    }


def test_the_first_layer_and_the_change_behind_it_are_named(planted):
    result, stdout, summary = planted
    for finding in result.stopping:
        assert (finding.stage, finding.since) == ("raw", "weights_sha256")
        assert finding.layer.endswith(f"of module model.{LAYER}")
        assert finding.what.startswith("AP ")
    (layer,) = result.layers
    assert layer.reason == "its weights are others, those of all other layers are not"
    assert [change.field for change in result.changes] == ["weights_sha256", "onnx_sha256"]
    for text in (stdout, summary):
        assert f"of module model.{LAYER}" in text
        assert "since weights_sha256 changed" in text


def test_latency_on_the_wall_was_measured_and_is_held_to_nothing(planted):
    result, _, _ = planted
    assert all(case.now.latency_ms and "max_latency_ratio" not in case.limits for case in result.cases)
