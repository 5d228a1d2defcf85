"""Losses of the two tasks: walls by pixel and by region, openings by cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as nats
from torch.nn.functional import one_hot

from lamella.methods.muranet.assign import overlap, simota
from lamella.methods.muranet.modules import LARGEST, CellGrid

OVERLAP = 5.0  # weight of the IoU loss


def wall_loss(logits: Sequence[Tensor], walls: Tensor, weights: Sequence[float] = (1.0,)) -> Tensor:
    """Return the weighted sum of cross-entropy plus soft Dice loss over the logits of several maps.

    Args:
        logits: logits of each map [B, H, W].
        walls: true walls [B, H, W].
        weights: weight of each map.
    """
    truth = walls.float()
    parts = [w * (nats(each, truth) + dice(each, truth)) for w, each in zip(weights, logits, strict=True)]
    return torch.stack(parts).sum()


def dice(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the soft Dice loss, 1 - 2 |p t| / (|p| + |t|), averaged over images; near 0 if both are empty.

    Args:
        logits: logits [B, H, W].
        truth: true walls, 0 or 1 [B, H, W].
    """
    p = logits.sigmoid()
    both, sizes = (p * truth).sum((1, 2)), (p + truth).sum((1, 2))
    return (1 - (2 * both + 1) / (sizes + 1)).mean()


def overlap_loss(found: Tensor, boxes: Tensor) -> Tensor:
    """Return 1 - IoU^2 of boxes, pair by pair [...].

    Args:
        found: predicted boxes cx, cy, w, h [..., 4].
        boxes: true boxes cx, cy, w, h [..., 4].
    """
    return 1 - overlap(found, boxes).square()


def opening_loss(cells: Tensor, grid: CellGrid, boxes: Tensor, closing: bool = False) -> dict[str, Tensor]:
    """Return the losses on openings, summed over cells and divided by the number of matched cells.

    Args:
        cells: raw predictions of each cell [B, A, 5 + classes].
        grid: the grid of the cells.
        boxes: class, cx, cy, w, h [B, M, 5]; padding has class -1.
        closing: add an L1 loss on the raw box values, as in the last steps of a training.

    Returns:
        ``overlap``, ``objectness``, ``classes`` and ``raw``, which is 0 unless closing; the loss is their sum.
    """
    cells = cells.float() if cells.dtype is torch.bfloat16 else cells  # bfloat16 is too coarse for pixel coordinates
    objectness = torch.zeros_like(cells[..., 4])
    parts: dict[str, list[Tensor]] = {"overlap": [], "classes": [], "raw": []}
    positives = 0
    for b, each in enumerate(boxes):
        real = each[each[:, 0] >= 0]
        labels = real[:, 0].long()
        matched = simota(cells[b].detach(), grid, real[:, 1:], labels)
        positives += len(matched.cell)
        objectness[b, matched.cell] = 1.0
        predicted, targets = cells[b, matched.cell], real[matched.box, 1:]
        matched_grid = CellGrid(grid.corner[matched.cell], grid.stride[matched.cell])
        parts["overlap"].append(overlap_loss(matched_grid.decode(predicted), targets).sum())
        target = one_hot(labels[matched.box], cells.shape[-1] - 5) * matched.iou[:, None]
        parts["classes"].append(nats(predicted[:, 5:], target, reduction="sum"))
        parts["raw"].append((predicted[:, :4].clamp(max=LARGEST) - matched_grid.encode(targets)).abs().sum())
    count = max(positives, 1)
    overlaps, classes, raw = (torch.stack(each).sum() / count for each in parts.values())
    return {
        "overlap": OVERLAP * overlaps,
        "objectness": nats(cells[..., 4], objectness, reduction="sum") / count,
        "classes": classes,
        "raw": raw if closing else torch.zeros_like(raw),
    }
