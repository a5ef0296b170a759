"""The ops of mmcv's compiled module `mmcv._ext` that detectors need, in plain torch.

`mmcv-lite` ships every Python file of `mmcv/ops` but not `mmcv._ext`, which those files ask for about a hundred names
when they are imported.  Under that name (see `mmcv_finder`) this module computes the six ops that mmyolo, mmdet and
mmrotate call, with the names, arguments and semantics of mmcv 2.0.1's C++; every other name is a function that raises.

Where the compiled ops differ between devices, this module follows the CPU one on every device.  Two things are pinned
down that the compiled ops leave open or get wrong: boxes of equal score are taken in index order (the compiled NMS
takes them in the order of an unstable `torch.sort`, which depends on the CPU), and rotated IoU is computed in float64
whatever the dtype of the boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

# Boxes handled at a time: large enough to keep the Python loop short, small enough to bound the overlap matrix.
NMS_BLOCK = 128
MATRIX_ELEMENTS = 1 << 22
PAIR_CHUNK = 1 << 16
# Boxes with a smaller area overlap nothing (box_iou_rotated_utils.hpp).
MIN_AREA = 1e-14
# Vertices of the intersection of two rectangles at most, and the closing one.
POLYGON_VERTICES = 8
# Among the 24 candidate vertices the first 8 are corners, the other 16 intersections of edges.
FIRST_EDGE_VERTEX = 8
# Vertices nearer than this in both coordinates are one (EPSILON of diff_iou_rotated_cuda_kernel.cuh).
COINCIDENCE = 1e-8


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Greedy NMS of axis-aligned boxes: a box goes when its IoU with a kept one *exceeds* the threshold.

    Args:
        boxes: (N, 4) x1, y1, x2, y2; computed in float32, as the compiled op (nms.cpp).
        scores: (N,).
        iou_threshold: rounded to float32.
        offset: 0, or 1 where coordinates are pixel indices (width = x2 - x1 + 1).

    Returns:
        Kept indices by falling score, int64.  0/0 of two empty boxes is no overlap.
    """
    order = _by_falling_score(scores)
    x1, y1, x2, y2 = boxes[order].float().T.contiguous()
    area = (x2 - x1 + offset) * (y2 - y1 + offset)

    def extent(low: Tensor, high: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        common = torch.minimum(high[rows, None], high[columns]) - torch.maximum(low[rows, None], low[columns])
        return (common + offset).clamp_(min=0)

    def suppresses(rows: Tensor, columns: Tensor) -> Tensor:
        intersection = extent(x1, x2, rows, columns) * extent(y1, y2, rows, columns)
        return intersection / (area[rows, None] + area[columns] - intersection) > iou_threshold

    return order[_greedy(len(order), suppresses, boxes.device)]


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Greedy NMS of rotated boxes: a box goes when its IoU with a kept one *reaches* the threshold (nms_rotated.cpp).

    Args:
        dets: (N, 5) centre x, y, width, height, angle in radians; (N, 6) with the label last.
        scores: (N,).
        order: not used; the compiled op's CUDA half takes it.
        dets_sorted: not used, as `order`.
        labels: not used; where labels count they are the last column of `dets`.
        iou_threshold: rounded to float32; the IoU is rounded to the dtype of `dets` before it is compared.
        multi_label: boxes suppress only boxes of their own label.  As CUDA has it; the compiled CPU op ignores labels.

    Returns:
        Kept indices by falling score, int64.
    """
    by_score = _by_falling_score(scores)
    boxes = dets[by_score]
    dtype = torch.promote_types(dets.dtype, torch.float32)
    threshold = torch.tensor(iou_threshold, dtype=torch.float32, device=dets.device).to(dtype)

    def suppresses(rows: Tensor, columns: Tensor) -> Tensor:
        over = _rotated_iou_matrix(boxes[rows], boxes[columns]).to(dtype) >= threshold
        if multi_label and boxes.shape[1] > 5:
            over &= boxes[rows, None, 5] == boxes[columns, 5]
        return over

    return by_score[_greedy(len(by_score), suppresses, dets.device)]


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int = 0, aligned: bool = False) -> None:
    """Overlap of rotated boxes, written into `ious`.

    Args:
        boxes1: (N, 5) centre x, y, width, height, angle in radians (either sense, the same for both).
        boxes2: (M, 5), or (N, 5) when `aligned`.
        ious: (N * M,) row by row, or (N,) when `aligned`; overwritten.
        mode_flag: 0 intersection over union, 1 intersection over the area of the first box.
        aligned: pair the boxes one to one.

    Boxes of an area below 1e-14 overlap nothing.
    """
    if aligned:
        for start in range(0, len(boxes1), PAIR_CHUNK):
            part = slice(start, start + PAIR_CHUNK)
            ious[part] = _rotated_iou(boxes1[part], boxes2[part], mode_flag).to(ious.dtype)
        return
    rows = max(1, MATRIX_ELEMENTS // max(1, len(boxes2)))
    matrix = ious.view(len(boxes1), len(boxes2))
    for start in range(0, len(boxes1), rows):
        part = slice(start, start + rows)
        matrix[part] = _rotated_iou_matrix(boxes1[part], boxes2, mode_flag).to(ious.dtype)


def diff_iou_rotated_sort_vertices_forward(vertices: Tensor, mask: Tensor, num_valid: Tensor) -> Tensor:
    """Orders the vertices of intersection polygons anticlockwise, for mmcv's differentiable rotated IoU.

    The compiled op exists for CUDA only, so that rotated IoU losses train on the CPU only with this one.  Vertices
    that coincide count once.  Of more than 8 (boxes turned against each other by less than mmcv's own tolerance
    have up to 16) those stay that lie farthest from their predecessor; the compiled op writes beyond its row then.

    Args:
        vertices: (B, N, 24, 2) candidates relative to their mean: 8 corners, 16 intersections of edges.
        mask: (B, N, 24) bool, the valid candidates.
        num_valid: (B, N) how many are valid.

    Returns:
        (B, N, 9) int32 indices: the polygon from the positive x axis on, its first vertex again, then an invalid
        intersection of edges (mmcv keeps those at 0, so they add no area).  Only the latter where fewer than 3
        vertices remain.
    """
    angle = torch.atan2(vertices[..., 1], vertices[..., 0]) % (2 * torch.pi)
    order = torch.where(mask, angle, torch.inf).argsort(dim=-1, stable=True)
    around = vertices.gather(-2, order[..., None].expand_as(vertices))
    candidates = around.shape[-2]
    rank = torch.arange(candidates, device=vertices.device)
    count = num_valid[..., None].long()
    last = around.gather(-2, (count - 1).clamp(min=0)[..., None].expand(*count.shape, 2))
    gap = (around - torch.cat([last, around[..., :-1, :]], -2)).abs().amax(-1)
    gap = torch.where((rank < count) & (gap >= COINCIDENCE), gap, -1.0)

    widest, chosen = gap.topk(POLYGON_VERTICES, dim=-1)
    chosen = torch.where(widest >= 0, chosen, candidates - 1).sort(dim=-1).values
    polygon = order.gather(-1, chosen)
    closed = torch.cat([polygon, polygon[..., :1]], -1)
    count = (widest >= 0).sum(-1, keepdim=True)

    unusable = mask.clone()
    unusable[..., :FIRST_EDGE_VERTEX] = True
    padding = unusable.int().argmin(-1, keepdim=True)
    rank = rank[: POLYGON_VERTICES + 1]
    closed = torch.where(rank < count, closed, torch.where(rank == count, polygon[..., :1], padding))
    return torch.where(count < 3, padding, closed).int()


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Sigmoid focal loss of each logit, written into `output` (sigmoid_focal_loss_cuda_kernel.cuh).

    Args:
        input: (N, C) logits.
        target: (N,) int64 class, C for background.
        weight: (C,) weight by the class of the target, or empty.
        output: (N, C); overwritten.
        gamma: focusing exponent.
        alpha: weight of the positive class, 1 - alpha of the others.
    """
    functional = torch.nn.functional
    probability, complement = input.sigmoid(), (-input).sigmoid()
    positive = -alpha * complement**gamma * functional.logsigmoid(input)
    negative = -(1 - alpha) * probability**gamma * functional.logsigmoid(-input)
    output.copy_(_by_target(positive, negative, target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of `sigmoid_focal_loss_forward` by each logit, written into `grad_input` (N, C)."""
    functional = torch.nn.functional
    probability, complement = input.sigmoid(), (-input).sigmoid()
    positive = complement - gamma * probability * functional.logsigmoid(input)
    negative = gamma * complement * functional.logsigmoid(-input) - probability
    positive = -alpha * complement**gamma * positive
    negative = -(1 - alpha) * probability**gamma * negative
    grad_input.copy_(_by_target(positive, negative, target, weight))


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Any other op: mmcv looks the names up when it is imported, and may never call them."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args: object, **options: object) -> NoReturn:
        raise NotImplementedError(
            f"the mmcv op {name!r} is not among those that the stand-in for mmcv._ext computes: "
            "install the package mmcv (the full, compiled one) instead of mmcv-lite"
        )

    missing.__name__ = missing.__qualname__ = name
    return missing


def _by_falling_score(scores: Tensor) -> Tensor:
    return scores.sort(dim=0, descending=True, stable=True).indices


def _greedy(count: int, suppresses: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> Tensor:
    """Positions that greedy NMS keeps of `count` boxes sorted by falling score.

    `suppresses(rows, columns)` says for positions (R,), (C,) as (R, C) bool whether the row's box suppresses the
    column's.  Boxes are settled block by block: first among themselves, then the kept ones clear what follows.
    """
    kept, rest = [], torch.arange(count, device=device)
    while len(rest):
        block, rest = rest[:NMS_BLOCK], rest[NMS_BLOCK:]
        within = suppresses(block, block).cpu().numpy()
        alive = torch.ones(len(block), dtype=torch.bool)
        flags = alive.numpy()
        for i in range(len(flags)):
            if flags[i]:
                flags[i + 1 :] &= ~within[i, i + 1 :]
        block = block[alive.to(device)]
        kept.append(block)
        rest = rest[~suppresses(block, rest).any(0)]
    return torch.cat(kept) if kept else torch.empty(0, dtype=torch.long, device=device)


def _rotated_iou_matrix(boxes1: Tensor, boxes2: Tensor, mode_flag: int = 0) -> Tensor:
    """Overlap of every box of (N, 5) with every one of (M, 5), (N, M) float64."""
    radius1, radius2 = (boxes[:, 2:4].double().norm(dim=1) / 2 for boxes in (boxes1, boxes2))
    # Not through a matrix product, whose cancellation would lose small boxes far from the origin.
    distance = torch.cdist(boxes1[:, :2].double(), boxes2[:, :2].double(), compute_mode="donot_use_mm_for_euclid_dist")
    rows, columns = (distance <= (radius1[:, None] + radius2) * (1 + 1e-9)).nonzero(as_tuple=True)
    matrix = torch.zeros(len(boxes1), len(boxes2), dtype=torch.float64, device=boxes1.device)
    for start in range(0, len(rows), PAIR_CHUNK):
        i, j = rows[start : start + PAIR_CHUNK], columns[start : start + PAIR_CHUNK]
        matrix[i, j] = _rotated_iou(boxes1[i], boxes2[j], mode_flag)
    return matrix


def _rotated_iou(boxes1: Tensor, boxes2: Tensor, mode_flag: int = 0) -> Tensor:
    """Overlap of paired rotated boxes (P, 5), (P, 5), (P,) float64."""
    area1, area2 = ((boxes[:, 2] * boxes[:, 3]).double() for boxes in (boxes1, boxes2))
    intersection = _rotated_intersection(boxes1[:, :5].double(), boxes2[:, :5].double())
    overlap = intersection / (area1 + area2 - intersection if mode_flag == 0 else area1)
    return overlap.masked_fill((area1 < MIN_AREA) | (area2 < MIN_AREA), 0.0)


def _rotated_intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Area common to paired rotated boxes (P, 5), (P, 5) float64, (P,).

    About the centre of the first box and along the axes of the second, the second is low <= (x, y) <= high, and the
    area is the integral of -clamp(y, low, high) dx along the anticlockwise outline of the first within
    low <= x <= high: a sum over four edges that is continuous in all its arguments, so that touching, equal and
    parallel boxes are no special cases.
    """
    shift, turn = boxes2[:, :2] - boxes1[:, :2], (boxes1[:, 4] - boxes2[:, 4])[:, None]
    cos, sin = boxes2[:, 4].cos(), boxes2[:, 4].sin()
    centre = torch.stack([shift[:, 0] * cos + shift[:, 1] * sin, shift[:, 1] * cos - shift[:, 0] * sin], 1)
    size1, size2 = boxes1[:, 2:4].abs(), boxes2[:, 2:4].abs()
    (x_low, y_low), (x_high, y_high) = ((centre + side * size2).split(1, 1) for side in (-0.5, 0.5))
    u, v = (
        size1[:, :1] * size1.new_tensor([-0.5, 0.5, 0.5, -0.5]),
        size1[:, 1:] * size1.new_tensor([-0.5, -0.5, 0.5, 0.5]),
    )
    x, y = turn.cos() * u - turn.sin() * v, turn.sin() * u + turn.cos() * v

    inside_x = x.clamp(x_low, x_high)
    next_inside_x = inside_x.roll(-1, 1)
    step_x, step_y = x.roll(-1, 1) - x, y.roll(-1, 1) - y
    start, end = (y + step_y * _fraction(at - x, step_x) for at in (inside_x, next_inside_x))
    # Along an edge the clamped ordinate is level, then linear, then level; `level` weighs its two ends.
    level = (_fraction(y_low - start, end - start) + _fraction(y_high - start, end - start)) / 2
    mean = start.clamp(y_low, y_high) * level + end.clamp(y_low, y_high) * (1 - level)
    # The outline is closed: a constant changes nothing but the rounding, and this one makes most empty areas exact.
    constant = torch.zeros_like(y_low).clamp(y_low, y_high)
    area = ((inside_x - next_inside_x) * (mean - constant)).sum(1)
    rounding = 1e-15 * torch.minimum(size1.norm(dim=1, keepdim=True), size2).prod(1)
    return area.masked_fill(area <= rounding, 0.0)


def _fraction(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole within [0, 1]; something in there where `whole` is 0."""
    return (part / torch.where(whole == 0, 1.0, whole)).clamp(0.0, 1.0)


def _by_target(positive: Tensor, negative: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """`positive` (N, C) in the target's column, else `negative`, times the weight of the target's class."""
    columns = torch.arange(positive.shape[1], device=positive.device)
    chosen = torch.where(target[:, None] == columns, positive, negative)
    if weight.numel():
        # Background has no weight of its own; the compiled op reads beyond the end.
        chosen = chosen * weight.to(chosen.dtype)[target.clamp(max=len(weight) - 1)][:, None]
    return chosen
