"""Rules that say how many weights each layer loses, from shapes or magnitudes alone: what allocations by measurement
are compared with.

All take the share of all weights to remove, and return the number to remove from each layer [layers].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def uniform(sizes: Sequence[int], sparsity: float) -> np.ndarray:
    """The same share of every layer."""
    return np.array([int(sparsity * size + 1e-9) for size in sizes], np.int64)


def uniform_plus(
    sizes: Sequence[int], sparsity: float, dense: int | None, last: int | None = None, keep: float = 0.2
) -> np.ndarray:
    """The same share of every layer, but nothing of the first convolution, and the last layer keeps at least 20 %.

    Gale et al., arXiv 1902.09574. Where the rest cannot make up for that, less than ``sparsity`` is removed.

    Args:
        dense: the layer that loses nothing; None where there is no convolution.
        last: the layer that keeps ``keep``; the last one when left out.
    """
    last = len(sizes) - 1 if last is None else last
    share = np.full(len(sizes), sparsity)
    fixed = set() if dense is None else {dense}
    if dense is not None:
        share[dense] = 0.0
    for _ in range(2):  # once more where the last layer reaches its limit
        rest = sum(size for layer, size in enumerate(sizes) if layer not in fixed)
        taken = sum(share[layer] * sizes[layer] for layer in fixed)
        for layer in range(len(sizes)):
            if layer not in fixed and rest:
                share[layer] = min((sparsity * sum(sizes) - taken) / rest, 1.0)
        if last in fixed or share[last] <= 1 - keep:
            break
        share[last] = 1 - keep
        fixed.add(last)
    return np.array([int(part * size + 1e-9) for part, size in zip(share, sizes, strict=True)], np.int64)


def erk(shapes: Sequence[Sequence[int]], sparsity: float) -> np.ndarray:
    """Erdős-Rényi kernel: what is kept is proportional to the sum of a layer's dimensions over their product.

    Evci et al., arXiv 1911.11134. Layers that would keep more than everything are left whole, and the rest is solved
    again.
    """
    sizes = np.array([math.prod(shape) for shape in shapes], np.int64)
    raw = np.array([sum(shape) / math.prod(shape) for shape in shapes])
    whole = np.zeros(len(shapes), bool)
    while True:
        budget = (1 - sparsity) * sizes.sum() - sizes[whole].sum()
        density = np.where(whole, 1.0, raw * (budget / max((raw * sizes)[~whole].sum(), 1e-30)))
        over = ~whole & (density > 1)
        if not over.any():
            return sizes - np.ceil(np.clip(density, 0, 1) * sizes - 1e-9).astype(np.int64)
        whole |= over


def global_magnitude(weights: Sequence[np.ndarray], sparsity: float) -> np.ndarray:
    """The smallest weights of all layers together.

    Args:
        weights: the weights of each layer, of any shape.
    """
    return _smallest([np.sort(np.abs(weight), axis=None) for weight in weights], sparsity)


def lamp(weights: Sequence[np.ndarray], sparsity: float) -> np.ndarray:
    """The smallest scores w_u^2 / (sum of w_v^2 over the v of the same layer with |w_v| >= |w_u|).

    Lee et al., arXiv 2010.07611. Within a layer the score grows with |w|, so it too removes the smallest weights.

    Args:
        weights: the weights of each layer, of any shape.
    """
    scores = []
    for weight in weights:
        squares = np.sort(np.square(weight, dtype=np.float64), axis=None)
        rest = np.cumsum(squares[::-1])[::-1]
        scores.append(np.divide(squares, rest, out=np.zeros_like(squares), where=rest > 0))
    return _smallest(scores, sparsity)


def _smallest(scores: list[np.ndarray], sparsity: float) -> np.ndarray:
    """How many of the smallest of all scores each layer has; each is sorted, and of equals the first layers' go."""
    every = np.concatenate(scores)
    count = int(sparsity * len(every) + 1e-9)
    if count == 0:
        return np.zeros(len(scores), np.int64)
    limit = np.partition(every, count - 1)[count - 1]
    below = np.array([np.searchsorted(each, limit, "left") for each in scores], np.int64)
    equal = np.array([np.searchsorted(each, limit, "right") for each in scores], np.int64) - below
    left = count - int(below.sum())
    before = np.cumsum(equal) - equal
    return below + np.clip(left - before, 0, equal)
