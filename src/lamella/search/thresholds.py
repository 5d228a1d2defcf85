"""Thresholds on scores: where they lie, and which settings of a sweep are worth a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

Result = TypeVar("Result")


def threshold(scores: ArrayLike, below: int, margin: float = 0.0) -> float:
    """Return the threshold with a number of scores below it, halfway between two scores to be robust against rounding.

    Args:
        scores: scores of any shape.
        below: number of scores below the threshold, from 0 to all.
        margin: twice the distance from the lowest or highest score, if none or all are below.

    >>> threshold([0.1, 0.4, 0.2, 0.3], 2)
    0.25
    """
    ordered: Any = np.sort(np.asarray(scores), axis=None)
    edges = np.concatenate([ordered[:1] - margin, ordered, ordered[-1:] + margin])
    return float(edges[below : below + 2].astype(np.float64).mean())


def rising(found: Iterable[Result], amount: Callable[[Result], float], above: float = 0.0) -> Iterator[Result]:
    """Yield the results of a sweep, without those whose amount does not exceed that of an earlier one.

    Args:
        found: results in the order of the sweep.
        amount: amount of a result.
        above: value that the first amount must exceed.

    >>> list(rising([1, 3, 2, 3, 4], float))
    [1, 3, 4]
    """
    for each in found:
        if (value := amount(each)) > above:
            above = value
            yield each
