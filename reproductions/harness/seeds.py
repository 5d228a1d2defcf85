"""Means over seeds: what they say of a threshold, and when they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t

from lamella.results.record import together

LEVEL = 0.95


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds with its 95 % interval by Student's t; a single seed has none, and is judged as it is.

    What is compared is compared seed by seed, since two arms of one seed begin alike: give their differences or ratios.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> OverSeeds:
        count, mean = len(values), fmean(values)
        half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * stdev(values) / math.sqrt(count) if count > 1 else 0.0
        return cls(mean, mean - half, mean + half)

    def at_least(self, bound: float) -> bool | None:
        """Whether the mean is ``bound`` or more: None where ``bound`` lies inside the interval."""
        return True if self.low >= bound else False if self.high < bound else None

    def at_most(self, bound: float) -> bool | None:
        return OverSeeds(-self.mean, -self.high, -self.low).at_least(-bound)

    def within(self, low: float, high: float) -> bool | None:
        return together([self.at_least(low), self.at_most(high)])

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ({self.low:.4g} to {self.high:.4g})" if self.low < self.high else "")
