"""The quickest path of one microbatch, given where it may not be and when: best first, over partial paths."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lamella.methods.skippipe.network import BACKWARD, HEAD, Network
from lamella.methods.skippipe.paths import Assignment, Limits, Path

Interval = tuple[float, float]
LOOKS = 50_000  # partial paths that are looked at for one microbatch


class Visit(NamedTuple):
    """A stay on a node: from when to when, and whether on the way back."""

    node: int
    begin: float
    end: float
    back: bool


@dataclass(frozen=True)
class Rules:
    """What one microbatch may not do.

    Attributes:
        nodes, stages: that it does not visit.
        closed: of nodes, the times at which it is not there.
    """

    nodes: frozenset[int] = frozenset()
    stages: frozenset[int] = frozenset()
    closed: Mapping[int, tuple[Interval, ...]] = field(default_factory=dict)

    def without(self, node: int) -> Rules:
        return Rules(self.nodes | {node}, self.stages, self.closed)

    def without_stage(self, stage: int) -> Rules:
        return Rules(self.nodes, self.stages | {stage}, self.closed)

    def not_during(self, node: int, interval: Interval) -> Rules:
        closed = dict(self.closed)
        closed[node] = tuple(sorted((*closed.get(node, ()), interval)))
        return Rules(self.nodes, self.stages, closed)

    def opens(self, node: int, when: float, length: float) -> float:
        """The first time from ``when`` on at which so long a stay on a node is allowed."""
        for begin, end in self.closed.get(node, ()):
            if when < end and when + length > begin:
                when = end
        return when


class Routed(NamedTuple):
    """A path, and its stays in time; the last end is when it is done."""

    path: Path
    visits: tuple[Visit, ...]

    @property
    def end(self) -> float:
        return self.visits[-1].end


@dataclass(frozen=True)
class Router:
    """Routes over one assignment.

    Attributes:
        network: what links and nodes cost.
        assignment: which node is in which stage.
        limits: what paths may do.
    """

    network: Network
    assignment: Assignment
    limits: Limits

    @cached_property
    def orders(self) -> list[tuple[int, ...]]:
        """Of stages, that a path may have."""
        return self.limits.orders(len(self.assignment))

    @cached_property
    def _next(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The stages that may follow a beginning of an order."""
        found: dict[tuple[int, ...], set[int]] = {}
        for order in self.orders:
            for place in range(1, len(order)):
                found.setdefault(order[:place], set()).add(order[place])
        return {beginning: tuple(sorted(each)) for beginning, each in found.items()}

    @cached_property
    def _least(self) -> float:
        """The least that one more stage can cost, there and back."""
        edge = self.network.edge
        away = edge[~np.eye(len(edge), dtype=bool)]
        return 2 * float(away.min(initial=np.inf if len(away) else 0.0)) + (1 + BACKWARD) * float(
            self.network.work.min()
        )

    def leaves_any(self, rules: Rules) -> bool:
        """Whether rules leave any path at all; times do not matter, since what is closed can be waited for."""
        stages = self.assignment.stages
        open_ = {stage for stage, nodes in enumerate(stages) if not rules.nodes.issuperset(nodes)} - rules.stages
        return any(open_.issuperset(order) for order in self.orders)

    def quickest(self, origin: int, released: float, rules: Rules) -> Routed | None:
        """The path that is done first; None where the rules leave none, or none is found among many thousands."""
        work = self.network.work
        begin = rules.opens(origin, released, float(work[origin]))
        first = Visit(origin, begin, begin + float(work[origin]), False)
        heap: list[tuple[float, int, tuple[int, ...], tuple[Visit, ...]]] = [(0.0, 0, (0,), (first,))]
        count = itertools.count(1)
        reached: dict[tuple[tuple[int, ...], int], float] = {}  # the least bound with which a node was reached so
        for _ in range(LOOKS):
            if not heap:
                return None
            _, _, order, visits = heapq.heappop(heap)
            if len(visits) > len(order):
                return Routed(tuple(visit.node for visit in visits[: len(order)]), visits)
            if len(order) == self.limits.length:
                home = self._home(visits, rules)
                heapq.heappush(heap, (home[-1].end, next(count), order, home))
                continue
            for stage in self._next.get(order, ()):
                for node in () if stage in rules.stages else self.assignment.stages[stage]:
                    if node in rules.nodes:
                        continue
                    length = float(work[node])
                    start = rules.opens(node, visits[-1].end + self.network.way(visits[-1].node, node), length)
                    path = (*visits, Visit(node, start, start + length, False))
                    bound = self._bound(path)
                    state = ((*order, stage), node)
                    if not rules.closed:  # then what is behind a node is worth the same however it was reached
                        if bound >= reached.get(state, math.inf):
                            continue
                        reached[state] = bound
                    heapq.heappush(heap, (bound, next(count), state[0], path))
        return None

    def along(self, path: Path, released: float) -> Routed:
        """The stays of a path that is given, where nothing is forbidden."""
        visits: list[Visit] = []
        for node in path:
            begin = visits[-1].end + self.network.way(visits[-1].node, node) if visits else released
            visits.append(Visit(node, begin, begin + float(self.network.work[node]), False))
        return Routed(path, self._home(tuple(visits), Rules()))

    def _bound(self, visits: Sequence[Visit]) -> float:
        """When a path that begins so is done at the earliest: without its way home, where the nearest stages follow."""
        nodes = [visit.node for visit in visits]
        back = sum(self.network.way(u, v) for u, v in zip(nodes[1:], nodes, strict=False))
        work = BACKWARD * sum(float(self.network.work[node]) for node in nodes)
        left = self.limits.length - len(visits)
        home = 0.0 if left else self.network.way(nodes[-1], nodes[0]) + self.network.way(nodes[0], nodes[-1])
        return visits[-1].end + home + HEAD * float(self.network.work[nodes[0]]) + back + work + left * self._least

    def _home(self, visits: tuple[Visit, ...], rules: Rules) -> tuple[Visit, ...]:
        """All stays of a path: home for the loss, and back the way that it came."""
        nodes = [visit.node for visit in visits]
        stays = list(visits)
        here = nodes[-1]
        for node, share in [(nodes[0], HEAD), *((node, BACKWARD) for node in reversed(nodes))]:
            length = share * float(self.network.work[node])
            begin = rules.opens(node, stays[-1].end + self.network.way(here, node), length)
            stays.append(Visit(node, begin, begin + length, True))
            here = node
        return tuple(stays)
