"""What MoDES is compared with: rules that look at the router's weights alone, fewer experts for all, and chance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lamella.methods.modes.policy import MODALITIES, ExpertSkipping
from lamella.stack import Stack


class Rule(ExpertSkipping):
    """Skips experts by another rule.

    Args:
        stack: the model.
        keeps: given the weights of the chosen experts [tokens, used] and how strict to be, which of them run, as bool.
        strict: how strict.
    """

    def __init__(self, stack: Stack, keeps: Callable[[Tensor, float], Tensor], strict: float = 0.0) -> None:
        super().__init__(stack, alpha=dict.fromkeys(MODALITIES, [1.0] * len(stack)))
        self.keeps, self.strict = keeps, strict

    def kept(self, layer: int, weights: Tensor, image: Tensor) -> Tensor:
        return self.keeps(weights.float(), self.strict)


def naee(weights: Tensor, beta: float) -> Tensor:
    """NAEE's rule for more than two experts: the lightest go as long as together they weigh less than beta of the rest.

    >>> naee(torch.tensor([[0.5, 0.3, 0.15, 0.05]]), 0.3).tolist()
    [[True, True, False, False]]
    """
    ordered, order = weights.sort(dim=1, descending=True)
    tail = ordered.flip(1).cumsum(1).flip(1)  # of each place on, all that is as light or lighter
    keeps = tail >= beta * (ordered.sum(1, keepdim=True) - tail)
    keeps[:, 0] = True
    return torch.zeros_like(keeps).scatter(1, order, keeps)


def fewer(weights: Tensor, skipped: float) -> Tensor:
    """As many for every token: the heaviest, without this share.

    >>> fewer(torch.tensor([[0.2, 0.5, 0.1, 0.2]]), 0.75).tolist()
    [[False, True, False, False]]
    """
    used = weights.shape[1]
    order = weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return order < used - round(skipped * used)


def by_chance(seed: int) -> Callable[[Tensor, float], Tensor]:
    """Each with the same probability, whatever it weighs."""
    generator = torch.Generator().manual_seed(seed)

    def keeps(weights: Tensor, skipped: float) -> Tensor:
        return torch.rand(weights.shape, generator=generator).to(weights.device) >= skipped

    return keeps


def strict_enough(skips: Callable[[float], float], share: float, low: float, high: float, steps: int = 12) -> float:
    """How strict a rule must be to skip a share: by halving, the least that was tried and found to be enough."""
    for _ in range(steps):
        middle = (low + high) / 2
        if skips(middle) >= share:
            high = middle
        else:
            low = middle
    return high
