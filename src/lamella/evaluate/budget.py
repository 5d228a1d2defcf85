"""Stopping goals of a search, which also select a plan of its series, and its time limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from lamella.evaluate.cost import cost, step_times
from lamella.needs import now
from lamella.plan import ModelReference, Plan
from lamella.stack import Position, Stack

CONTEXT = 2048  # tokens whose cache counts as memory


@dataclass(frozen=True)
class Budget:
    """The goal of a search; without one, the search runs to its method's default.

    Searches that remove sublayers one by one stop at a speed-up, a share, parameters, a size or a memory. From any
    other series, the plan is chosen that reaches the goal.

    Attributes:
        share: of all sublayers, at which to stop.
        parameters: maximum fraction of the model's parameters that remain.
        size: maximum size of the weights in MB, in their precision when opened.
        memory: maximum size in MB of the weights and the cache of 2,048 tokens.
        sparsity: minimum fraction of the parameters that are masked.
        loss: the highest score of a plan on the calibration data; the largest reduction below it is chosen.
        speedup: the decode speed-up at batch 1 to stop at, in the cost model.
        minutes: time limit of comparisons. Afterwards every step takes the candidate that was estimated best, with one
            measurement: the plan still reaches the goal, but is less good. The result then depends on the machine.
        until: any other goal: whether the removed sublayers are enough.
    """

    share: Annotated[float, Ge(0), Le(1)] | None = None
    parameters: Annotated[float, Gt(0), Le(1)] | None = None
    size: Annotated[float, Gt(0)] | None = None
    memory: Annotated[float, Gt(0)] | None = None
    sparsity: Annotated[float, Gt(0), Lt(1)] | None = None
    loss: Annotated[float, Ge(0)] | None = None
    speedup: Annotated[float, Ge(1)] | None = None
    minutes: Annotated[float, Ge(0)] | None = None
    until: Callable[[frozenset[Position]], bool] | None = None

    def most(self, default: float) -> float:
        """Return the maximum share of removed sublayers: all with another goal, and ``default`` without one."""
        if self.share is not None:
            return self.share
        goals = (self.speedup, self.parameters, self.size, self.memory, self.loss, self.until)
        return default if all(goal is None for goal in goals) else 1.0

    def clock(self) -> Callable[[], bool]:
        """Return a function that tells whether the time is over; it starts now."""
        if self.minutes is None:
            return lambda: False
        end = now() + 60 * self.minutes
        return lambda: now() >= end

    def enough(self, stack: Stack) -> Callable[[frozenset[Position]], bool] | None:
        """Return a function that tells whether the removed sublayers reach the goal, if there is such a goal.

        A speed-up is that of the cost model, for which the time of a decoding step is measured once.
        """
        goals = [] if self.until is None else [self.until]
        if self.speedup is not None:
            times, speedup = step_times(stack), self.speedup
            goals.append(lambda gone: times.speedup_without(gone, len(stack)) >= speedup)
        if self.parameters is not None or self.size is not None or self.memory is not None:
            goals.append(lambda gone: self.fits(stack, _without(stack, gone)))
        return (lambda gone: any(goal(gone) for goal in goals)) if goals else None

    def fits(self, stack: Stack, plan: Plan) -> bool:
        """Return whether a plan meets the limits on parameters, size of the weights and memory.

        Args:
            stack: the whole model.
            plan: the plan.
        """
        left = cost(stack, plan)
        weights = left.parameters * next(stack.model.parameters()).element_size()
        memory = weights + CONTEXT * left.kv_bytes_per_token
        return (
            (self.parameters is None or left.parameters <= self.parameters * cost(stack).parameters)
            and (self.size is None or weights <= 1e6 * self.size)
            and (self.memory is None or memory <= 1e6 * self.memory)
        )


def _without(stack: Stack, gone: frozenset[Position]) -> Plan:
    """Return the plan that removes these sublayers."""
    reference = ModelReference.of(stack)
    return Plan(model=reference, drop=reference.sites({stack.stack: gone}))
