"""Measurements, stage by stage, of where the tasks should split and where attention is worth inserting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.methods.muranet.balance import TASKS, LossBalance, agreement, gradients, shared_stages
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.frame import PlanRows, collate
from lamella.methods.muranet.modules import OVERFLOWS, PlanNetwork
from lamella.methods.muranet.recipe import PlanTraining, task_losses, train_network
from lamella.methods.muranet.result import Recogniser
from lamella.progress import track
from lamella.train import TrainConfig


def gradients_of(network: PlanNetwork, plans: Sequence[FloorPlan], frame: tuple[int, bool], batch: int) -> Tensor:
    """Measure for each batch and shared stage the norms of both tasks' gradients, and their cosine.

    The network is in its current mode: batch norm statistics do not change in evaluation mode.

    Args:
        network: the network.
        plans: labelled plans.
        frame: side in pixels of the network's input, and whether plans keep their aspect ratio in it.
        batch: number of plans per gradient.

    Returns:
        [batches, stages, 3].

    Raises:
        MethodError: for a network of one task, one whose tasks share no stage, or one whose gradients are not finite.
    """
    stages = shared_stages(network)
    if not stages:
        raise MethodError("the two tasks share no stage of this network: give one that shares some")
    rows = PlanRows(plans, *frame)
    measured = []
    device = network.encoder.mean.device
    starts = range(0, len(rows), batch)
    for start in track(starts, "gradients", len(starts)):
        inputs = collate([rows[index] for index in range(start, min(start + batch, len(rows)))])
        with torch.enable_grad():
            losses = task_losses(network, {name: each.to(device) for name, each in inputs.items()})
            measured.append(agreement(*(gradients(losses[task], stages) for task in TASKS)))
        if not measured[-1].isfinite().all():
            names = ", ".join(plan.name for plan in plans[start : start + batch])
            raise MethodError(f"gradients on {names} are not finite: {OVERFLOWS}")
    return torch.stack(measured).detach()


def branch_point(cosines: Tensor, persistent: float) -> int:
    """Return how many stages to share: those before the first whose cosine is negative in a given fraction of batches.

    Args:
        cosines: cosines of each batch and stage [batches, stages].
        persistent: the fraction.
    """
    against = (cosines < 0).double().mean(0) >= persistent
    return int(against.nonzero()[0]) if against.any() else cosines.shape[1]


def size_of(network: PlanNetwork, split: int) -> int:
    """Return the number of parameters that a network would have if its tasks shared ``split`` stages.

    Args:
        network: the network.
        split: number of shared stages, at most that of the network.
    """
    encoder = network.encoder
    whole = sum(each.numel() for each in network.parameters())
    copied = encoder.stages[split : encoder.shared]
    return whole + sum(each.numel() for stage in copied for each in stage.parameters())


def worth(
    found: Recogniser,
    plans: Sequence[FloorPlan],
    judges: Sequence[FloorPlan],
    stage: int,
    config: TrainConfig,
    balance: LossBalance,
    out: Path,
) -> dict[str, Any]:
    """Train attention after one stage alone, and return the loss on held-out plans before and after.

    Both are the two tasks' losses with their initial weights, so that changing weights have no influence.

    Args:
        found: the trained network.
        plans: plans to train on.
        judges: held-out plans.
        stage: index of the stage.
        config: training settings.
        balance: balance of the losses.
        out: folder of the run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + stage)
        trial = found.changed(insert=[stage])
    network = trial.model
    encoder = network.encoder
    stages: list[Any] = [encoder.stages[stage]]
    if stage >= encoder.shared:
        stages.append(encoder.apart[stage - encoder.shared])
    blocks = [index[1] for index in stages]
    network.freeze(*network.children(), except_for=blocks)
    training = PlanTraining(flip=True, jitter=False, closing=0.0)
    log = train_network(network, plans, config, training, balance, frame=found.shape.frame, out=out, held_out=judges)
    before, after = log.held_out[0].parts, log.held_out[-1].parts
    first, last = (sum(w * each[task] for task, w in balance.first.items()) for each in (before, after))
    size = sum(each.numel() for block in blocks for each in block.parameters())
    return {"stage": stage, "before": first, "after": last, "gain": first - last,
            "walls": before["walls"] - after["walls"],
            "openings": before["openings"] - after["openings"], "parameters": size}  # fmt: skip
