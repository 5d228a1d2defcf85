"""Baselines: other ways to choose the same number of layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise


def spaced(allowed: Sequence[int], k: int) -> tuple[int, ...]:
    """Return evenly spaced layers.

    Args:
        allowed: layers that may be skipped.
        k: number of layers.

    >>> spaced(range(1, 9), 3)
    (2, 5, 7)
    """
    return tuple(allowed[int((2 * index + 1) * len(allowed) / (2 * k))] for index in range(k))


def neighbours(sim: Sequence[float], allowed: Sequence[int], k: int) -> tuple[int, ...]:
    """Return the k consecutive layers with the highest sum of similarities.

    Args:
        sim: similarity of each layer.
        allowed: layers that may be skipped.
        k: number of layers.

    >>> neighbours([0.9, 0.5, 0.8, 0.9, 0.1], [1, 2, 3], 2)
    (2, 3)
    """
    starts = [start for start in allowed if start + k - 1 in allowed]
    best = max(starts, key=lambda start: sum(sim[start : start + k]))
    return tuple(range(best, best + k))


def cheapest(rise: Sequence[float], allowed: Sequence[int], k: int) -> tuple[int, ...]:
    """Return the k layers with the smallest loss increase when skipped alone.

    Args:
        rise: increase of the loss without each layer.
        allowed: layers that may be skipped.
        k: number of layers.
    """
    return tuple(sorted(sorted(allowed, key=lambda layer: rise[layer])[:k]))


def every(allowed: Sequence[int], k: int) -> list[tuple[int, ...]]:
    """Return all sets of k layers without adjacent ones.

    Args:
        allowed: layers that may be skipped.
        k: number of layers.

    >>> every(range(1, 6), 2)
    [(1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 5)]
    """
    return [each for each in combinations(allowed, k) if all(b - a > 1 for a, b in pairwise(each))]
