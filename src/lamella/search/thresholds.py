"""Thresholds on scores: where one lies, and which settings of a sweep are worth a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

Found = TypeVar("Found")


def threshold(scores: ArrayLike, below: int, margin: float = 0.0) -> float:
    """The threshold that has a number of scores below it, halfway between two of them, so that rounding cannot decide.

    Args:
        scores: of any shape.
        below: how many of them are lower, from 0 to all.
        margin: how far half of it lies beyond the lowest and the highest score, where none or all are below.

    >>> threshold([0.1, 0.4, 0.2, 0.3], 2)
    0.25
    """
    ordered: Any = np.sort(np.asarray(scores), axis=None)
    edges = np.concatenate([ordered[:1] - margin, ordered, ordered[-1:] + margin])
    return float(edges[below : below + 2].astype(np.float64).mean())


def rising(found: Iterable[Found], amount: Callable[[Found], float], above: float = 0.0) -> Iterator[Found]:
    """What a sweep finds, as it finds it, without what brings no more than something before it.

    Args:
        found: in the order of the sweep.
        amount: what each of them brings.
        above: what the first must exceed.

    >>> list(rising([1, 3, 2, 3, 4], float))
    [1, 3, 4]
    """
    for each in found:
        if (value := amount(each)) > above:
            above = value
            yield each
