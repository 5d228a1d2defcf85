"""A pipeline in time: every node serves one microbatch at once, in the order in which they arrive.

A microbatch holds a place of a node's memory from its forward pass there until its backward pass. Where none is free, it
waits, and others behind it do, too; a node of stage 0 holds no more than its memory of its own, and starts the next when
one has come back.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lamella.errors import MethodError
from lamella.methods.skippipe.network import BACKWARD, HEAD, Network
from lamella.methods.skippipe.paths import Path

Phase = Literal["forward", "loss", "backward"]


class Served(NamedTuple):
    """A stretch of a node's time.

    Attributes:
        node: which.
        microbatch: whose.
        phase: what it did.
        begin, end: seconds.
    """

    node: int
    microbatch: int
    phase: Phase
    begin: float
    end: float


@dataclass
class _Waiting:
    """What stands at a node: microbatches in the order in which they came, with the place in their path and phase."""

    back: list[tuple[float, int, int, Phase]] = field(default_factory=list)  # what frees memory, or needs none
    ahead: list[tuple[float, int, int, Phase]] = field(default_factory=list)


def simulate(network: Network, paths: Sequence[Path], released: Sequence[float] | None = None) -> list[Served]:
    """Run microbatches through a pipeline.

    Args:
        network: what links and nodes cost.
        paths: of the microbatches; those of one node of stage 0 start in their order.
        released: when each may start, in seconds.

    Returns:
        What every node did, in the order of time; the last end is the time of an iteration.

    Raises:
        MethodError: when microbatches wait for each other for ever, each holding what another needs.
    """
    free = {node: int(room) for node, room in enumerate(network.memory)}
    busy: dict[int, float] = defaultdict(float)
    waiting: dict[int, _Waiting] = defaultdict(_Waiting)
    events: list[tuple[float, int, int, int, Phase]] = []  # when, order, microbatch, place, phase: an arrival
    served: list[Served] = []
    for number, path in enumerate(paths):
        heapq.heappush(events, (0.0 if released is None else released[number], number, number, 0, "forward"))
    order, left = len(paths), len(paths)
    wakes: set[tuple[float, int]] = set()

    def arrive(when: float, microbatch: int, place: int, phase: Phase) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (when, order, microbatch, place, phase))

    def serve(node: int, now: float) -> None:
        """Let a node that is free take what stands first and can be taken."""
        nonlocal left
        stands = waiting[node]
        while busy[node] <= now and (stands.back or (stands.ahead and free[node] > 0)):
            takes_back = bool(stands.back) and (
                not stands.ahead or free[node] == 0 or stands.back[0] <= stands.ahead[0]
            )
            _, microbatch, place, phase = heapq.heappop(stands.back if takes_back else stands.ahead)
            path, work = paths[microbatch], float(network.work[node])
            end = now + work * {"forward": 1.0, "loss": HEAD, "backward": BACKWARD}[phase]
            busy[node] = end
            served.append(Served(node, microbatch, phase, now, end))
            if phase == "forward":
                free[node] -= 1
                last = place == len(path) - 1
                there = path[0] if last else path[place + 1]
                arrive(
                    end + _way(network, node, there),
                    microbatch,
                    0 if last else place + 1,
                    "loss" if last else "forward",
                )
            elif phase == "loss":
                arrive(end + _way(network, node, path[-1]), microbatch, len(path) - 1, "backward")
            else:
                free[node] += 1
                if place == 0:
                    left -= 1
                else:
                    arrive(end + _way(network, node, path[place - 1]), microbatch, place - 1, "backward")
            if (end, node) not in wakes:
                wakes.add((end, node))
                heapq.heappush(events, (end, -1, -1, node, "forward"))

    while events:
        now, rank, microbatch, place, phase = heapq.heappop(events)
        if rank == -1:
            serve(place, now)
            continue
        node = paths[microbatch][place]
        stands = waiting[node]
        heapq.heappush(stands.ahead if phase == "forward" else stands.back, (now, microbatch, place, phase))
        serve(node, now)
    if left:
        raise MethodError(f"{left} of {len(paths)} microbatches wait for one another: give nodes more memory")
    return served


def _way(network: Network, here: int, there: int) -> float:
    return 0.0 if here == there else float(network.edge[here, there])


def iteration(served: Sequence[Served]) -> float:
    """The time of an iteration: when the last backward pass has ended."""
    return max((each.end for each in served), default=0.0)
