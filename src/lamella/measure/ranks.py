"""How far two measurements order things alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def spearman(ones: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> float | None:
    """The correlation of ranks, equal ones sharing theirs; None where one side has no order.

    >>> round(spearman([1, 2, 5], [3, 4, 9]), 6)
    1.0
    """
    if min(len(set(np.asarray(each).tolist())) for each in (ones, others)) < 2:
        return None
    return float(np.corrcoef(_ranks(ones), _ranks(others))[0, 1])


def _ranks(values: Sequence[float] | np.ndarray) -> Any:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
