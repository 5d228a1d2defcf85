"""``recycle="auto"``: whether a carried basis does harm. This rule is ours, not the paper's.

A basis from a system that is too far away makes GCRO-DR slower than a cold start, for the whole solve and not for its
first steps only. So every cycle that builds on a carried basis is compared, at equal products with A, with what cold
starts had reached by then: the start-up products and the first cycle together are as many as a cold cycle has.

- Behind in two cycles in a row: the basis is dropped, and the system begins again from zero. To go on from what was
  reached would be no gain: the residual holds what the basis made hard, and a cold start has a known price.
- A ledger has the products that carried bases saved or cost, against the average cold start. While they cost more than
  5 % of all products so far, systems start cold; these also renew the average. What was saved counts up to the price of
  one cold start, so that a good beginning does not pay for a long bad end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamella.methods.skr.gcrodr import Solve

Array = NDArray[np.float64]
TWICE = 2  # cycles behind in a row, before the basis is dropped
SHARE = 0.05  # of all products with A, which trying may cost
MEMORY = 0.5  # the weight of the past in the running average of cold starts


class Harm:
    """What one chunk has seen of cold and of recycled systems."""

    def __init__(self) -> None:
        self.cold: Array = np.empty(0)  # log |r| / |b| of cold starts, by products with A
        self.saved = 0.0
        self.spent = 0.0
        self._behind = 0

    def begin(self) -> bool:
        """Whether the next system may use the carried basis."""
        self._behind = 0
        return self.saved >= -SHARE * self.spent

    def __call__(self, matvecs: int, residual: float) -> bool:
        """Whether to drop the basis, asked after a cycle that has not converged."""
        if not len(self.cold):
            return False
        reached = self.cold[min(matvecs, len(self.cold) - 1)]
        self._behind = self._behind + 1 if np.log(residual) > reached else 0
        return self._behind >= TWICE

    def end(self, solve: Solve, carried: bool) -> None:
        """Learn from a finished system."""
        self.spent += solve.work[-1]
        if not carried:
            self._average(solve)
        elif len(self.cold):
            price = len(self.cold) - 1
            self.saved = min(self.saved + price - solve.work[-1], price)

    def _average(self, solve: Solve) -> None:
        new = np.log(np.maximum(solve.history, np.finfo(float).tiny))
        old = self.cold if len(self.cold) else new
        length = round(MEMORY * len(old) + (1 - MEMORY) * len(new))
        longest = max(len(old), len(new))
        both = [np.pad(curve, (0, longest - len(curve)), mode="edge") for curve in (old, new)]
        self.cold = (MEMORY * both[0] + (1 - MEMORY) * both[1])[:length]

    def state(self) -> dict[str, Any]:
        return {"cold": self.cold, "ledger": np.array([self.saved, self.spent])}

    def restore(self, state: dict[str, Any]) -> None:
        self.cold = state["cold"]
        self.saved, self.spent = (float(value) for value in state["ledger"])
