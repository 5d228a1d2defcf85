"""The design of an experiment: how many seeds decide it, and the learning rate of every arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from harness.measured import LEVEL
from harness.run import Run

EXTENSIONS = 3  # of a grid, at most
FEWEST, MOST = 3, 12  # seeds


def seeds_needed(pilot: Sequence[float], margin: float, most: int = MOST) -> int:
    """Return the number of seeds with which the interval of a mean is expected to be within ``margin`` of it.

    Args:
        pilot: paired differences (or logarithms of ratios) of a few seeds, which are not used again.
        margin: distance of the expected value from the threshold.
        most: maximum number of seeds.
    """
    counts = np.arange(FEWEST, most)
    half_widths = t.ppf((1 + LEVEL) / 2, counts - 1) * np.std(pilot, ddof=1) / np.sqrt(counts)
    return int(counts[half_widths <= margin].min(initial=most))


@dataclass(frozen=True)
class Rate:
    """The learning rate of one arm.

    Attributes:
        value: the rate with the lowest score.
        scores: by rate, the score.
    """

    value: float
    scores: Mapping[float, float]

    @property
    def is_interior(self) -> bool:
        """Whether lower and higher rates were tried."""
        return min(self.scores) < self.value < max(self.scores)


def tuned(
    run: Run,
    arms: Mapping[str, Callable[[float], float]],
    grid: Sequence[float],
    title: str = "Learning rates, chosen on validation data",
) -> dict[str, Rate]:
    """Choose the learning rate of each arm, and extend the grid for all while one has its optimum at an edge.

    Args:
        run: the run, which gets a table.
        arms: by name, a function from a rate to a score on validation data, lower is better; scores are arms of the
            journal.
        grid: at least two rates, ascending, at equal ratios.
        title: the title of the table; another positive value than the learning rate can be chosen, too.
    """
    rates, ratio = list(grid), grid[1] / grid[0]
    chosen: dict[str, Rate] = {}
    for _ in range(EXTENSIONS + 1):
        for name, score in arms.items():
            scores = {rate: run.arm(f"{name} at rate {rate:g}", score, rate) for rate in rates}
            chosen[name] = Rate(min(scores, key=scores.__getitem__), scores)
        best = {each.value for each in chosen.values()}
        lower, higher = rates[0] in best, rates[-1] in best
        if not lower and not higher:
            break
        rates = [*([rates[0] / ratio] if lower else []), *rates, *([rates[-1] * ratio] if higher else [])]
    rows = []
    for name, each in chosen.items():
        scores = ", ".join(f"{rate:g}: {score:.4g}" for rate, score in each.scores.items())
        rows.append([name, each.value, "yes" if each.is_interior else "no", scores])
    run.table(title, ["arm", "rate", "interior", "scores"], rows)
    return chosen
