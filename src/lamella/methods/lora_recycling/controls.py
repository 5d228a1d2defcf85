"""Controls that separate transfer from mere fitting: adapters with random weights, and shuffled answers."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lamella.methods.lora_recycling.merging import module_seed
from lamella.train import Adapter
from lamella.train.adapters import LazyPairs, Pair


def randomise(adapters: Sequence[Adapter], keep: Collection[int] = (), *, seed: int = 0) -> list[Adapter]:
    """Replace adapters by random ones with the same shapes, ranks, scales, modules and standard deviations.

    Every A and B is sampled from a normal distribution with mean 0, with the standard deviation of all replaced A's
    (B's) in that module, on access: the random adapters need no memory.

    Args:
        adapters: the adapters of a merge.
        keep: indices of those that are not replaced, such as 0 for the target's own.
        seed: random seed.
    """
    replaced = [each for index, each in enumerate(adapters) if index not in keep]
    names = list(dict.fromkeys(name for each in replaced for name in each.pairs))
    spread = {
        name: [_std([each.pairs[name][half] for each in replaced if name in each.pairs]) for half in (0, 1)]
        for name in names
    }

    def sample(index: int, name: str) -> Pair:
        generator = torch.Generator().manual_seed(module_seed(seed, name, index))
        a, b = ((std * torch.randn(like.shape, generator=generator)).to(like)
                for like, std in zip(adapters[index].pairs[name], spread[name], strict=True))  # fmt: skip
        return a, b

    return [
        each
        if index in keep
        else replace(each, pairs=LazyPairs({name: name for name in each.modules}, partial(sample, index)))
        for index, each in enumerate(adapters)
    ]


def _std(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([each.float().flatten() for each in tensors]).std(correction=0))


def derangement(count: int, seed: int) -> list[int]:
    """A random permutation without fixed points, for at least two elements.

    Args:
        count: number of elements.
        seed: random seed.
    """
    order = list(range(count))
    random.Random(seed).shuffle(order)  # one cycle through all of them moves each
    turned = [0] * count
    for here, there in zip(order, [*order[1:], *order[:1]], strict=True):
        turned[here] = there
    return turned
