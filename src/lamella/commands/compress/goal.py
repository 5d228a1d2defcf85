"""What a compression has to reach, and when a route reaches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lamella import formatting
from lamella.commands.compress.forms import Program
from lamella.errors import BudgetError
from lamella.evaluate import Budget, Ratio
from lamella.planners import goal_of

SPEEDUP = 1.3  # the default goal
GOALS = ("speedup", "size", "memory", "loss")
TOLERANCE = 0.98  # fraction of a speed-up that counts as reached: two runs of one model differ by about 2 %


@dataclass(frozen=True)
class Goal:
    """The goal of a compression.

    Attributes:
        name: ``speedup``, of decoding at batch 1; ``size`` of the weights in MB; ``memory`` of the weights and the
            cache of 2,048 tokens in MB; or ``loss``, a KL divergence in nats, within which the fastest route is chosen.
        value: its value.
        program: the program in which it is to be reached.
    """

    name: str
    value: float
    program: Program = "torch"

    @classmethod
    def of(cls, budget: Budget, program: Program = "torch") -> Goal:
        """Return the goal of a budget, by default a speed-up.

        Args:
            budget: the budget.
            program: the program in which it is to be reached.

        Raises:
            BudgetError: for several goals, or one that a compression does not have.
        """
        name = goal_of(budget)
        if name is None:
            return cls("speedup", SPEEDUP, program)
        if name not in GOALS:
            raise BudgetError(f"compress has the goals {', '.join(GOALS)}: give one of them instead of {name}")
        return cls(name, getattr(budget, name), program)

    @property
    def is_in_bytes(self) -> bool:
        """Whether it is a number of bytes, which does not depend on how fast the result runs."""
        return self.name in ("size", "memory")

    @property
    def text(self) -> str:
        """The goal in words."""
        where = "" if self.program == "torch" else f" in {self.program}"
        return {
            "speedup": f"a decode speed-up of {formatting.ratio(self.value)}{where}",
            "size": f"weights of at most {formatting.size(1e6 * self.value)}",
            "memory": f"weights and cache of at most {formatting.size(1e6 * self.value)}",
            "loss": f"a KL divergence of at most {self.value:g} nats",
        }[self.name]

    def is_reached(self, speedup: Ratio, weights: int, memory: int, kl: float) -> bool:
        """Return whether a measured route reaches the goal.

        Args:
            speedup: its decode speed-up.
            weights: bytes of its weights.
            memory: bytes of its weights and its cache.
            kl: its KL divergence from the original, nats.
        """
        return {
            "speedup": speedup.median >= TOLERANCE * self.value,
            "size": weights <= 1e6 * self.value,
            "memory": memory <= 1e6 * self.value,
            "loss": kl <= self.value,
        }[self.name]

    def as_dict(self) -> dict[str, Any]:
        """Return the goal as JSON values."""
        return {"name": self.name, "value": self.value, "text": self.text}
