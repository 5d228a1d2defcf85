"""Measured values with intervals, and their comparison with thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

from lamella.evaluate import Ratio
from lamella.results.record import together

LEVEL = 0.95


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
    def over_seeds_and_items(cls, values: ArrayLike) -> Measured:
        """Return the mean with its 95 % interval, where all seeds are tested on the same items.

        Seeds and items are crossed random effects. The variance of the mean follows from the mean squares of a two-way
        analysis of variance, and its degrees of freedom from Satterthwaite's approximation. A mean square of seeds or
        items below the residual one is replaced by that. With a single seed the interval speaks of items alone.

        Compare arms seed by seed and item by item: give differences or logarithms of ratios. If each seed has its own
        items, use :meth:`over_seeds` on the means, which vary by the items too.

        Args:
            values: paired values [seeds, items].

        Source: Satterthwaite, "An Approximate Distribution of Estimates of Variance Components", 1946.
        """
        x = np.asarray(values, float)
        seeds, items = x.shape
        if min(seeds, items) == 1:
            return cls.over_seeds(x.ravel().tolist())
        of_seeds, of_items, mean = x.mean(axis=1, keepdims=True), x.mean(axis=0, keepdims=True), float(x.mean())
        free = np.array([seeds - 1, items - 1, (seeds - 1) * (items - 1)])
        squares = np.array([items * of_seeds.var(), seeds * of_items.var(), (x - of_seeds - of_items + mean).var()])
        squares *= np.array([seeds, items, seeds * items]) / free
        squares[:2] = squares[:2].clip(min=squares[2])
        if not squares.any():
            return cls(mean, mean, mean)
        spread = squares[0] + squares[1] - squares[2]
        half = float(t.ppf((1 + LEVEL) / 2, spread**2 / (squares**2 / free).sum()) * (spread / x.size) ** 0.5)
        return cls(mean, mean - half, mean + half)

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
