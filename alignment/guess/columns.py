"""What the columns of a detector's rows hold: boxes of which coding, objectness or not, probabilities or logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignment.guess.findings import Sure
from alignment.models.onnx_heads import sigmoid
from alignment.variant import InputSize

#: Sets of strides that heads are built with, the commonest first.
STRIDES = ((8, 16, 32), (8, 16, 32, 64), (16, 32), (4, 8, 16, 32), (4, 8, 16), (8, 16, 32, 64, 128), (32,), (16,), (8,))
#: Priors in one cell at most.
MOST_ANCHORS = 9
#: In strides: so near to the middle of its cell is the middle of a typical box.
NEAR = 3.0
#: Correlation of a decoded box's x with that of its cell, at least.
GROWS = 0.9
#: A probability may be that much outside 0..1, by rounding.
SLACK = 1e-3
#: A row of at least this objectness is one where the network sees something.
SEEN = 0.3


@dataclass(frozen=True)
class Grid:
    """How rows are spread over cells: `anchors` rows for each cell of each stride."""

    strides: tuple[int, ...]
    anchors: int

    def cells(self, size: InputSize, anchors_inside: bool) -> tuple[np.ndarray, np.ndarray]:
        """The middle of each row's cell in pixels ``[N, 2]`` and its stride ``[N, 1]``; the rows of a cell follow each
        other where `anchors_inside`, else the cells of an anchor do."""
        middles, steps = [], []
        for stride in self.strides:
            y, x = np.mgrid[: size.height // stride, : size.width // stride]
            middle = (np.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride
            repeated = middle.repeat(self.anchors, 0) if anchors_inside else np.tile(middle, (self.anchors, 1))
            middles.append(repeated)
            steps.append(np.full((len(repeated), 1), float(stride)))
        return np.concatenate(middles), np.concatenate(steps)


def grid_of(rows: int, size: InputSize) -> Grid | None:
    """The grid with so many rows; None where none of the usual strides gives it."""
    for strides in STRIDES:
        cells = sum((size.height // stride) * (size.width // stride) for stride in strides)
        if cells and rows % cells == 0 and rows // cells <= MOST_ANCHORS:
            return Grid(strides, rows // cells)
    return None


@dataclass(frozen=True)
class BoxCoding:
    """How four columns code a box.

    Attributes:
        unit: ``pixels``, ``relative`` (0..1) or ``offsets`` (YOLOX, undecoded); empty where it is none of these.
        format: ``xyxy`` or ``cxcywh``.
        evidence: what was measured.
        sure: of the format.
    """

    unit: str
    format: str
    evidence: str
    sure: Sure = "certain"


def box_coding(boxes: np.ndarray, grid: Grid | None, size: InputSize) -> BoxCoding:
    """Holds boxes ``[A, N, 4]``, of any images, to the cells that they belong to.

    A decoded box lies about its cell.  A centre lies right of what is only its width in nearly all rows, while corners
    cross in few: in none, or in background rows of a network whose distances to the sides may be negative (RTMDet).
    """
    rows = boxes.reshape(-1, 4)
    rows = rows[np.isfinite(rows).all(1)]
    crossed = float(np.mean((rows[:, 2] < rows[:, 0]) | (rows[:, 3] < rows[:, 1]))) if len(rows) else 0.0
    form = "cxcywh" if crossed > 0.5 else "xyxy"
    sure: Sure = "likely" if 0.01 < crossed < 0.5 else "certain"
    say = f"column 3 is below 1, or 4 below 2, in {crossed:.0%} of the rows"
    if grid is None:
        far = float(np.quantile(np.abs(rows), 0.999)) if len(rows) else 0.0
        unit = "relative" if far <= 2 else "pixels" if far <= 4 * max(size.height, size.width) else ""
        return BoxCoding(unit, form, f"{say}; they reach to {far:.4g}", sure)
    scale = np.array([size.width, size.height] * 2, float)
    if sure == "likely":
        form = min(
            ("xyxy", "cxcywh"), key=lambda name: min(_distance(b, name, grid, size) for b in (boxes, boxes * scale))
        )
        say += f", but as {form} they are nearer to their cells"
    distances = {
        "pixels": _distance(boxes, form, grid, size),
        "relative": _distance(boxes * scale, form, grid, size),
        "offsets": _offset(boxes, grid, size),
    }
    unit = min(distances, key=lambda name: distances[name])
    # The logarithms of sizes leave 0..1, so that columns that do not are scores.
    if distances[unit] > NEAR or (unit == "offsets" and activation(rows)[0] == "none"):
        unit = ""
    near = ", ".join(f"{distance:.2g} as {name}" for name, distance in distances.items())
    evidence = f"strides from the middle of its cell to that of a box, median: {near}"
    if unit != "offsets":
        evidence += f"; {say}"
    return BoxCoding(unit, "cxcywh", evidence) if unit == "offsets" else BoxCoding(unit, form, evidence, sure)


def _distance(boxes: np.ndarray, form: str, grid: Grid, size: InputSize) -> float:
    """Strides from the middle of its cell to that of a box, median, for the better of the two orders of rows."""
    centre = boxes[..., :2] if form == "cxcywh" else (boxes[..., :2] + boxes[..., 2:]) / 2
    found = []
    for inside in (False, True):
        middles, strides = grid.cells(size, inside)
        with np.errstate(invalid="ignore", over="ignore"):
            away = np.abs(centre - middles).max(-1) / strides[:, 0]
        away = away[np.isfinite(away)]
        found.append(float(np.median(away)) if away.size else np.inf)
    return min(found)


def _offset(boxes: np.ndarray, grid: Grid, size: InputSize) -> float:
    """The same of undecoded boxes, whose first column, unlike a decoded one, does not grow with the cell's x."""
    first = boxes[..., 0]
    finite = np.isfinite(boxes).all((1, 2)) & (first.std(1) > 0)
    if not finite.any():
        return np.inf
    for inside in (False, True):
        x = grid.cells(size, inside)[0][:, 0]
        grows = [np.corrcoef(image, x)[0, 1] for image in first[finite]]
        if np.median(grows) > GROWS:
            return np.inf
    return float(np.median(np.abs(boxes[finite][..., :2] - 0.5)))


def activation(scores: np.ndarray) -> tuple[str, str]:
    """``none``, ``sigmoid``, or empty for columns that are neither probabilities nor logits; and the evidence.

    Args:
        scores: ``[R, K]``.  Logits of a detector are negative nearly everywhere.
    """
    finite = scores[np.isfinite(scores).all(1)]
    if not finite.size:
        return "", "they are NaN or infinite"
    low, high = float(finite.min()), float(finite.max())
    if low >= -SLACK and high <= 1 + SLACK:
        return "none", f"scores lie between {low:.3g} and {high:.3g}"
    medians = np.median(finite, 0)
    if low < -1 and bool((medians < 0).all()):
        return "sigmoid", f"scores lie between {low:.3g} and {high:.3g}, most of them below 0: logits"
    return "", f"columns lie between {low:.3g} and {high:.3g}"


def is_angle(column: np.ndarray) -> bool:
    """Whether a column is an angle in radians rather than a probability."""
    finite = column[np.isfinite(column)]
    outside = bool(finite.size) and (finite.min() < -0.01 or finite.max() > 1.01)
    return outside and bool(np.abs(finite).max() <= 2 * np.pi)


def objectness(scores: list[np.ndarray], logits: bool) -> tuple[bool | None, str]:
    """Whether the first of the columns is an objectness, by its company; None where that does not tell.

    Where a network sees something, an objectness has a class beside it, while the score of one class stands alone.

    Args:
        scores: ``[N, K]`` of each image.
    """
    if scores[0].shape[1] < 2:
        return False, "there is one column of scores"
    seen = []
    for image in scores:
        values = sigmoid(image) if logits else image
        strong = values[values[:, 0] > SEEN]
        if len(strong) <= 0.05 * len(values):  # on an input of the wrong range it sees something everywhere
            seen.append(strong)
    rows = np.concatenate(seen) if seen else np.empty((0, 2))
    first = np.concatenate([sigmoid(image[:, 0]) if logits else image[:, 0] for image in scores])
    if (first > 1 - SLACK).all():
        return True, "the first column of scores is 1 everywhere"
    if len(rows) < 10:
        return None, f"only {len(rows)} rows have a first score over {SEEN}"
    share = float(np.mean(rows[:, 1:].max(1) > SEEN))
    said = f"of {len(rows)} rows whose first score is over {SEEN}, {share:.0%} have another that is"
    return (True if share > 0.8 else False if share < 0.3 else None), said
