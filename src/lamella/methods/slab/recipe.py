"""Training of a decoder while its norms are replaced, with its own loss and statistics of the counted tokens."""

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
from lamella.methods.slab.modules import Init, TokenMask
from lamella.methods.slab.sites import Site, sites_of
from lamella.methods.slab.transition import (
    BestCheckpoint,
    Transition,
    convert,
    merge,
    prepbn_modules,
    refresh,
    reshuffled,
)
from lamella.stack import Stack, share
from lamella.train import Task, TrainConfig, TrainingLog, collate, fit, own
from lamella.train.losses import mean_loss, response_loss


@dataclass(frozen=True)
class GammaSchedule:
    """Schedule of the transition.

    Attributes:
        share: fraction of the steps over which gamma falls to 0; a third of a short training, up to 0.8 of a long one.
        warm: fraction of the steps before, in which the norms are used alone.
        first: initial gamma.
        init: initialisation of each batch norm: the ``norm``'s own weights with eta 0, for trained models; ``vision``,
            1 with eta 1; ``zero``.
        passes: number of epochs over which statistics are recomputed at the end; those with the lowest held-out loss,
            before or after any of them, are kept.

    Raises:
        MethodError: for fractions that add up to more than 1.
    """

    share: Annotated[float, Ge(0), Le(1)] = 0.3
    warm: Annotated[float, Ge(0), Le(1)] = 0.0
    first: Annotated[float, Gt(0), Le(1)] = 1.0
    init: Init = "norm"
    passes: Annotated[int, Ge(0)] = 1

    def __post_init__(self) -> None:
        if self.share + self.warm > 1:
            raise MethodError(
                f"share {self.share:g}, warm {self.warm:g}: give fractions of the steps that add up to at most 1, so "
                "that the "
                "transition ends before the training does"
            )

    def steps(self, whole: int) -> tuple[int, int]:
        """Return T and the number of warm steps of a training."""
        return round(self.share * whole), round(self.warm * whole)


@dataclass(frozen=True)
class MaskedLoss:
    """The loss of a language model; it also selects the tokens that enter the batch-norm statistics.

    Attributes:
        real: the shared token mask.
    """

    real: TokenMask

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Set the token mask from a batch, and return the loss.

        Args:
            model: the language model.
            batch: token ids, labels and, with padding, the attention mask, each [batch, time].
        """
        self.real.mask = counted_tokens(batch)
        return response_loss(model, batch)


def counted_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mask of tokens without padding and without the first of each row.

    The hidden state of the first token may be a hundred times as large as the others.
    """
    ids = batch["input_ids"]
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    first = mask & (mask.long().cumsum(1) == 1)
    return mask & ~first if bool((mask.sum(1) > 1).any()) else mask


def without_norms(
    stack: Stack,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    schedule: GammaSchedule,
    config: TrainConfig,
    out: Path,
) -> tuple[Any, TrainingLog, dict[str, Any]]:
    """Train a copy of a model until these norms are batch norms, and fold them.

    Args:
        stack: the model.
        samples: training samples.
        sites: the norms.
        schedule: schedule of the transition.
        config: training settings.
        out: folder of the run.

    Returns:
        The model without them, the log, and the change of the logits by folding, with the held-out losses of the
        refreshed statistics.
    """
    training, held_out = split_samples(samples)
    config = config.with_steps(len(training))
    view = share(stack.model)
    steps, warm = schedule.steps(config.steps or 1)
    real = convert(view, sites, steps=steps, warm=warm, first=schedule.first, init=schedule.init)
    own(view, lambda name: True)
    task = Task(MaskedLoss(real))
    settings = {"sites": [site.path for site in sites], "transition": [steps, warm, schedule.first, schedule.init]}
    log = fit(
        view, training, task, config, out=out, trainable=lambda name: True, held_out=held_out,
        hooks=[Transition(), BestCheckpoint()], settings=settings,
    )  # fmt: skip
    view.eval()
    for each in prepbn_modules(view):
        each.step.fill_(config.steps or 1)
    device = next(view.parameters()).device

    def run(batch: Mapping[str, Tensor]) -> None:
        inputs = {name: each.to(device) for name, each in batch.items() if name in ("input_ids", "attention_mask")}
        real.mask = counted_tokens(inputs)
        view(**inputs, use_cache=False)

    with torch.no_grad():
        passes = reshuffled(training, schedule.passes, config.batch, collate, config.seed)
        losses = refresh(view, passes, run, lambda: mean_loss(view, held_out, batch=config.batch))
        probe = dict(collate(training[:2]))["input_ids"].to(device)
        before = view(input_ids=probe, use_cache=False).logits
        merge(view, sites)
        moved = float((view(input_ids=probe, use_cache=False).logits - before).abs().max())
    return view, log, {"moved": moved, "scale": float(before.abs().max()), "refreshed": losses}


def split_samples(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Return the samples to train on, and the last twentieth, by which checkpoint and statistics are chosen.

    Args:
        samples: two samples or more.

    Raises:
        MethodError: for fewer.
    """
    if len(samples) < 2:
        raise MethodError("one sample: give at least two, of which one is held out")
    count = -(-len(samples) // 20)
    return samples[:-count], samples[-count:]


def free_sites(stack: Stack) -> tuple[list[Site], list[Site]]:
    """Return the norms that fold, and those that do not since the layers after them have tied weights."""
    uses: dict[int, int] = {}
    for _, parameter in stack.model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    sites = sites_of(stack)
    tied = [s for s in sites if any(uses[id(stack.model.get_submodule(r).weight)] > 1 for r in s.readers)]
    return [site for site in sites if site not in tied], tied
