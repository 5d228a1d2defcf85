"""The quickest path of one microbatch, given where it may not be and when: best first, over partial paths."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from lamella.methods.skippipe.network import BACKWARD, HEAD, Network
from lamella.methods.skippipe.paths import Assignment, Limits, Path

Interval = tuple[float, float]


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
    def _next(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The stages that may follow a beginning of an order."""
        found: dict[tuple[int, ...], set[int]] = {}
        for order in self.limits.orders(len(self.assignment)):
            for place in range(1, len(order)):
                found.setdefault(order[:place], set()).add(order[place])
        return {beginning: tuple(sorted(each)) for beginning, each in found.items()}

    @cached_property
    def _least(self) -> float:
        """The least that one more stage can cost, there and back."""
        edge, work = self.network.edge, self.network.work
        away = [float(edge[u, v]) for u in range(len(edge)) for v in range(len(edge)) if u != v]
        return 2 * min(away, default=0.0) + (1 + BACKWARD) * float(work.min())

    def quickest(self, origin: int, released: float, rules: Rules) -> Routed | None:
        """The path that is done first; None where the rules leave none."""
        edge, work = self.network.edge, self.network.work
        begin = rules.opens(origin, released, float(work[origin]))
        first = Visit(origin, begin, begin + float(work[origin]), False)
        heap: list[tuple[float, int, tuple[int, ...], tuple[Visit, ...]]] = [(0.0, 0, (0,), (first,))]
        count, best = 0, None
        while heap:
            bound, _, order, visits = heapq.heappop(heap)
            if best is not None and bound >= best.end:
                break
            if len(order) == self.limits.length:
                done = self._home(visits, rules)
                best = done if best is None or done.end < best.end else best
                continue
            here = visits[-1]
            for stage in self._next.get(order, ()):
                if stage in rules.stages:
                    continue
                for node in self.assignment.stages[stage]:
                    if node in rules.nodes:
                        continue
                    length = float(work[node])
                    start = rules.opens(node, here.end + float(edge[here.node, node]), length)
                    path = (*visits, Visit(node, start, start + length, False))
                    count += 1
                    left = self.limits.length - len(path)
                    heapq.heappush(heap, (self._done(path) + left * self._least, count, (*order, stage), path))
        return best

    def _done(self, visits: Sequence[Visit]) -> float:
        """When a path that turns back here is done, at the earliest."""
        edge, work = self.network.edge, self.network.work
        nodes = [visit.node for visit in visits]
        hops = zip(nodes[1:], nodes, strict=False)
        back = sum(float(edge[u, v]) for u, v in hops) + BACKWARD * sum(float(work[node]) for node in nodes)
        home = 0.0 if len(nodes) == 1 else float(edge[nodes[-1], nodes[0]]) * 2
        return visits[-1].end + home + HEAD * float(work[nodes[0]]) + back

    def _home(self, visits: tuple[Visit, ...], rules: Rules) -> Routed:
        """The whole of a path: home for the loss, and back the way that it came."""
        edge, work = self.network.edge, self.network.work
        nodes = [visit.node for visit in visits]
        origin, last = nodes[0], nodes[-1]
        there = 0.0 if last == origin else float(edge[last, origin])
        begin = rules.opens(origin, visits[-1].end + there, HEAD * float(work[origin]))
        stays = [*visits, Visit(origin, begin, begin + HEAD * float(work[origin]), True)]
        when = stays[-1].end + there
        for place in range(len(nodes) - 1, -1, -1):
            length = BACKWARD * float(work[nodes[place]])
            begin = rules.opens(nodes[place], when, length)
            stays.append(Visit(nodes[place], begin, begin + length, True))
            if place:
                when = begin + length + float(edge[nodes[place], nodes[place - 1]])
        return Routed(tuple(nodes), tuple(stays))
