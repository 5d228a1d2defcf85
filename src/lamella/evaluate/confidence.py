"""A confidence sequence for the mean of values in [0, 1], by betting (Waudby-Smith and Ramdas, arXiv 2010.09686).

What is estimated. Positions of one sequence are correlated, so a position is no independent observation; a prompt is.
The value of a prompt is the fraction of its scored positions at which two models have the same most likely token, and
the interval covers the mean over prompts: on what share of its positions the top token agrees, for a prompt drawn from
the traffic. If all sequences have the same length, this is the share of all positions; otherwise every prompt counts
alike, however long it is.

What is assumed. The prompts are independent draws from the traffic that the statement is about. Their values may have
any distribution on [0, 1]. A file of prompts is a sample of the traffic, not the traffic itself, so the interval does
not shrink to a point where the file ends, as it would with the paper's variant for sampling without replacement. The
order of a file is not random (it may be sorted by topic), so prompts are shuffled before they are looked at one by one.
Windows of one text are not independent of their neighbours: their interval is about windows of such text.

How it works. A gambler bets against the claim that the mean is m. With a fraction c of the capital at stake, a value x
multiplies the capital by 1 + c (x / m - 1), which is never negative, and is 1 on average if the claim is true. Half of
the capital is bet with c = 1, a quarter with c = 1/2, an eighth with c = 1/4, and so on: diversified Kelly bets, whose
large stakes decide after few values and whose small stakes decide close questions after many.

    K_t(m) = sum_k 2^-(k+1) prod_{i <= t} (1 + 2^-k (x_i / m - 1))

By Ville's inequality, the capital ever reaches 2 / alpha with a probability of at most alpha / 2 if m is the mean.
Every factor decreases in m, so all claims below one root are refuted: the root is the lower bound. The upper bound is
one minus the lower bound of 1 - x. Together they cover the mean at all times at once with a probability of at least
1 - alpha, so one may look after every prompt, and stop at any of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from lamella.formatting import percent

CONFIDENCE = 0.95
STAKES = 0.5 ** np.arange(16)  # fractions c of the capital at stake; each of them bets half of its own share of it
LOWEST = 1e-9  # lower bounds below it are 0


@dataclass(frozen=True)
class Interval:
    """Bounds of a mean.

    Attributes:
        lower, upper: the bounds.
        confidence: probability that they hold, for all times together.
    """

    lower: float = 0.0
    upper: float = 1.0
    confidence: float = CONFIDENCE

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> Interval:
        """Return the interval after all values, which does not depend on their order.

        Args:
            values: [count], values from 0 to 1; none give the interval from 0 to 1.
            confidence: probability that the interval covers the mean.
        """
        found = np.asarray(values, dtype=np.float64)
        threshold = np.log(2 / (1 - confidence))
        return cls(_lower(found, threshold), 1 - _lower(1 - found, threshold), confidence)

    def within(self, other: Interval) -> Interval:
        """Return the intersection with another interval of the same confidence sequence."""
        return Interval(max(self.lower, other.lower), min(self.upper, other.upper), self.confidence)

    def verdict(self, share: float) -> str:
        """Return whether the mean is at least ``share``: ``holds``, ``does not hold`` or ``undecided``.

        Args:
            share: the share.
        """
        return "holds" if self.lower >= share else "does not hold" if self.upper < share else "undecided"


def guarantee(agreement: Mapping[str, Any]) -> str:
    """Return what an interval guarantees, as a sentence.

    Args:
        agreement: an :class:`Interval` of the evidence.
    """
    confidence, (least, _) = in_percent(agreement["confidence"]), rounded(agreement)
    return (
        f"With {confidence} confidence, the top token agrees on at least {least} of positions in sequences like those "
        "of the test (anytime-valid)."
    )


def rounded(agreement: Mapping[str, Any]) -> tuple[str, str]:
    """Return the bounds of an interval in percent, rounded outwards.

    Args:
        agreement: an :class:`Interval` of the evidence.
    """
    lower, upper = math.floor(1000 * agreement["lower"]) / 1000, math.ceil(1000 * agreement["upper"]) / 1000
    return in_percent(lower), in_percent(upper)


def in_percent(share: float) -> str:
    """Format a share in percent, with a decimal only where it is needed, such as ``95 %`` or ``52.3 %``.

    Args:
        share: the share.
    """
    return percent(share).replace(".0 %", " %")


def log_capital(values: np.ndarray, mean: float) -> np.ndarray:
    """Return the logarithm of the capital after each value, of the gambler who claims that the mean is higher.

    Args:
        values: [..., count], values from 0 to 1.
        mean: the claimed mean, above 0.

    Returns:
        float64 [..., count].
    """
    with np.errstate(divide="ignore"):  # everything is at stake and lost: log 0
        growth = np.log1p(STAKES[:, None] * (values[..., None, :] / mean - 1)).cumsum(axis=-1)
    capital: np.ndarray = logsumexp(growth + np.log(STAKES / 2)[:, None], axis=-2)
    return capital


def _lower(values: np.ndarray, threshold: float) -> float:
    """Return the mean at which the capital reaches the threshold: lower ones are refuted."""

    def excess(mean: float) -> float:
        return float(log_capital(values, mean)[-1]) - threshold

    if not values.any() or excess(LOWEST) <= 0:
        return 0.0
    return float(brentq(excess, LOWEST, values.mean()))  # at the mean of the values no bet gains
