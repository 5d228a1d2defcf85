"""Evaluation: walls by IoU pooled over all pixels, openings by COCO's average precision.

Average precision is that of pycocotools, through torchmetrics: greedy matching by score, each true box once, 101 points
of recall, IoU from 0.5 to 0.95. A baseline without training calls every pixel darker than a threshold a wall.
"""

from __future__ import annotations

import warnings
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
from lamella.methods.muranet.modules import OVERFLOWS, PlanNetwork
from lamella.progress import track

LEAST_SCORE, OVERLAP = 0.01, 0.65  # score and IoU thresholds of boxes in the evaluation
USED_SCORE, USED_OVERLAP = 0.25, 0.45  # score and IoU thresholds of boxes in use
GREYS = (0.3, 0.5, 0.7)  # thresholds of the baseline without training
MOST = 1000  # boxes of a plan before non-maximum suppression
AT = {"ap50": 0, "ap75": 5}  # indices of the IoU thresholds


@dataclass(frozen=True)
class Recognition:
    """The predictions of a network for one plan.

    Attributes:
        walls: probability of wall [height, width]; None without that task.
        boxes: x0, y0, x1, y1 in pixels [n, 4], in falling order of score.
        scores: objectness x class probability [n].
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
) -> Recognition:
    """Run a network on a plan, in one pass.

    An output that is not finite is reported by a warning: nothing is recognised there.

    Args:
        network: in evaluation mode.
        plan: the plan.
        frame: side in pixels of the network's input, and whether plans keep their aspect ratio in it.
        score: minimum score of boxes.
        overlap: IoU of two boxes of a class above which the one with the lower score is suppressed.
    """
    frame_of_plan = Frame.of(plan, *frame)
    device = network.encoder.mean.device
    output = network(frame_of_plan.pixels(plan)[None].to(device))
    outputs = output.walls if output.cells is None else [*output.walls, output.cells]
    if not all(each.isfinite().all() for each in outputs):
        warnings.warn(f"{plan.name}: the output is not finite, so nothing is recognised: {OVERFLOWS}", stacklevel=2)
    walls = frame_of_plan.back(output.walls[0][0].float(), plan).sigmoid().cpu().numpy() if output.walls else None
    if output.cells is None or output.grid is None:
        return Recognition(walls)
    cells = output.cells[0].float()
    boxes = corners(output.grid.decode(cells))
    scores = cells[:, 4:5].sigmoid() * cells[:, 5:].sigmoid()
    index, label = (scores > score).nonzero(as_tuple=True)
    order = scores[index, label].topk(min(MOST, len(index))).indices
    index, label = index[order], label[order]
    found, score_of = frame_of_plan.boxes_back(boxes[index], plan), scores[index, label]
    real = ((found[:, 2:] - found[:, :2]) > 0).all(1)
    found, score_of, label = found[real], score_of[real], label[real]
    nms = require("torchvision.ops", "vision", "finding openings").batched_nms
    keep = nms(found, score_of, label, overlap)
    return Recognition(walls, found[keep].cpu(), score_of[keep].cpu(), label[keep].cpu())


@dataclass
class WallCount:
    """Number of pixels that are wall in both of two masks, and in either.

    Attributes:
        both: pixels in the intersection.
        either: pixels in the union.
    """

    both: int = 0
    either: int = 0

    def add(self, ours: NDArray[np.bool_], truth: NDArray[np.bool_]) -> None:
        """Add the pixels of one plan.

        Args:
            ours: predicted walls [height, width].
            truth: true walls [height, width].
        """
        self.both += int((ours & truth).sum())
        self.either += int((ours | truth).sum())

    @property
    def iou(self) -> float:
        """The intersection over union; 1 without any wall."""
        return self.both / self.either if self.either else 1.0


def evaluate_plans(
    network: PlanNetwork, plans: Sequence[FloorPlan], frame: tuple[int, bool], classes: Sequence[str]
) -> dict[str, Any]:
    """Evaluate a network on labelled plans: IoU of the walls, and average precision of each class of openings.

    Args:
        network: the network, in evaluation mode.
        plans: labelled plans.
        frame: side in pixels of the network's input, and whether plans keep their aspect ratio in it.
        classes: names of the classes.

    Returns:
        ``wall iou``, and ``openings`` by class, each with ``ap50``, ``ap75``, ``ap`` and ``boxes``, the number of true
        boxes. Tasks that the network does not have are missing.

    Raises:
        LamellaError: when torchmetrics or pycocotools is missing.
    """
    walls, found = WallCount(), []
    for plan in track(plans, "plans", len(plans)):
        output = recognise(network, plan, frame, score=LEAST_SCORE, overlap=OVERLAP)
        if output.walls is not None and plan.walls is not None:
            walls.add(output.walls > 0.5, plan.walls)
        found.append(output)
    findings: dict[str, Any] = {} if network.walls is None else {"wall iou": walls.iou}
    if network.openings is not None:
        findings["openings"] = precision(found, plans, classes)
    return findings


def precision(
    found: Sequence[Recognition], plans: Sequence[FloorPlan], classes: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Return the average precision of each class at IoU 0.5, at 0.75, and averaged over 0.5 to 0.95.

    It is None for a class without a true box.

    Args:
        found: predictions of each plan.
        plans: labelled plans.
        classes: names of the classes.

    Raises:
        LamellaError: when torchmetrics or pycocotools is missing.
    """
    require("pycocotools", "detection", "average precision")
    detection = require("torchmetrics.detection", "detection", "average precision")
    metric = detection.MeanAveragePrecision(extended_summary=True, backend="pycocotools")
    metric.warn_on_many_detections = False
    counts = dict.fromkeys(range(len(classes)), 0)
    for output, plan in zip(found, plans, strict=True):
        assert plan.boxes is not None
        true = torch.from_numpy(plan.boxes)
        labels = true[:, 0].long()
        metric.update(
            [{"boxes": output.boxes, "scores": output.scores, "labels": output.labels}],
            [{"boxes": corners(true[:, 1:]), "labels": labels}],
        )
        for each in labels.tolist():
            counts[each] += 1
    if not any(counts.values()):
        return {name: dict.fromkeys((*AT, "ap")) | {"boxes": 0} for name in classes}
    result = metric.compute()
    known = result["classes"].reshape(-1).tolist()
    rows: dict[str, dict[str, float | None]] = {}
    for label, name in enumerate(classes):
        if not counts[label]:
            rows[name] = dict.fromkeys((*AT, "ap")) | {"boxes": 0}
            continue
        curve = result["precision"][:, :, known.index(label), 0, -1].double()  # [IoU, recall], over all sizes
        each = curve.mean(1).tolist()
        rows[name] = {at: each[index] for at, index in AT.items()} | {"ap": float(curve.mean()), "boxes": counts[label]}
    return rows


def grey_floor(plans: Sequence[FloorPlan]) -> dict[str, float]:
    """Return the wall IoU of calling dark pixels wall, by the grey threshold from 0 to 1."""
    counts = {threshold: WallCount() for threshold in GREYS}
    for plan in plans:
        grey = plan.image.mean(axis=2) / 255
        for threshold, count in counts.items():
            assert plan.walls is not None
            count.add(grey < threshold, plan.walls)
    return {f"{threshold:g}": count.iou for threshold, count in counts.items()}


def median_box(plans: Sequence[FloorPlan]) -> list[float] | None:
    """Return the length and thickness of the median opening, along and across its wall, in pixels."""
    sides = [
        np.sort(plan.boxes[:, 3:], axis=1)[:, ::-1] for plan in plans if plan.boxes is not None and len(plan.boxes)
    ]
    return np.median(np.concatenate(sides), axis=0).tolist() if sides else None
