"""An exact multiple-choice knapsack: one option for every item, with the least total distortion within a budget.

    g_0(j) = 0
    g_i(j) = min over options q of  g_(i-1)(j - cost[i, q]) + distortion[i, q]        j: budget left to items 1..i

The argmin of every cell is kept, and the choice is traced back from g_L(budget). Distortions add up; they need be
neither convex nor monotone in the cost. The running time is items x options x budget, in units: costs are rounded *up*
to units, so the budget is never exceeded, and the result is exact for the rounded costs (for the true ones where the
unit is 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lamella.errors import BudgetError

UNITS = 20_000  # number of units of the most expensive choice, unless a unit is given


@dataclass(frozen=True)
class Allocation:
    """One option for every item.

    Attributes:
        choice: the option of each item.
        distortion: sum of their distortions.
        cost: sum of their costs, not rounded to units.
    """

    choice: tuple[int, ...]
    distortion: float
    cost: int


def allocate(
    distortion: Sequence[np.ndarray],
    cost: Sequence[np.ndarray],
    budget: int,
    *,
    unit: int | None = None,
    lowest: Sequence[int] | None = None,
    highest: Sequence[int] | None = None,
) -> Allocation:
    """Choose one option of every item with the least sum of distortions within a budget.

    Among choices of equal distortion, earlier options are taken. Options should be in falling order of cost, so that
    nothing is removed without need.

    Args:
        distortion: for each item, the distortion of its options [options].
        cost: for each item, the cost of its options [options], whole numbers.
        budget: largest total cost.
        unit: unit to which costs are rounded up; defaults to the largest total cost divided by 20 000.
        lowest: the first option that each item may take.
        highest: the last option that each item may take.

    Raises:
        BudgetError: when even the cheapest choice costs more than the budget.
    """
    first = [0] * len(cost) if lowest is None else list(lowest)
    last = [len(options) - 1 for options in cost] if highest is None else list(highest)
    losses = [np.asarray(d, np.float64)[a : b + 1] for d, a, b in zip(distortion, first, last, strict=True)]
    costs = [np.asarray(c, np.int64)[a : b + 1] for c, a, b in zip(cost, first, last, strict=True)]

    def chosen(choice: Sequence[int]) -> Allocation:
        total = math.fsum(d[q] for d, q in zip(losses, choice, strict=True))
        spent = sum(int(c[q]) for c, q in zip(costs, choice, strict=True))
        return Allocation(tuple(q + a for q, a in zip(choice, first, strict=True)), total, spent)

    free = chosen([int(d.argmin()) for d in losses])
    if free.cost <= budget:
        return free
    cheapest = chosen([int(np.lexsort((d, c))[0]) for d, c in zip(losses, costs, strict=True)])
    if cheapest.cost > budget:
        raise BudgetError(f"a budget of {budget} is out of reach: the cheapest choice costs {cheapest.cost}")
    unit = unit or max(1, sum(int(c.max()) for c in costs) // UNITS)
    found = _solve(losses, [-(-c // unit) for c in costs], budget // unit)
    return cheapest if found is None else chosen(found)  # None: nothing fits because of the rounding


def _solve(losses: list[np.ndarray], costs: list[np.ndarray], budget: int) -> list[int] | None:
    """Run the dynamic programme; None when no choice fits."""
    order = sorted(range(len(costs)), key=lambda item: int(costs[item].max()))  # the small ones first
    best = np.zeros(budget + 1)  # g(j), j = 0 .. budget
    kept: dict[int, np.ndarray] = {}  # the argmin of every cell, by item
    candidate, better = np.empty(budget + 1), np.empty(budget + 1, bool)
    for item in order:
        new = np.full(budget + 1, np.inf)
        kept[item] = np.zeros(budget + 1, np.min_scalar_type(len(costs[item])))
        for option in _useful(losses[item], costs[item]):
            k = int(costs[item][option])
            if k > budget:
                continue
            sums = np.add(best[: budget + 1 - k], losses[item][option], out=candidate[k:])
            less = np.less(sums, new[k:], out=better[k:])
            np.copyto(new[k:], sums, where=less)
            np.copyto(kept[item][k:], option, where=less)
        best = new
    if not np.isfinite(best[budget]):
        return None
    choice, left = [0] * len(costs), budget
    for item in reversed(order):
        choice[item] = int(kept[item][left])
        left -= int(costs[item][choice[item]])
    return choice


def _useful(losses: np.ndarray, costs: np.ndarray) -> Iterator[int]:
    """Return the options that no other one dominates in both cost and distortion; the rest is in no optimum."""
    least = np.full(int(costs.max()) + 1, np.inf)
    np.minimum.at(least, costs, losses)
    least = np.minimum.accumulate(least)
    return (int(option) for option in np.flatnonzero(losses <= least[costs]))
