"""How far a search must go: a share to remove, or a speed to reach; and how long it may compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from lamella.evaluate.cost import cost, step_times
from lamella.plan import ModelReference, Plan
from lamella.stack import Position, Stack


@dataclass(frozen=True)
class Budget:
    """How far a search must go; without any of these, as far as its method does by itself.

    Attributes:
        share: of all sublayers, at which to stop.
        parameters: share of the model's parameters that may stay at most.
        speedup: the decode speed-up at batch 1 to stop at, in the cost model.
        minutes: for which a search may compare. From then on every step takes what seemed best before, which costs one
            measurement: the plan still reaches the goal, and is less good. What it finds then depends on the machine.
        until: true of the removed sublayers as soon as they are enough, for any other goal.
    """

    share: Annotated[float, Ge(0), Le(1)] | None = None
    parameters: Annotated[float, Gt(0), Le(1)] | None = None
    speedup: Annotated[float, Ge(1)] | None = None
    minutes: Annotated[float, Ge(0)] | None = None
    until: Callable[[frozenset[Position]], bool] | None = None

    def most(self, default: float) -> float:
        """The share of all sublayers that may go: all where another goal is given, and ``default`` where none is."""
        if self.share is not None:
            return self.share
        return default if self.speedup is None and self.parameters is None and self.until is None else 1.0

    def clock(self) -> Callable[[], bool]:
        """What says whether the minutes are over; they begin now."""
        if self.minutes is None:
            return lambda: False
        end = time.monotonic() + 60 * self.minutes
        return lambda: time.monotonic() >= end

    def enough(self, stack: Stack) -> Callable[[frozenset[Position]], bool] | None:
        """What says of the removed sublayers whether they are enough, if there is such a goal.

        A speed-up is that of the cost model, for which the time of a decoding step is measured once.
        """
        goals = [] if self.until is None else [self.until]
        if self.speedup is not None:
            times, speedup = step_times(stack), self.speedup
            goals.append(lambda gone: times.speedup_without(gone, len(stack)) >= speedup)
        if self.parameters is not None:
            left = self.parameters * cost(stack).parameters
            goals.append(lambda gone: cost(stack, _without(stack, gone)).parameters <= left)
        return (lambda gone: any(goal(gone) for goal in goals)) if goals else None


def _without(stack: Stack, gone: frozenset[Position]) -> Plan:
    """The plan that leaves out these sublayers."""
    reference = ModelReference.of(stack)
    return Plan(model=reference, drop=reference.sites({stack.stack: gone}))
