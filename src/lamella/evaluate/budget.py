"""How far a search goes, and which plan of its series is taken: one goal, and how long it may compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from lamella.evaluate.cost import cost, step_times
from lamella.plan import ModelReference, Plan
from lamella.stack import Position, Stack

CONTEXT = 2048  # tokens whose cache counts as memory


@dataclass(frozen=True)
class Budget:
    """How far a search goes; without a goal, as far as its method does by itself.

    Searches that remove sublayers one by one stop at a speed-up, a share, parameters, a size or a memory. Of every
    other series, the plan is taken that reaches the goal.

    Attributes:
        share: of all sublayers, at which to stop.
        parameters: share of the model's parameters that may stay at most.
        size: MB that the weights may take at most, in the precision that they are opened in.
        memory: MB that the weights and the cache of 2,048 tokens may take at most.
        sparsity: share of the parameters that must be masked at least.
        loss: the highest score of a plan on the calibration data; the largest cut below it is taken.
        speedup: the decode speed-up at batch 1 to stop at, in the cost model.
        minutes: for which a search may compare. From then on every step takes what seemed best before, which costs one
            measurement: the plan still reaches the goal, and is less good. What it finds then depends on the machine.
        until: true of the removed sublayers as soon as they are enough, for any other goal.
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
        """The share of all sublayers that may go: all where another goal is given, and ``default`` where none is."""
        if self.share is not None:
            return self.share
        goals = (self.speedup, self.parameters, self.size, self.memory, self.loss, self.until)
        return default if all(goal is None for goal in goals) else 1.0

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
        if self.parameters is not None or self.size is not None or self.memory is not None:
            goals.append(lambda gone: self.fits(stack, _without(stack, gone)))
        return (lambda gone: any(goal(gone) for goal in goals)) if goals else None

    def fits(self, stack: Stack, plan: Plan) -> bool:
        """Whether a plan keeps as little of a model as is asked for: parameters, megabytes of weights, or of memory."""
        left = cost(stack, plan)
        weights = left.parameters * next(stack.model.parameters()).element_size()
        memory = weights + CONTEXT * left.kv_bytes_per_token
        return (
            (self.parameters is None or left.parameters <= self.parameters * cost(stack).parameters)
            and (self.size is None or weights <= 1e6 * self.size)
            and (self.memory is None or memory <= 1e6 * self.memory)
        )


def _without(stack: Stack, gone: frozenset[Position]) -> Plan:
    """The plan that leaves out these sublayers."""
    reference = ModelReference.of(stack)
    return Plan(model=reference, drop=reference.sites({stack.stack: gone}))
