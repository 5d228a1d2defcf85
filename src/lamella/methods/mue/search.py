"""Thresholds for samples: each exit swept by itself, a small grid of what is worth it, and the front of that.

A threshold is a quantile of S on these samples, so that it fits the model, whatever its cosines are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lamella.methods.mue.policy import OFF
from lamella.methods.mue.reduction import Exits, quantiles
from lamella.search import pareto

QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1)
WORTH = 0.9  # of the answers that are right without exits: below that a threshold is not tried together with others
KEPT = 3  # thresholds of each exit in the grid


@dataclass(frozen=True)
class Tried:
    """Thresholds, and what came of them.

    Attributes:
        tau: by exit.
        right: the share of samples answered word for word.
        reduction: by layers.
        exits: that were taken.
    """

    tau: dict[str, float]
    right: float
    reduction: float
    exits: Exits


Try = Callable[[Mapping[str, float]], Tried]


def searched(
    attempt: Try, quantiles_tried: Sequence[float] = QUANTILES, min_layer: int = 1, kept: int = KEPT
) -> list[Tried]:
    """All that was tried, without exits first: separate sweeps, then a joint grid of so many of each."""
    full = attempt({})
    floor, found, grid = WORTH * full.right, [full], []
    for name in full.exits.cosines:
        each = [quantiles(full.exits, q, min_layer).get(name) for q in quantiles_tried]
        swept = [attempt({name: tau}) for tau in dict.fromkeys(each) if tau is not None]
        found += swept
        worth = sorted((one for one in swept if one.right >= floor), key=lambda one: -one.reduction)
        grid.append([{}, *(one.tau for one in worth[:kept])])
    for some in product(*grid):
        tau = {name: value for one in some for name, value in one.items()}
        if len(tau) > 1:
            found.append(attempt(tau))
    return found


def front(tried: Iterable[Tried]) -> list[Tried]:
    """What nothing else beats in both, from the least reduction to the most."""
    first = {(-one.reduction, -one.right): one for one in reversed(list(tried))}
    return [first[costs] for costs in sorted(pareto({costs: costs for costs in first}), reverse=True)]


def chosen(tried: Iterable[Tried], full: float, retain: float) -> Tried | None:
    """What reduces most of what keeps this share of the right answers; None where nothing does.

    Args:
        tried: of :func:`searched`.
        full: right answers without exits.
        retain: such as 0.99.
    """
    good = [one for one in tried if one.right >= retain * full]
    return max(good, key=lambda one: (one.reduction, one.right), default=None)


def complete(tau: Mapping[str, float]) -> dict[str, float]:
    """Thresholds of all exits, those that are not named off."""
    return {name: tau.get(name, OFF) for name in ("image", "text", "decoder")}
