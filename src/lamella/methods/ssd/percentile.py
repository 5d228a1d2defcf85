"""Exact percentile of a large stream of values, without sorting: three passes with a table of counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

HALF = 16  # bits of a float32 per pass


def percentile(parts: Callable[[], Iterator[Tensor]], percent: float) -> float:
    """Return the percentile of all values of a stream, with linear interpolation as in ``numpy.percentile``.

    The bits of non-negative floats have the same order as the floats. So the upper half of the bits is counted first,
    then the lower half of the values whose upper half is that of the result.

    Args:
        parts: returns a new iterator over the stream: tensors of any shape, without negative values and NaN, as
            float32.
        percent: from 0 to 100.

    Raises:
        ValueError: if the stream is empty.
    """
    upper = _counts(parts, None)
    count = int(upper.sum())
    if not count:
        raise ValueError("the stream has no values")
    position = percent / 100 * (count - 1)
    low = int(position)
    first = _value_at(parts, upper, low)
    second = first if low == position else _value_at(parts, upper, low + 1)
    return first + (second - first) * (position - low)


def _value_at(parts: Callable[[], Iterator[Tensor]], upper: np.ndarray, rank: int) -> float:
    """Return the value at a rank, from 0 on."""
    ends = upper.cumsum()
    head = int(np.searchsorted(ends, rank, side="right"))
    within = rank - int(ends[head] - upper[head])
    tail = int(np.searchsorted(_counts(parts, head).cumsum(), within, side="right"))
    return float(np.array(head << HALF | tail, np.uint32).view(np.float32))


def _counts(parts: Callable[[], Iterator[Tensor]], head: int | None) -> np.ndarray:
    """Return how often each upper half occurs, or each lower half of the values with that upper half."""
    counts = torch.zeros(1 << HALF, dtype=torch.int64)
    for part in parts():
        bits = part.detach().flatten().float().cpu().contiguous().view(torch.int32)
        found = bits >> HALF if head is None else bits[bits >> HALF == head] & ((1 << HALF) - 1)
        counts += torch.bincount(found, minlength=1 << HALF)
    return counts.numpy()
