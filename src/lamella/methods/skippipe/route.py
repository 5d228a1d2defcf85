"""The quickest path of one microbatch under constraints on nodes and times: best-first search over partial paths."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lamella.methods.skippipe.network import BACKWARD, HEAD, PipelineNetwork
from lamella.methods.skippipe.paths import Assignment, Limits, Path

Interval = tuple[float, float]
MAX_EXPANSIONS = 50_000  # partial paths per search


class Visit(NamedTuple):
    """A visit of a node: begin and end in seconds, and whether it is on the way back."""

    node: int
    begin: float
    end: float
    back: bool


@dataclass(frozen=True)
class RouteRules:
    """Constraints on one microbatch.

    Attributes:
        nodes: nodes that it must not visit.
        stages: stages that it must not visit.
        closed: for nodes, the intervals in which it must not be there.
    """

    nodes: frozenset[int] = frozenset()
    stages: frozenset[int] = frozenset()
    closed: Mapping[int, tuple[Interval, ...]] = field(default_factory=dict)

    def without_node(self, node: int) -> RouteRules:
        """Return the rules with one more forbidden node."""
        return RouteRules(self.nodes | {node}, self.stages, self.closed)

    def without_stage(self, stage: int) -> RouteRules:
        """Return the rules with one more forbidden stage."""
        return RouteRules(self.nodes, self.stages | {stage}, self.closed)

    def not_during(self, node: int, interval: Interval) -> RouteRules:
        """Return the rules with one more forbidden interval of a node.

        Args:
            node: the node.
            interval: begin and end in seconds.
        """
        closed = dict(self.closed)
        closed[node] = tuple(sorted((*closed.get(node, ()), interval)))
        return RouteRules(self.nodes, self.stages, closed)

    def first_free(self, node: int, when: float, length: float) -> float:
        """Return the first time from `when` on at which a visit of the given length is allowed.

        Args:
            node: the node.
            when: the earliest time in seconds.
            length: the length of the visit in seconds.
        """
        for begin, end in self.closed.get(node, ()):
            if when < end and when + length > begin:
                when = end
        return when


class TimedRoute(NamedTuple):
    """A path with its visits; it is complete at the end of the last one."""

    path: Path
    visits: tuple[Visit, ...]

    @property
    def end(self) -> float:
        """The time at which the last visit ends."""
        return self.visits[-1].end


@dataclass(frozen=True)
class Router:
    """Finds routes for one assignment.

    Attributes:
        network: the costs of nodes and links.
        assignment: the nodes of each stage.
        limits: the constraints on paths.
    """

    network: PipelineNetwork
    assignment: Assignment
    limits: Limits

    @cached_property
    def orders(self) -> list[tuple[int, ...]]:
        """The orders of stages that a path may have."""
        return self.limits.orders(len(self.assignment))

    @cached_property
    def _next(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The stages that may follow each prefix of an order."""
        found: dict[tuple[int, ...], set[int]] = {}
        for order in self.orders:
            for position in range(1, len(order)):
                found.setdefault(order[:position], set()).add(order[position])
        return {beginning: tuple(sorted(each)) for beginning, each in found.items()}

    @cached_property
    def _least(self) -> float:
        """The minimum cost of one more stage, forward and backward."""
        edge = self.network.edge
        links = edge[~np.eye(len(edge), dtype=bool)]
        return 2 * float(links.min(initial=np.inf if len(links) else 0.0)) + (1 + BACKWARD) * float(
            self.network.work.min()
        )

    def allow_any(self, rules: RouteRules) -> bool:
        """Return whether any path satisfies the rules; intervals are ignored, since a microbatch can wait."""
        stages = self.assignment.stages
        allowed = {stage for stage, nodes in enumerate(stages) if not rules.nodes.issuperset(nodes)} - rules.stages
        return any(allowed.issuperset(order) for order in self.orders)

    def quickest(self, origin: int, released: float, rules: RouteRules) -> TimedRoute | None:
        """Return the path that completes first; None if the rules allow none, or the search exceeds its limit.

        Args:
            origin: the node of stage 0.
            released: the earliest start in seconds.
            rules: the constraints on the microbatch.
        """
        work = self.network.work
        begin = rules.first_free(origin, released, float(work[origin]))
        first = Visit(origin, begin, begin + float(work[origin]), False)
        heap: list[tuple[float, int, tuple[int, ...], tuple[Visit, ...]]] = [(0.0, 0, (0,), (first,))]
        count = itertools.count(1)
        reached: dict[tuple[tuple[int, ...], int], float] = {}  # the smallest bound per order and node
        for _ in range(MAX_EXPANSIONS):
            if not heap:
                return None
            _, _, order, visits = heapq.heappop(heap)
            if len(visits) > len(order):
                return TimedRoute(tuple(visit.node for visit in visits[: len(order)]), visits)
            if len(order) == self.limits.length:
                home = self._home(visits, rules)
                heapq.heappush(heap, (home[-1].end, next(count), order, home))
                continue
            for stage in self._next.get(order, ()):
                for node in () if stage in rules.stages else self.assignment.stages[stage]:
                    if node in rules.nodes:
                        continue
                    length = float(work[node])
                    start = rules.first_free(
                        node, visits[-1].end + self.network.message_seconds(visits[-1].node, node), length
                    )
                    path = (*visits, Visit(node, start, start + length, False))
                    bound = self._bound(path)
                    state = ((*order, stage), node)
                    if not rules.closed:  # then the rest is independent of the prefix
                        if bound >= reached.get(state, math.inf):
                            continue
                        reached[state] = bound
                    heapq.heappush(heap, (bound, next(count), state[0], path))
        return None

    def along(self, path: Path, released: float) -> TimedRoute:
        """Return the visits of a given path without constraints.

        Args:
            path: the nodes of the path.
            released: the start in seconds.
        """
        visits: list[Visit] = []
        for node in path:
            begin = visits[-1].end + self.network.message_seconds(visits[-1].node, node) if visits else released
            visits.append(Visit(node, begin, begin + float(self.network.work[node]), False))
        return TimedRoute(path, self._home(tuple(visits), RouteRules()))

    def _bound(self, visits: Sequence[Visit]) -> float:
        """Return the earliest end of a path with this prefix, assuming the cheapest remaining stages."""
        nodes = [visit.node for visit in visits]
        back = sum(self.network.message_seconds(u, v) for u, v in zip(nodes[1:], nodes, strict=False))
        work = BACKWARD * sum(float(self.network.work[node]) for node in nodes)
        left = self.limits.length - len(visits)
        home = (
            0.0
            if left
            else self.network.message_seconds(nodes[-1], nodes[0]) + self.network.message_seconds(nodes[0], nodes[-1])
        )
        return visits[-1].end + home + HEAD * float(self.network.work[nodes[0]]) + back + work + left * self._least

    def _home(self, visits: tuple[Visit, ...], rules: RouteRules) -> tuple[Visit, ...]:
        """Return all visits of a path: back to the origin for the loss, and backward along the path."""
        nodes = [visit.node for visit in visits]
        stays = list(visits)
        current = nodes[-1]
        for node, factor in [(nodes[0], HEAD), *((node, BACKWARD) for node in reversed(nodes))]:
            length = factor * float(self.network.work[node])
            begin = rules.first_free(node, stays[-1].end + self.network.message_seconds(current, node), length)
            stays.append(Visit(node, begin, begin + length, True))
            current = node
        return tuple(stays)
