"""Evenly spaced choices and cheapest runs."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from lamella.errors import BudgetError
from lamella.search import balanced, window


def test_balanced_fixtures() -> None:
    """Worked out by hand from round(j (L - 1) / (n - 1))."""
    assert balanced(30, 2) == [0, 29]
    assert balanced(30, 6) == [0, 6, 12, 17, 23, 29]  # multiples of 5.8: 5.8, 11.6, 17.4, 23.2
    assert balanced(7, 4) == [0, 2, 4, 6]
    assert balanced(10, 4) == [0, 3, 6, 9]
    assert balanced(24, 4) == [0, 8, 15, 23]  # 7.67, 15.33
    assert balanced(2, 2) == [0, 1]
    assert balanced(30, 30) == list(range(30))


@pytest.mark.parametrize("total", [2, 3, 8, 24, 30, 32, 80])
def test_balanced_keeps_that_many_both_ends_and_even_gaps(total: int) -> None:
    for keep in range(2, total + 1):
        chosen = balanced(total, keep)
        assert len(chosen) == len(set(chosen)) == keep
        assert chosen == sorted(chosen) and chosen[0] == 0 and chosen[-1] == total - 1
        gaps = [after - before for before, after in pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1 or keep == 2


@pytest.mark.parametrize(("total", "keep"), [(5, 1), (5, 6), (5, 0), (1, 1)])
def test_a_number_that_cannot_be_kept_is_refused(total: int, keep: int) -> None:
    with pytest.raises(BudgetError, match=f"keep at least 2 and at most {total}"):
        balanced(total, keep)


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
