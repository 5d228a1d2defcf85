"""Choose the blocks to drop: the cheapest set that removes enough parameters, a covering 0-1 knapsack.

    min  sum_i v_i x_i     subject to  sum_i p_i x_i >= P,   x_i in {0, 1}

States (removed, cost) are extended block by block, in the order of v_i / p_i. A state is discarded when another one
costs no more and removes no less; when the remaining blocks cannot reach P; or when a fractional relaxation of the
remaining blocks already costs more than the best known answer. Sizes are integers and are not rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lamella.errors import MethodError

Floats = npt.NDArray[np.float64]
MOST = 200_000  # maximum number of states; beyond it, the least promising ones are discarded, and the bound reflects it
SLACK = 1e-12  # relative rounding error of sums with terms of different magnitude


@dataclass(frozen=True)
class Choice:
    """A set of blocks.

    Attributes:
        chosen: indices of the blocks, ascending.
        cost: sum of v.
        size: sum of p.
        bound: lower bound on the cost of any sufficient set; equal to ``cost`` if this set is proven optimal.
    """

    chosen: tuple[int, ...]
    cost: float
    size: int
    bound: float = 0.0


def covering(values: Sequence[float], sizes: Sequence[int], target: int, most: int = MOST) -> Choice:
    """Find the cheapest set that removes at least ``target``.

    Args:
        values: v_i, the cost of dropping each block.
        sizes: p_i, the parameters that this removes, as integers.
        target: P.
        most: maximum number of states.

    Returns:
        The set, with a lower bound on the optimal cost.

    Raises:
        MethodError: for a target above the size of all blocks.
    """
    v, p = np.asarray(values, float), np.asarray(sizes, np.int64)
    check(p, target)
    best = greedy(values, sizes, target)
    order = _by_ratio(v, p)
    v, p = v[order], p[order]
    filled = _Filler(v, p)
    removed, cost = np.zeros(1, np.int64), np.zeros(1)
    lost = np.inf  # lower bound of the discarded states
    steps: list[tuple[Any, Any]] = []  # per block: the previous state, and whether the block was dropped
    for number in range(len(v)):
        removed = np.concatenate([removed, np.minimum(removed + p[number], target)])
        cost = np.concatenate([cost, cost + v[number]])
        least = cost + filled.least(target - removed, number + 1)
        kept = _undominated(removed, cost, least <= best.cost * (1 + SLACK) + SLACK * abs(v).sum())
        if len(kept) > most:
            kept = kept[np.argsort(least[kept], kind="stable")]
            lost = min(lost, float(least[kept[most]]))
            kept = np.sort(kept[:most])
        half = len(removed) // 2
        steps.append((kept % half, kept >= half))
        removed, cost = removed[kept], cost[kept]
    done = np.flatnonzero(removed >= target)
    if len(done) and cost[done].min() <= best.cost:
        state = int(done[cost[done].argmin()])
        chosen = []
        for number in range(len(v) - 1, -1, -1):
            before, dropped = steps[number]
            if dropped[state]:
                chosen.append(int(order[number]))
            state = int(before[state])
        best = _choice(chosen, values, sizes)
    return Choice(best.chosen, best.cost, best.size, min(best.cost, lost))


def greedy(values: Sequence[float], sizes: Sequence[int], target: int) -> Choice:
    """Take blocks in the order of cost per parameter until enough is removed; then return those that are not needed.

    Args:
        values: v_i, the cost of dropping each block.
        sizes: p_i, the parameters that this removes.
        target: P.

    Raises:
        MethodError: for a target above the size of all blocks.
    """
    v, p = np.asarray(values, float), np.asarray(sizes, np.int64)
    check(p, target)
    chosen: list[int] = []
    for number in _by_ratio(v, p).tolist():
        if v[number] < 0 or p[chosen].sum() < target:
            chosen.append(number)
    for number in sorted(chosen, key=lambda each: -v[each]):
        if v[number] >= 0 and p[chosen].sum() - p[number] >= target:
            chosen.remove(number)
    return _choice(chosen, values, sizes)


def check(sizes: npt.NDArray[np.int64], target: int) -> None:
    """Check that the target can be reached.

    Args:
        sizes: sizes of all blocks.
        target: P.

    Raises:
        MethodError: if it cannot.
    """
    if target > sizes.sum():
        raise MethodError(f"{target:,} parameters cannot be removed: all blocks together have {int(sizes.sum()):,}")


def _choice(chosen: Sequence[int], values: Sequence[float], sizes: Sequence[int]) -> Choice:
    chosen = sorted(chosen)
    cost = float(sum(values[each] for each in chosen))
    return Choice(tuple(chosen), cost, int(sum(sizes[each] for each in chosen)), cost)


def _by_ratio(v: Floats, p: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Indices ordered by v / p; blocks with zero or negative cost come first, and those that remove nothing last."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(v < 0, -np.inf, np.where(p > 0, v / np.maximum(p, 1), np.inf))
    return np.argsort(ratio, kind="stable")


class _Filler:
    """Lower bound on the cost of removing parameters from the remaining blocks, by a fractional relaxation."""

    def __init__(self, v: Floats, p: npt.NDArray[np.int64]) -> None:
        self.v, self.p = v, p
        self.sizes = np.concatenate([[0], np.cumsum(p)])
        self.costs = np.concatenate([[0.0], np.cumsum(np.maximum(v, 0))])
        self.gains = np.concatenate([np.cumsum(np.minimum(v, 0)[::-1])[::-1], [0.0]])  # negative costs

    def least(self, need: npt.NDArray[np.int64], start: int) -> Floats:
        """The bound for the blocks from ``start`` on; infinite if they are not enough."""
        need = np.maximum(need, 0)
        goal = self.sizes[start] + need
        whole = np.clip(np.searchsorted(self.sizes, goal, side="right") - 1, start, len(self.p))
        cost = self.costs[whole] - self.costs[start]
        part = np.minimum(whole, len(self.p) - 1)
        rest = np.maximum(goal - self.sizes[whole], 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            fraction = np.where(rest > 0, np.maximum(self.v[part], 0) * rest / np.maximum(self.p[part], 1), 0.0)
        enough = goal <= self.sizes[-1]
        return np.where(enough, cost + fraction, np.inf) + self.gains[start]


def _undominated(removed: npt.NDArray[np.int64], cost: Floats, open_: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Indices of the states that are not dominated, ascending."""
    numbers = np.flatnonzero(open_)
    order = numbers[np.lexsort((cost[numbers], -removed[numbers]))]  # most removed first, then cheapest
    if not len(order):
        return order
    costs = cost[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(costs)[:-1]])
    return np.sort(order[costs < before])
