"""The paths that microbatches may take: which stages in which order, and which nodes.

    1  a path starts at its own node of stage 0 and visits ``length`` different stages
    2  with the frontier the highest stage so far, a visit to an earlier stage is a swap: back by one stage at most,
       twice at most, and by two stages in total
    3  a step goes at most four stages beyond the frontier
    4  in a wave, all stages but 0 are visited equally often, up to the |stage| * memory microbatches that each can hold
    5  in a wave, a node is visited at most ``memory`` times
    6  two microbatches are not on a node at the same time, unless both are on their way back

The first five are checked here. The last depends on time; the planner avoids it where possible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from lamella.errors import MethodError
from lamella.methods.skippipe.network import BACKWARD, HEAD, PipelineNetwork

Path = tuple[int, ...]  # nodes, in the order of the forward pass


@dataclass(frozen=True)
class Limits:
    """The constraints on paths.

    Attributes:
        length: stages per path, including the origin's.
        distance: maximum number of stages that a swap goes back.
        swaps: maximum number of swaps per path.
        total: maximum number of stages that all swaps of a path go back together.
        jump: maximum number of stages beyond the frontier.
    """

    length: int = 4
    distance: int = 1
    swaps: int = 2
    total: int = 2
    jump: int = 4

    def orders(self, stages: int) -> list[tuple[int, ...]]:
        """Return all orders of stages that a path may have.

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
    """The nodes of each stage.

    Attributes:
        stages: the nodes of each stage, in the order of the pipeline; microbatches originate at those of stage 0.
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
        """The stage of each node."""
        return {node: stage for stage, nodes in enumerate(self.stages) for node in nodes}


def seconds(network: PipelineNetwork, path: Path) -> float:
    """Return the time of a path alone: forward, back to its origin for the loss, and backward along the path.

    Args:
        network: the costs of nodes and links.
        path: the nodes of the path.
    """
    hops = [*pairwise(path), (path[-1], path[0])]
    back = [(v, u) for u, v in hops]
    work = sum(float(network.work[node]) for node in path)
    return (
        sum(network.message_seconds(u, v) for u, v in hops + back)
        + (1 + BACKWARD) * work
        + HEAD * float(network.work[path[0]])
    )


def capacities(network: PipelineNetwork, assignment: Assignment, microbatches: int, length: int) -> list[int]:
    """Return how often each stage may be visited in a wave: as equally as the memory of the nodes allows.

    Args:
        network: the costs of nodes and links.
        assignment: the nodes of each stage.
        microbatches: microbatches per wave.
        length: stages per path.

    Raises:
        MethodError: if the memory of all stages together is too small.
    """
    memory = network.memory
    most = [min(sum(int(memory[node]) for node in stage), microbatches) for stage in assignment.stages[1:]]
    needed = microbatches * (length - 1)
    if sum(most) < needed:
        raise MethodError(
            f"{microbatches} microbatches in flight need {needed} visits, but the stages have memory for {sum(most)}: "
            "give nodes more memory, add nodes to the stages after the first, or skip more"
        )
    equal = next(each for each in range(microbatches + 1) if sum(min(capacity, each) for capacity in most) >= needed)
    return [microbatches, *(min(capacity, equal) for capacity in most)]


def check(network: PipelineNetwork, assignment: Assignment, paths: Sequence[Path], limits: Limits) -> None:
    """Check the constraints on the paths of one wave, except for collisions.

    Args:
        network: the costs of nodes and links.
        assignment: the nodes of each stage.
        paths: the path of each microbatch.
        limits: the constraints.

    Raises:
        MethodError: for the first violated constraint.
    """
    allowed = set(limits.orders(len(assignment)))
    stage_of, memory = assignment.stage_of, network.memory
    for number, path in enumerate(paths):
        order = tuple(stage_of.get(node, -1) for node in path)
        if order not in allowed:
            raise MethodError(f"path {number} visits the stages {', '.join(map(str, order))}, which is not allowed")
    visits = Counter(node for path in paths for node in path)
    for stage, capacity in enumerate(capacities(network, assignment, len(paths), limits.length)):
        count = sum(visits[node] for node in assignment.stages[stage])
        if count > capacity:
            raise MethodError(f"stage {stage} is visited {count} times in a wave and has memory for {capacity}")
    for node, count in visits.items():
        if count > memory[node]:
            raise MethodError(f"node {node} is visited {count} times in a wave and has memory for {int(memory[node])}")
