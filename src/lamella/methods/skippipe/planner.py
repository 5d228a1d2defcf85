"""Paths for all microbatches of a wave: conflict-based search, within a limit of time.

Every microbatch has its quickest path at first. Of what stands against the paths together one thing is taken away at a
time, by forbidding it to some of them, and they are routed again:

    1  load       a stage is visited more often than it can hold: forbid the stage to as many as are too many
    2  memory     a node is: forbid the node
    3  collision  two are on a node at once: one of them comes later

The search goes on from the plan that would end first, keeps some that fit the load, and returns the one whose pipeline,
run in time with memory that is full and queues, ends first.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from lamella.errors import MethodError
from lamella.methods.skippipe.network import Network
from lamella.methods.skippipe.paths import Assignment, Limits, Path
from lamella.methods.skippipe.route import Routed, Router, Rules, Visit
from lamella.methods.skippipe.simulate import iteration, simulate

Avoids = Literal["nothing", "load", "collisions"]
FITTING, SOLUTIONS = 32, 8  # plans that fit the load, before memory is looked at; and plans without a collision
ENOUGH, LATER = 0.88, 5.0  # of the first plan's time, where the search stops; seconds above the best that are given up
LOADS, NODES = 3, 2  # branches of a conflict


@dataclass(frozen=True)
class Agent:
    """One microbatch of a wave.

    Attributes:
        origin: its node of stage 0.
        released: when it may start, in seconds.
    """

    origin: int
    released: float


@dataclass(frozen=True)
class Limit:
    """How long the search may take.

    Attributes:
        seconds: at most; what has been found by then is returned.
        expansions: plans that are looked at, at most.
    """

    seconds: float = 60.0
    expansions: int = 100_000


@dataclass(frozen=True)
class Planned:
    """What a search has found.

    Attributes:
        paths: of each microbatch of a wave.
        seconds: of an iteration, as the pipeline runs in time.
        bound: that no plan can be under: the slowest of all quickest paths.
        expansions: plans that were looked at.
        stopped: whether the limit ended the search.
        collisions: pairs of stays that overlap in the plan.
    """

    paths: tuple[Path, ...]
    seconds: float
    bound: float
    expansions: int
    stopped: bool
    collisions: int


class _Plan(NamedTuple):
    rules: tuple[Rules, ...]
    routes: tuple[Routed, ...]

    @property
    def end(self) -> float:
        return max(route.end for route in self.routes)


def agents_of(network: Network, assignment: Assignment, each: int) -> list[Agent]:
    """So many microbatches of every node of stage 0, each released when the one before it has been computed there."""
    return [
        Agent(origin, number * float(network.work[origin])) for origin in assignment.stages[0] for number in range(each)
    ]


def plan_paths(
    network: Network,
    assignment: Assignment,
    agents: Sequence[Agent],
    limits: Limits | None = None,
    *,
    avoids: Avoids = "collisions",
    limit: Limit | None = None,
) -> Planned:
    """Paths for the microbatches of a wave.

    Args:
        network: what links and nodes cost.
        assignment: which node is in which stage.
        agents: the microbatches.
        limits: what paths may do.
        avoids: ``collisions`` and what is too much load; the ``load`` alone; or ``nothing``: every quickest path.
        limit: of the search.

    Raises:
        MethodError: when no paths fit, or the limit comes before any were found.
    """
    limits, limit = limits or Limits(), limit or Limit()
    search = _Search(network, assignment, agents, Router(network, assignment, limits), avoids, limit)
    return search.run()


@dataclass
class _Search:
    network: Network
    assignment: Assignment
    agents: Sequence[Agent]
    router: Router
    avoids: Avoids
    limit: Limit

    def __post_init__(self) -> None:
        self.count = itertools.count()
        self.expansions = 0
        self.best: tuple[float, _Plan] | None = None
        self.first: float | None = None
        self.until = time.monotonic() + self.limit.seconds

    def run(self) -> Planned:
        root = self._routed(tuple(Rules() for _ in self.agents))
        if root is None:
            raise MethodError("skippipe: a microbatch has no path at all: allow longer jumps, or shorter paths")
        bound = root.end
        if self.avoids == "nothing":
            self._keep(root)
        else:
            fitting = self._phase([root], self._load, FITTING)
            light = self._phase(fitting, self._memory, FITTING)
            if self.avoids == "load":
                for plan in light:
                    self._keep(plan)
            else:
                self._collisions(light)
        if self.best is None:
            raise MethodError(
                f"skippipe: no paths were found that fit, of {self.expansions} plans that were looked at in "
                f"{self.limit.seconds:g} s: give more time, or nodes more memory"
            )
        seconds, plan = self.best
        paths = tuple(route.path for route in plan.routes)
        overlaps = sum(1 for _ in self._overlaps(plan))
        return Planned(paths, seconds, bound, self.expansions, self._over(), overlaps)

    def _over(self) -> bool:
        return time.monotonic() > self.until or self.expansions >= self.limit.expansions

    def _keep(self, plan: _Plan) -> float:
        """The time of a plan's iteration, and the best one yet remembered."""
        paths = [route.path for route in plan.routes]
        seconds = iteration(simulate(self.network, paths, [agent.released for agent in self.agents]))
        if self.first is None:
            self.first = seconds
        if self.best is None or seconds < self.best[0]:
            self.best = seconds, plan
        return seconds

    def _routed(self, rules: tuple[Rules, ...], known: _Plan | None = None) -> _Plan | None:
        """The plan under these rules; those whose rules are as they were keep their paths."""
        routes = []
        for place, (agent, each) in enumerate(zip(self.agents, rules, strict=True)):
            if known is not None and known.rules[place] is each:
                routes.append(known.routes[place])
                continue
            route = self.router.quickest(agent.origin, agent.released, each)
            if route is None:
                return None
            routes.append(route)
        return _Plan(rules, tuple(routes))

    def _phase(self, plans: Sequence[_Plan], conflict: object, enough: int) -> list[_Plan]:
        """Plans that a conflict is gone from: as many as are enough, or as there is time for."""
        heap = [(plan.end, next(self.count), plan) for plan in plans]
        heapq.heapify(heap)
        found: list[_Plan] = []
        seen: set[object] = set()
        while heap and len(found) < enough and not (self._over() and found):
            _, _, plan = heapq.heappop(heap)
            self.expansions += 1
            branches = conflict(plan)  # type: ignore[operator]
            if branches is None:
                found.append(plan)
                continue
            for rules in branches:
                key = tuple((each.nodes, each.stages) for each in rules)
                if key in seen:
                    continue
                seen.add(key)
                child = self._routed(rules, plan)
                if child is not None:
                    heapq.heappush(heap, (child.end, next(self.count), child))
        return found

    def _load(self, plan: _Plan) -> list[tuple[Rules, ...]] | None:
        """Forbid a stage to those that are too many; None where no stage is visited too often."""
        memory, stage_of = self.network.memory, self.assignment.stage_of
        for stage, nodes in enumerate(self.assignment.stages[1:], start=1):
            visiting = [place for place, each in enumerate(plan.routes) if stage in map(stage_of.get, each.path[1:])]
            surplus = len(visiting) - sum(int(memory[node]) for node in nodes)
            if surplus > 0:
                return self._forbidding(plan, visiting, surplus, LOADS, lambda rules, s=stage: rules.without_stage(s))
        return None

    def _memory(self, plan: _Plan) -> list[tuple[Rules, ...]] | None:
        """Forbid a node to those that are too many; None where no node is visited too often."""
        visits = Counter(node for route in plan.routes for node in route.path[1:])
        for node, asked in sorted(visits.items()):
            surplus = asked - int(self.network.memory[node])
            if surplus > 0:
                visiting = [place for place, each in enumerate(plan.routes) if node in each.path[1:]]
                return self._forbidding(plan, visiting, surplus, NODES, lambda rules, n=node: rules.without(n))
        return self._load(plan)

    def _forbidding(
        self, plan: _Plan, visiting: list[int], surplus: int, branches: int, forbid: object
    ) -> list[tuple[Rules, ...]]:
        """A thing forbidden to so many of its visitors, the slowest first, in a few ways."""
        slowest = sorted(visiting, key=lambda place: -plan.routes[place].end)
        ways = []
        for chosen in itertools.islice(itertools.combinations(slowest, surplus), branches):
            ways.append(
                tuple(
                    forbid(rules) if place in chosen else rules  # type: ignore[operator]
                    for place, rules in enumerate(plan.rules)
                )
            )
        return ways

    def _overlaps(self, plan: _Plan) -> Iterator[tuple[int, Visit, int, Visit]]:
        """Pairs of stays on one node at once, but for two on their way back; those of the slowest first."""
        order = sorted(range(len(plan.routes)), key=lambda place: -plan.routes[place].end)
        for place, other in itertools.combinations(order, 2):
            for one in plan.routes[place].visits:
                for two in plan.routes[other].visits:
                    apart = one.node != two.node or (one.back and two.back)
                    if not apart and one.begin < two.end and two.begin < one.end:
                        yield place, one, other, two

    def _collisions(self, plans: Sequence[_Plan]) -> None:
        """Let one of two that meet come later, until none meet or it takes too long."""
        heap = []
        for plan in plans:
            heapq.heappush(heap, (self._keep(plan), next(self.count), plan))
        solutions = 0
        while heap and solutions < SOLUTIONS and not self._over():
            assert self.best is not None and self.first is not None
            if self.best[0] < ENOUGH * self.first:
                break
            _, _, plan = heapq.heappop(heap)
            self.expansions += 1
            meeting = next(self._overlaps(plan), None)
            if meeting is None:
                solutions += 1
                continue
            for late, until in self._later(*meeting):
                place, visit = late
                rules = list(plan.rules)
                rules[place] = rules[place].not_during(visit.node, until)
                child = self._routed(tuple(rules), plan)
                if child is None:
                    continue
                seconds = self._keep(child)
                if seconds <= self.best[0] + LATER:
                    heapq.heappush(heap, (seconds, next(self.count), child))

    @staticmethod
    def _later(place: int, one: Visit, other: int, two: Visit) -> list[tuple[tuple[int, Visit], tuple[float, float]]]:
        """Who may come later, and when it is not to be there: either, or, where one is on its way back, the later."""
        first = ((place, one), (two.begin, two.end))
        second = ((other, two), (one.begin, one.end))
        if one.back or two.back:
            return [first if one.begin >= two.begin else second]
        return [first, second]


def full(network: Network, assignment: Assignment) -> list[Path]:
    """The paths of the full pipeline: chains through all stages, as many as the smallest stage has nodes."""
    chains = min(map(len, assignment.stages))
    return [tuple(stage[chain] for stage in assignment.stages) for chain in range(chains)]


def unweighted(network: Network) -> Network:
    """The same network in which everything costs alike: paths through it are skips by chance."""
    return replace(network, edge=(network.edge > 0).astype(float), work=network.work * 0 + 1)
