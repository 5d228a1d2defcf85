"""Which cells learn which box (SimOTA, as in YOLOX), and what they learn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lamella.methods.muranet.modules import Grid

RADIUS = 1.5  # strides between the centre of a box and that of a cell, on each axis
OVERLAP, FAR = 3.0, 1e6  # weights in the cost: of -log IoU, and of cells that are near other boxes alone
MOST = 10  # cells whose IoU says how many a box gets
TINY = 1e-8
LEAST = -100.0  # of a logarithm


class Matched(NamedTuple):
    """Cells with the box of each.

    Attributes:
        cell: places of cells [P], each once.
        box: the number of its box [P].
        iou: of the two [P].
    """

    cell: Tensor
    box: Tensor
    iou: Tensor


def corners(boxes: Tensor) -> Tensor:
    """cx, cy, w, h as x0, y0, x1, y1 [..., 4]."""
    xy, half = boxes[..., :2], boxes[..., 2:4] / 2
    return torch.cat([xy - half, xy + half], -1)


def overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """IoU of boxes cx, cy, w, h [..., 4], pair by pair."""
    a, b = corners(ours), corners(theirs)
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    shared = sides.prod(-1)
    both = ours[..., 2:4].prod(-1) + theirs[..., 2:4].prod(-1)
    return shared / (both - shared).clamp(min=TINY)


@torch.no_grad()
def simota(cells: Tensor, grid: Grid, boxes: Tensor, labels: Tensor) -> Matched:
    """The cells that learn the boxes of one picture.

    Args:
        cells: what is in each [A, 5 + classes], raw.
        grid: of the cells.
        boxes: cx, cy, w, h [G, 4].
        labels: classes [G].

    Returns:
        For each box as many of the cheapest cells as its best IoUs come to, at least one; a cell that two boxes want
        goes to the one that it is cheaper for. A box that loses all of its cells so takes the cheapest that is left.
    """
    nothing = torch.zeros(0, dtype=torch.long, device=cells.device)
    if not len(boxes):
        return Matched(nothing, nothing, cells.new_zeros(0))
    away = (grid.centres[None] - boxes[:, None, :2]).abs().amax(-1)
    near = away < RADIUS * grid.stride  # [G, A]
    candidates = near.any(0).nonzero()[:, 0]  # [A']
    near, cells = near[:, candidates], cells[candidates].float()
    chosen = Grid(grid.corner[candidates], grid.stride[candidates])
    iou = overlap(boxes[:, None], chosen.decode(cells)[None])  # [G, A']
    scores = (cells[:, 5:].sigmoid() * cells[:, 4:5].sigmoid()).sqrt()  # [A', K]
    sure, unsure = scores.log().clamp(min=LEAST), (-scores).log1p().clamp(min=LEAST)
    others = unsure.sum(-1, keepdim=True)
    named = -(sure - unsure + others)[:, labels].T  # the cross-entropy with the class of each box [G, A']
    cost = named - OVERLAP * (iou + TINY).log() + FAR * ~near
    many = iou.topk(min(MOST, iou.shape[1]), 1).values.sum(1).int().clamp(min=1)
    match = torch.zeros_like(near)
    for g, k in enumerate(many.tolist()):
        match[g, cost[g].topk(min(k, cost.shape[1]), largest=False).indices] = True
    twice = match.sum(0) > 1
    match[:, twice] = one_hot(cost[:, twice].argmin(0), len(boxes)).T.bool()
    for g in (~match.any(1)).nonzero()[:, 0].tolist():  # YOLOX leaves these without any
        free = cost[g].masked_fill(match.any(0), torch.inf)
        if torch.isfinite(free.min()):
            match[g, free.argmin()] = True
    box, place = match.nonzero(as_tuple=True)
    return Matched(candidates[place], box, iou[box, place])
