"""What a run found: the typed content of ``alignment.json``.

`compare` and `pipeline` fill these models, `report` and `pytest_plugin` read them.  A field is only ever added, as
optional, under the same `SCHEMA_VERSION`; anything else raises the version.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1
StageName = Literal["input", "raw", "decoded", "detections", "map"]
STAGES: tuple[StageName, ...] = ("input", "raw", "decoded", "detections", "map")


class _Model(BaseModel):
    # Unknown fields are passed over, so that an older reader takes a newer file of the same version.
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")


class ErrorStats(_Model):
    """Errors of one tensor against another, over all elements of all images.

    `p99_abs` is exact to 1 %, for large tensors that of every 11th element; `sqnr_db` is 10 log10(signal / noise
    power), absent when there is no noise; `nonfinite` counts elements that are finite on one side only.
    """

    count: int
    max_abs: float
    mean_abs: float
    p99_abs: float
    cosine: float
    sqnr_db: float | None
    nonfinite: int = 0


class TensorResult(_Model):
    """One named output: subject against reference, and both against float64 on `referee_images` images.

    `nonfinite` counts values of the subject itself that are NaN or infinite, over all images.
    """

    name: str
    unit: str
    difference: ErrorStats
    reference_error: ErrorStats | None = None
    subject_error: ErrorStats | None = None
    referee_images: int = 0
    nonfinite: int = 0


class Check(_Model):
    """One number held to one limit.  `origin` says where the limit comes from."""

    name: str
    value: float
    limit: str
    ok: bool
    origin: str = ""


class StageResult(_Model):
    """One stage; ``not_checked`` always comes with a `note` that says why."""

    name: StageName
    status: Literal["pass", "fail", "not_checked"]
    note: str = ""
    checks: list[Check] = []
    tensors: list[TensorResult] = []


class Box(_Model):
    """A detection in pixels of the original image; `matched` says whether the other side has it too.

    A rotated one has `corners`, in order around it; `xyxy` is then the upright box around them.
    """

    xyxy: tuple[float, float, float, float]
    score: float
    label: int
    label_name: str = ""
    matched: bool = True
    corners: list[tuple[float, float]] | None = None


class WorstImage(_Model):
    """An image on which the two sides differ most: their detections of score >= 0.25.

    `picture` is a path inside the RUN folder (JPEG or PNG, scaled); `agreement` is 0..1.
    """

    image_id: int
    file_name: str
    width: int
    height: int
    picture: str | None = None
    box_difference: float
    score_difference: float
    agreement: float
    reference: list[Box] = []
    subject: list[Box] = []


class DotaScores(_Model):
    """mAP of rotated boxes by DOTA's protocol, 0..1: `ap` over IoU 0.50:0.95, `ap50` at 0.5, both by VOC 2007's 11
    recalls; `area_ap50` is `ap50` by the area under the curve.  `reference_ap50` is that of the reference."""

    ap: float
    ap50: float
    area_ap50: float
    reference_ap50: float | None = None


class Scores(_Model):
    """COCO AP of both sides, 0..1; `subject_ap50` at IoU 0.5.  -1 on images without truth.

    `dota` is there where boxes are rotated and truth is known.  `agreement_ap` is the subject's AP with the reference's
    detections of score >= 0.3 as truth.  `twin` is the case that computes the same graph node by node, where there is
    one.
    """

    reference_ap: float | None = None
    subject_ap: float
    subject_ap50: float
    dota: DotaScores | None = None
    agreement_ap: float | None = None
    twin: str | None = None
    twin_ap: float | None = None
    twin_agreement_ap: float | None = None


class Timing(_Model):
    """Seconds in the backend alone, over `images` images.

    `latency_ms` is the median of one call with `batch` images: by the GPU's own clock, without copies, where the
    backend has one (`clock` ``gpu``), else on the wall.  It is absent where there were too few calls to tell.
    """

    inference_s: float
    images: int
    latency_ms: float | None = None
    clock: Literal["wall", "gpu"] | None = None
    batch: int | None = None


class EngineFacts(_Model):
    """A TensorRT engine in numbers, by its own inspector; `reformats` of its layers only change type or layout."""

    layers: int
    reformats: int
    size_bytes: int


class LayerSignature(_Model):
    """What one layer with weights holds and answers; see `alignment.signatures.sketch`.

    `weights` is absent where they are not constants of the graph.
    """

    node: str
    op: str
    module: str = ""
    weights: list[float] | None = None
    output: list[float]


class GraphSignature(_Model):
    """How each layer of a variant's FP32 graph answers to one image, in the order of the graph, its outputs last."""

    image_id: int
    input_digest: str
    layers: list[LayerSignature] = []


#: How the warning begins that a reference finds next to nothing of what the images hold.
REFERENCE_AP = "reference AP "


class CaseId(_Model):
    """Variant × backend × precision × route."""

    id: str
    variant: str
    backend: str
    precision: str
    route: str | None = None


class CaseResult(_Model):
    """The verdict on one case and all that stands behind it.

    `first_difference` is the first stage that fails; `wrong_side` says which side is further from float64 than its
    own arithmetic explains; `reason` is one line for people.  `signature` is of the variant's FP32 graph, and comes
    with one case of it.  `command` runs this case alone, on the same images.
    """

    case: CaseId
    status: Literal["pass", "fail", "skip"]
    reason: str
    command: str = ""
    reference: str | None = None
    first_difference: StageName | None = None
    wrong_side: Literal["subject", "reference", "neither", "unknown"] | None = None
    replayed: bool = False
    images: int = 0
    stages: list[StageResult] = []
    scores: Scores | None = None
    timing: Timing | None = None
    engine: EngineFacts | None = None
    signature: GraphSignature | None = None
    worst: list[WorstImage] = []
    warnings: list[str] = []
    notes: list[str] = []
    provenance: dict[str, Any] = {}
    reference_provenance: dict[str, Any] = {}

    @property
    def doubts(self) -> list[str]:
        """Those of `warnings` that are no backend's own, but say that both sides are likely wrong."""
        return [warning for warning in self.warnings if warning.startswith(REFERENCE_AP)]


class CauseCount(_Model):
    """How many boxes one cause explains, how many more follow from these, and the subject's AP where all of them go as
    in the reference."""

    cause: str
    boxes: int
    followers: int = 0
    ap_without: float | None = None


class ExplainedBox(_Model):
    """A pair of row and class that only one side keeps, or both otherwise: what became of it on both, why, and what was
    undone to prove it.  `follows` names the pair that a cascade follows from."""

    image_id: int
    row: int
    label: int
    label_name: str
    score: float
    reference: str
    subject: str
    cause: str
    follows: str = ""
    replay: str


class Explanation(_Model):
    """What two post-processings of one variant keep otherwise.

    `boxes`: unexplained ones first, then by falling score; `worst`: crops around the first.  `wrong_settings`: how many
    come from a setting that differs though nobody asked for that.
    """

    id: str
    reference: str
    subject: str
    images: int
    reference_detections: int
    subject_detections: int
    reference_ap: float | None = None
    subject_ap: float | None = None
    differing: int
    unexplained: int
    wrong_settings: int = 0
    causes: list[CauseCount] = []
    boxes: list[ExplainedBox] = []
    worst: list[WorstImage] = []
    notes: list[str] = []


class RungScore(_Model):
    """What a rung is worth on one backend: AP, 0..1, −1 without truth, and `agreement_ap` with the ladder's reference.

    `key` stands for graph and images; `provenance` says with what it was measured.
    """

    backend: str
    ap: float
    agreement_ap: float
    key: str = ""
    provenance: dict[str, Any] = {}


class Rung(_Model):
    """One step from float to int8.

    `how`: what was done, in words; `command`: what makes it, for `align run`; `float_nodes`: how many nodes with learnt
    weights stay float; `int8_macs`: the share of all multiplications with learnt weights that are done in int8, 0..1.
    """

    name: str
    how: str = ""
    command: str = ""
    float_nodes: int
    int8_macs: float
    scores: list[RungScore] = []

    def on(self, backend: str) -> RungScore | None:
        """Its score on a backend, where it has one."""
        return next((score for score in self.scores if score.backend == backend), None)


class Ladder(_Model):
    """Float, post-training quantization, partial quantization and training of one variant, on the same images.

    `reference` is the case that agreement is held to, and FP32's rung the one that AP is; `missing` says of a backend
    why it was not measured.
    """

    variant: str
    images: int
    reference: str
    recipe: dict[str, Any] = {}
    rungs: list[Rung] = []
    missing: dict[str, str] = {}

    @property
    def backends(self) -> list[str]:
        """Those that any rung was measured on."""
        return list(dict.fromkeys(score.backend for rung in self.rungs for score in rung.scores))

    def ap_change(self, rung: Rung, backend: str) -> float | None:
        """AP less that of FP32 on the same backend; None where one of them is not there, or has no truth."""
        score, start = rung.on(backend), self.rungs[0].on(backend) if self.rungs else None
        return score.ap - start.ap if score and start and min(score.ap, start.ap) >= 0 else None


class Alignment(_Model):
    """One RUN: ``alignment.json``.  `timing` is in seconds."""

    schema_version: Literal[1] = 1
    created: str
    command: str
    machine: dict[str, Any] = {}
    dataset: dict[str, Any] = {}
    timing: dict[str, float] = {}
    cases: list[CaseResult] = []
    explanations: list[Explanation] = []
    ladders: list[Ladder] = []

    def dataset_of(self, variant: str) -> dict[str, Any]:
        """What images a variant was run on: their `root`, `split`, `images` and `fingerprint`; empty where unknown."""
        found = self.dataset.get(variant)
        return found if isinstance(found, dict) else {}

    @property
    def aligned(self) -> bool:
        """True when no case fails and no difference is unexplained or due to a wrong setting."""
        harmless = not any(e.unexplained or e.wrong_settings for e in self.explanations)
        return harmless and all(case.status != "fail" for case in self.cases)
