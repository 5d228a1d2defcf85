"""The knapsack: the best of all sets, as counting all of them and an established solver find it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from lamella.errors import MethodError
from lamella.methods.laptop_diff import Choice, covering, greedy


def drawn(count: int, seed: int, largest: int = 10_000) -> tuple[list[float], list[int]]:
    """Scores that differ by orders of magnitude, and sizes."""
    draw = np.random.default_rng(seed)
    return (10 ** draw.uniform(-4, 0, count)).tolist(), draw.integers(1, largest, count).tolist()


def is_whole(choice: Choice, values: list[float], sizes: list[int], target: int) -> None:
    assert choice.size == sum(sizes[each] for each in choice.chosen) >= target
    assert choice.cost == pytest.approx(sum(values[each] for each in choice.chosen), rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.01, 0.35, 0.5, 0.9, 1.0])
def test_it_is_the_best_of_all_sets(seed: int, share: float) -> None:
    values, sizes = drawn(12, seed)
    target = int(share * sum(sizes))
    found = covering(values, sizes, target)
    is_whole(found, values, sizes, target)
    sets = itertools.product((0, 1), repeat=12)
    costs = [np.dot(each, values) for each in sets if np.dot(each, sizes) >= target]
    assert found.cost == pytest.approx(min(costs), rel=1e-12) and found.bound == found.cost


def test_all_sixty_five_thousand_sets_of_sixteen_blocks() -> None:
    values, sizes = drawn(16, 5)
    every = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    costs, removed = every @ values, every @ sizes
    for share in (0.2, 0.35, 0.5):
        target = int(share * sum(sizes))
        assert covering(values, sizes, target).cost == pytest.approx(costs[removed >= target].min(), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_an_established_solver_finds_nothing_better_among_a_hundred(seed: int) -> None:
    values, sizes = drawn(100, seed, 10**7)
    target = sum(sizes) // 2
    found = covering(values, sizes, target)
    is_whole(found, values, sizes, target)
    solved = milp(
        values, integrality=np.ones(100), bounds=Bounds(0, 1), constraints=LinearConstraint([sizes], target, np.inf),
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    assert found.cost == pytest.approx(solved.fun, rel=1e-9) and found.bound == found.cost


def test_a_target_that_is_met_with_nothing_to_spare_counts() -> None:
    assert covering([1.0, 1.13], [1000, 1008], 1000).chosen == (0,)  # rounding sizes down would take the other


def test_scores_in_other_units_choose_the_same() -> None:
    values, sizes = drawn(30, 1)
    target = sum(sizes) // 3
    assert covering(values, sizes, target).chosen == covering([7e6 * each for each in values], sizes, target).chosen


def test_blocks_of_one_size_are_taken_by_their_score() -> None:
    values, _ = drawn(20, 2)
    assert covering(values, [64] * 20, 64 * 7).chosen == tuple(sorted(np.argsort(values)[:7].tolist()))


def test_what_gains_by_going_goes_and_what_removes_nothing_stays() -> None:
    assert covering([-1.0, 5.0, 0.5, 0.1], [10, 10, 10, 0], 0).chosen == (0,)
    assert covering([-1.0, 5.0, 0.5, 0.1], [10, 10, 10, 0], 20).chosen == (0, 2)


def test_greedy_is_no_better_and_meets_the_target() -> None:
    for seed in range(20):
        values, sizes = drawn(15, seed)
        target = sum(sizes) // 2
        near = greedy(values, sizes, target)
        is_whole(near, values, sizes, target)
        assert near.cost >= covering(values, sizes, target).cost * (1 - 1e-12)


def test_where_states_have_no_room_the_answer_says_what_that_may_have_cost() -> None:
    values, sizes = drawn(60, 3, 10**7)
    target = sum(sizes) // 2
    best, hurried = covering(values, sizes, target), covering(values, sizes, target, most=4)
    is_whole(hurried, values, sizes, target)
    assert hurried.bound <= best.cost * (1 + 1e-12) and best.cost <= hurried.cost * (1 + 1e-12)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(MethodError, match="31 parameters cannot be removed: all blocks together have 30"):
        covering([1.0, 1.0], [10, 20], 31)
