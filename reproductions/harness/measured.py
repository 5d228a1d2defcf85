"""Measured values with intervals, and their comparison with thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, t

from lamella.evaluate import Ratio
from lamella.results.record import together

LEVEL = 0.95
RESAMPLES = 10_000  # of a bootstrap


@dataclass(frozen=True)
class Measured:
    """A value with an interval. A threshold within the interval is undecided.

    Attributes:
        figure: the value.
        low: the lower bound.
        high: the upper bound.
    """

    figure: float
    low: float
    high: float

    @classmethod
    def over_seeds(cls, values: Sequence[float]) -> Measured:
        """Return the mean with its 95 % interval by Student's t; a single seed has no interval.

        Compare arms seed by seed, since two arms of one seed have the same initialisation: give differences or ratios.
        """
        count, mean = len(values), float(np.mean(values))
        half = float(t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / count**0.5) if count > 1 else 0.0
        return cls(mean, mean - half, mean + half)

    @classmethod
    def over_seeds_and_items(cls, values: ArrayLike, shared: bool = True) -> Measured:
        """Return the mean with its 95 % interval by a hierarchical bootstrap over seeds and test items.

        Compare arms seed by seed and item by item: give differences or logarithms of ratios. Resamples of few seeds
        vary too little, so the interval is widened as a t interval is. With a single seed it speaks of items alone.

        Args:
            values: paired values [seeds, items].
            shared: whether all seeds are tested on the same items; otherwise each seed has its own.
        """
        x = np.asarray(values, float)
        seeds, items = x.shape
        random = np.random.default_rng(0)
        of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
        if shared:
            of_items = random.multinomial(items, np.full(items, 1 / items), RESAMPLES) / items
            means = ((of_seeds @ x) * of_items).sum(axis=1)
        else:
            each = [random.multinomial(items, np.full(items, 1 / items), RESAMPLES) @ row / items for row in x]
            means = (of_seeds * np.stack(each, axis=1)).sum(axis=1)
        mean, ends = float(x.mean()), np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if seeds > 1:
            wider = t.ppf((1 + LEVEL) / 2, seeds - 1) / norm.ppf((1 + LEVEL) / 2) * (seeds / (seeds - 1)) ** 0.5
            ends = mean + wider * (ends - mean)
        return cls(mean, float(ends[0]), float(ends[1]))

    def exp(self) -> Measured:
        """Return the exponential, a ratio if the values are means of logarithms of ratios."""
        return Measured(*(float(np.exp(each)) for each in (self.figure, self.low, self.high)))

    @classmethod
    def over_rounds(cls, speedup: Ratio, predicted: float = 1.0) -> Measured:
        """Return a speed-up over interleaved rounds, its median and quartiles, relative to the predicted one.

        Args:
            speedup: the measured speed-up.
            predicted: the predicted speed-up.
        """
        return cls(*(each / predicted for each in (speedup.median, speedup.low, speedup.high)))

    def at_least(self, bound: float) -> bool | None:
        """Return whether the value is at least ``bound``; None if ``bound`` is within the interval."""
        return True if self.low >= bound else False if self.high < bound else None

    def at_most(self, bound: float) -> bool | None:
        """Return whether the value is at most ``bound``; None if ``bound`` is within the interval."""
        return Measured(-self.figure, -self.high, -self.low).at_least(-bound)

    def within(self, low: float, high: float) -> bool | None:
        """Return whether the value is between two bounds; None if that is undecided."""
        return together([self.at_least(low), self.at_most(high)])

    def __str__(self) -> str:
        return f"{self.figure:.4g}" + (f" ({self.low:.4g} to {self.high:.4g})" if self.low < self.high else "")
