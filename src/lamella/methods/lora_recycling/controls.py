"""What tells transfer from training a few numbers: the same adapters with random weights, the same answers shuffled."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lamella.train import Adapter


def randomised(adapters: Sequence[Adapter], keep: Collection[int] = (), *, seed: int = 0) -> list[Adapter]:
    """The same adapters with random weights: of the same shapes, ranks, scales, modules and spread.

    Every A and B is drawn anew from a normal distribution around 0, with the standard deviation that the A's (the B's)
    which are replaced have together in that module.

    Args:
        adapters: what takes part in a merge.
        keep: the places of those that stay, such as 0 for the target's own.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    replaced = [each for place, each in enumerate(adapters) if place not in keep]
    names = list(dict.fromkeys(name for each in replaced for name in each.pairs))
    spread = {
        name: [_std([each.pairs[name][half] for each in replaced if name in each.pairs]) for half in (0, 1)]
        for name in names
    }

    def drawn(like: Tensor, std: float) -> Tensor:
        return (std * torch.randn(like.shape, generator=generator)).to(like)

    found = []
    for place, each in enumerate(adapters):
        if place in keep:
            found.append(each)
            continue
        pairs = {name: (drawn(a, spread[name][0]), drawn(b, spread[name][1])) for name, (a, b) in each.pairs.items()}
        found.append(replace(each, pairs=pairs))
    return found


def _std(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([each.float().flatten() for each in tensors]).std(correction=0))


def shuffled(count: int, seed: int) -> list[int]:
    """An order in which nothing keeps its place, where there are two things or more."""
    order = list(range(count))
    random.Random(seed).shuffle(order)  # one cycle through all of them moves each
    turned = [0] * count
    for here, there in zip(order, [*order[1:], *order[:1]], strict=True):
        turned[here] = there
    return turned
