"""``recycle="auto"``: detect whether a carried basis does harm. This rule is ours, not the paper's.

A basis from a system that is too far away makes GCRO-DR slower than a cold start, for the whole solve and not only for
its first steps. So every cycle that builds on a carried basis is compared, at equal products with A, with the residual
that cold starts had reached: the start-up products and the first cycle together are as many as a cold cycle has.

- If it is behind in two consecutive cycles, the basis is dropped, and the system restarts from zero. Continuing from
the
  current iterate would gain nothing: the residual contains what the basis made hard, and a cold start has a known cost.
- A ledger counts the products that carried bases saved or cost, relative to the average cold start. While they have
cost
  more than 5 % of all products, systems start cold, which also updates the average. Savings count up to the cost of one
  cold start, so that a good beginning does not pay for a long harmful end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamella.methods.skr.gcrodr import Solve

Array = NDArray[np.float64]
TWICE = 2  # consecutive cycles behind before the basis is dropped
MAX_COST = 0.05  # fraction of all products with A that harmful bases may cost
MEMORY = 0.5  # the weight of the past in the running average of cold starts


class Harm:
    """Statistics of the cold and recycled systems of one chunk."""

    def __init__(self) -> None:
        self.cold: Array = np.empty(0)  # log |r| / |b| of cold starts, by products with A
        self.saved = 0.0
        self.spent = 0.0
        self._behind = 0

    def may_recycle(self) -> bool:
        """Return whether the next system may use the carried basis."""
        self._behind = 0
        return self.saved >= -MAX_COST * self.spent

    def __call__(self, matvecs: int, residual: float) -> bool:
        """Return whether to drop the basis, after a cycle that has not converged."""
        if not len(self.cold):
            return False
        reached = self.cold[min(matvecs, len(self.cold) - 1)]
        self._behind = self._behind + 1 if np.log(residual) > reached else 0
        return self._behind >= TWICE

    def update(self, solve: Solve, carried: bool) -> None:
        """Update the statistics with a finished system.

        Args:
            solve: the result.
            carried: whether it started with a carried basis.
        """
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
        """Return the state to save."""
        return {"cold": self.cold, "ledger": np.array([self.saved, self.spent])}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.cold = state["cold"]
        self.saved, self.spent = (float(value) for value in state["ledger"])
