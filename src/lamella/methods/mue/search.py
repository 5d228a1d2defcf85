"""Search for thresholds: a sweep of each exit alone, then a small joint grid of the best.

A threshold is a quantile of S on the samples, so that it fits the model whatever the range of its cosines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lamella.methods.mue.policy import OFF
from lamella.methods.mue.reduction import Exits, quantile_thresholds
from lamella.search import pareto

QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1)
WORTH = 0.9  # of the correct answers without exits: thresholds below this fraction are not part of the joint grid
KEPT = 3  # thresholds of each exit in the joint grid


@dataclass(frozen=True)
class ExitTrial:
    """Thresholds with their measured effect.

    Attributes:
        tau: threshold by exit.
        correct: fraction of samples answered exactly.
        reduction: expected time reduction by layers.
        exits: the exits that were taken.
    """

    tau: dict[str, float]
    correct: float
    reduction: float
    exits: Exits


Attempt = Callable[[Mapping[str, float]], ExitTrial]


def search_thresholds(
    attempt: Attempt, quantiles_tried: Sequence[float] = QUANTILES, min_layer: int = 1, kept: int = KEPT
) -> list[ExitTrial]:
    """Sweep each exit alone, then try a joint grid, and return all trials, the one without exits first.

    Args:
        attempt: measures the effect of thresholds.
        quantiles_tried: quantile_thresholds of S that become thresholds.
        min_layer: first layer after which a sample may exit.
        kept: number of thresholds of each exit in the joint grid.
    """
    full = attempt({})
    floor, found, grid = WORTH * full.correct, [full], []
    for name in full.exits.cosines:
        each = [quantile_thresholds(full.exits, q, min_layer).get(name) for q in quantiles_tried]
        swept = [attempt({name: tau}) for tau in dict.fromkeys(each) if tau is not None]
        found += swept
        worth = sorted((one for one in swept if one.correct >= floor), key=lambda one: -one.reduction)
        grid.append([{}, *(one.tau for one in worth[:kept])])
    for some in product(*grid):
        tau = {name: value for one in some for name, value in one.items()}
        if len(tau) > 1:
            found.append(attempt(tau))
    return found


def pareto_trials(tried: Iterable[ExitTrial]) -> list[ExitTrial]:
    """Return the Pareto-optimal trials in accuracy and reduction, from the least reduction to the most."""
    first = {(-one.reduction, -one.correct): one for one in reversed(list(tried))}
    return [first[costs] for costs in sorted(pareto({costs: costs for costs in first}), reverse=True)]


def best_trial(tried: Iterable[ExitTrial], full: float, retain: float) -> ExitTrial | None:
    """Return the trial with the largest reduction that keeps a fraction of the correct answers; None if there is none.

    Args:
        tried: trials of :func:`search_thresholds`.
        full: fraction of correct answers without exits.
        retain: fraction of these to keep, such as 0.99.
    """
    good = [one for one in tried if one.correct >= retain * full]
    return max(good, key=lambda one: (one.reduction, one.correct), default=None)


def with_all_exits(tau: Mapping[str, float]) -> dict[str, float]:
    """Return the thresholds of all exits; those that are not named are off."""
    return {name: tau.get(name, OFF) for name in ("image", "text", "decoder")}
