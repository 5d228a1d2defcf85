"""How well plans are recognised: walls by IoU pooled over all pixels, openings by COCO's average precision.

Precision is that of pycocotools, through torchmetrics: greedy matching by score, each true box once, 101 points of
recall, IoU from 0.5 to 0.95. What needs no training stands beside it: every pixel darker than a threshold is wall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamella.extras import require
from lamella.methods.muranet.assign import corners
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.frame import Frame
from lamella.methods.muranet.modules import PlanNetwork
from lamella.progress import track

LEAST_SCORE, OVERLAP = 0.01, 0.65  # of boxes that are judged
USED_SCORE, USED_OVERLAP = 0.25, 0.45  # of boxes that are used
GREYS = (0.3, 0.5, 0.7)  # thresholds without training
MOST = 1000  # boxes of a plan before any is suppressed
AT = {"ap50": 0, "ap75": 5}  # places of the thresholds of IoU


@dataclass(frozen=True)
class Recognised:
    """What a network sees in one plan.

    Attributes:
        walls: probability of wall [height, width]; None without that task.
        boxes: x0, y0, x1, y1 in pixels [n, 4], the surest first.
        scores: objectness x class [n].
        labels: classes [n].
    """

    walls: NDArray[np.float32] | None
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


@torch.no_grad()
def recognise(
    network: PlanNetwork,
    plan: FloorPlan,
    frame: tuple[int, bool],
    *,
    score: float = USED_SCORE,
    overlap: float = USED_OVERLAP,
) -> Recognised:
    """What a network sees in a plan, in one pass.

    Args:
        network: in evaluation mode.
        plan: it.
        frame: pixels of a side that the network reads, and whether plans keep their shape in it.
        score: of boxes, at least.
        overlap: IoU of two boxes of a class, above which the less sure one goes.
    """
    placed = Frame.of(plan, *frame)
    device = network.encoder.mean.device
    seen = network(placed.pixels(plan)[None].to(device))
    walls = placed.back(seen.walls[0][0].float(), plan).sigmoid().cpu().numpy() if seen.walls else None
    if seen.cells is None or seen.grid is None:
        return Recognised(walls)
    cells = seen.cells[0].float()
    boxes = corners(seen.grid.decode(cells))
    scores = cells[:, 4:5].sigmoid() * cells[:, 5:].sigmoid()
    place, label = (scores > score).nonzero(as_tuple=True)
    sure = scores[place, label].topk(min(MOST, len(place))).indices
    place, label = place[sure], label[sure]
    found, score_of = placed.boxes_back(boxes[place], plan), scores[place, label]
    real = ((found[:, 2:] - found[:, :2]) > 0).all(1)
    found, score_of, label = found[real], score_of[real], label[real]
    nms = require("torchvision.ops", "vision", "finding openings").batched_nms
    kept = nms(found, score_of, label, overlap)
    return Recognised(walls, found[kept].cpu(), score_of[kept].cpu(), label[kept].cpu())


@dataclass
class WallCount:
    """Pixels that are wall in both of two masks, and in either."""

    both: int = 0
    either: int = 0

    def add(self, ours: NDArray[np.bool_], truth: NDArray[np.bool_]) -> None:
        """Count those of one plan."""
        self.both += int((ours & truth).sum())
        self.either += int((ours | truth).sum())

    @property
    def iou(self) -> float:
        return self.both / self.either if self.either else 1.0


def judged(
    network: PlanNetwork, plans: Sequence[FloorPlan], frame: tuple[int, bool], classes: Sequence[str]
) -> dict[str, Any]:
    """Wall IoU, and average precision of each class, of a network in evaluation mode on plans whose truth is known.

    Returns:
        ``wall iou``, and ``openings`` by class, each with ``ap50``, ``ap75``, ``ap`` and ``boxes``, how many there are;
        what the network does not look for is missing.

    Raises:
        LamellaError: when torchmetrics or pycocotools is missing.
    """
    walls, found = WallCount(), []
    for plan in track(plans, "plans", len(plans)):
        seen = recognise(network, plan, frame, score=LEAST_SCORE, overlap=OVERLAP)
        if seen.walls is not None and plan.walls is not None:
            walls.add(seen.walls > 0.5, plan.walls)
        found.append(seen)
    told: dict[str, Any] = {} if network.walls is None else {"wall iou": walls.iou}
    if network.openings is not None:
        told["openings"] = precision(found, plans, classes)
    return told


def precision(
    found: Sequence[Recognised], plans: Sequence[FloorPlan], classes: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Average precision of each class: at IoU 0.5, at 0.75, and the mean from 0.5 to 0.95; None without a true box.

    Raises:
        LamellaError: when torchmetrics or pycocotools is missing.
    """
    require("pycocotools", "detection", "average precision")
    detection = require("torchmetrics.detection", "detection", "average precision")
    metric = detection.MeanAveragePrecision(extended_summary=True, backend="pycocotools")
    metric.warn_on_many_detections = False
    counts = dict.fromkeys(range(len(classes)), 0)
    for seen, plan in zip(found, plans, strict=True):
        assert plan.boxes is not None
        true = torch.from_numpy(plan.boxes)
        labels = true[:, 0].long()
        metric.update(
            [{"boxes": seen.boxes, "scores": seen.scores, "labels": seen.labels}],
            [{"boxes": corners(true[:, 1:]), "labels": labels}],
        )
        for each in labels.tolist():
            counts[each] += 1
    if not any(counts.values()):
        return {name: dict.fromkeys((*AT, "ap")) | {"boxes": 0} for name in classes}
    said = metric.compute()
    known = said["classes"].reshape(-1).tolist()
    rows: dict[str, dict[str, float | None]] = {}
    for label, name in enumerate(classes):
        if not counts[label]:
            rows[name] = dict.fromkeys((*AT, "ap")) | {"boxes": 0}
            continue
        curve = said["precision"][:, :, known.index(label), 0, -1].double()  # [IoU, recall], of all sizes
        each = curve.mean(1).tolist()
        rows[name] = {at: each[place] for at, place in AT.items()} | {"ap": float(curve.mean()), "boxes": counts[label]}
    return rows


def grey_floor(plans: Sequence[FloorPlan]) -> dict[str, float]:
    """Wall IoU of calling dark pixels wall, by the threshold of grey from 0 to 1."""
    counts = {threshold: WallCount() for threshold in GREYS}
    for plan in plans:
        grey = plan.picture.mean(axis=2) / 255
        for threshold, count in counts.items():
            assert plan.walls is not None
            count.add(grey < threshold, plan.walls)
    return {f"{threshold:g}": count.iou for threshold, count in counts.items()}


def median_box(plans: Sequence[FloorPlan]) -> list[float] | None:
    """Width and height of the median opening, along and across its wall, in pixels."""
    sides = [
        np.sort(plan.boxes[:, 3:], axis=1)[:, ::-1] for plan in plans if plan.boxes is not None and len(plan.boxes)
    ]
    return np.median(np.concatenate(sides), axis=0).tolist() if sides else None
