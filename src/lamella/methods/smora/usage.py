"""Who runs what: how often the tokens of each task choose each expert of each map, and how even the load is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lamella.data import Sample
from lamella.methods.smora.modules import RankExperts
from lamella.train import collate, response_loss
from lamella.train.task import Batch


@dataclass(frozen=True)
class Usage:
    """Counts of chosen experts.

    Attributes:
        maps: names of the maps.
        counts: by task, for each map and rank [maps, R].
        losses: of each task's labels, in nats per token.
    """

    maps: tuple[str, ...]
    counts: Mapping[str, Tensor]
    losses: Mapping[str, float]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        view: Any,
        experts: Mapping[str, RankExperts],
        samples: Mapping[str, Sequence[Sample]],
        *,
        answers: bool = False,
        batch: int = 8,
    ) -> Usage:
        """Route the examples of each task; the view's mode stays as it is.

        Args:
            view: that the experts stand in.
            experts: by the names of their maps.
            samples: by task.
            answers: count the tokens that predict a label alone, and not all that are no padding.
            batch: samples in one forward pass.
        """
        was_training, device = view.training, next(view.parameters()).device
        view.eval()
        counts, losses = {}, {}
        try:
            for task, given in samples.items():
                total, nats, labels = {name: torch.zeros(each.r) for name, each in experts.items()}, 0.0, 0
                for start in range(0, len(given), batch):
                    some = {name: each.to(device) for name, each in collate(given[start : start + batch]).items()}
                    weight = int((some["labels"][:, 1:] >= 0).sum())
                    nats += weight * float(_counted(view, experts, some, total, answers))
                    labels += weight
                counts[task] = torch.stack(list(total.values()))
                losses[task] = nats / max(labels, 1)
        finally:
            view.train(was_training)
        return cls(tuple(experts), counts, losses)

    @property
    def total(self) -> Tensor:
        """Of all tasks [maps, R]."""
        return torch.stack(list(self.counts.values())).sum(0)

    def load(self) -> list[tuple[float, int]]:
        """Of each map the coefficient of variation of its ranks' counts, and how many of them nobody chose."""
        total = self.total
        spread = total.std(dim=1, correction=0) / total.mean(dim=1).clamp(min=1e-12)
        return list(zip(spread.tolist(), (total == 0).sum(1).tolist(), strict=True))

    def shares(self) -> Tensor:
        """Of each task's choices in a map, how many fell on each rank [tasks, maps, R]."""
        counts = torch.stack(list(self.counts.values()))
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)

    def similarity(self) -> Tensor:
        """The cosine of two tasks' usage, over all ranks of all maps [tasks, tasks]."""
        vectors = normalize(self.shares().flatten(1), dim=1)
        return vectors @ vectors.T

    def sharpest(self) -> int:
        """The map in which the tasks use the most different ranks."""
        vectors = normalize(self.shares(), dim=-1).transpose(0, 1)  # [maps, tasks, R]
        return int((vectors @ vectors.mT).sum((1, 2)).argmin())


def _counted(
    view: Any, experts: Mapping[str, RankExperts], batch: Batch, total: Mapping[str, Tensor], answers: bool
) -> Tensor:
    """The loss of a batch, whose choices are added to the totals."""
    real = batch["attention_mask"].bool()
    if answers:  # a label is predicted one token before it
        real = torch.cat([batch["labels"][:, 1:] >= 0, torch.zeros_like(real[:, :1])], dim=1)

    def tally(name: str, module: RankExperts, given: Any) -> None:
        ranks = module.route(given[0].to(module.lora_A.dtype)).ranks
        if ranks.shape[:-1] == real.shape:
            ranks = ranks[real]
        total[name].add_(torch.bincount(ranks.flatten(), minlength=module.r).cpu())

    hooks = [each.register_forward_pre_hook(partial(tally, name)) for name, each in experts.items()]
    try:
        return response_loss(view, batch)
    finally:
        for hook in hooks:
            hook.remove()
