"""Baselines of MoDES: rules that look at router weights alone, fewer experts for every token, and random skipping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lamella.methods.modes.policy import MODALITIES, ExpertSkipping
from lamella.stack import Stack


class Rule(ExpertSkipping):
    """Skip experts by another rule.

    Args:
        stack: the model.
        keeps: maps the router weights of the chosen experts [tokens, used] and the strictness to a mask of the experts
            that run [tokens, used] bool.
        strict: strictness of the rule.
    """

    def __init__(self, stack: Stack, keeps: Callable[[Tensor, float], Tensor], strict: float = 0.0) -> None:
        super().__init__(stack, alpha=dict.fromkeys(MODALITIES, [1.0] * len(stack)))
        self.keeps, self.strict = keeps, strict

    def kept(self, layer: int, weights: Tensor, image: Tensor) -> Tensor:
        """Return the mask of the chosen experts that run: [tokens, used] bool.

        Args:
            layer: index of the layer; not used.
            weights: router weights of the chosen experts `[tokens, used]`.
            image: mask of image tokens `[tokens]`, bool; not used.
        """
        return self.keeps(weights.float(), self.strict)


def naee(weights: Tensor, beta: float) -> Tensor:
    """Apply NAEE's rule for more than two experts: skip the lightest whose weights sum to less than beta of the rest.

    Args:
        weights: router weights of the chosen experts [tokens, used].
        beta: threshold on the ratio of skipped to remaining weight.

    >>> naee(torch.tensor([[0.5, 0.3, 0.15, 0.05]]), 0.3).tolist()
    [[True, True, False, False]]
    """
    ordered, order = weights.sort(dim=1, descending=True)
    tail = ordered.flip(1).cumsum(1).flip(1)  # the weight of each expert and of all lighter ones
    keeps = tail >= beta * (ordered.sum(1, keepdim=True) - tail)
    keeps[:, 0] = True
    return torch.zeros_like(keeps).scatter(1, order, keeps)


def fewer(weights: Tensor, skipped: float) -> Tensor:
    """Keep the same number of experts for every token: the heaviest, without this fraction.

    Args:
        weights: router weights of the chosen experts [tokens, used].
        skipped: fraction of the chosen experts to skip.

    >>> fewer(torch.tensor([[0.2, 0.5, 0.1, 0.2]]), 0.75).tolist()
    [[False, True, False, False]]
    """
    used = weights.shape[1]
    order = weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return order < used - round(skipped * used)


def random_rule(seed: int) -> Callable[[Tensor, float], Tensor]:
    """Return a rule that skips each expert with the same probability, whatever its weight."""
    generator = torch.Generator().manual_seed(seed)

    def keeps(weights: Tensor, skipped: float) -> Tensor:
        return torch.rand(weights.shape, generator=generator).to(weights.device) >= skipped

    return keeps


def find_strictness(skips: Callable[[float], float], share: float, low: float, high: float, steps: int = 12) -> float:
    """Return, by bisection, the least strictness tried at which a rule skips the required fraction.

    Args:
        skips: the fraction skipped at a strictness.
        share: the fraction to skip.
        low: strictness that skips too little.
        high: strictness that skips enough.
        steps: number of bisection steps.
    """
    for _ in range(steps):
        middle = (low + high) / 2
        if skips(middle) >= share:
            high = middle
        else:
            low = middle
    return high
