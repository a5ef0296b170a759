"""Records: what one runner answered on one set of samples, kept small enough to commit.

A record is a pair of files, ``<case>.npz`` and ``<case>.json``.  It holds, for every image, all detections and up to
`CANDIDATES` (prior, class) pairs of score ≥ 0.001; for `FULL_IMAGES` images all decoded boxes and scores, in fixed
point (`STEPS`: pixels, radians, probability); and, in the JSON, the error statistics of every stage over all images as
they were measured where the record was made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignment.case import BACKENDS, PRECISIONS, ROUTES
from alignment.errors import AlignError
from alignment.nms.multiclass import Detections
from alignment.reading import cut, read_arrays, read_json
from alignment.results import CaseResult
from alignment.storage import writing

RECORD_VERSION = 1
#: What the identity of every record says.
IDENTITY = {"variant_fingerprint", "weights_sha256"}
CANDIDATES = 256
CANDIDATE_SCORE = 0.001
FULL_IMAGES = 2
BOX_STEP = 2.0**-10
ANGLE_STEP = 2.0**-20
SCORE_STEP = 2.0**-20
STEPS = {"boxes": BOX_STEP, "angles": ANGLE_STEP, "scores": SCORE_STEP}
PACKED = {"boxes": 2.0**-4, "angles": 2.0**-12, "scores": 2.0**-16}


@dataclass(frozen=True)
class Candidates:
    """Pairs of one image before NMS, by falling score: ``rows`` and ``labels`` int32, ``boxes`` float32 in pixels of
    the network input (rotated ones with their angle in radians), ``scores`` float32."""

    rows: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    @property
    def floor(self) -> float:
        """The highest score that a pair may have which is not among them: a full list says nothing of those below."""
        return float(min(self.scores)) if len(self.scores) >= CANDIDATES else CANDIDATE_SCORE


@dataclass
class Record:
    """One runner's answers.

    Attributes:
        case: case id.
        digests: image id → digest of the input bytes, in the order of the run.
        detections: by image id.
        candidates: by image id.
        full: image id → (boxes ``[N, 4]`` or rotated ``[N, 5]``, scores ``[N, C]``).
        result: the verdict where the record was made, with its statistics and provenance; None for a reference that
            was not judged itself.
        identity: what the record depends on: variant fingerprint, digest of the weights.
        compact: holds detections alone, boxes in steps of 1/16 px and scores of 2⁻¹⁶, and not from which rows they are.
    """

    case: str
    identity: dict[str, str]
    digests: dict[int, str] = field(default_factory=dict)
    detections: dict[int, Detections] = field(default_factory=dict)
    candidates: dict[int, Candidates] = field(default_factory=dict)
    full: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    result: CaseResult | None = None
    compact: bool = False

    @property
    def rotated(self) -> bool:
        """Whether its boxes have an angle."""
        return any(boxes.shape[1] == 5 for boxes, _ in self.full.values())

    def add(self, image: int, digest: str, boxes: np.ndarray, scores: np.ndarray, detections: Detections) -> None:
        """Adds one image: decoded `boxes` ``[N, 4 or 5]`` and `scores` ``[N, C]``, and its detections."""
        self.digests[image] = digest
        self.detections[image] = detections
        if self.compact:
            return
        self.candidates[image] = best_candidates(boxes, scores)
        if len(self.full) < FULL_IMAGES:
            self.full[image] = boxes.astype(np.float32), scores.astype(np.float32)

    def save(self, folder: Path) -> Path:
        """Writes both files into `folder`; when both are whole they appear, the JSON last.  Returns its path."""
        arrays: dict[str, np.ndarray] = {}
        images = list(self.digests)
        arrays["images"] = np.array(images, np.int64)
        if self.compact:
            arrays |= _packed([self.detections[i] for i in images])
        for name, table in (("detections", self.detections), ("candidates", self.candidates)):
            if self.compact:
                continue
            parts = [table[i] for i in images]
            arrays[f"{name}_count"] = np.array([len(p.scores) for p in parts], np.int32)
            for key in ("boxes", "scores", "labels", "rows"):
                arrays[f"{name}_{key}"] = np.concatenate([getattr(p, key) for p in parts])
        with np.errstate(invalid="ignore"):  # fixed point has no NaN; how many there are, the statistics say
            for image, (boxes, scores) in self.full.items():
                arrays[f"full_{image}_boxes"] = np.rint(boxes / _box_steps(STEPS, boxes)).astype(np.int32)
                arrays[f"full_{image}_scores"] = np.rint(scores / SCORE_STEP).astype(np.int32)
        fields = {
            "record_version": RECORD_VERSION,
            "case": self.case,
            "identity": self.identity,
            "steps": {name: step for name, step in STEPS.items() if name != "angles" or self.rotated},
            "digests": {str(i): d for i, d in self.digests.items()},
            "result": self.result.model_dump(mode="json") if self.result else None,
        }
        if self.compact:
            fields["compact"] = True
        path = record_path(folder, self.case)
        with writing(path) as text, writing(path.with_suffix(".npz")) as binary:
            text.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
            with binary.open("wb") as stream:
                np.savez_compressed(stream, allow_pickle=False, **arrays)
        return path

    @classmethod
    def load(cls, path: Path) -> Record:
        """Reads a record by the path of its JSON.

        Raises:
            AlignError: when either file is missing, damaged or of another version.
        """
        mend = "make the record again on a machine with TensorRT: align run VARIANT --records DIR"
        try:
            fields = read_json(path, mend, mend, "not a whole record")
            if fields["record_version"] != RECORD_VERSION:
                raise AlignError(f"{path}: record version {fields['record_version']}, not {RECORD_VERSION}", mend)
            arrays = read_arrays(path.with_suffix(".npz"), mend, mend, "not a whole record")
            if lost := IDENTITY - fields["identity"].keys():
                raise ValueError(f"identity lacks {', '.join(sorted(lost))}")
            _, backend, precision, *route = fields["case"].split("-")
            if backend not in BACKENDS or precision not in PRECISIONS or not {*route} <= {*ROUTES} or len(route) > 1:
                raise ValueError(f"case {cut(fields['case'], 60)} is none")
            record = cls(fields["case"], fields["identity"], {int(i): d for i, d in fields["digests"].items()})
            record.compact = fields.get("compact", False)
            record._fill(arrays, fields["steps"])
            if fields["result"]:
                record.result = CaseResult.model_validate(fields["result"])
        except AlignError:
            raise
        except Exception as error:  # zip, JSON, NumPy and pydantic each have their own
            reason = cut(f"{type(error).__name__}: {error}")
            raise AlignError(f"{path}: not a whole record: {reason}", mend) from None
        return record

    def _fill(self, arrays: dict[str, np.ndarray], steps: dict[str, float]) -> None:
        images = [int(i) for i in arrays["images"]]
        if images != list(self.digests):
            raise ValueError("the two files are of different runs")
        if self.compact:
            self.detections.update(zip(images, _unpacked(arrays), strict=True))
            return
        for name, table, kind in (
            ("detections", self.detections, Detections),
            ("candidates", self.candidates, Candidates),
        ):
            ends = _require_table(name, arrays)
            columns = {k: np.split(arrays[f"{name}_{k}"], ends) for k in ("boxes", "scores", "labels", "rows")}
            rows: list[Any] = [kind(**{k: parts[i] for k, parts in columns.items()}) for i in range(len(images))]
            table.update(zip(images, rows, strict=True))
        for image in images:
            if f"full_{image}_boxes" in arrays:
                stored = arrays[f"full_{image}_boxes"]
                boxes = (stored * _box_steps(steps, stored)).astype(np.float32)
                scores = (arrays[f"full_{image}_scores"] * steps["scores"]).astype(np.float32)
                self.full[image] = boxes, scores
        self._require_within(arrays)

    def _require_within(self, arrays: dict[str, np.ndarray]) -> None:
        """Raises ValueError for rows and labels that the network has not: a full image has all of them."""
        shapes = {(len(boxes), *scores.shape) for boxes, scores in self.full.values()}
        if len(shapes) > 1 or any(len(shape) != 3 or shape[0] != shape[1] for shape in shapes):
            raise ValueError("its full images do not fit each other")
        for rows, _, classes in shapes:
            for name in ("detections", "candidates") if rows else ():  # a network that ends in NMS has none
                if (arrays[f"{name}_rows"] >= rows).any() or (arrays[f"{name}_labels"] >= classes).any():
                    raise ValueError(f"{name} of rows or classes that are none of {rows} and {classes}")


def _packed(detections: list[Detections]) -> dict[str, np.ndarray]:
    return {
        "detections_count": np.array([len(found) for found in detections], np.int32),
        "detections_boxes": np.concatenate([np.rint(f.boxes / _box_steps(PACKED, f.boxes)) for f in detections]).astype(
            np.int32
        ),
        "detections_scores": np.concatenate([np.rint(f.scores / PACKED["scores"]) for f in detections]).astype(
            np.int32
        ),
        "detections_labels": np.concatenate([f.labels for f in detections]).astype(np.uint16),
    }


def _unpacked(arrays: dict[str, np.ndarray]) -> list[Detections]:
    boxes = arrays["detections_boxes"]
    ends = _require_table("detections", {**arrays, "detections_rows": np.full(len(boxes), -1, np.int32)})
    columns = (
        (boxes * _box_steps(PACKED, boxes)).astype(np.float32),
        (arrays["detections_scores"] * PACKED["scores"]).astype(np.float32),
        arrays["detections_labels"].astype(np.int32),
        np.full(len(boxes), -1, np.int32),
    )
    names = ("boxes", "scores", "labels", "rows")
    parts = zip(*(np.split(column, ends) for column in columns), strict=True)
    return [Detections(**dict(zip(names, part, strict=True))) for part in parts]


def _require_table(name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Where the images of a table end, the last excepted.  Raises ValueError for columns that do not fit each other."""
    counts, boxes, scores = (arrays[f"{name}_{key}"] for key in ("count", "boxes", "scores"))
    labels, rows = arrays[f"{name}_labels"], arrays[f"{name}_rows"]
    total = int(counts.sum()) if counts.ndim == 1 and counts.dtype.kind in "iu" and (counts >= 0).all() else -1
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 5) or boxes.dtype.kind not in "fi":
        raise ValueError(f"{name} with boxes of {boxes.dtype} {boxes.shape}")
    if not {(total,)} == {scores.shape, labels.shape, rows.shape, boxes.shape[:1]}:
        raise ValueError(f"{name} whose columns do not fit each other")
    whole = labels.dtype.kind in "iu" and rows.dtype.kind in "iu" and scores.dtype.kind in "fi"
    if not whole or (rows < -1).any() or (labels < 0).any():
        raise ValueError(f"{name} with labels of {labels.dtype}, rows of {rows.dtype}, or less than none")
    return np.cumsum(counts)[:-1]


def best_candidates(boxes: np.ndarray, scores: np.ndarray) -> Candidates:
    """The best `CANDIDATES` pairs of score ≥ `CANDIDATE_SCORE` of one image."""
    values = scores.ravel()
    flat = np.flatnonzero(values >= CANDIDATE_SCORE)
    flat = flat[np.argsort(-values[flat], kind="stable")[:CANDIDATES]]
    rows, labels = np.divmod(flat, scores.shape[1])
    return Candidates(
        rows.astype(np.int32), labels.astype(np.int32), boxes[rows].astype(np.float32), values[flat].astype(np.float32)
    )


def _box_steps(steps: dict[str, float], boxes: np.ndarray) -> np.ndarray:
    """The step of each column of `boxes` ``[N, 4]`` or ``[N, 5]``."""
    return np.array([steps[name] for name in ["boxes"] * 4 + ["angles"] * (boxes.shape[1] - 4)])


def record_path(folder: Path, case: str) -> Path:
    """The JSON of a record."""
    return folder / f"{case}.json"
