"""The ramp: how many heads each layer keeps, at the least loss within a cost, none more than a later one.

    min  sum over layers of  loss_l(a_l)      with  sum cost(a_l) <= budget,   a_1 <= a_2 <= ... <= a_L

loss_l(a) is what the heads that go cost by themselves, added up, when the a most important ones stay. The optimum is
found exactly: for each last a, all pairs of cost and loss that no other pair beats are carried from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lamella.errors import BudgetError, MethodError

Numbers = npt.NDArray[np.float64]


class Front(NamedTuple):
    """Ways to allocate the layers so far, none of which another beats.

    Attributes:
        cost: rising.
        loss: falling.
        before: the heads of the layer before, and the place of the rest in its front [ways, 2].
    """

    cost: npt.NDArray[np.int64]
    loss: Numbers
    before: npt.NDArray[np.int64]


def losses(importance: Numbers) -> Numbers:
    """What is lost when a layer keeps its a most important heads [L, n + 1], a from 0 to n.

    Args:
        importance: of each head [L, n], 0 or more.
    """
    rising = np.sort(importance, axis=1)
    gone = np.concatenate([np.zeros((len(rising), 1)), np.cumsum(rising, axis=1)], axis=1)  # m heads are gone
    return gone[:, ::-1]


def allocate(importance: Numbers, cost: Sequence[int], budget: int, *, least: int = 1) -> list[int]:
    """The heads that each layer keeps, non-decreasing in depth, with the least loss that the budget allows.

    Among equals, the cheapest.

    Args:
        importance: of each head [L, n], 0 or more.
        cost: of a layer that keeps a heads, a from 0 to n.
        budget: for all layers, in the same unit.
        least: heads that every layer keeps.

    Raises:
        BudgetError: for a budget below the smallest shape.
        MethodError: for a ``least`` beyond the number of heads.
    """
    layers, heads = importance.shape
    if not 0 <= least <= heads:
        raise MethodError(f"least {least}: layers have {heads} heads, so give 0 to {heads}")
    smallest = layers * min(cost[least:])
    if budget < smallest:
        raise BudgetError(
            f"the budget of {budget:,} is below the smallest shape, {smallest:,} with {least} of {heads} heads in each "
            "layer: give more, or a smaller least"
        )
    lost = losses(importance)
    choices = range(least, heads + 1)
    fronts: list[dict[int, Front]] = []
    for layer in range(layers):
        found: dict[int, Front] = {}
        for kept in choices:
            way = _begun() if layer == 0 else _merged({a: fronts[-1][a] for a in choices if a <= kept})
            later = (layers - 1 - layer) * min(cost[kept:])  # what the rest costs at least
            found[kept] = _within(
                Front(way.cost + cost[kept], way.loss + lost[layer, kept], way.before), budget - later
            )
        fronts.append(found)
    best = _merged(fronts[-1])
    kept, place = (int(each) for each in best.before[np.lexsort((best.cost, best.loss))[0]])
    chosen = []
    for found in reversed(fronts):
        chosen.append(kept)
        kept, place = (int(each) for each in found[kept].before[place])
    return chosen[::-1]


def _begun() -> Front:
    return Front(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 2), np.int64))


def _merged(fronts: dict[int, Front]) -> Front:
    """The ways of several fronts that no other one beats, each with where it came from."""
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
    fits = front.cost <= budget
    return Front(front.cost[fits], front.loss[fits], front.before[fits])


def mirrored(kept: Sequence[int]) -> list[int]:
    """The same numbers of heads with the layers in reverse: the opposite of a ramp."""
    return list(reversed(kept))


def flat(kept: Sequence[int]) -> list[int]:
    """The same number of heads, as even over the layers as whole heads can be; those left over go to the last."""
    whole, over = divmod(sum(kept), len(kept))
    return [whole + (layer >= len(kept) - over) for layer in range(len(kept))]


def most_important(importance: Numbers, kept: Sequence[int]) -> list[tuple[int, ...]]:
    """Which heads stay in each layer: the most important ones, in their order."""
    order = np.argsort(-importance, axis=1, kind="stable")
    return [tuple(sorted(int(head) for head in row[:count])) for row, count in zip(order, kept, strict=True)]
