"""Training of both tasks at once, in Lamella's training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from lamella.methods.muranet.balance import TASKS, BalanceHook, LossBalance, WeightedNetwork
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.frame import PlanRows, collate, recoloured, rotated
from lamella.methods.muranet.loss import opening_loss, wall_loss
from lamella.methods.muranet.modules import PlanNetwork
from lamella.plan import fingerprint
from lamella.train import Hook, Task, TrainConfig, TrainingLog, TrainingRun, fit
from lamella.train.supervised import count_rows

NO_CLIP = 1e6  # no clip of the summed gradient: the balance limits the gradients
TRAINING = TrainConfig(lr=1e-3, schedule="cosine", warmup=0.05, batch=8, weight_decay=5e-4, clip=NO_CLIP)
JITTER = 0.2  # range of the contrast, twice that of the brightness


@dataclass(frozen=True)
class PlanTraining:
    """How the network is trained on plans.

    Attributes:
        flip: mirror plans, and rotate them by quarter turns, at random.
        jitter: change contrast and brightness at random.
        closing: fraction of the steps, the last ones, without augmentation and with an additional loss on raw box
            values; 15 of 300 epochs in YOLOX.
        frozen: number of stages, the first ones, that are not trained.
    """

    flip: bool = True
    jitter: bool = True
    closing: Annotated[float, Ge(0), Le(1)] = 0.05
    frozen: Annotated[int, Ge(0)] = 0


def train_network(
    network: PlanNetwork,
    plans: Sequence[FloorPlan],
    config: TrainConfig,
    training: PlanTraining,
    balance: LossBalance,
    *,
    frame: tuple[int, bool],
    out: Path,
    held_out: Sequence[FloorPlan] = (),
    hooks: Sequence[Hook] = (),
) -> TrainingLog:
    """Train the trainable parameters of a network in place.

    Args:
        network: the network to train.
        plans: plans with known walls and openings.
        config: training settings.
        training: augmentation and closing steps.
        balance: balance of the two losses.
        frame: side in pixels of the network's input, and whether plans keep their aspect ratio in it.
        out: folder of the run, from which an interrupted run resumes.
        held_out: plans on which the loss is evaluated from time to time.
        hooks: further hooks.

    Raises:
        TrainingError: when training cannot start, resume or stay finite.
    """
    config = config.with_steps(len(plans))
    model = WeightedNetwork(network, balance)
    loss, balancing = PlanLoss(training), BalanceHook(model, balance)
    task = Task(loss, collate=collate, weight=count_rows, passes=balancing.passes)
    settings = {"training": asdict(training), "balance": asdict(balance), "frame": list(frame)}
    settings |= {"start": fingerprint.state(network)}  # a run from other initial weights must not resume this one
    closing = Closing(loss, round((1 - training.closing) * (config.steps or 1)))
    tested = PlanRows(held_out, *frame) if held_out else ()
    return fit(
        model, PlanRows(plans, *frame), task, config, out=out, held_out=tested, hooks=[closing, balancing, *hooks],
        settings=settings,
    )  # fmt: skip


class PlanLoss:
    """The loss of a batch, with its parts.

    Args:
        training: augmentation and closing steps.

    Attributes:
        closing: whether the last steps have begun.
    """

    def __init__(self, training: PlanTraining) -> None:
        self.training = training
        self.closing = False

    def __call__(self, model: WeightedNetwork, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and its parts, with augmentation in training."""
        if model.training and not self.closing:
            batch = self.augmented(batch)
        losses = task_losses(model.network, batch, closing=model.training and self.closing)
        tasks = {name: losses[name] for name in TASKS if name in losses}
        return model.total(tasks), losses

    def augmented(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Augment plans at random; the state of torch's generator is in the checkpoint."""
        rows = []
        for x, walls, boxes in zip(batch["x"], batch["walls"], batch["boxes"], strict=True):
            flip, quarters = int(torch.randint(2, ())), int(torch.randint(4, ()))
            if self.training.flip:
                x, walls, boxes = rotated(x, walls, boxes, bool(flip), quarters)
            if self.training.jitter:
                contrast, brightness = ((JITTER * (2 * torch.rand(2) - 1)) * torch.tensor([1, 0.5])).tolist()
                x = recoloured(x, 1 + contrast, brightness)
            rows.append({"x": x, "walls": walls, "boxes": boxes})
        return collate(rows)


def task_losses(network: PlanNetwork, batch: dict[str, Tensor], closing: bool = False) -> dict[str, Tensor]:
    """Return the loss of each task of a network, and the parts of the loss on openings.

    Args:
        network: the network.
        batch: images ``x`` [B, 3, H, W], true ``walls`` [B, H, W] and ``boxes`` [B, M, 5].
        closing: whether the last steps have begun, with an additional L1 loss on raw box values.
    """
    output = network(batch["x"])
    found: dict[str, Tensor] = {}
    if network.walls is not None:
        found["walls"] = wall_loss(output.walls, batch["walls"], network.walls.weights)
    if output.cells is not None and output.grid is not None:
        parts = opening_loss(output.cells, output.grid, batch["boxes"], closing)
        found |= {"openings": torch.stack([*parts.values()]).sum(), **parts}
    return found


class Closing(Hook):
    """Hook that switches to the last steps.

    Args:
        lesson: the loss.
        first: index of the first of these steps.
    """

    def __init__(self, loss: PlanLoss, first: int) -> None:
        self.loss, self.first = loss, first

    def before_step(self, run: TrainingRun) -> None:
        """Switch on the last steps."""
        self.loss.closing = run.step >= self.first


def curves(log: TrainingLog) -> dict[str, list[float]]:
    """Return losses and gradient measurements for each point of a log."""
    names = sorted({name for point in log.train for name in point.parts})
    return {name: [point.parts[name] for point in log.train if name in point.parts] for name in names}
