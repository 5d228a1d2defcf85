"""The paths that microbatches may take: which stages in which order, and which nodes.

1  a path starts at its own node of stage 0 and visits ``length`` different stages
2  with the frontier the highest stage so far, a visit to an earlier stage is a swap: of one stage at most, twice
   at most, and of two stages in all
3  a step is at most four stages beyond the frontier
4  in a wave, all stages but 0 are visited equally often, as far as each has room for |stage| * memory microbatches
5  in a wave, a node is visited at most ``memory`` times
6  two microbatches are not on a node at once, unless both are on their way back

The first five are checked here. The last needs time: the planner avoids it where it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from lamella.errors import MethodError
from lamella.methods.skippipe.network import BACKWARD, HEAD, Network

Path = tuple[int, ...]  # nodes, in the order of the forward pass


@dataclass(frozen=True)
class Limits:
    """What paths may do.

    Attributes:
        length: stages of a path, its own one included.
        distance: how many stages a swap may go back.
        swaps: how many swaps a path may have, and ``total`` how many stages back they may go together.
        jump: how many stages beyond the frontier a step may go.
    """

    length: int = 4
    distance: int = 1
    swaps: int = 2
    total: int = 2
    jump: int = 4

    def orders(self, stages: int) -> list[tuple[int, ...]]:
        """All orders of stages that a path may have.

        >>> Limits(length=2).orders(3)
        [(0, 1), (0, 2)]
        >>> Limits(length=3).orders(3)
        [(0, 1, 2), (0, 2, 1)]
        """
        if not 1 <= self.length <= stages:
            raise MethodError(f"paths of {self.length} stages: there are {stages}")
        return list(self._from((0,), 0, 0, 0, stages))

    def _from(
        self, order: tuple[int, ...], frontier: int, swaps: int, back: int, stages: int
    ) -> Iterator[tuple[int, ...]]:
        if len(order) == self.length:
            yield order
            return
        for stage in range(1, stages):
            if stage in order or stage - frontier > self.jump:
                continue
            gap = max(frontier - stage, 0)
            if gap and (gap > self.distance or swaps == self.swaps or back + gap > self.total):
                continue
            yield from self._from((*order, stage), max(frontier, stage), swaps + (gap > 0), back + gap, stages)


@dataclass(frozen=True)
class Assignment:
    """Which nodes make up which stage.

    Attributes:
        stages: the nodes of each, in the order of the pipeline; those of stage 0 are where microbatches come from.
    """

    stages: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        nodes = [node for stage in self.stages for node in stage]
        if not all(self.stages) or len(set(nodes)) != len(nodes):
            raise MethodError("every stage has a node, and no node is in two stages")

    def __len__(self) -> int:
        return len(self.stages)

    @cached_property
    def stage_of(self) -> dict[int, int]:
        return {node: stage for stage, nodes in enumerate(self.stages) for node in nodes}


def seconds(network: Network, path: Path) -> float:
    """What a path takes by itself: forward, home to its first node, the loss there, and back the same way."""
    hops = [*pairwise(path), (path[-1], path[0])]
    back = [(v, u) for u, v in hops]
    work = sum(float(network.work[node]) for node in path)
    return sum(network.way(u, v) for u, v in hops + back) + (1 + BACKWARD) * work + HEAD * float(network.work[path[0]])


def rooms(network: Network, assignment: Assignment, microbatches: int, length: int) -> list[int]:
    """How often each stage may be visited in a wave: as equally as the memory of their nodes allows.

    Args:
        microbatches: of a wave.
        length: stages of a path.

    Raises:
        MethodError: where all stages together have too little room.
    """
    memory = network.memory
    most = [min(sum(int(memory[node]) for node in stage), microbatches) for stage in assignment.stages[1:]]
    wanted = microbatches * (length - 1)
    if sum(most) < wanted:
        raise MethodError(
            f"{microbatches} microbatches in flight visit {wanted} times stages that have room for {sum(most)}: give "
            "nodes more memory, more nodes to the stages behind the first, or skip more"
        )
    share = next(each for each in range(microbatches + 1) if sum(min(room, each) for room in most) >= wanted)
    return [microbatches, *(min(room, share) for room in most)]


def check(network: Network, assignment: Assignment, paths: Sequence[Path], limits: Limits) -> None:
    """Check what must hold of the paths of one wave, but for collisions.

    Raises:
        MethodError: for the first thing that does not hold.
    """
    allowed = set(limits.orders(len(assignment)))
    stage_of, memory = assignment.stage_of, network.memory
    for number, path in enumerate(paths):
        order = tuple(stage_of.get(node, -1) for node in path)
        if order not in allowed:
            raise MethodError(f"path {number} visits the stages {', '.join(map(str, order))}, which it may not")
    visits = Counter(node for path in paths for node in path)
    for stage, room in enumerate(rooms(network, assignment, len(paths), limits.length)):
        asked = sum(visits[node] for node in assignment.stages[stage])
        if asked > room:
            raise MethodError(f"stage {stage} is visited {asked} times in a wave and has room for {room}")
    for node, asked in visits.items():
        if asked > memory[node]:
            raise MethodError(f"node {node} is visited {asked} times in a wave and has room for {int(memory[node])}")
