"""The cheapest run of consecutive numbers."""

from __future__ import annotations

from collections.abc import Callable

from lamella.errors import BudgetError


def window(total: int, size: int, cost: Callable[[int], float], last: int | None = None) -> int:
    """Where the cheapest run of ``size`` consecutive numbers begins; the first one wins ties.

    Args:
        total: numbers run from 0 to ``total - 1``.
        cost: the cost of the run that begins at a number.
        last: the last start to consider; by default the run may reach the end.
    """
    if not 0 < size <= total:
        raise BudgetError(f"a run of {size} does not fit into {total}")
    stop = total - size if last is None else min(last, total - size)
    return min(range(stop + 1), key=cost)
