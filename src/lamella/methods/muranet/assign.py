"""Assignment of boxes to the cells that learn them (SimOTA, as in YOLOX)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lamella.methods.muranet.modules import CellGrid

RADIUS = 1.5  # strides between the centre of a box and that of a cell, on each axis
OVERLAP, FAR = 3.0, 1e6  # weights in the cost: of -log IoU, and of cells that are near other boxes only
MOST = 10  # cells whose IoUs determine the number of cells of a box
TINY = 1e-8
LEAST = -100.0  # lower bound of a logarithm


class Matches(NamedTuple):
    """Cells with their boxes.

    Attributes:
        cell: indices of cells [P], each once.
        box: index of the box of each [P].
        iou: IoU of the predicted box of the cell and its box [P].
    """

    cell: Tensor
    box: Tensor
    iou: Tensor


def corners(boxes: Tensor) -> Tensor:
    """Convert cx, cy, w, h to x0, y0, x1, y1 [..., 4]."""
    xy, half = boxes[..., :2], boxes[..., 2:4] / 2
    return torch.cat([xy - half, xy + half], -1)


def overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the IoU of boxes, pair by pair [...].

    Args:
        ours: boxes cx, cy, w, h [..., 4].
        theirs: boxes cx, cy, w, h [..., 4].
    """
    a, b = corners(ours), corners(theirs)
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    shared = sides.prod(-1)
    both = ours[..., 2:4].prod(-1) + theirs[..., 2:4].prod(-1)
    return shared / (both - shared).clamp(min=TINY)


@torch.no_grad()
def simota(cells: Tensor, grid: CellGrid, boxes: Tensor, labels: Tensor) -> Matches:
    """Assign cells to the boxes of one image.

    Args:
        cells: raw predictions of each cell [A, 5 + classes].
        grid: the grid of the cells.
        boxes: cx, cy, w, h [G, 4].
        labels: classes [G].

    Returns:
        For each box its cheapest cells, as many as the sum of its best IoUs, at least one; a cell claimed by two boxes
        goes to the one for which it is cheaper. A box that loses all its cells gets the cheapest remaining one.
    """
    nothing = torch.zeros(0, dtype=torch.long, device=cells.device)
    if not len(boxes):
        return Matches(nothing, nothing, cells.new_zeros(0))
    away = (grid.centres[None] - boxes[:, None, :2]).abs().amax(-1)
    near = away < RADIUS * grid.stride  # [G, A]
    candidates = near.any(0).nonzero()[:, 0]  # [A']
    near, cells = near[:, candidates], cells[candidates].float()
    chosen = CellGrid(grid.corner[candidates], grid.stride[candidates])
    iou = overlap(boxes[:, None], chosen.decode(cells)[None])  # [G, A']
    scores = (cells[:, 5:].sigmoid() * cells[:, 4:5].sigmoid()).sqrt()  # [A', K]
    sure, unsure = scores.log().clamp(min=LEAST), (-scores).log1p().clamp(min=LEAST)
    others = unsure.sum(-1, keepdim=True)
    class_cost = -(sure - unsure + others)[:, labels].T  # the cross-entropy with the class of each box [G, A']
    cost = class_cost - OVERLAP * (iou + TINY).log() + FAR * ~near
    counts = iou.topk(min(MOST, iou.shape[1]), 1).values.sum(1).int().clamp(min=1)
    match = torch.zeros_like(near)
    for g, k in enumerate(counts.tolist()):
        match[g, cost[g].topk(min(k, cost.shape[1]), largest=False).indices] = True
    twice = match.sum(0) > 1
    match[:, twice] = one_hot(cost[:, twice].argmin(0), len(boxes)).T.bool()
    for g in (~match.any(1)).nonzero()[:, 0].tolist():  # YOLOX leaves these boxes without cells
        free = cost[g].masked_fill(match.any(0), torch.inf)
        if torch.isfinite(free.min()):
            match[g, free.argmin()] = True
    box, index = match.nonzero(as_tuple=True)
    return Matches(candidates[index], box, iou[box, index])
