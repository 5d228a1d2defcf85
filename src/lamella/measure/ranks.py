"""Rank correlation of two measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr


def spearman(ones: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties; None if all values of one side are equal.

    Args:
        ones: values.
        others: as many values, paired with ``ones`` by position.

    >>> round(spearman([1, 2, 5], [3, 4, 9]), 6)
    1.0
    """
    if min(np.unique(each).size for each in (ones, others)) < 2:
        return None
    return float(spearmanr(ones, others).statistic)
