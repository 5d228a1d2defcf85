"""Where the tasks should part, and where attention is worth inserting: both are measured stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.methods.muranet.balance import TASKS, Balance, agreement, gradients, shared_stages
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.frame import Rows, together
from lamella.methods.muranet.modules import PlanNetwork
from lamella.methods.muranet.recipe import Practice, practise, task_losses
from lamella.methods.muranet.result import Recogniser
from lamella.progress import track
from lamella.train import TrainConfig


def gradients_of(network: PlanNetwork, plans: Sequence[FloorPlan], frame: tuple[int, bool], batch: int) -> Tensor:
    """For each batch and shared stage the norms of both tasks' gradients, and their cosine [batches, stages, 3].

    The network is as it is used: statistics do not move.

    Raises:
        MethodError: for a network of one task, or one whose tasks share no stage.
    """
    stages = shared_stages(network)
    if not stages:
        raise MethodError("the two tasks share no stage of this network: give one that shares some")
    rows = Rows(plans, *frame)
    told = []
    device = network.encoder.mean.device
    starts = range(0, len(rows), batch)
    for start in track(starts, "gradients", len(starts)):
        given = together([rows[place] for place in range(start, min(start + batch, len(rows)))])
        with torch.enable_grad():
            losses = task_losses(network, {name: each.to(device) for name, each in given.items()})
            told.append(agreement(*(gradients(losses[task], stages) for task in TASKS)))
    return torch.stack(told).detach()


def branch_point(cosines: Tensor, persistent: float) -> int:
    """How many stages to share: up to the first whose cosine is negative in so large a share of the batches.

    Args:
        cosines: of each batch and stage [batches, stages].
        persistent: the share.
    """
    against = (cosines < 0).double().mean(0) >= persistent
    return int(against.nonzero()[0]) if against.any() else cosines.shape[1]


def size_of(network: PlanNetwork, split: int) -> int:
    """How many parameters a network has when its tasks share so many stages."""
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
    balance: Balance,
    out: Path,
) -> dict[str, Any]:
    """What attention behind one stage is worth: the loss before and after it alone was trained, on plans kept aside.

    Both are the two tasks' losses with the weights of the beginning, so that weights which move decide nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + stage)
        trial = found.changed(insert=[stage])
    network = trial.model
    encoder = network.encoder
    places: list[Any] = [encoder.stages[stage]]
    if stage >= encoder.shared:
        places.append(encoder.apart[stage - encoder.shared])
    blocks = [place[1] for place in places]
    network.hold(*network.children(), but=blocks)
    practice = Practice(flip=True, jitter=False, closing=0.0)
    log = practise(network, plans, config, practice, balance, frame=found.shape.frame, out=out, held_out=judges)
    before, after = log.held_out[0].parts, log.held_out[-1].parts
    first, last = (sum(w * each[task] for task, w in balance.first.items()) for each in (before, after))
    size = sum(each.numel() for block in blocks for each in block.parameters())
    return {"stage": stage, "before": first, "after": last, "gain": first - last,
            "walls": before["walls"] - after["walls"],
            "openings": before["openings"] - after["openings"], "parameters": size}  # fmt: skip
