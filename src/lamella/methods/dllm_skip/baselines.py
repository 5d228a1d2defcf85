"""Other ways to choose as many layers: what the paper's choice is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


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


def drawn(allowed: Sequence[int], k: int, seed: int, non_adjacent: bool = True) -> tuple[int, ...]:
    """Layers at random, each such set as likely as any other.

    With ``non_adjacent`` no two are neighbours: k of ``len(allowed) - k + 1`` places, spread by one each.
    """
    generator = torch.Generator().manual_seed(seed)
    room = len(allowed) - (k - 1 if non_adjacent else 0)
    places = np.sort(torch.randperm(room, generator=generator)[:k].numpy())
    return tuple(allowed[int(place) + (number if non_adjacent else 0)] for number, place in enumerate(places))
