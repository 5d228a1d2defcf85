"""What was measured, with its interval: what it says of a threshold, and when it says nothing."""

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
    """A figure between two bounds of what it may be. A threshold that lies between them is not decided."""

    figure: float
    low: float
    high: float

    @classmethod
    def over_seeds(cls, values: Sequence[float]) -> Measured:
        """The mean with its 95 % interval by Student's t; a single seed has none, and is judged as it is.

        What is compared is compared seed by seed, since two arms of one seed begin alike: give differences or ratios.
        """
        count, mean = len(values), float(np.mean(values))
        half = float(t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / count**0.5) if count > 1 else 0.0
        return cls(mean, mean - half, mean + half)

    @classmethod
    def over_rounds(cls, speedup: Ratio, predicted: float = 1.0) -> Measured:
        """A speed-up over interleaved rounds, its median and quartiles, by the one that was predicted."""
        return cls(*(each / predicted for each in (speedup.median, speedup.low, speedup.high)))

    def at_least(self, bound: float) -> bool | None:
        """Whether the figure is ``bound`` or more: None where ``bound`` lies inside the interval."""
        return True if self.low >= bound else False if self.high < bound else None

    def at_most(self, bound: float) -> bool | None:
        return Measured(-self.figure, -self.high, -self.low).at_least(-bound)

    def within(self, low: float, high: float) -> bool | None:
        return together([self.at_least(low), self.at_most(high)])

    def __str__(self) -> str:
        return f"{self.figure:.4g}" + (f" ({self.low:.4g} to {self.high:.4g})" if self.low < self.high else "")
