"""A pipeline in time: every node serves one microbatch at once, in the order in which they arrive.

    forward on every node of the path  ->  loss at the first one  ->  backward on every node, the other way

A microbatch holds a place of a node's memory from its forward pass there to its backward pass. Where none is free, it
waits, and those behind it do, too; what goes back is let past. A path carries one microbatch at a time: the next one
starts when it has come back. So a node holds no more than its paths, and nobody waits for ever.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lamella.errors import MethodError
from lamella.methods.skippipe.network import BACKWARD, HEAD, Network
from lamella.methods.skippipe.paths import Path

Phase = Literal["forward", "loss", "backward"]
SHARES: dict[Phase, float] = {"forward": 1.0, "loss": HEAD, "backward": BACKWARD}  # of the time of a forward pass


class Stop(NamedTuple):
    """One thing that is to be done for a microbatch.

    Attributes:
        microbatch: its number in the iteration.
        place: in its path.
        phase: what is done there.
    """

    microbatch: int
    place: int
    phase: Phase

    def then(self, length: int) -> Stop | None:
        """What comes next on a path of so many nodes; None where it is done."""
        if self.phase == "loss":
            return Stop(self.microbatch, length - 1, "backward")
        if self.phase == "forward":
            is_last = self.place == length - 1
            return Stop(self.microbatch, 0 if is_last else self.place + 1, "loss" if is_last else "forward")
        return Stop(self.microbatch, self.place - 1, "backward") if self.place else None


@dataclass
class Desk:
    """What waits at a node, in the order in which it came.

    Attributes:
        memory: places that are free.
    """

    memory: int
    _ahead: list[tuple[float, int, Stop]] = field(default_factory=list)
    _back: list[tuple[float, int, Stop]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    def put(self, stop: Stop, when: float) -> None:
        """Something has arrived."""
        heapq.heappush(self._ahead if stop.phase == "forward" else self._back, (when, next(self._count), stop))

    def take(self) -> Stop | None:
        """What is served next, if anything can be; a forward pass takes a place of memory."""
        ahead = bool(self._ahead) and self.memory > 0
        if ahead and (not self._back or self._ahead[0] < self._back[0]):
            self.memory -= 1
            return heapq.heappop(self._ahead)[-1]
        return heapq.heappop(self._back)[-1] if self._back else None

    def free(self) -> None:
        """A backward pass is done."""
        self.memory += 1


class Served(NamedTuple):
    """A stretch of a node's time, in seconds."""

    node: int
    microbatch: int
    phase: Phase
    begin: float
    end: float


def simulate(network: Network, paths: Sequence[Path], microbatches: int | None = None) -> list[Served]:
    """Run an iteration through a pipeline.

    Args:
        network: what links and nodes cost.
        paths: of a wave. Microbatch m takes path m modulo their number, when the one before it there has come back.
        microbatches: of the iteration; one for every path when left out.

    Returns:
        What every node did, in the order of time; the last end is the time of the iteration.

    Raises:
        MethodError: for paths on which microbatches wait for one another for ever, each holding what another needs.
    """
    count = len(paths) if microbatches is None else microbatches
    desks = {node: Desk(int(network.memory[node])) for path in paths for node in path}
    busy = dict.fromkeys(desks, 0.0)
    tick = itertools.count()
    events: list[tuple[float, int, int, Stop, bool]] = []  # when, order, node, what, and whether it is over there
    served: list[Served] = []
    left = count

    def later(when: float, node: int, stop: Stop, over: bool) -> None:
        heapq.heappush(events, (when, next(tick), node, stop, over))

    def serve(node: int, now: float) -> None:
        if busy[node] > now:
            return
        stop = desks[node].take()
        if stop is not None:
            busy[node] = now + SHARES[stop.phase] * float(network.work[node])
            served.append(Served(node, stop.microbatch, stop.phase, now, busy[node]))
            later(busy[node], node, stop, True)

    for number, path in enumerate(paths[:count]):
        later(0.0, path[0], Stop(number, 0, "forward"), False)
    while events:
        now, _, node, stop, over = heapq.heappop(events)
        if not over:
            desks[node].put(stop, now)
            serve(node, now)
            continue
        path = paths[stop.microbatch % len(paths)]
        following = stop.then(len(path))
        if stop.phase == "backward":
            desks[node].free()
        if following is None:
            left -= 1
            again = stop.microbatch + len(paths)
            if again < count:
                later(now, path[0], Stop(again, 0, "forward"), False)
        else:
            there = path[following.place]
            later(now + network.way(node, there), there, following, False)
        serve(node, now)
    if left:
        raise MethodError(f"{left} of {count} microbatches wait for one another: give nodes more memory")
    return served


def iteration(served: Sequence[Served]) -> float:
    """The time of an iteration: when the last backward pass has ended."""
    return max((each.end for each in served), default=0.0)
