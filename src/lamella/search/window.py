"""The cheapest run of consecutive indices."""

from __future__ import annotations

from collections.abc import Callable

from lamella.errors import BudgetError


def window(total: int, size: int, cost: Callable[[int], float], last: int | None = None) -> int:
    """Return the start of the cheapest run of ``size`` consecutive indices; the first one wins ties.

    Args:
        total: number of indices.
        size: length of the run.
        cost: cost of the run that starts at an index.
        last: last start to consider; if None, the run may extend to the end.

    Raises:
        BudgetError: for a size that does not fit.
    """
    if not 0 < size <= total:
        raise BudgetError(f"a run of {size} does not fit into {total}")
    stop = total - size if last is None else min(last, total - size)
    return min(range(stop + 1), key=cost)
