"""Runs of layers with the lowest cost."""

from __future__ import annotations

import random

import pytest

from lamella.errors import BudgetError
from lamella.search import window


@pytest.mark.parametrize("seed", range(10))
def test_window_finds_the_cheapest_run_the_first_of_equals(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.randrange(4) for _ in range(12)]
    for size in range(1, 13):
        starts = range(12 - size + 1)
        expected = min(costs[start] for start in starts)
        assert window(12, size, costs.__getitem__) == costs.index(expected, 0, len(starts))


def test_window_stops_at_the_last_start_and_refuses_runs_that_do_not_fit() -> None:
    assert window(10, 2, lambda start: -start) == 8
    assert window(10, 2, lambda start: -start, last=3) == 3
    for size in (0, 11):
        with pytest.raises(BudgetError, match="does not fit into 10"):
            window(10, size, float)
