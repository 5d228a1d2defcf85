"""How far a search must go: a share to remove, or a speed to reach."""

from __future__ import annotations

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
        until: true of the removed sublayers as soon as they are enough, for any other goal.
    """

    remove: float | None = None
    speedup: float | None = None
    until: Callable[[frozenset[Position]], bool] | None = None

    def __post_init__(self) -> None:
        if self.remove is not None and not 0 <= self.remove <= 1:
            raise MethodError(f"remove={self.remove}: it is a share, one of the numbers from 0 to 1")
        if self.speedup is not None and self.speedup < 1:
            raise MethodError(f"speedup={self.speedup}: it is a ratio, from 1 on")

    def share(self, default: float) -> float:
        """The share of all sublayers that may go: all where another goal is given, and ``default`` where none is."""
        if self.remove is not None:
            return self.remove
        return default if self.speedup is None and self.until is None else 1.0

    def enough(self, stack: Stack) -> Callable[[frozenset[Position]], bool] | None:
        """What says of the removed sublayers whether they are enough, if there is such a goal.

        A speed-up is that of the cost model, for which the time of a decoding step is measured once.
        """
        if self.speedup is None:
            return self.until
        times, speedup, until = measure_step(stack), self.speedup, self.until
        return lambda gone: times.speedup_without(gone, len(stack)) >= speedup or bool(until and until(gone))
