"""Paths for all microbatches of a wave: conflict-based search, within a limit of time.

Every microbatch has its quickest path at first. Of what stands against the paths together one thing is taken away at a
time, by forbidding it to some of them, and they are routed again:

    1  load       a stage is visited more often than the others: forbid the stage to as many as are too many
    2  memory     a node is, more often than it can hold: forbid the node
    3  collision  two are on a node at once: one of them comes later

A thing is forbidden to those alone that can do without it. While visits are too many, the search goes on from the plan
with the fewest of those, and then from the one that would end first (ours: the authors go by the end alone, by which
nothing that fits is found in time where visits must fill every node to its last place). Of plans that fit it goes on
from the one whose iteration, run in time with queues and all waves, ends first, and keeps the best of them; with them
stands a plan in turns, which needs no search (ours). What time is left goes into exchanges (ours), from the best plan
and from that in turns: two microbatches take each other's node or way, which keeps loads and memory as they are, while
that makes the iteration shorter. Where the paths that each microbatch could take are few, all of them are tried at
last, so that the best plan is known to be it.
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
from lamella.methods.skippipe.exchanges import exchanged, turned
from lamella.methods.skippipe.network import Network
from lamella.methods.skippipe.paths import Assignment, Limits, Path, rooms, seconds
from lamella.methods.skippipe.route import Routed, Router, Rules, Visit
from lamella.methods.skippipe.simulate import iteration, simulate
from lamella.progress import tracker

Avoids = Literal["load", "collisions"]
Place = int  # of a microbatch among those of its wave
FITTING, SOLUTIONS = 32, 8  # plans that fit the load, before memory is looked at; and plans without a collision
ENOUGH, LATER = 0.88, 5.0  # of the first plan's time, where the search stops; seconds above the best that are given up
LOADS, NODES = 3, 2  # branches of a conflict
SHARES = (0.2, 0.4, 0.6)  # of the time, by which loads, memory and collisions are dealt with
TRIES = 20  # plans that are looked at to find one that fits after a collision was avoided
FEW = 20_000  # plans that are all tried


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

    seconds: Annotated[float, Ge(0)] = 60.0
    expansions: Annotated[int, Ge(1)] = 100_000


@dataclass(frozen=True)
class Planned:
    """What a search has found.

    Attributes:
        paths: of each microbatch of a wave.
        seconds: of an iteration, as the pipeline runs in time.
        bound: that no plan can be under: the slowest of all quickest paths in all of its waves, or the time itself
            where it is known to be the best.
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

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(route.path for route in self.routes)


Branches = list[tuple[Rules, ...]]


def agents_of(network: Network, assignment: Assignment, each: int) -> list[Agent]:
    """So many microbatches of every node of stage 0, in turn; each can start when the one before it is computed."""
    return [
        Agent(origin, number * float(network.work[origin])) for number in range(each) for origin in assignment.stages[0]
    ]


def plan_paths(
    network: Network,
    assignment: Assignment,
    agents: Sequence[Agent],
    limits: Limits | None = None,
    *,
    avoids: Avoids = "collisions",
    limit: Limit | None = None,
    microbatches: int | None = None,
) -> Planned:
    """Paths for the microbatches of a wave.

    Args:
        network: what links and nodes cost.
        assignment: which node is in which stage.
        agents: the microbatches.
        limits: what paths may do.
        avoids: ``collisions``, and what is too much for a stage or a node; or that ``load`` alone.
        limit: of the search.
        microbatches: of an iteration; those of one wave when left out.

    Raises:
        MethodError: when no paths fit, or the limit comes before any were found.
    """
    count = microbatches or len(agents)
    return _Search(network, assignment, agents, limits or Limits(), limit or Limit(), count).run(avoids)


@dataclass
class _Search:
    network: Network
    assignment: Assignment
    agents: Sequence[Agent]
    limits: Limits
    limit: Limit
    microbatches: int
    expansions: int = 0
    best: tuple[float, tuple[Path, ...]] | None = None
    count: Iterator[int] = field(default_factory=itertools.count)
    began: float = field(default_factory=time.monotonic)
    tell: Callable[..., None] = field(default=lambda: None)

    def __post_init__(self) -> None:
        self.router = Router(self.network, self.assignment, self.limits)
        self.rooms = rooms(self.network, self.assignment, len(self.agents), self.limits.length)
        for node, held in Counter(agent.origin for agent in self.agents).items():
            if held > self.network.memory[node]:
                raise MethodError(f"node {node} holds {int(self.network.memory[node])} microbatches, not {held}")

    def run(self, avoids: Avoids) -> Planned:
        root = self._root()
        with tracker("skippipe: plans of paths", None) as self.tell:
            fitting = self._without(self._load, [root], FITTING, SHARES[0])
            light = self._without(self._memory, fitting, FITTING, SHARES[1])
            turns = self._in_turns()
            for paths in [*(plan.paths for plan in light), *turns]:
                self._keep(paths)
            if avoids == "collisions":
                self._collisions(light)
                for paths in [] if self.best is None else dict.fromkeys([self.best[1], *turns]):
                    self._exchange(paths)
            proved = avoids == "collisions" and self._all_are_tried()
        if self.best is None:
            raise MethodError(
                f"no paths were found that fit, of {self.expansions} plans that were looked at in "
                f"{self.limit.seconds:g} s: give more time, or nodes more memory"
            )
        found, paths = self.best
        routes = [self.router.along(path, agent.released) for path, agent in zip(paths, self.agents, strict=True)]
        meetings = len(list(_overlaps(routes)))
        ends = [self._end(place, route.end - self.agents[place].released) for place, route in enumerate(root.routes)]
        return Planned(paths, found, found if proved else max(ends), self.expansions, self._over(), meetings)

    def _end(self, place: Place, alone: float) -> float:
        """When all microbatches of one path are back at the earliest, where each by itself takes so long."""
        waves = -(-(self.microbatches - place) // len(self.agents))
        return self.agents[place].released + waves * alone

    def _root(self) -> _Plan:
        """The quickest path of each, which is the same for all of one origin."""
        quickest: dict[int, Path] = {}
        for origin in {agent.origin for agent in self.agents}:
            route = self.router.quickest(origin, 0.0, Rules())
            if route is None:
                raise MethodError("a microbatch has no path at all: allow longer jumps, or shorter paths")
            quickest[origin] = route.path
        routes = [self.router.along(quickest[agent.origin], agent.released) for agent in self.agents]
        return _Plan(tuple(Rules() for _ in routes), tuple(routes))

    def _over(self, share: float = 1.0) -> bool:
        spent = time.monotonic() - self.began
        return spent > share * self.limit.seconds or self.expansions >= share * self.limit.expansions

    def _expanded(self) -> None:
        self.expansions += 1
        self.tell()

    def _keep(self, paths: tuple[Path, ...]) -> float:
        """The time of an iteration; the best paths so far are remembered."""
        taken = iteration(simulate(self.network, paths, self.microbatches))
        if self.best is None or taken < self.best[0]:
            self.best = taken, paths
        return taken

    def _fits(self, paths: Sequence[Path]) -> bool:
        """Whether neither a stage nor a node is visited too often."""
        return self._too_many(paths) == 0

    def _too_many(self, paths: Sequence[Path]) -> int:
        """How many visits of nodes and of stages there is no room for."""
        nodes = Counter(node for path in paths for node in path)
        stages: Counter[int] = Counter()
        for node, asked in nodes.items():
            stages[self.assignment.stage_of[node]] += asked
        room = [(asked, self.network.nodes[node].memory) for node, asked in nodes.items()]
        room += [(asked, self.rooms[stage]) for stage, asked in stages.items()]
        return sum(max(0, asked - most) for asked, most in room)

    def _routed(self, rules: tuple[Rules, ...], known: _Plan | None = None) -> _Plan | None:
        """The plan under these rules; those whose rules are as they were keep their paths."""
        routes: list[Routed] = []
        for place, (agent, each) in enumerate(zip(self.agents, rules, strict=True)):
            if known is not None and known.rules[place] is each:
                routes.append(known.routes[place])
                continue
            route = self.router.quickest(agent.origin, agent.released, each)
            if route is None:
                return None
            routes.append(route)
        return _Plan(rules, tuple(routes))

    # Loads and memory

    def _without(
        self,
        conflict: Callable[[_Plan], Branches | None],
        plans: Sequence[_Plan],
        enough: int,
        share: float,
        tries: float = math.inf,
    ) -> list[_Plan]:
        """Plans that a conflict is gone from: as many as are enough, or as there is time for."""
        heap = [(self._too_many(plan.paths), plan.end, next(self.count), plan) for plan in plans]
        heapq.heapify(heap)
        found: list[_Plan] = []
        seen: set[object] = set()
        while heap and len(found) < enough and tries > 0 and not self._over(share):
            *_, plan = heapq.heappop(heap)
            self._expanded()
            tries -= 1
            branches = conflict(plan)
            if branches is None:
                found.append(plan)
                continue
            for rules in branches:
                key = tuple((each.nodes, each.stages) for each in rules)
                child = None if key in seen else self._routed(rules, plan)
                seen.add(key)
                if child is not None:
                    heapq.heappush(heap, (self._too_many(child.paths), child.end, next(self.count), child))
        return found

    def _load(self, plan: _Plan) -> Branches | None:
        """Forbid a stage to those that are too many; None where no stage is visited too often."""
        stage_of = self.assignment.stage_of
        for stage in range(1, len(self.assignment)):
            visiting = [place for place, each in enumerate(plan.routes) if stage in map(stage_of.get, each.path)]
            surplus = len(visiting) - self.rooms[stage]
            if surplus > 0:
                return self._forbidding(plan, visiting, surplus, LOADS, partial(Rules.without_stage, stage=stage))
        return None

    def _memory(self, plan: _Plan) -> Branches | None:
        """Forbid a node to those that are too many; None where neither a node nor a stage is visited too often."""
        visits = Counter(node for route in plan.routes for node in route.path[1:])
        for node, asked in sorted(visits.items()):
            surplus = asked - int(self.network.memory[node])
            if surplus > 0:
                visiting = [place for place, each in enumerate(plan.routes) if node in each.path[1:]]
                return self._forbidding(plan, visiting, surplus, NODES, partial(Rules.without, node=node))
        return self._load(plan)

    def _forbidding(
        self, plan: _Plan, visiting: list[Place], surplus: int, branches: int, forbid: Callable[[Rules], Rules]
    ) -> Branches:
        """A thing forbidden to so many of its visitors that can do without, the slowest first, in a few ways."""
        able = [place for place in visiting if self.router.leaves_any(forbid(plan.rules[place]))]
        slowest = sorted(able, key=lambda place: -plan.routes[place].end)
        return [
            tuple(forbid(rules) if place in chosen else rules for place, rules in enumerate(plan.rules))
            for chosen in itertools.islice(itertools.combinations(slowest, surplus), branches)
        ]

    def _in_turns(self) -> list[tuple[Path, ...]]:
        """A plan without a search, where it fits: stages are left out in turns, and nodes taken while there is room."""
        behind = len(self.assignment) - 1
        skipped = len(self.assignment) - self.limits.length
        taken: Counter[int] = Counter()
        paths: list[Path] = []
        for place, agent in enumerate(self.agents):
            out = frozenset(1 + (place * skipped + step) % behind for step in range(skipped))
            full = frozenset(node for node, visits in taken.items() if visits >= self.network.memory[node])
            route = self.router.quickest(agent.origin, agent.released, Rules(full, out))
            if route is None:
                return []
            paths.append(route.path)
            taken.update(route.path[1:])
        return [tuple(paths)] if self._fits(paths) else []

    # Collisions

    def _collisions(self, plans: Sequence[_Plan]) -> None:
        """Let one of two that meet come later, until none meet or it takes too long."""
        heap = [(self._keep(plan.paths), next(self.count), plan) for plan in plans]
        heapq.heapify(heap)
        first = heap[0][0] if heap else math.inf
        solutions = 0
        while heap and solutions < SOLUTIONS and not self._over(SHARES[2]):
            if self.best is None or self.best[0] < ENOUGH * first:
                break
            _, _, plan = heapq.heappop(heap)
            self._expanded()
            meeting = next(_overlaps(plan.routes), None)
            if meeting is None:
                solutions += 1
                continue
            for place, visit, interval in _later(*meeting):
                rules = list(plan.rules)
                rules[place] = rules[place].not_during(visit.node, interval)
                child = self._routed(tuple(rules), plan)
                fitting = [] if child is None else self._without(self._memory, [child], 1, SHARES[2], TRIES)
                for each in fitting:
                    taken = self._keep(each.paths)
                    if taken <= self.best[0] + LATER:
                        heapq.heappush(heap, (taken, next(self.count), each))

    # Exchanges

    def _exchange(self, paths: tuple[Path, ...]) -> None:
        """Let two microbatches exchange a node or their ways, while that makes the iteration shorter."""
        before, better = self._keep(paths), True
        while better:
            better = False
            ways = turned(self.assignment, self.router.orders, paths)
            for changed in itertools.chain(exchanged(self.assignment, paths), filter(self._fits, ways)):
                if self._over():
                    return
                self._expanded()
                taken = self._keep(changed)
                if taken < before:
                    before, paths, better = taken, changed, True
                    break

    # All plans

    def _all_are_tried(self) -> bool:
        """Try every plan that could be better than the best, where they are few; whether that was all of them."""
        stages = self.assignment.stages
        orders = self.router.orders
        if sum(math.prod(len(stages[stage]) for stage in order[1:]) for order in orders) > FEW:
            return False
        ends = [nodes for order in orders for nodes in itertools.product(*(stages[stage] for stage in order[1:]))]
        choices = [self._better(place, ends) for place in range(len(self.agents))]
        if math.prod(map(len, choices)) > FEW:
            return False
        for paths in itertools.product(*choices):
            if self._over():
                return False
            if self._fits(paths):
                self._expanded()
                self._keep(paths)
        return True

    def _better(self, place: Place, ends: Sequence[Path]) -> list[Path]:
        """The paths of a microbatch that do not by themselves take longer than the best plan."""
        most = math.inf if self.best is None else self.best[0]
        paths = [(self.agents[place].origin, *nodes) for nodes in ends]
        return [path for path in paths if self._end(place, seconds(self.network, path)) < most]


def _overlaps(routes: Sequence[Routed]) -> Iterator[tuple[Place, Visit, Place, Visit]]:
    """Pairs of stays on one node at once, but for two on their way back; those of the slowest first."""
    order = sorted(range(len(routes)), key=lambda place: -routes[place].end)
    for place, other in itertools.combinations(order, 2):
        if set(routes[place].path).isdisjoint(routes[other].path):
            continue
        for one, two in itertools.product(routes[place].visits, routes[other].visits):
            meets = one.node == two.node and one.begin < two.end and two.begin < one.end
            if meets and not (one.back and two.back):
                yield place, one, other, two


def _later(place: Place, one: Visit, other: Place, two: Visit) -> list[tuple[Place, Visit, tuple[float, float]]]:
    """Who may come later, and when it is not to be there: either, or, where one is on its way back, the later."""
    first, second = (place, one, (two.begin, two.end)), (other, two, (one.begin, one.end))
    if one.back or two.back:
        return [first if one.begin >= two.begin else second]
    return [first, second]
