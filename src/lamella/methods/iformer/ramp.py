"""The ramp: the number of heads of each layer with the least loss within a cost, non-decreasing in depth.

    min  sum over layers of  loss_l(a_l)      with  sum cost(a_l) <= budget,   a_1 <= a_2 <= ... <= a_L

loss_l(a) is the sum of the importances of the removed heads when the a most important ones remain. The optimum is
exact: for each last a, the Pareto front of cost and loss is carried from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lamella.errors import BudgetError, MethodError

FloatArray = npt.NDArray[np.float64]


class Front(NamedTuple):
    """Pareto-optimal allocations of the layers so far.

    Attributes:
        cost: ascending.
        loss: descending.
        before: the heads of the previous layer, and the index of the rest in its front [ways, 2].
    """

    cost: npt.NDArray[np.int64]
    loss: FloatArray
    before: npt.NDArray[np.int64]


def losses(importance: FloatArray) -> FloatArray:
    """Compute the loss of a layer that keeps its a most important heads [L, n + 1], a from 0 to n.

    Args:
        importance: of each head [L, n], 0 or more.
    """
    rising = np.sort(importance, axis=1)
    gone = np.concatenate([np.zeros((len(rising), 1)), np.cumsum(rising, axis=1)], axis=1)  # m heads are removed
    return gone[:, ::-1]


def allocate(importance: FloatArray, cost: Sequence[int], budget: int, *, least: int = 1) -> list[int]:
    """Choose the number of heads of each layer, non-decreasing in depth, with the least loss within a budget.

    Among equal losses, the cheapest is chosen.

    Args:
        importance: of each head [L, n], 0 or more.
        cost: cost of a layer that keeps a heads, a from 0 to n.
        budget: for all layers, in the same unit.
        least: minimum number of heads per layer.

    Returns:
        The number of heads of each layer.

    Raises:
        BudgetError: for a budget below the smallest shape.
        MethodError: for a ``least`` above the number of heads.
    """
    layers, heads = importance.shape
    if not 0 <= least <= heads:
        raise MethodError(f"least {least}: layers have {heads} heads: give 0 to {heads}")
    smallest = layers * min(cost[least:])
    if budget < smallest:
        raise BudgetError(
            f"the budget of {budget:,} is below the smallest shape, {smallest:,} with {least} of {heads} heads in each "
            "layer: allow more, or use a smaller least"
        )
    lost = losses(importance)
    choices = range(least, heads + 1)
    fronts: list[dict[int, Front]] = []
    for layer in range(layers):
        found: dict[int, Front] = {}
        for kept in choices:
            way = _begun() if layer == 0 else _merged({a: fronts[-1][a] for a in choices if a <= kept})
            later = (layers - 1 - layer) * min(cost[kept:])  # minimum cost of the remaining layers
            found[kept] = _within(
                Front(way.cost + cost[kept], way.loss + lost[layer, kept], way.before), budget - later
            )
        fronts.append(found)
    best = _merged(fronts[-1])
    kept, index = (int(each) for each in best.before[np.lexsort((best.cost, best.loss))[0]])
    chosen = []
    for found in reversed(fronts):
        chosen.append(kept)
        kept, index = (int(each) for each in found[kept].before[index])
    return chosen[::-1]


def _begun() -> Front:
    return Front(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 2), np.int64))


def _merged(fronts: dict[int, Front]) -> Front:
    """Merge fronts into one, each allocation with its origin."""
    cost = np.concatenate([each.cost for each in fronts.values()])
    loss = np.concatenate([each.loss for each in fronts.values()])
    before = np.concatenate(
        [np.stack([np.full(len(each.cost), a), np.arange(len(each.cost))], 1) for a, each in fronts.items()]
    )
    order = np.lexsort((loss, cost))
    cost, loss, before = cost[order], loss[order], before[order]
    least = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    better = loss < least
    return Front(cost[better], loss[better], before[better])


def _within(front: Front, budget: int) -> Front:
    fit_convolutions = front.cost <= budget
    return Front(front.cost[fit_convolutions], front.loss[fit_convolutions], front.before[fit_convolutions])


def mirrored(kept: Sequence[int]) -> list[int]:
    """The same numbers of heads with the layers in reverse order: the opposite of a ramp."""
    return list(reversed(kept))


def flat(kept: Sequence[int]) -> list[int]:
    """The same total number of heads, spread evenly over the layers; the remainder goes to the last layers."""
    whole, over = divmod(sum(kept), len(kept))
    return [whole + (layer >= len(kept) - over) for layer in range(len(kept))]


def most_important(importance: FloatArray, kept: Sequence[int]) -> list[tuple[int, ...]]:
    """Select the most important heads of each layer, in ascending order.

    Args:
        importance: of each head [L, n].
        kept: number of heads of each layer.
    """
    order = np.argsort(-importance, axis=1, kind="stable")
    return [tuple(sorted(int(head) for head in row[:count])) for row, count in zip(order, kept, strict=True)]
