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


class Scores(_Model):
    """COCO AP of both sides, 0..1; `subject_ap50` at IoU 0.5.

    `agreement_ap` is the subject's AP with the reference's detections of score >= 0.3 as truth.  `twin` is the case
    that computes the same graph node by node, where there is one.
    """

    reference_ap: float | None = None
    subject_ap: float
    subject_ap50: float
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
    with one case of it.
    """

    case: CaseId
    status: Literal["pass", "fail", "skip"]
    reason: str
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

    @property
    def aligned(self) -> bool:
        """True when no case fails and no difference is unexplained or due to a wrong setting."""
        harmless = not any(e.unexplained or e.wrong_settings for e in self.explanations)
        return harmless and all(case.status != "fail" for case in self.cases)
