"""Training: both tasks at once, through the house's loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from lamella.methods.muranet.balance import TASKS, Balance, Balanced, Balancing
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.frame import Rows, coloured, together, turned
from lamella.methods.muranet.loss import opening_loss, wall_loss
from lamella.methods.muranet.modules import PlanNetwork
from lamella.plan import fingerprint
from lamella.train import Hook, Task, TrainConfig, TrainingLog, TrainingRun, fit
from lamella.train.supervised import count_rows

NO_CLIP = 1e6  # of the sum of both tasks' gradients: it is the balance that limits them
TRAINING = TrainConfig(lr=1e-3, schedule="cosine", warmup=0.05, batch=8, weight_decay=5e-4, clip=NO_CLIP)
JITTER = 0.2  # of contrast, and half of it of brightness


@dataclass(frozen=True)
class Practice:
    """How plans are practised on.

    Attributes:
        flip: mirror plans, and turn them by quarters, by chance.
        jitter: change contrast and brightness by chance.
        closing: the share of the steps, the last ones, in which plans are as they are and the raw numbers of boxes
            count too; YOLOX's 15 of 300.
        frozen: how many stages, the first ones, stay as they are.
    """

    flip: bool = True
    jitter: bool = True
    closing: Annotated[float, Ge(0), Le(1)] = 0.05
    frozen: Annotated[int, Ge(0)] = 0


def practise(
    network: PlanNetwork,
    plans: Sequence[FloorPlan],
    config: TrainConfig,
    practice: Practice,
    balance: Balance,
    *,
    frame: tuple[int, bool],
    out: Path,
    held_out: Sequence[FloorPlan] = (),
    hooks: Sequence[Hook] = (),
) -> TrainingLog:
    """Train what of a network requires a gradient, in place.

    Args:
        network: that trains.
        plans: whose walls and openings are known.
        config: of the training.
        practice: on plans.
        balance: of the two losses.
        frame: pixels of a side that the network reads, and whether plans keep their shape in it.
        out: the folder of the run, which goes on from there after a stop.
        held_out: plans that are looked at now and then.
        hooks: what else looks on.

    Raises:
        TrainingError: when training cannot start, go on or stay finite.
    """
    config = config.with_steps(len(plans))
    model = Balanced(network, balance)
    lesson, balancing = Lesson(practice), Balancing(model, balance)
    task = Task(lesson, collate=together, weight=count_rows, passes=balancing.passes)
    settings = {"practice": asdict(practice), "balance": asdict(balance), "frame": list(frame)}
    settings |= {"start": fingerprint.state(network)}  # a run that begins elsewhere is another
    closing = Closing(lesson, round((1 - practice.closing) * (config.steps or 1)))
    tested = Rows(held_out, *frame) if held_out else ()
    return fit(
        model, Rows(plans, *frame), task, config, out=out, held_out=tested, hooks=[closing, balancing, *hooks],
        settings=settings,
    )  # fmt: skip


class Lesson:
    """The loss of a batch, and its parts.

    Args:
        practice: what is done to plans that are trained on.

    Attributes:
        closing: whether these are the last steps.
    """

    def __init__(self, practice: Practice) -> None:
        self.practice = practice
        self.closing = False

    def __call__(self, model: Balanced, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if model.training and not self.closing:
            batch = self.varied(batch)
        losses = task_losses(model.network, batch, closing=model.training and self.closing)
        tasks = {name: losses[name] for name in TASKS if name in losses}
        return model.total(tasks), losses

    def varied(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Plans mirrored, turned and recoloured by chance; torch's state is in the checkpoint."""
        rows = []
        for x, walls, boxes in zip(batch["x"], batch["walls"], batch["boxes"], strict=True):
            flip, quarters = int(torch.randint(2, ())), int(torch.randint(4, ()))
            if self.practice.flip:
                x, walls, boxes = turned(x, walls, boxes, bool(flip), quarters)
            if self.practice.jitter:
                contrast, brightness = ((JITTER * (2 * torch.rand(2) - 1)) * torch.tensor([1, 0.5])).tolist()
                x = coloured(x, 1 + contrast, brightness)
            rows.append({"x": x, "walls": walls, "boxes": boxes})
        return together(rows)


def task_losses(network: PlanNetwork, batch: dict[str, Tensor], closing: bool = False) -> dict[str, Tensor]:
    """The loss of each task that a network has, and the parts of that on openings."""
    seen = network(batch["x"])
    found: dict[str, Tensor] = {}
    if network.walls is not None:
        found["walls"] = wall_loss(seen.walls, batch["walls"], network.walls.weights)
    if seen.cells is not None and seen.grid is not None:
        parts = opening_loss(seen.cells, seen.grid, batch["boxes"], closing)
        found |= {"openings": torch.stack([*parts.values()]).sum(), **parts}
    return found


class Closing(Hook):
    """Tells a lesson when the last steps begin.

    Args:
        lesson: it.
        first: of these steps.
    """

    def __init__(self, lesson: Lesson, first: int) -> None:
        self.lesson, self.first = lesson, first

    def before_step(self, run: TrainingRun) -> None:
        self.lesson.closing = run.step >= self.first


def curves(log: TrainingLog) -> dict[str, list[float]]:
    """Losses, and what was seen of gradients, point by point of a log."""
    names = sorted({name for point in log.train for name in point.parts})
    return {name: [point.parts[name] for point in log.train if name in point.parts] for name in names}
