"""Training a decoder while its norms go: its own loss, gamma counted by steps, statistics of the tokens that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lamella.data import Sample
from lamella.errors import MethodError
from lamella.methods.slab.modules import Init, Real
from lamella.methods.slab.sites import Site, sites_of
from lamella.methods.slab.transition import Transition, convert, merge, places, refresh
from lamella.progress import tracker
from lamella.stack import Stack, share
from lamella.train import Task, TrainConfig, TrainingLog, collate, fit, own
from lamella.train.losses import response_loss


@dataclass(frozen=True)
class Schedule:
    """How norms go.

    Attributes:
        share: of the steps, over which gamma falls to 0; of a short training a third, of a long one up to 0.8.
        warm: share of the steps before, in which the norms are alone.
        first: gamma at its highest.
        init: of each batch norm: the ``norm``'s own weights with eta 0, for trained models; ``vision``, 1 with eta 1;
            ``zero``.
        passes: over the training data, in which statistics are counted anew at the end.

    Raises:
        MethodError: for shares of more than all steps together.
    """

    share: Annotated[float, Ge(0), Le(1)] = 0.3
    warm: Annotated[float, Ge(0), Le(1)] = 0.0
    first: Annotated[float, Gt(0), Le(1)] = 1.0
    init: Init = "norm"
    passes: Annotated[int, Ge(0)] = 1

    def __post_init__(self) -> None:
        if self.share + self.warm > 1:
            raise MethodError(
                f"share {self.share:g}, warm {self.warm:g}: give shares of the steps, 1 together at most, so that the "
                "transition ends before the training does"
            )

    def steps(self, whole: int) -> tuple[int, int]:
        """T and the warm steps of a training of so many."""
        return round(self.share * whole), round(self.warm * whole)


@dataclass(frozen=True)
class Counted:
    """A language model's loss; which tokens count in statistics is said before it runs.

    Attributes:
        real: where it is said.
    """

    real: Real

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        self.real.mask = counted(batch)
        return response_loss(model, batch)


def counted(batch: Mapping[str, Tensor]) -> Tensor:
    """Tokens that are no padding, without the first of each row, whose stream may be a hundred times as large."""
    ids = batch["input_ids"]
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    first = mask & (mask.long().cumsum(1) == 1)
    return mask & ~first if bool((mask.sum(1) > 1).any()) else mask


def without_norms(
    stack: Stack, samples: Sequence[Sample], sites: Sequence[Site], schedule: Schedule, config: TrainConfig, out: Path
) -> tuple[Any, TrainingLog, dict[str, Any]]:
    """Train a copy of a model until these norms are batch norms, and fold them.

    Returns:
        The model without them, the log, and how the function was kept in folding.
    """
    config = config.with_steps(len(samples))
    view = share(stack.model)
    steps, warm = schedule.steps(config.steps or 1)
    real = convert(view, sites, steps=steps, warm=warm, first=schedule.first, init=schedule.init)
    own(view, lambda name: True)
    task = Task(Counted(real))
    settings = {"sites": [site.path for site in sites], "transition": [steps, warm, schedule.first, schedule.init]}
    log = fit(
        view, samples, task, config, out=out, trainable=lambda name: True, hooks=[Transition()], settings=settings
    )
    view.eval()
    for each in places(view):
        each.step.fill_(config.steps or 1)
    device = next(view.parameters()).device

    def run(batch: Mapping[str, Tensor]) -> None:
        given = {name: each.to(device) for name, each in batch.items() if name in ("input_ids", "attention_mask")}
        real.mask = counted(given)
        view(**given, use_cache=False)

    if schedule.passes:
        with tracker("statistics", schedule.passes) as count:
            for _ in range(schedule.passes):
                refresh(view, batches(samples, config.batch), run)
                count()
    real.mask = None
    probe = next(iter(batches(samples, 2)))["input_ids"].to(device)
    with torch.no_grad():
        before = view(input_ids=probe, use_cache=False).logits
        merge(view, sites)
        moved = float((view(input_ids=probe, use_cache=False).logits - before).abs().max())
    return view, log, {"moved": moved, "scale": float(before.abs().max())}


def batches(samples: Sequence[Sample], size: int) -> list[dict[str, Tensor]]:
    return [dict(collate(samples[start : start + size])) for start in range(0, len(samples), size)]


def free_sites(stack: Stack) -> tuple[list[Site], list[Site]]:
    """The norms that fold, and those that do not, since what reads them is tied to something else."""
    held: dict[int, int] = {}
    for _, parameter in stack.model.named_parameters(remove_duplicate=False):
        held[id(parameter)] = held.get(id(parameter), 0) + 1
    sites = sites_of(stack)
    tied = [s for s in sites if any(held[id(stack.model.get_submodule(r).weight)] > 1 for r in s.readers)]
    return [site for site in sites if site not in tied], tied
