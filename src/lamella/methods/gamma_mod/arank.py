"""ARank: the rank of a layer's attention, which is low if tokens attend to the same few positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lamella.progress import track
from lamella.stack import Hidden, Stack, attend_with_weights

Rank = Literal["exact", "effective"]


@torch.no_grad()
def attention_ranks(stack: Stack, samples: Sequence[Mapping[str, Any]], rank: Rank = "exact") -> Tensor:
    """Measure ARank of every layer on every sample, as a fraction of the maximum [samples, layers].

    A_h are the attention probabilities of a head over one prompt, below the diagonal; the mean of their ranks over the
    heads is divided by time - 1, since one row and one column of them are empty. Compare layers on samples of one
    length.

    Args:
        stack: the model.
        samples: inputs by name, one prompt each, without padding.
        rank: ``exact`` is the number of singular values above time * eps * the largest, in float32; ``effective`` is
            the exponential of the entropy of the singular values, which also distinguishes layers of nearly full rank.
    """
    rows = []
    for inputs in track(samples, "attention ranks"):
        context = stack.context(inputs)
        h: Hidden = context.h
        ranks = []
        for index, layer in enumerate(stack.layers):
            attn, call = stack.architecture["attn"], context.calls[index]
            _, weights = attend_with_weights(attn, layer, h, call, stack.architecture.causal)
            ranks.append(rank_of(weights[0], rank).mean() / max(weights.shape[-1] - 1, 1))
            h = stack.run(h, index, index + 1, context)
        rows.append(torch.stack(ranks))
    return torch.stack(rows)


def rank_of(weights: Tensor, rank: Rank = "exact") -> Tensor:
    """Return the rank of each head's attention below the diagonal [heads, time, time] -> [heads].

    Args:
        weights: attention probabilities.
        rank: see :func:`attention_ranks`.

    >>> rank_of(torch.full((1, 4, 4), 0.25)).tolist()  # uniform: the maximum
    [3.0]
    >>> rank_of(torch.eye(4)[:1].expand(1, 4, 4)).tolist()  # all attend to the first token
    [1.0]
    """
    below = weights.float().tril(-1)
    if rank == "exact":
        return torch.linalg.matrix_rank(below).float()
    values = torch.linalg.svdvals(below)
    share = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


def lowest(ranks: Tensor, fraction: float, protect: Sequence[int] = ()) -> list[int]:
    """Return the layers to convert: a fraction of all layers, those with the lowest ranks, without protected ones.

    Args:
        ranks: rank of each layer [layers].
        fraction: fraction of all layers.
        protect: layers that are not converted; negative indices count from the end.

    >>> lowest(torch.tensor([0.1, 0.9, 0.5, 0.2]), 0.5, protect=[-1])
    [0, 2]
    """
    layers = len(ranks)
    kept = {layer % layers for layer in protect}
    order = [int(layer) for layer in ranks.argsort(stable=True) if int(layer) not in kept]
    return sorted(order[: round(fraction * layers)])
