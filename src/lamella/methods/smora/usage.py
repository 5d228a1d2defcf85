"""Statistics of the routing: how often the tokens of each task select each expert, and how even the load is."""

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
    """Counts of selected experts.

    Attributes:
        layers: names of the linear layers.
        counts: by task, for each linear layer and rank `[layers, R]`.
        losses: mean loss of each task's labels, in nats per token.
    """

    layers: tuple[str, ...]
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
        """Count the routing of the examples of each task; the view's mode is restored.

        Args:
            view: the view that contains the experts.
            experts: the experts by the names of their linear layers.
            samples: the examples by task.
            answers: only count tokens that predict a label, instead of all non-padding tokens.
            batch: samples per forward pass.
        """
        was_training, device = view.training, next(view.parameters()).device
        view.eval()
        counts, losses = {}, {}
        try:
            for task, examples in samples.items():
                total, nats, labels = {name: torch.zeros(each.r) for name, each in experts.items()}, 0.0, 0
                for start in range(0, len(examples), batch):
                    inputs = {name: each.to(device) for name, each in collate(examples[start : start + batch]).items()}
                    weight = int((inputs["labels"][:, 1:] >= 0).sum())
                    nats += weight * float(_count_batch(view, experts, inputs, total, answers))
                    labels += weight
                counts[task] = torch.stack(list(total.values()))
                losses[task] = nats / max(labels, 1)
        finally:
            view.train(was_training)
        return cls(tuple(experts), counts, losses)

    @property
    def total(self) -> Tensor:
        """The counts over all tasks `[layers, R]`."""
        return torch.stack(list(self.counts.values())).sum(0)

    def load(self) -> list[tuple[float, int]]:
        """Return the coefficient of variation of the ranks' counts and the number of unused ranks of each layer."""
        total = self.total
        spread = total.std(dim=1, correction=0) / total.mean(dim=1).clamp(min=1e-12)
        return list(zip(spread.tolist(), (total == 0).sum(1).tolist(), strict=True))

    def shares(self) -> Tensor:
        """Return the fraction of each task's selections that fell on each rank `[tasks, layers, R]`."""
        counts = torch.stack(list(self.counts.values()))
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)

    def similarity(self) -> Tensor:
        """Return the cosine of two tasks' usage, over all ranks of all linear layers `[tasks, tasks]`."""
        vectors = normalize(self.shares().flatten(1), dim=1)
        return vectors @ vectors.T

    def sharpest(self) -> int:
        """Return the index of the linear layer in which the tasks use the most different ranks."""
        vectors = normalize(self.shares(), dim=-1).transpose(0, 1)  # [layers, tasks, R]
        return int((vectors @ vectors.mT).sum((1, 2)).argmin())


def _count_batch(
    view: Any, experts: Mapping[str, RankExperts], batch: Batch, total: Mapping[str, Tensor], answers: bool
) -> Tensor:
    """Return the loss of a batch, and add its selections to the totals."""
    token_mask = batch["attention_mask"].bool()
    if answers:  # a label is predicted one token before it
        token_mask = torch.cat([batch["labels"][:, 1:] >= 0, torch.zeros_like(token_mask[:, :1])], dim=1)

    def add_counts(name: str, module: RankExperts, arguments: Any) -> None:
        ranks = module.route(arguments[0].to(module.lora_A.dtype)).ranks
        if ranks.shape[:-1] == token_mask.shape:
            ranks = ranks[token_mask]
        total[name].add_(torch.bincount(ranks.flatten(), minlength=module.r).cpu())

    hooks = [each.register_forward_pre_hook(partial(add_counts, name)) for name, each in experts.items()]
    try:
        return response_loss(view, batch)
    finally:
        for hook in hooks:
            hook.remove()
