"""Discrete-event simulation of a pipeline: every node processes one microbatch at a time, in order of arrival.

    forward on every node of the path  ->  loss at the origin  ->  backward on every node, in reverse order

A microbatch occupies one unit of a node's memory from its forward pass there to its backward pass. If none is free, it
waits, and so do the forward passes behind it; backward passes overtake them. A path carries one microbatch at a time:
the next one starts when the previous one has come back, so a node never holds more microbatches than it has paths.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lamella.errors import MethodError
from lamella.methods.skippipe.network import BACKWARD, HEAD, PipelineNetwork
from lamella.methods.skippipe.paths import Path

Phase = Literal["forward", "loss", "backward"]
PHASE_COSTS: dict[Phase, float] = {"forward": 1.0, "loss": HEAD, "backward": BACKWARD}  # relative to a forward pass


class Stop(NamedTuple):
    """One step in the processing of a microbatch.

    Attributes:
        microbatch: the index of the microbatch in the iteration.
        position: the position in its path.
        phase: forward, loss or backward.
    """

    microbatch: int
    position: int
    phase: Phase

    def next_stop(self, length: int) -> Stop | None:
        """Return the next stop on a path of `length` nodes, or None at the end."""
        if self.phase == "loss":
            return Stop(self.microbatch, length - 1, "backward")
        if self.phase == "forward":
            is_last = self.position == length - 1
            return Stop(self.microbatch, 0 if is_last else self.position + 1, "loss" if is_last else "forward")
        return Stop(self.microbatch, self.position - 1, "backward") if self.position else None


@dataclass
class NodeQueue:
    """The queue of a node, in order of arrival.

    Attributes:
        memory: free units of memory.
    """

    memory: int
    _forward: list[tuple[float, int, Stop]] = field(default_factory=list)
    _backward: list[tuple[float, int, Stop]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    def put(self, stop: Stop, when: float) -> None:
        """Add a stop that has arrived at time `when`.

        Args:
            stop: the stop.
            when: the time of its arrival.
        """
        heapq.heappush(self._forward if stop.phase == "forward" else self._backward, (when, next(self._count), stop))

    def take(self) -> Stop | None:
        """Return the next stop to process, if any; a forward pass occupies one unit of memory."""
        can_go_forward = bool(self._forward) and self.memory > 0
        if can_go_forward and (not self._backward or self._forward[0] < self._backward[0]):
            self.memory -= 1
            return heapq.heappop(self._forward)[-1]
        return heapq.heappop(self._backward)[-1] if self._backward else None

    def free(self) -> None:
        """Release one unit of memory after a backward pass."""
        self.memory += 1


class BusyInterval(NamedTuple):
    """An interval in which a node is busy, in seconds."""

    node: int
    microbatch: int
    phase: Phase
    begin: float
    end: float


def simulate(network: PipelineNetwork, paths: Sequence[Path], microbatches: int | None = None) -> list[BusyInterval]:
    """Simulate an iteration of a pipeline.

    Args:
        network: the costs of nodes and links.
        paths: the paths of a wave. Microbatch m takes path m modulo their number, after its predecessor has come back.
        microbatches: microbatches per iteration; one per path if None.

    Returns:
        The busy intervals of all nodes in temporal order; the last end is the time of the iteration.

    Raises:
        MethodError: if microbatches deadlock, each holding the memory that another needs.
    """
    count = len(paths) if microbatches is None else microbatches
    queues = {node: NodeQueue(int(network.memory[node])) for path in paths for node in path}
    busy = dict.fromkeys(queues, 0.0)
    tick = itertools.count()
    events: list[tuple[float, int, int, Stop, bool]] = []  # time, order, node, stop, and whether it is finished there
    timeline: list[BusyInterval] = []
    remaining = count

    def schedule_event(when: float, node: int, stop: Stop, finished: bool) -> None:
        heapq.heappush(events, (when, next(tick), node, stop, finished))

    def serve(node: int, now: float) -> None:
        if busy[node] > now:
            return
        stop = queues[node].take()
        if stop is not None:
            busy[node] = now + PHASE_COSTS[stop.phase] * float(network.work[node])
            timeline.append(BusyInterval(node, stop.microbatch, stop.phase, now, busy[node]))
            schedule_event(busy[node], node, stop, True)

    for number, path in enumerate(paths[:count]):
        schedule_event(0.0, path[0], Stop(number, 0, "forward"), False)
    while events:
        now, _, node, stop, finished = heapq.heappop(events)
        if not finished:
            queues[node].put(stop, now)
            serve(node, now)
            continue
        path = paths[stop.microbatch % len(paths)]
        following = stop.next_stop(len(path))
        if stop.phase == "backward":
            queues[node].free()
        if following is None:
            remaining -= 1
            successor = stop.microbatch + len(paths)
            if successor < count:
                schedule_event(now, path[0], Stop(successor, 0, "forward"), False)
        else:
            there = path[following.position]
            schedule_event(now + network.message_seconds(node, there), there, following, False)
        serve(node, now)
    if remaining:
        raise MethodError(f"{remaining} of {count} microbatches wait for one another: give nodes more memory")
    return timeline


def iteration(timeline: Sequence[BusyInterval]) -> float:
    """Return the time of an iteration: the end of the last backward pass."""
    return max((each.end for each in timeline), default=0.0)
