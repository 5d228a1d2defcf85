"""A percentile of more numbers than one likes to sort: exact, in three passes over a stream, with a table of counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

HALF = 16  # bits of a float32 that are looked at in one pass


def percentile(parts: Callable[[], Iterator[Tensor]], percent: float) -> float:
    """The percentile of all numbers of a stream, between two neighbours linearly, as ``numpy.percentile`` has it.

    The bits of floats that are not negative are ordered as the floats are. So the upper half of the bits is counted
    first, then the lower half of those that share the upper half of the one that is looked for.

    Args:
        parts: makes the stream anew: tensors of any shape, without negative numbers and NaN; read as float32.
        percent: from 0 to 100.

    Raises:
        ValueError: when there are no numbers.
    """
    upper = _counts(parts, None)
    count = int(upper.sum())
    if not count:
        raise ValueError("no numbers, no percentile")
    place = percent / 100 * (count - 1)
    low = int(place)
    first = _at(parts, upper, low)
    second = first if low == place else _at(parts, upper, low + 1)
    return first + (second - first) * (place - low)


def _at(parts: Callable[[], Iterator[Tensor]], upper: np.ndarray, rank: int) -> float:
    """The number at a rank, from 0 on."""
    ends = upper.cumsum()
    head = int(np.searchsorted(ends, rank, side="right"))
    within = rank - int(ends[head] - upper[head])
    tail = int(np.searchsorted(_counts(parts, head).cumsum(), within, side="right"))
    return float(np.array(head << HALF | tail, np.uint32).view(np.float32))


def _counts(parts: Callable[[], Iterator[Tensor]], head: int | None) -> np.ndarray:
    """How often each upper half occurs, or each lower half of the numbers with that upper half."""
    counts = torch.zeros(1 << HALF, dtype=torch.int64)
    for part in parts():
        bits = part.detach().flatten().float().cpu().contiguous().view(torch.int32)
        found = bits >> HALF if head is None else bits[bits >> HALF == head] & ((1 << HALF) - 1)
        counts += torch.bincount(found, minlength=1 << HALF)
    return counts.numpy()
