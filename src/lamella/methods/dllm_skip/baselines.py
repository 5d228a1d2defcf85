"""Other ways to choose as many layers: what the paper's choice is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise


def spaced(allowed: Sequence[int], k: int) -> tuple[int, ...]:
    """Evenly spaced layers.

    >>> spaced(range(1, 9), 3)
    (2, 5, 7)
    """
    return tuple(allowed[int((2 * place + 1) * len(allowed) / (2 * k))] for place in range(k))


def neighbours(sim: Sequence[float], allowed: Sequence[int], k: int) -> tuple[int, ...]:
    """The k layers in a row that turn the stream least, by the sum of their similarities.

    >>> neighbours([0.9, 0.5, 0.8, 0.9, 0.1], [1, 2, 3], 2)
    (2, 3)
    """
    starts = [start for start in allowed if start + k - 1 in allowed]
    best = max(starts, key=lambda start: sum(sim[start : start + k]))
    return tuple(range(best, best + k))


def cheapest(rise: Sequence[float], allowed: Sequence[int], k: int) -> tuple[int, ...]:
    """The k layers that cost least when they are skipped alone."""
    return tuple(sorted(sorted(allowed, key=lambda layer: rise[layer])[:k]))


def every(allowed: Sequence[int], k: int) -> list[tuple[int, ...]]:
    """All sets of k layers of which no two are neighbours: k of ``len(allowed) - k + 1`` places, spread by one each.

    >>> every(range(1, 6), 2)
    [(1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 5)]
    """
    return [each for each in combinations(allowed, k) if all(b - a > 1 for a, b in pairwise(each))]
