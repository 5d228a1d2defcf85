"""Searches are independent of models: they are tested on tables of costs with known answers."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from itertools import islice

import pytest

from lamella.search import Cost, Removal, greedy, lazy_greedy, one_shot, swap

Table = Callable[[frozenset], float]


def random_costs(seed: int, levels: int) -> Table:
    """Costs that are neither monotone nor additive; few levels mean many ties."""

    def cost(removed: frozenset) -> float:
        return random.Random(f"{seed}/{sorted(removed)}").randrange(levels) / levels

    return cost


def modular_costs(seed: int, count: int) -> Table:
    draw = random.Random(seed)
    weights = draw.sample(range(1, 10 * count), count)
    return lambda removed: float(sum(weights[each] for each in removed))


def exact(table: Table) -> Callable:
    return lambda removed, candidate, bound: Cost(table(frozenset(removed) | {candidate}))


def abandoning(table: Table, seed: int = 0) -> Callable:
    """Stops early as often as the contract allows: with any lower bound that is above the bound."""
    draw = random.Random(seed)

    def cost(removed: Iterable, candidate: int, bound: float) -> Cost:
        value = table(frozenset(removed) | {candidate})
        if value > bound and draw.random() < 0.8:
            return Cost(bound + (value - bound) * draw.uniform(0.01, 1.0), exact=False)
        return Cost(value)

    return cost


def naive(
    candidates: list, table: Table, held: tuple = (), release_after: int | None = None, steps: int | None = None
) -> list[tuple[int, float]]:
    """The loop as the paper writes it: measure every candidate, take the first of the smallest."""
    removed: list = []
    order, left = [], list(candidates)
    while left and (steps is None or len(order) < steps):
        best = min(left, key=lambda c: table(frozenset([*removed, c])))  # min takes the first of equals
        removed.append(best)
        order.append((best, table(frozenset(removed))))
        left.remove(best)
        if len(removed) == release_after:
            left += held
    return order


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("levels", [2, 4, 10_000])
def test_greedy_is_the_naive_loop_also_among_ties(seed: int, levels: int) -> None:
    table, candidates = random_costs(seed, levels), random.Random(seed).sample(range(9), 9)
    found = [(step.candidate, step.cost) for step in greedy(candidates, exact(table))]
    assert found == naive(candidates, table)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("levels", [2, 4, 10_000])
def test_costs_that_stop_early_give_the_same_result(seed: int, levels: int) -> None:
    table, candidates = random_costs(seed, levels), random.Random(seed).sample(range(9), 9)
    found = [(step.candidate, step.cost) for step in greedy(candidates, abandoning(table, seed))]
    assert found == naive(candidates, table)


@pytest.mark.parametrize("seed", range(10))
def test_a_guess_changes_the_evaluation_order_and_not_the_result(seed: int) -> None:
    table = random_costs(seed, 4)
    guess = {candidate: random.Random(-seed - candidate).random() for candidate in range(8)}
    found = [step[:2] for step in greedy(range(8), abandoning(table, seed), guess=guess)]
    assert found == naive(list(range(8)), table)
    asked: list[int] = []

    def cost(removed: tuple, candidate: int, bound: float) -> Cost:
        asked.append(candidate)
        return Cost(table(frozenset(removed) | {candidate}))

    next(greedy(range(8), cost, guess=guess))
    assert asked == sorted(range(8), key=guess.__getitem__)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("release_after", [1, 2, 4, 6])
def test_held_candidates_join_right_after_the_release(seed: int, release_after: int) -> None:
    table = random_costs(seed, 5)
    found = greedy([3, 4, 5, 6, 7, 8], abandoning(table, seed), held=(0, 1, 2), release_after=release_after)
    steps = list(found)
    expected = naive([3, 4, 5, 6, 7, 8], table, held=(0, 1, 2), release_after=release_after)
    assert [(step.candidate, step.cost) for step in steps] == expected
    assert not {0, 1, 2} & {step.candidate for step in steps[:release_after]}
    assert len(steps) == 9
    assert [step.evaluations for step in steps] == [6 - k + (3 if k >= release_after else 0) for k in range(9)]


def test_held_candidates_never_join_without_a_release() -> None:
    table = modular_costs(0, 6)
    assert {step.candidate for step in greedy([0, 1, 2], exact(table), held=(3, 4))} == {0, 1, 2}
    assert {step.candidate for step in greedy([0, 1], exact(table), held=(3,), release_after=5)} == {0, 1}


@pytest.mark.parametrize("search", [greedy, lazy_greedy])
@pytest.mark.parametrize("done", range(8))
def test_a_search_that_goes_on_from_what_is_done_ends_as_one_that_was_not_interrupted(
    search: Callable, done: int
) -> None:
    table = random_costs(3, 1000) if search is greedy else modular_costs(3, 8)
    options = {"held": (0, 1), "release_after": 3}
    whole = list(search([2, 3, 4, 5, 6, 7], exact(table), **options))
    rest = list(search([2, 3, 4, 5, 6, 7], exact(table), done=whole[:done], **options))
    assert [step[:2] for step in rest] == [step[:2] for step in whole[done:]]


def test_greedy_asks_the_last_step_s_cheapest_first_so_that_the_bound_is_tight() -> None:
    table, bounds = modular_costs(1, 8), []

    def cost(removed: tuple, candidate: int, bound: float) -> Cost:
        bounds.append((len(removed), bound))
        return Cost(table(frozenset(removed) | {candidate}))

    steps = list(greedy(range(8), cost))
    for step in range(1, 8):
        asked = [bound for count, bound in bounds if count == step]
        assert asked[0] == math.inf and all(bound == steps[step].cost for bound in asked[1:])


@pytest.mark.parametrize("seed", range(15))
def test_lazy_is_greedy_where_costs_are_modular_and_asks_less(seed: int) -> None:
    table = modular_costs(seed, 12)
    lazy, full = list(lazy_greedy(range(12), abandoning(table, seed))), list(greedy(range(12), exact(table)))
    assert [step[:2] for step in lazy] == [step[:2] for step in full]
    assert sum(step.evaluations for step in lazy) < 0.75 * sum(step.evaluations for step in full)


@pytest.mark.parametrize("seed", range(10))
def test_lazy_reports_true_costs_where_it_differs(seed: int) -> None:
    table = random_costs(seed, 10_000)
    removed: set = set()
    for step in lazy_greedy(range(8), abandoning(table, seed)):
        removed.add(step.candidate)
        assert step.cost == table(frozenset(removed))
    assert removed == set(range(8))


def test_lazy_with_all_patience_is_greedy() -> None:
    for seed in range(10):
        table = random_costs(seed, 10_000)
        patient = lazy_greedy(range(7), exact(table), patience=100)
        assert [step[:2] for step in patient] == [step[:2] for step in greedy(range(7), exact(table))]


def test_one_shot_ranks_by_the_cost_alone_the_first_of_equals_first() -> None:
    costs = {"a": 2.0, "b": 1.0, "c": 2.0, "d": 0.5}

    def cost(removed: tuple, candidate: str, bound: float) -> Cost:
        assert removed == () and bound == math.inf
        return Cost(costs[candidate])

    assert one_shot(list(costs), cost) == [("d", 0.5), ("b", 1.0), ("a", 2.0), ("c", 2.0)]
    assert [name for name, _ in one_shot(list(costs), cost, largest=True)] == ["a", "c", "b", "d"]


def test_the_first_step_of_greedy_is_the_first_of_one_shot() -> None:
    for seed in range(10):
        table = random_costs(seed, 6)
        assert next(greedy(range(9), exact(table)))[:2] == one_shot(range(9), exact(table))[0]


@pytest.mark.parametrize("seed", range(20))
def test_swap_is_never_worse_and_ends_where_no_exchange_helps(seed: int) -> None:
    table = random_costs(seed, 10_000)
    chosen = random.Random(seed).sample(range(8), 3)
    better, cost = swap(chosen, range(8), abandoning(table, seed), table(frozenset(chosen)))
    assert cost == table(frozenset(better)) <= table(frozenset(chosen))
    assert len(set(better)) == 3
    for out, candidate in itertools.product(better, set(range(8)) - set(better)):
        assert table(frozenset(better) - {out} | {candidate}) >= cost


@pytest.mark.parametrize("seed", range(10))
def test_swap_finds_the_optimum_of_modular_costs(seed: int) -> None:
    table = modular_costs(seed, 9)
    optimum = min((frozenset(each) for each in itertools.combinations(range(9), 4)), key=table)
    found, cost = swap([0, 1, 2, 3], range(9), exact(table), table(frozenset(range(4))))
    assert frozenset(found) == optimum and cost == table(optimum)


def test_swap_escapes_where_greedy_is_stuck() -> None:
    """Alone, 0 is cheapest; but 1 and 2 together cost less than any pair with 0."""
    costs = {(): 0.0, (0,): 1.0, (1,): 2.0, (2,): 2.0, (0, 1): 3.0, (0, 2): 3.5, (1, 2): 1.5}

    def table(removed: frozenset) -> float:
        return costs[tuple(sorted(removed))]

    steps = list(islice(greedy([0, 1, 2], exact(table)), 2))
    assert [step.candidate for step in steps] == [0, 1]
    found, cost = swap([0, 1], [0, 1, 2], exact(table), steps[-1].cost)
    assert set(found) == {1, 2} and cost == 1.5


def test_nothing_to_remove_gives_nothing() -> None:
    def never(*_: object) -> Cost:
        raise AssertionError("no cost may be asked for")

    assert list(greedy([], never)) == list(lazy_greedy([], never)) == one_shot([], never) == []
    assert list(greedy([1], never, done=[Removal(1, 0.5, 1)])) == []
    assert swap([], [], never, 0.25) == ([], 0.25)


@pytest.mark.parametrize("search", [greedy, lazy_greedy])
def test_in_a_hurry_each_step_asks_once_and_takes_what_was_best_before(search: Callable) -> None:
    table, asked = modular_costs(0, 12), 0

    def cost(removed: tuple, candidate: int, bound: float) -> Cost:
        nonlocal asked
        asked += 1
        return exact(table)(removed, candidate, bound)

    at_leisure = [step.candidate for step in search(range(12), exact(table))]
    found = list(search(range(12), cost, out_of_time=lambda: asked > 3 * 12))
    assert [step.candidate for step in found] == at_leisure  # costs that only add up were known before
    late = [step for step in found if sum(each.evaluations for each in found[: found.index(step)]) > 3 * 12]
    assert all(step.evaluations == 1 for step in late)
    guessed = list(search(range(12), cost, guess={each: -each for each in range(12)}, out_of_time=lambda: True))
    assert guessed[0].candidate == 11 and all(step.evaluations == 1 for step in guessed)
    assert [step.cost for step in guessed] == [
        table(frozenset(each.candidate for each in guessed[: n + 1])) for n in range(12)
    ]
