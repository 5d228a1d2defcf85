"""Measured values with intervals, and their comparison with thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
