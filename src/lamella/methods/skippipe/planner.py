"""Paths for all microbatches of a wave: conflict-based search within a time limit.

Initially every microbatch has its quickest path. Conflicts between the paths are resolved one at a time, by forbidding
the contested resource to some of the microbatches and routing them again:

    1  load       a stage is visited more often than the others: forbid the stage to the surplus
    2  memory     a node is visited more often than it can hold: forbid the node
    3  collision  two microbatches are on a node at the same time: delay one of them

A resource is only forbidden to microbatches that can do without it. While there are surplus visits, the search expands
the plan with the fewest of them, and among those the plan that ends first (ours: the authors order by the end alone,
which finds no valid plan in time where the visits must fill every node completely). Among valid plans it expands the
one whose simulated iteration, with queues and all waves, ends first, and keeps the best; a round-robin plan that needs
no search competes with them (ours). The remaining time goes into exchanges (ours) from the best plan and from the
round-robin plan: two microbatches swap a node or their paths, which keeps load and memory as they are, as long as that
shortens the iteration. Where each microbatch has few possible paths, all combinations are tried at the end, which
proves the best plan optimal.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge

from lamella.errors import MethodError
from lamella.methods.skippipe.exchanges import exchange_variants, reroute_variants
from lamella.methods.skippipe.network import PipelineNetwork
from lamella.methods.skippipe.paths import Assignment, Limits, Path, capacities, seconds
from lamella.methods.skippipe.route import Router, RouteRules, TimedRoute, Visit
from lamella.methods.skippipe.simulate import iteration, simulate
from lamella.progress import tracker

Avoids = Literal["load", "collisions"]
Index = int  # of a microbatch in its wave
FITTING, SOLUTIONS = 32, 8  # plans with balanced load before memory is resolved, and plans without a collision
ENOUGH, LATER = (
    0.88,
    5.0,
)  # stop at this fraction of the first plan's time; discard plans this much slower than the best
LOADS, NODES = 3, 2  # branches per conflict
SHARES = (0.2, 0.4, 0.6)  # of the time, at which load, memory and collisions must be resolved
TRIES = 20  # plans to expand for a valid one after a collision was resolved
FEW = 20_000  # up to this number of plans, all are tried


@dataclass(frozen=True)
class Agent:
    """One microbatch of a wave.

    Attributes:
        origin: its node of stage 0.
        released: the earliest start in seconds.
    """

    origin: int
    released: float


@dataclass(frozen=True)
class Limit:
    """The limits of the search for paths.

    Attributes:
        seconds: time limit in seconds; the best plan found by then is used.
        expansions: maximum number of plans to expand.
    """

    seconds: Annotated[float, Ge(0)] = 60.0
    expansions: Annotated[int, Ge(1)] = 100_000


@dataclass(frozen=True)
class PlanResult:
    """The result of a search.

    Attributes:
        paths: the path of each microbatch of a wave.
        seconds: simulated seconds per iteration.
        bound: a lower bound for all plans: the slowest of the quickest paths over all of its waves, or the time itself
            if the plan is proven to be optimal.
        expansions: the number of expanded plans.
        stopped: whether the limit ended the search.
        collisions: the number of pairs of visits that overlap in the plan.
    """

    paths: tuple[Path, ...]
    seconds: float
    bound: float
    expansions: int
    stopped: bool
    collisions: int


class _Plan(NamedTuple):
    rules: tuple[RouteRules, ...]
    routes: tuple[TimedRoute, ...]

    @property
    def end(self) -> float:
        return max(route.end for route in self.routes)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(route.path for route in self.routes)


Branches = list[tuple[RouteRules, ...]]


def agents_of(network: PipelineNetwork, assignment: Assignment, each: int) -> list[Agent]:
    """Return `each` microbatches per node of stage 0, in turn; each may start when the previous one is computed.

    Args:
        network: the costs of nodes and links.
        assignment: the nodes of each stage.
        each: microbatches per node of stage 0.
    """
    return [
        Agent(origin, number * float(network.work[origin])) for number in range(each) for origin in assignment.stages[0]
    ]


def plan_paths(
    network: PipelineNetwork,
    assignment: Assignment,
    agents: Sequence[Agent],
    limits: Limits | None = None,
    *,
    avoids: Avoids = "collisions",
    limit: Limit | None = None,
    microbatches: int | None = None,
) -> PlanResult:
    """Plan the paths of the microbatches of a wave.

    Args:
        network: the costs of nodes and links.
        assignment: the nodes of each stage.
        agents: the microbatches.
        limits: the constraints on paths.
        avoids: which conflicts to resolve: ``load`` and memory alone, or ``collisions`` as well.
        limit: the limits of the search.
        microbatches: microbatches per iteration; those of one wave if None.

    Raises:
        MethodError: if no valid paths exist, or none were found within the limit.
    """
    count = microbatches or len(agents)
    return _Search(network, assignment, agents, limits or Limits(), limit or Limit(), count).run(avoids)


@dataclass
class _Search:
    network: PipelineNetwork
    assignment: Assignment
    agents: Sequence[Agent]
    limits: Limits
    limit: Limit
    microbatches: int
    expansions: int = 0
    best: tuple[float, tuple[Path, ...]] | None = None
    count: Iterator[int] = field(default_factory=itertools.count)
    started: float = field(default_factory=time.monotonic)
    report: Callable[..., None] = field(default=lambda: None)

    def __post_init__(self) -> None:
        self.router = Router(self.network, self.assignment, self.limits)
        self.capacities = capacities(self.network, self.assignment, len(self.agents), self.limits.length)
        for node, held in Counter(agent.origin for agent in self.agents).items():
            if held > self.network.memory[node]:
                raise MethodError(f"node {node} holds {int(self.network.memory[node])} microbatches, not {held}")

    def run(self, avoids: Avoids) -> PlanResult:
        root = self._root()
        with tracker("skippipe: plans of paths", None) as self.report:
            fitting = self._resolve(self._load, [root], FITTING, SHARES[0])
            balanced = self._resolve(self._memory, fitting, FITTING, SHARES[1])
            rotation = self._rotate_skips()
            for paths in [*(plan.paths for plan in balanced), *rotation]:
                self._evaluate(paths)
            if avoids == "collisions":
                self._collisions(balanced)
                for paths in [] if self.best is None else dict.fromkeys([self.best[1], *rotation]):
                    self._exchange(paths)
            proved = avoids == "collisions" and self._try_all()
        if self.best is None:
            raise MethodError(
                f"no valid paths were found among {self.expansions} plans in {self.limit.seconds:g} s: give more "
                "time, or "
                "nodes more memory"
            )
        found, paths = self.best
        routes = [self.router.along(path, agent.released) for path, agent in zip(paths, self.agents, strict=True)]
        collisions = len(list(_overlaps(routes)))
        ends = [self._end(index, route.end - self.agents[index].released) for index, route in enumerate(root.routes)]
        return PlanResult(
            paths, found, found if proved else max(ends), self.expansions, self._limit_reached(), collisions
        )

    def _end(self, index: Index, alone: float) -> float:
        """Return the earliest end of all microbatches of one path, each of which takes `alone` seconds."""
        waves = -(-(self.microbatches - index) // len(self.agents))
        return self.agents[index].released + waves * alone

    def _root(self) -> _Plan:
        """Return the quickest path of each microbatch, identical for all of one origin."""
        quickest: dict[int, Path] = {}
        for origin in {agent.origin for agent in self.agents}:
            route = self.router.quickest(origin, 0.0, RouteRules())
            if route is None:
                raise MethodError("a microbatch has no possible path: allow longer jumps, or shorter paths")
            quickest[origin] = route.path
        routes = [self.router.along(quickest[agent.origin], agent.released) for agent in self.agents]
        return _Plan(tuple(RouteRules() for _ in routes), tuple(routes))

    def _limit_reached(self, share: float = 1.0) -> bool:
        spent = time.monotonic() - self.started
        return spent > share * self.limit.seconds or self.expansions >= share * self.limit.expansions

    def _count_expansion(self) -> None:
        self.expansions += 1
        self.report()

    def _evaluate(self, paths: tuple[Path, ...]) -> float:
        """Simulate an iteration, keep the paths if they are the best so far, and return the seconds."""
        used = iteration(simulate(self.network, paths, self.microbatches))
        if self.best is None or used < self.best[0]:
            self.best = used, paths
        return used

    def _fits(self, paths: Sequence[Path]) -> bool:
        """Return whether the load of all stages and nodes is within their capacity."""
        return self._too_many(paths) == 0

    def _too_many(self, paths: Sequence[Path]) -> int:
        """Return the number of visits beyond the capacity of nodes and stages."""
        nodes = Counter(node for path in paths for node in path)
        stages: Counter[int] = Counter()
        for node, requested in nodes.items():
            stages[self.assignment.stage_of[node]] += requested
        limits = [(requested, self.network.nodes[node].memory) for node, requested in nodes.items()]
        limits += [(requested, self.capacities[stage]) for stage, requested in stages.items()]
        return sum(max(0, requested - most) for requested, most in limits)

    def _route(self, rules: tuple[RouteRules, ...], parent: _Plan | None = None) -> _Plan | None:
        """Return the plan under these rules; microbatches with unchanged rules keep their routes."""
        routes: list[TimedRoute] = []
        for index, (agent, each) in enumerate(zip(self.agents, rules, strict=True)):
            if parent is not None and parent.rules[index] is each:
                routes.append(parent.routes[index])
                continue
            route = self.router.quickest(agent.origin, agent.released, each)
            if route is None:
                return None
            routes.append(route)
        return _Plan(rules, tuple(routes))

    # Loads and memory

    def _resolve(
        self,
        conflict: Callable[[_Plan], Branches | None],
        plans: Sequence[_Plan],
        enough: int,
        share: float,
        tries: float = math.inf,
    ) -> list[_Plan]:
        """Expand plans until `enough` of them are free of a conflict, or the time is over."""
        heap = [(self._too_many(plan.paths), plan.end, next(self.count), plan) for plan in plans]
        heapq.heapify(heap)
        found: list[_Plan] = []
        known_rules: set[object] = set()
        while heap and len(found) < enough and tries > 0 and not self._limit_reached(share):
            *_, plan = heapq.heappop(heap)
            self._count_expansion()
            tries -= 1
            branches = conflict(plan)
            if branches is None:
                found.append(plan)
                continue
            for rules in branches:
                key = tuple((each.nodes, each.stages) for each in rules)
                child = None if key in known_rules else self._route(rules, plan)
                known_rules.add(key)
                if child is not None:
                    heapq.heappush(heap, (self._too_many(child.paths), child.end, next(self.count), child))
        return found

    def _load(self, plan: _Plan) -> Branches | None:
        """Forbid a stage to the surplus microbatches; None if no stage is visited too often."""
        stage_of = self.assignment.stage_of
        for stage in range(1, len(self.assignment)):
            visiting = [index for index, each in enumerate(plan.routes) if stage in map(stage_of.get, each.path)]
            surplus = len(visiting) - self.capacities[stage]
            if surplus > 0:
                return self._forbid(plan, visiting, surplus, LOADS, partial(RouteRules.without_stage, stage=stage))
        return None

    def _memory(self, plan: _Plan) -> Branches | None:
        """Forbid a node to the surplus microbatches; None if no node or stage is visited too often."""
        visits = Counter(node for route in plan.routes for node in route.path[1:])
        for node, requested in sorted(visits.items()):
            surplus = requested - int(self.network.memory[node])
            if surplus > 0:
                visiting = [index for index, each in enumerate(plan.routes) if node in each.path[1:]]
                return self._forbid(plan, visiting, surplus, NODES, partial(RouteRules.without_node, node=node))
        return self._load(plan)

    def _forbid(
        self,
        plan: _Plan,
        visiting: list[Index],
        surplus: int,
        branches: int,
        forbid: Callable[[RouteRules], RouteRules],
    ) -> Branches:
        """Forbid a resource to `surplus` visitors that can do without it, the slowest first, in a few variants."""
        candidates = [index for index in visiting if self.router.allow_any(forbid(plan.rules[index]))]
        slowest = sorted(candidates, key=lambda index: -plan.routes[index].end)
        return [
            tuple(forbid(rules) if index in chosen else rules for index, rules in enumerate(plan.rules))
            for chosen in itertools.islice(itertools.combinations(slowest, surplus), branches)
        ]

    def _rotate_skips(self) -> list[tuple[Path, ...]]:
        """Return a round-robin plan if it is valid: stages are skipped in turn, nodes used while they have capacity."""
        others = len(self.assignment) - 1
        skipped = len(self.assignment) - self.limits.length
        used: Counter[int] = Counter()
        paths: list[Path] = []
        for index, agent in enumerate(self.agents):
            skipped_stages = frozenset(1 + (index * skipped + step) % others for step in range(skipped))
            full = frozenset(node for node, visits in used.items() if visits >= self.network.memory[node])
            route = self.router.quickest(agent.origin, agent.released, RouteRules(full, skipped_stages))
            if route is None:
                return []
            paths.append(route.path)
            used.update(route.path[1:])
        return [tuple(paths)] if self._fits(paths) else []

    # Collisions

    def _collisions(self, plans: Sequence[_Plan]) -> None:
        """Delay one of two colliding microbatches, until none collide or the time is over."""
        heap = [(self._evaluate(plan.paths), next(self.count), plan) for plan in plans]
        heapq.heapify(heap)
        first = heap[0][0] if heap else math.inf
        solutions = 0
        while heap and solutions < SOLUTIONS and not self._limit_reached(SHARES[2]):
            if self.best is None or self.best[0] < ENOUGH * first:
                break
            _, _, plan = heapq.heappop(heap)
            self._count_expansion()
            overlap = next(_overlaps(plan.routes), None)
            if overlap is None:
                solutions += 1
                continue
            for index, visit, interval in _delays(*overlap):
                rules = list(plan.rules)
                rules[index] = rules[index].not_during(visit.node, interval)
                child = self._route(tuple(rules), plan)
                fitting = [] if child is None else self._resolve(self._memory, [child], 1, SHARES[2], TRIES)
                for each in fitting:
                    used = self._evaluate(each.paths)
                    if used <= self.best[0] + LATER:
                        heapq.heappush(heap, (used, next(self.count), each))

    # Exchanges

    def _exchange(self, paths: tuple[Path, ...]) -> None:
        """Apply exchanges of nodes or paths between microbatches as long as they shorten the iteration."""
        before, better = self._evaluate(paths), True
        while better:
            better = False
            rerouted = reroute_variants(self.assignment, self.router.orders, paths)
            for changed in itertools.chain(exchange_variants(self.assignment, paths), filter(self._fits, rerouted)):
                if self._limit_reached():
                    return
                self._count_expansion()
                used = self._evaluate(changed)
                if used < before:
                    before, paths, better = used, changed, True
                    break

    # All plans

    def _try_all(self) -> bool:
        """Try all plans that could be better than the best, if they are few; return whether that was exhaustive."""
        stages = self.assignment.stages
        orders = self.router.orders
        if sum(math.prod(len(stages[stage]) for stage in order[1:]) for order in orders) > FEW:
            return False
        ends = [nodes for order in orders for nodes in itertools.product(*(stages[stage] for stage in order[1:]))]
        choices = [self._better_paths(index, ends) for index in range(len(self.agents))]
        if math.prod(map(len, choices)) > FEW:
            return False
        for paths in itertools.product(*choices):
            if self._limit_reached():
                return False
            if self._fits(paths):
                self._count_expansion()
                self._evaluate(paths)
        return True

    def _better_paths(self, index: Index, ends: Sequence[Path]) -> list[Path]:
        """Return the paths of a microbatch that alone do not take longer than the best plan."""
        most = math.inf if self.best is None else self.best[0]
        paths = [(self.agents[index].origin, *nodes) for nodes in ends]
        return [path for path in paths if self._end(index, seconds(self.network, path)) < most]


def _overlaps(routes: Sequence[TimedRoute]) -> Iterator[tuple[Index, Visit, Index, Visit]]:
    """Yield overlapping visits of one node, except two on their way back; those of the slowest routes first."""
    order = sorted(range(len(routes)), key=lambda index: -routes[index].end)
    for index, other in itertools.combinations(order, 2):
        if set(routes[index].path).isdisjoint(routes[other].path):
            continue
        for one, two in itertools.product(routes[index].visits, routes[other].visits):
            overlap = one.node == two.node and one.begin < two.end and two.begin < one.end
            if overlap and not (one.back and two.back):
                yield index, one, other, two


def _delays(index: Index, one: Visit, other: Index, two: Visit) -> list[tuple[Index, Visit, tuple[float, float]]]:
    """Return which visits to delay, and past which interval: either one, or the later one if one is on its way back."""
    first, second = (index, one, (two.begin, two.end)), (other, two, (one.begin, one.end))
    if one.back or two.back:
        return [first if one.begin >= two.begin else second]
    return [first, second]
