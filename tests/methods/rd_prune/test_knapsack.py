"""The knapsack is exact: against every allocation where there are few, against duality where there are many."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lamella.errors import BudgetError
from lamella.methods.rd_prune.knapsack import Allocation, allocate

STEPS = 10


def instance(seed: int, layers: int = 4, steps: int = STEPS) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Curves that are neither convex nor monotone, and what is kept of layers of different sizes."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(3, 60, layers)
    curves = [np.concatenate([[0.0], draw.random(steps) * draw.random()]) for _ in range(layers)]
    return curves, [size - size * np.arange(steps + 1) // steps for size in sizes]


def brute_force(curves: list[np.ndarray], costs: list[np.ndarray], budget: int) -> float:
    """The least sum over every allocation."""
    loss, cost = np.zeros(1), np.zeros(1, np.int64)
    for d, c in zip(curves, costs, strict=True):
        loss, cost = np.add.outer(loss, d).ravel(), np.add.outer(cost, c).ravel()
    return float(loss[cost <= budget].min())


def checked(found: Allocation, curves: list[np.ndarray], costs: list[np.ndarray], budget: int) -> Allocation:
    """What is reported is what the choice gives, and it fits."""
    assert found.cost == sum(c[q] for c, q in zip(costs, found.choice, strict=True)) <= budget
    assert found.distortion == math.fsum(d[q] for d, q in zip(curves, found.choice, strict=True))
    return found


@pytest.mark.parametrize("seed", range(200))
def test_the_result_is_that_of_brute_force(seed: int) -> None:
    curves, costs = instance(seed)
    budget = int(np.random.default_rng(seed + 1000).random() * sum(c[0] for c in costs))
    found = checked(allocate(curves, costs, budget, unit=1), curves, costs, budget)
    assert found.distortion == pytest.approx(brute_force(curves, costs, budget), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("seed", range(40))
def test_bounds_hold_and_the_result_is_the_best_within_them(seed: int) -> None:
    curves, costs = instance(seed)
    draw = np.random.default_rng(seed + 2000)
    lowest = draw.integers(0, 4, 4)
    highest = draw.integers(5, STEPS + 1, 4)
    inside = [slice(a, b + 1) for a, b in zip(lowest, highest, strict=True)]
    least = sum(c[part].min() for c, part in zip(costs, inside, strict=True))
    budget = int(least + draw.random() * sum(c[0] for c in costs) / 3)
    found = allocate(curves, costs, budget, unit=1, lowest=lowest.tolist(), highest=highest.tolist())
    checked(found, curves, costs, budget)
    assert all(a <= q <= b for a, q, b in zip(lowest, found.choice, highest, strict=True))
    within = [d[part] for d, part in zip(curves, inside, strict=True)]
    assert found.distortion == pytest.approx(
        brute_force(within, [c[part] for c, part in zip(costs, inside, strict=True)], budget), rel=1e-12, abs=1e-15
    )


@pytest.mark.parametrize("unit", [2, 5, 17])
@pytest.mark.parametrize("seed", range(20))
def test_in_larger_units_it_is_exact_for_the_rounded_costs_and_never_passes_the_budget(seed: int, unit: int) -> None:
    curves, costs = instance(seed)
    budget = int(0.6 * sum(c[0] for c in costs))
    found = checked(allocate(curves, costs, budget, unit=unit), curves, costs, budget)
    rounded = [-(-c // unit) for c in costs]
    assert found.distortion == pytest.approx(brute_force(curves, rounded, budget // unit), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_on_large_instances_no_lower_bound_of_lagrange_is_passed_and_convex_curves_reach_it(seed: int) -> None:
    """max over lambda of [min over q of sum (d + lambda c)] - lambda budget never exceeds the optimum."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(100, 400, 60)
    phi = np.arange(101) / 100
    convex = [draw.random() * phi ** (2 + draw.random()) for _ in sizes]
    costs = [size - size * np.arange(101) // 100 for size in sizes]
    budget = int(0.4 * sizes.sum())
    found = checked(allocate(convex, costs, budget, unit=1), convex, costs, budget)

    def dual(price: float) -> float:
        return sum(float((d + price * c).min()) for d, c in zip(convex, costs, strict=True)) - price * budget

    bound = max(dual(price) for price in np.geomspace(1e-6, 1e-1, 2000))
    assert bound <= found.distortion + 1e-12
    assert found.distortion <= bound * 1.005  # the gap is at most one step of one layer


def test_with_a_budget_for_everything_nothing_is_given_up() -> None:
    for seed in range(20):
        curves, costs = instance(seed)
        for unit in (1, 7, None):
            assert allocate(curves, costs, sum(c[0] for c in costs), unit=unit).choice == (0, 0, 0, 0)


def test_a_layer_whose_curve_is_all_zeros_goes_first() -> None:
    curves, costs = instance(3)
    curves[2] = np.zeros(STEPS + 1)
    others = [0, 1, 3]
    whole = sum(c[0] for c in costs)
    found = allocate(curves, costs, int(whole - costs[2][0]), unit=1)
    assert found.distortion == 0 and found.choice[2] == STEPS and all(found.choice[layer] == 0 for layer in others)
    some = allocate(curves, costs, int(whole - costs[2][0] // 2), unit=1)
    assert some.distortion == 0 and 0 < some.choice[2] < STEPS  # and no more of it than needed


def test_scaling_all_curves_changes_nothing_and_the_order_of_layers_does_not_change_the_cost() -> None:
    for seed in range(30):
        curves, costs = instance(seed, layers=5)
        budget = int(0.5 * sum(c[0] for c in costs))
        found = allocate(curves, costs, budget, unit=1)
        assert allocate([10 * d for d in curves], costs, budget, unit=1).choice == found.choice
        order = np.random.default_rng(seed).permutation(5)
        moved = allocate([curves[k] for k in order], [costs[k] for k in order], budget, unit=1)
        assert moved.distortion == pytest.approx(found.distortion, rel=1e-12)


def test_costs_that_are_not_monotone_in_the_option_are_fine() -> None:
    curves = [np.array([0.0, 3.0, 1.0]), np.array([0.0, 0.5, 4.0])]
    costs = [np.array([5, 1, 4]), np.array([6, 5, 0])]
    for budget in range(1, 12):
        pairs = itertools.product(range(3), repeat=2)
        fits = [curves[0][a] + curves[1][b] for a, b in pairs if costs[0][a] + costs[1][b] <= budget]
        assert allocate(curves, costs, budget, unit=1).distortion == min(fits)


def test_a_budget_that_no_choice_keeps_is_refused_and_one_that_only_rounding_breaks_is_not() -> None:
    curves, costs = [np.array([0.0, 1.0])] * 3, [np.array([10, 4])] * 3
    with pytest.raises(BudgetError, match="a budget of 11 is out of reach: the cheapest choice costs 12") as error:
        allocate(curves, costs, 11)
    assert "\n" not in str(error.value)
    assert allocate(curves, costs, 12, unit=5).choice == (1, 1, 1)
