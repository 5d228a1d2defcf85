"""The allocation against all allocations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from lamella.errors import BudgetError, MethodError
from lamella.methods.iformer import allocate, flat, mirrored, most_important


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_rising_allocations_within_the_budget(seed: int) -> None:
    draw = np.random.default_rng(seed)
    layers, heads, least = 5, 4, int(draw.integers(0, 3))
    importance = draw.exponential(size=(layers, heads))
    cost = [int(each) for each in np.cumsum(draw.integers(1, 20, heads + 1)) + draw.integers(0, 9)]
    budget = int(draw.integers(layers * cost[least], layers * cost[-1] + 1))
    best = min(
        (sum(np.sort(row)[: heads - a].sum() for row, a in zip(importance, kept, strict=True)), kept)
        for kept in product(range(least, heads + 1), repeat=layers)
        if list(kept) == sorted(kept) and sum(cost[a] for a in kept) <= budget
    )
    found = allocate(importance, cost, budget, least=least)
    assert found == sorted(found) and sum(cost[a] for a in found) <= budget
    lost = sum(np.sort(row)[: heads - a].sum() for row, a in zip(importance, found, strict=True))
    assert lost == pytest.approx(best[0], abs=1e-12)


def test_a_model_of_real_size_takes_no_time_to_speak_of() -> None:
    importance = np.random.default_rng(0).exponential(size=(24, 16))
    cost = [100 + 13 * a + a * a for a in range(17)]
    found = allocate(importance, cost, 24 * cost[12])
    assert found == sorted(found) and sum(cost[a] for a in found) <= 24 * cost[12]


def test_all_heads_stay_where_the_budget_allows_it() -> None:
    assert allocate(np.ones((3, 2)), [1, 2, 3], 9) == [2, 2, 2]


def test_a_budget_below_the_smallest_shape_is_refused_in_one_line() -> None:
    with pytest.raises(BudgetError, match="budget of 5 is below the smallest shape, 6 with 1 of 2 heads") as error:
        allocate(np.ones((3, 2)), [1, 2, 3], 5)
    assert "\n" not in str(error.value)
    with pytest.raises(MethodError, match="least 3: layers have 2 heads"):
        allocate(np.ones((3, 2)), [1, 2, 3], 9, least=3)


def test_other_shapes_have_as_many_heads() -> None:
    assert mirrored([1, 2, 4]) == [4, 2, 1] and flat([1, 2, 4]) == [2, 2, 3] and flat([2, 4]) == [3, 3]


def test_the_most_important_heads_stay() -> None:
    worth = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 5.0]])
    assert most_important(worth, [2, 1]) == [(0, 2), (2,)]
