"""Baseline rules for the number of weights to remove per layer, from shapes or magnitudes alone.

All of them take the fraction of all weights to remove, and return the number to remove from each layer [layers].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def uniform(sizes: Sequence[int], sparsity: float) -> np.ndarray:
    """Remove the same fraction of every layer.

    Args:
        sizes: number of weights of each layer.
        sparsity: fraction of all weights to remove.
    """
    return np.array([int(sparsity * size + 1e-9) for size in sizes], np.int64)


def uniform_plus(
    sizes: Sequence[int], sparsity: float, dense: int | None, last: int | None = None, keep: float = 0.2
) -> np.ndarray:
    """Remove the same fraction of every layer, but nothing of the first convolution and at most 80 % of the last layer.

    Gale et al., arXiv 1902.09574. Where the other layers cannot compensate for that, less than ``sparsity`` is removed.

    Args:
        sizes: number of weights of each layer.
        sparsity: fraction of all weights to remove.
        dense: the layer that loses nothing; None if there is no convolution.
        last: the layer that keeps at least ``keep``; defaults to the last one.
        keep: fraction of the last layer to keep.
    """
    last = len(sizes) - 1 if last is None else last
    fraction = np.full(len(sizes), sparsity)
    fixed = set() if dense is None else {dense}
    if dense is not None:
        fraction[dense] = 0.0
    for _ in range(2):  # once more where the last layer reaches its limit
        rest = sum(size for layer, size in enumerate(sizes) if layer not in fixed)
        taken = sum(fraction[layer] * sizes[layer] for layer in fixed)
        for layer in range(len(sizes)):
            if layer not in fixed and rest:
                fraction[layer] = min((sparsity * sum(sizes) - taken) / rest, 1.0)
        if last in fixed or fraction[last] <= 1 - keep:
            break
        fraction[last] = 1 - keep
        fixed.add(last)
    return np.array([int(part * size + 1e-9) for part, size in zip(fraction, sizes, strict=True)], np.int64)


def erk(shapes: Sequence[Sequence[int]], sparsity: float) -> np.ndarray:
    """Erdős-Rényi kernel: the kept fraction is proportional to the sum of a layer's dimensions over their product.

    Evci et al., arXiv 1911.11134. Layers that would keep more than all their weights stay whole, and the rest is solved
    again.

    Args:
        shapes: shape of each layer's weight.
        sparsity: fraction of all weights to remove.
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
    """Remove the smallest weights of all layers together.

    Args:
        weights: the weights of each layer, of any shape.
        sparsity: fraction of all weights to remove.
    """
    return _smallest([np.sort(np.abs(weight), axis=None) for weight in weights], sparsity)


def lamp(weights: Sequence[np.ndarray], sparsity: float) -> np.ndarray:
    """Remove the weights with the smallest scores w_u^2 / (sum of w_v^2 over v of the same layer with |w_v| >= |w_u|).

    Lee et al., arXiv 2010.07611. Within a layer the score grows with |w|, so it too removes the smallest weights.

    Args:
        weights: the weights of each layer, of any shape.
        sparsity: fraction of all weights to remove.
    """
    scores = []
    for weight in weights:
        squares = np.sort(np.square(weight, dtype=np.float64), axis=None)
        rest = np.cumsum(squares[::-1])[::-1]
        scores.append(np.divide(squares, rest, out=np.zeros_like(squares), where=rest > 0))
    return _smallest(scores, sparsity)


def _smallest(scores: list[np.ndarray], sparsity: float) -> np.ndarray:
    """Count how many of the smallest of all scores each layer has; scores are sorted, and earlier layers win ties."""
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
