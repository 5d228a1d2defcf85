"""Plans: what every path may do, the best one on small networks, and the published network."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.errors import MethodError
from lamella.methods.skippipe.allocation import AllocationSearch, allocate, bottleneck, closed_tour, even_sizes
from lamella.methods.skippipe.baselines import full_pipeline
from lamella.methods.skippipe.network import Machine, PipelineNetwork, published
from lamella.methods.skippipe.paths import Assignment, Limits, capacities, check, seconds
from lamella.methods.skippipe.planner import Limit, _Search, agents_of, plan_paths
from lamella.methods.skippipe.route import Router, RouteRules
from lamella.methods.skippipe.schedule import PipelineSchedule, in_flight, make_schedule
from lamella.methods.skippipe.simulate import BusyInterval, iteration, simulate

QUICK = Limit(seconds=20, expansions=150)


def random_network(sizes: Sequence[int], seed: int, memory: int = 3) -> tuple[PipelineNetwork, Assignment]:
    """A network of random times, whose nodes are in stages in their order."""
    random = np.random.default_rng(seed)
    count = sum(sizes)
    edge = random.uniform(0.1, 3.0, (count, count))
    np.fill_diagonal(edge, 0.0)
    nodes = tuple(Machine("here", memory=memory) for _ in range(count))
    ends = np.cumsum([0, *sizes])
    stages = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends.tolist()))
    return PipelineNetwork(nodes, edge, random.uniform(0.2, 1.5, count)), Assignment(stages)


# What paths may do


def obeys(order: tuple[int, ...], limits: Limits, stages: int) -> bool:
    """The rules for one order of stages, once more."""
    if len(set(order)) != limits.length or order[0] != 0 or len(order) != limits.length or max(order) >= stages:
        return False
    backs = []
    for place in range(1, len(order)):
        frontier = max(order[:place])
        if order[place] < frontier:
            backs.append(frontier - order[place])
        elif order[place] - frontier > limits.jump:
            return False
    return all(back <= limits.distance for back in backs) and len(backs) <= limits.swaps and sum(backs) <= limits.total


@given(st.integers(2, 6), st.data())
def test_the_orders_of_stages_are_those_that_obey_the_rules(stages: int, data: st.DataObject) -> None:
    limits = Limits(
        length=data.draw(st.integers(1, stages)),
        distance=data.draw(st.integers(0, 2)),
        swaps=data.draw(st.integers(0, 2)),
        total=data.draw(st.integers(0, 3)),
        jump=data.draw(st.integers(1, 4)),
    )
    every = itertools.permutations(range(stages), limits.length)
    assert set(limits.orders(stages)) == {order for order in every if obeys(order, limits, stages)}


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from([(2, 2, 2), (3, 2, 2, 2), (2, 2, 2, 2, 2)]), st.integers(0, 1))
def test_plans_keep_to_orders_loads_and_memory(seed: int, sizes: tuple[int, ...], skipped: int) -> None:
    network, assignment = random_network(sizes, seed)
    limits = Limits(length=len(sizes) - skipped)
    each = in_flight(network, assignment, 3 * sizes[0], limits.length)
    agents = agents_of(network, assignment, each)
    planned = plan_paths(network, assignment, agents, limits, limit=Limit(expansions=40))
    stage_of = {node: stage for stage, nodes in enumerate(assignment.stages) for node in nodes}
    orders = [tuple(stage_of[node] for node in path) for path in planned.paths]
    assert all(obeys(order, limits, len(sizes)) for order in orders)
    assert [path[0] for path in planned.paths] == [agent.origin for agent in agents]
    nodes = Counter(node for path in planned.paths for node in path)
    assert all(count <= network.nodes[node].memory for node, count in nodes.items())
    visited = Counter(stage for order in orders for stage in order[1:])
    spread = [visited[stage] for stage in range(1, len(sizes))]
    assert max(spread) <= -(-sum(spread) // len(spread))  # since the stages have as much room as one another
    assert planned.bound <= planned.seconds + 1e-9


def test_what_breaks_a_rule_is_named() -> None:
    network, assignment = random_network((2, 2, 2), 0, memory=1)
    limits = Limits(length=2)
    check(network, assignment, [(0, 2), (1, 4)], limits)
    for paths, message in [
        ([(0, 2, 4)], "visits the stages 0, 1, 2, which is not allowed"),
        ([(2, 4)], "visits the stages 1, 2"),
        ([(0, 9)], "visits the stages 0, -1"),
        ([(0, 2), (1, 3)], "stage 1 is visited 2 times in a wave and has memory for 1"),
        ([(0, 2), (0, 4)], "node 0 is visited 2 times"),
    ]:
        with pytest.raises(MethodError, match=message):
            check(network, assignment, paths, limits)


def test_stages_are_visited_as_equally_as_their_memory_allows() -> None:
    network, assignment = random_network((5, 3, 3, 3, 3, 3), 0)
    assert capacities(network, assignment, 15, 4) == [15, 9, 9, 9, 9, 9]
    small, uneven = random_network((2, 1, 3, 3), 0)
    assert capacities(small, uneven, 6, 3) == [6, 3, 5, 5]  # 12 visits: 3 in the small one, and 9 in two that share
    with pytest.raises(MethodError, match="need 45 visits, but the stages have memory for 30: give nodes more memory"):
        capacities(*random_network((5, 3, 3, 3, 3, 3), 0, memory=2), 15, 4)


# Time


def in_slow_motion(network: PipelineNetwork, paths: Sequence[tuple[int, ...]], count: int) -> float:
    """The pipeline once more: at every moment, look at everything that could begin, and begin what came first."""
    hops: list[list[tuple[int, float, str]]] = []
    for number in range(count):
        path = paths[number % len(paths)]
        way = [(node, float(network.work[node]), "take") for node in path]
        way.append((path[0], 0.25 * float(network.work[path[0]]), "hold"))
        hops.append(way + [(node, 1.5 * float(network.work[node]), "give") for node in reversed(path)])
    step = [0] * count
    here: list[float | None] = [0.0 if number < len(paths) else None for number in range(count)]  # since when it waits
    sequence: list[int] = list(range(count))  # who came first, where times are equal
    busy = dict.fromkeys(range(len(network)), 0.0)
    free = {node: int(network.memory[node]) for node in busy}
    running: list[tuple[float, int]] = []
    clock, tick, ended = 0.0, count, 0.0
    while True:
        for node in busy:
            standing = [
                m
                for m in range(count)
                if here[m] is not None and here[m] <= clock and step[m] < len(hops[m]) and hops[m][step[m]][0] == node
                and (hops[m][step[m]][2] != "take" or free[node] > 0)
            ]  # fmt: skip
            if standing and busy[node] <= clock:
                m = min(standing, key=lambda each: (here[each], sequence[each]))
                free[node] -= hops[m][step[m]][2] == "take"
                busy[node] = clock + hops[m][step[m]][1]
                running.append((busy[node], m))
                here[m] = None
        times = [end for end, _ in running] + [when for when in here if when is not None and when > clock]
        if not times:
            return ended
        clock = min(times)
        for end, m in sorted(running):
            if end <= clock:
                running.remove((end, m))
                node, _, kind = hops[m][step[m]]
                free[node] += kind == "give"
                step[m] += 1
                tick += 1
                if step[m] == len(hops[m]):
                    ended = max(ended, end)
                    if m + len(paths) < count:
                        here[m + len(paths)] = end
                else:
                    there = hops[m][step[m]][0]
                    here[m], sequence[m] = end + (float(network.edge[node, there]) if node != there else 0.0), tick


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 2))
def test_the_pipeline_in_time_is_that_of_a_slow_simulation(seed: int, memory: int, waves: int) -> None:
    network, assignment = random_network((2, 2, 2), seed, memory)
    random = np.random.default_rng(seed)
    orders = [(0, 1, 2), (0, 2, 1), (0, 1), (0, 2)]
    paths = [
        tuple(int(random.choice(assignment.stages[stage])) for stage in orders[random.integers(len(orders))])
        for _ in range(random.integers(1, 5))
    ]
    if max(Counter(node for path in paths for node in path).values()) > memory:
        return  # then they could wait for one another
    served = simulate(network, paths, waves * len(paths))
    assert iteration(served) == pytest.approx(in_slow_motion(network, paths, waves * len(paths)))


@given(st.floats(0.1, 5.0), st.integers(1, 5))
def test_one_microbatch_without_links_takes_its_stages_forward_and_back_and_the_head(work: float, length: int) -> None:
    nodes = tuple(Machine("here") for _ in range(length))
    network = PipelineNetwork(nodes, np.zeros((length, length)), np.full(length, work))
    path = tuple(range(length))
    assert iteration(simulate(network, [path])) == pytest.approx(length * work * 2.5 + 0.25 * work)
    assert seconds(network, path) == pytest.approx(length * work * 2.5 + 0.25 * work)


def overlapping(served: Sequence[BusyInterval]) -> list[tuple[BusyInterval, BusyInterval]]:
    pairs = itertools.combinations(served, 2)
    return [(a, b) for a, b in pairs if a.node == b.node and a.begin < b.end - 1e-9 and b.begin < a.end - 1e-9]


def test_a_node_does_one_thing_at_once_and_holds_no_more_than_its_memory() -> None:
    network, assignment = random_network((2, 2, 2), 3, memory=2)
    made, _ = make_schedule(network, assignment, 8, Limits(length=2), limit=QUICK)
    assert not overlapping(made.timeline) and len(made.timeline) == 8 * (2 * 2 + 1)
    for node in range(6):
        held = 0
        for each in made.timeline:
            held += (each.node == node) * {"forward": 1, "loss": 0, "backward": -1}[each.phase]
            assert 0 <= held <= 2


def test_microbatches_that_wait_for_one_another_are_refused_in_one_line() -> None:
    network, _ = random_network((2, 1, 1), 0, memory=1)
    with pytest.raises(MethodError, match="2 of 2 microbatches wait for one another: give nodes more memory"):
        still = PipelineNetwork(network.nodes, np.ones((4, 4)) - np.eye(4), np.ones(4))
        simulate(still, [(0, 2, 3), (1, 3, 2)])


@pytest.mark.parametrize("seed", range(8))
def test_the_router_finds_the_quickest_of_all_paths(seed: int) -> None:
    network, assignment = random_network((1, 3, 3, 2), seed)
    limits = Limits(length=3)
    every = [
        (0, *nodes)
        for order in limits.orders(4)
        for nodes in itertools.product(*(assignment.stages[stage] for stage in order[1:]))
    ]
    found = Router(network, assignment, limits).quickest(0, 0.5, RouteRules())
    assert found is not None
    best = min(every, key=lambda path: seconds(network, path))
    assert found.end == pytest.approx(0.5 + seconds(network, best))
    best = found.path
    others = RouteRules(frozenset({best[1]}), frozenset({assignment.stage_of[best[2]]}))
    around = Router(network, assignment, limits).quickest(0, 0.5, others)
    allowed = [
        path for path in every
        if best[1] not in path and assignment.stage_of[best[2]] not in map(assignment.stage_of.get, path)
    ]  # fmt: skip
    assert (around is None) == (not allowed)
    assert around is None or around.end == pytest.approx(0.5 + min(seconds(network, path) for path in allowed))


def test_a_node_that_is_closed_is_waited_for_or_gone_around() -> None:
    network, assignment = random_network((1, 2), 0)
    router = Router(network, assignment, Limits(length=2))
    free = router.quickest(0, 0.0, RouteRules())
    assert free is not None
    visit = free.visits[1]
    shut = RouteRules(closed={visit.node: ((visit.begin - 0.01, visit.end + 100.0),)})
    later = router.quickest(0, 0.0, shut)
    assert later is not None and later.path != free.path
    brief = RouteRules(closed={visit.node: ((visit.begin - 0.01, visit.begin + 0.01),)})
    waited = router.quickest(0, 0.0, brief)
    assert waited is not None and free.end < waited.end <= min(later.end, free.end + 0.01 + 1e-9)


# The best plan


def best_of_all(network: PipelineNetwork, assignment: Assignment, origins: Sequence[int], limits: Limits) -> float:
    """The least time of an iteration over all choices of paths that keep to the rules."""
    stage_of = {node: stage for stage, nodes in enumerate(assignment.stages) for node in nodes}
    orders = [
        o for o in itertools.permutations(range(len(assignment)), limits.length) if obeys(o, limits, len(assignment))
    ]
    ends = [nodes for o in orders for nodes in itertools.product(*(assignment.stages[stage] for stage in o[1:]))]
    share = -(-len(origins) * (limits.length - 1) // (len(assignment) - 1))
    best = np.inf
    for chosen in itertools.product(ends, repeat=len(origins)):
        nodes = Counter(node for each in chosen for node in each)
        stages = Counter(stage_of[node] for each in chosen for node in each)
        if max(stages.values()) <= share and all(count <= network.memory[node] for node, count in nodes.items()):
            paths = [(origin, *each) for origin, each in zip(origins, chosen, strict=True)]
            best = min(best, iteration(simulate(network, paths)))
    return float(best)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 3, 3)])
def test_on_small_networks_no_choice_of_paths_is_better_than_the_plan(seed: int, sizes: tuple[int, ...]) -> None:
    network, assignment = random_network(sizes, seed)
    limits = Limits(length=2)
    agents = agents_of(network, assignment, 2)
    assert len(agents) == 4
    planned = plan_paths(network, assignment, agents, limits)
    best = best_of_all(network, assignment, [agent.origin for agent in agents], limits)
    assert planned.seconds == pytest.approx(best) and planned.bound == planned.seconds


def cost_of(network: PipelineNetwork, stages: Sequence[Sequence[int]]) -> float:
    """The slowest link inside a stage, and twice the best closed tour of bottleneck matchings, all by trying."""

    def apart(here: Sequence[int], there: Sequence[int]) -> float:
        return min(
            max(network.edge[u, v] + network.work[u] for u, v in zip(here, order, strict=True))
            for order in itertools.permutations(there)
        )

    inside = max(network.edge[u, v] for stage in stages for u, v in itertools.combinations(stage, 2))
    tours = ((stages[0], *order, stages[0]) for order in itertools.permutations(stages[1:]))
    return inside + 2 * min(sum(apart(u, v) for u, v in itertools.pairwise(tour)) for tour in tours)


@pytest.mark.parametrize("seed", range(3))
def test_no_allocation_of_a_small_network_is_better_than_the_one_that_is_found(seed: int) -> None:
    network, _ = random_network((2, 2, 2), seed)
    network = PipelineNetwork(network.nodes, (network.edge + network.edge.T) / 2, network.work)
    every = [
        (one, two, tuple(node for node in range(6) if node not in one + two))
        for one in itertools.combinations(range(6), 2)
        for two in itertools.combinations([node for node in range(6) if node not in one], 2)
    ]
    settings = AllocationSearch(population=20, trials=150)
    found = allocate(network, (2, 2, 2), settings, seed)
    assert cost_of(network, found.stages) == pytest.approx(min(cost_of(network, each) for each in every))
    assert allocate(network, (2, 2, 2), settings, seed) == found


@pytest.mark.parametrize("seed", range(5))
def test_matchings_and_tours_are_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    costs = random.random((3, 4))
    every = [max(costs[row, column] for row, column in enumerate(c)) for c in itertools.permutations(range(4), 3)]
    assert bottleneck(costs) == min(every) and bottleneck(costs.T) == min(every)
    between = random.random((9, 9))  # so many stages that sets are gone through, and not all tours
    few = between[:5, :5]
    for table in (few, between):
        count = len(table)
        tours = itertools.permutations(range(1, count)) if count < 9 else ()
        lengths = [sum(table[a, b] for a, b in itertools.pairwise((0, *tour, 0))) for tour in tours]
        length, order = closed_tour(table)
        assert length == pytest.approx(sum(table[a, b] for a, b in itertools.pairwise((*order, 0))))
        assert not lengths or length == pytest.approx(min(lengths))
        assert sorted(order) == list(range(count)) and order[0] == 0


def by_trying(costs: np.ndarray) -> float:
    """The least that the largest cost of a matching of all rows can be."""
    rows, columns = costs.shape
    return min(
        max(costs[row, c] for row, c in enumerate(each)) for each in itertools.permutations(range(columns), rows)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(5, 3, 3, 3), (2, 4, 3), (3, 3)])
def test_the_full_pipeline_chains_stages_by_matchings_that_no_other_is_better_than(
    seed: int, sizes: tuple[int, ...]
) -> None:
    network, assignment = random_network(sizes, seed)
    stages, chains = assignment.stages, full_pipeline(network, assignment, 30)
    count = min(sizes)
    assert len(chains) == 3 * count and set(chains) == set(chains[:count])  # three in flight on each
    assert len({node for chain in chains for node in chain}) == count * len(sizes)  # chains share no node
    assert all(assignment.stage_of[node] == stage for chain in chains for stage, node in enumerate(chain))
    cost = network.edge + network.work[:, None]
    start = sizes.index(count)
    tour = [*range(start, len(sizes)), *range(start)]
    for here, there in itertools.pairwise(tour):
        ends = [chain[here] for chain in chains[:count]]
        costs = cost[np.ix_(ends, stages[there])]
        if there == tour[-1]:  # where the tour closes both hops count
            costs = costs + cost[np.ix_(stages[there], [chain[start] for chain in chains[:count]])].T
        taken = [costs[row, stages[there].index(chain[there])] for row, chain in enumerate(chains[:count])]
        assert max(taken) == pytest.approx(by_trying(costs))


def test_stages_that_do_not_fit_a_network_are_refused() -> None:
    network, _ = random_network((2, 2), 0)
    assert even_sizes(20, 6) == (5, 3, 3, 3, 3, 3)
    with pytest.raises(MethodError, match="5 stages: 4 nodes can form 1 to 4"):
        even_sizes(4, 5)
    with pytest.raises(MethodError, match="stages of 3, 2 nodes: give sizes of at least 1 that add up to 4"):
        allocate(network, (3, 2))


def test_a_search_without_time_fails_or_returns_what_it_has() -> None:
    network, assignment = random_network((3, 2, 2, 2), 1)
    agents = agents_of(network, assignment, 2)
    planned = plan_paths(network, assignment, agents, Limits(length=3), limit=Limit(seconds=0.0))
    assert planned.stopped and planned.bound <= planned.seconds


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(3, 2, 2, 2), (4, 2, 2, 2, 2)])
def test_the_search_itself_finds_paths_that_fill_every_node_to_its_last_place(
    sizes: tuple[int, ...], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Search, "_rotate_skips", lambda self: [])
    network, assignment = random_network(sizes, seed)
    each = sum(sizes[1:]) * 3 // (2 * sizes[0])  # microbatches of an origin, which visit two stages behind it
    agents = agents_of(network, assignment, each)
    planned = plan_paths(network, assignment, agents, Limits(length=3), avoids="load", limit=Limit(expansions=1000))
    check(network, assignment, planned.paths, Limits(length=3))
    visited = Counter(node for path in planned.paths for node in path)
    assert all(visited[node] == 3 for stage in assignment.stages[1:] for node in stage)


@pytest.mark.slow
def test_on_the_published_network_plans_are_faster_than_chance_and_the_full_pipeline() -> None:
    network = published()
    assignment = allocate(network, even_sizes(20, 6), AllocationSearch(population=40, trials=300, evolve_seconds=30))
    made, planned = make_schedule(network, assignment, 30, Limits(), limit=Limit(seconds=30))
    check(network, assignment, made.paths, Limits())
    visited = Counter(node for path in made.paths for node in path)
    assert [visited[node] for node in range(20)] == [3] * 20
    chains = full_pipeline(network, assignment, 30)
    assert made.seconds <= 0.6 * iteration(simulate(network, chains, 30))
    assert planned.bound <= made.seconds


# Schedules


def test_a_schedule_is_read_back_and_a_damaged_one_is_refused_in_one_line() -> None:
    network, assignment = random_network((2, 2, 2), 0)
    made, _ = make_schedule(network, assignment, 6, Limits(length=2), limit=QUICK)
    again = PipelineSchedule.parse(made.dump())
    assert again.dump() == made.dump() and again.timeline == made.timeline and again.seconds == made.seconds
    for old, new, message in [
        ('"microbatches":6', '"microbatches":0', "microbatches"),
        ('"schema"', '"scheme"', "scheme"),
        ('"stages":[[0,1]', '"stages":[[0,9]', "stages contain unknown nodes: the nodes"),
        ('"memory":3', '"memory":0', "no memory"),
        ('"paths":[[0', '"paths":[[2', "which is not allowed"),
        ('"work":[', '"work":[1.0,', "edge and work do not have 6 nodes"),
    ]:
        assert old in made.dump()
        with pytest.raises(MethodError, match=f"here: invalid schedule: .*{message}") as error:
            PipelineSchedule.parse(made.dump().replace(old, new, 1), "here")
        assert "\n" not in str(error.value)


def test_the_turns_of_nodes_are_all_that_is_done_in_an_iteration() -> None:
    network, assignment = random_network((2, 2, 2), 0)
    made, _ = make_schedule(network, assignment, 6, Limits(length=2), limit=QUICK)
    turns = [turn for node in made.nodes for turn in made.turns(node)]
    wanted = {(m, p, "forward") for m in range(6) for p in range(2)} | {(m, 0, "loss") for m in range(6)}
    assert set(turns) == wanted | {(m, p, "backward") for m in range(6) for p in range(2)} and len(turns) == len(
        set(turns)
    )


def test_without_a_node_the_paths_of_the_others_are_planned_again_for_as_many_microbatches() -> None:
    network, assignment = random_network((2, 2, 2), 0)
    made, _ = make_schedule(network, assignment, 8, Limits(length=2), limit=QUICK)
    less = made.without([3], QUICK)
    assert less.nodes == [0, 1, 2, 4, 5] and less.microbatches == 8 and len(less.orders) == 8
    check(network, less.assignment, less.paths, less.limits)
    fewer = made.without([0], QUICK)  # an origin: the other one begins all microbatches
    assert {path[0] for path in fewer.paths} == {1} and fewer.microbatches == 8
    with pytest.raises(MethodError, match="stage 1 has no node left without 2, 3"):
        made.without([2, 3])
    with pytest.raises(MethodError, match="node 7 is not in the schedule"):
        made.without([7])
