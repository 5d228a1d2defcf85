"""How far a search must go: a share to remove, or a speed to reach; and how long it may compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lamella.errors import MethodError
from lamella.evaluate.cost import measure_step
from lamella.stack import Position, Stack


@dataclass(frozen=True)
class Budget:
    """How far a search must go; without any of these, as far as its method does by itself.

    Attributes:
        remove: the share of all sublayers at which to stop.
        speedup: the decode speed-up at batch 1 to stop at, in the cost model.
        minutes: for which a search may compare. From then on every step takes what seemed best before, which costs one
            measurement: the plan still reaches the goal, and is less good. What it finds then depends on the machine.
        until: true of the removed sublayers as soon as they are enough, for any other goal.
    """

    remove: float | None = None
    speedup: float | None = None
    minutes: float | None = None
    until: Callable[[frozenset[Position]], bool] | None = None

    def __post_init__(self) -> None:
        if self.remove is not None and not 0 <= self.remove <= 1:
            raise MethodError(f"remove {self.remove}: it is a share, one of the numbers from 0 to 1")
        if self.speedup is not None and self.speedup < 1:
            raise MethodError(f"speedup {self.speedup}: it is a ratio, from 1 on")
        if self.minutes is not None and not self.minutes >= 0:
            raise MethodError(f"minutes {self.minutes}: give the minutes for which a search may compare, from 0 on")

    def share(self, default: float) -> float:
        """The share of all sublayers that may go: all where another goal is given, and ``default`` where none is."""
        if self.remove is not None:
            return self.remove
        return default if self.speedup is None and self.until is None else 1.0

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
        if self.speedup is None:
            return self.until
        times, speedup, until = measure_step(stack), self.speedup, self.until
        return lambda gone: times.speedup_without(gone, len(stack)) >= speedup or bool(until and until(gone))
