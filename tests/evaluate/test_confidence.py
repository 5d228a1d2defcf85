"""The confidence sequence, compared with capital products on a grid, with closed forms, and in simulations."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom

from lamella.evaluate.confidence import Interval, guarantee, log_capital, rounded

ALPHA = 0.05


def streams(name: str, count: int, length: int) -> tuple[np.ndarray, float]:
    """Streams of values in [0, 1] [count, length], and their mean."""
    generator = np.random.default_rng(7)
    if name.startswith("beta"):
        a, b = map(float, name.split()[1:])
        return generator.beta(a, b, (count, length)), a / (a + b)
    mean = float(name)
    return (generator.random((count, length)) < mean).astype(float), mean


@pytest.mark.parametrize("name", ["0.5", "0.9", "0.02", "beta 9 1", "beta 0.2 0.2", "beta 40 60"])
def test_the_mean_is_covered_at_all_times_at_once(name: str) -> None:
    values, mean = streams(name, 1000, 300)
    capital = np.maximum(log_capital(values, mean), log_capital(1 - values, 1 - mean))
    missed = int((capital.max(axis=1) >= math.log(2 / ALPHA)).sum())
    assert missed <= binom.ppf(0.999, len(values), ALPHA)


def test_exact_products_on_a_grid_of_means_refute_the_same_means() -> None:
    values = [Fraction(each, 16) for each in (3, 9, 16, 0, 12, 11, 12, 15, 16, 8, 14, 13, 9, 10, 16, 11, 12, 13, 9, 14)]
    stakes = [Fraction(1, 2**k) for k in range(16)]

    def refuted(given: list[Fraction], mean: Fraction) -> bool:
        capital = sum(stake / 2 * math.prod(1 + stake * (x / mean - 1) for x in given) for stake in stakes)
        return capital >= Fraction(2) / Fraction(5, 100)

    grid = [Fraction(each, 200) for each in range(1, 200)]
    for count in (1, 3, 7, len(values)):
        given = values[:count]
        kept = [m for m in grid if not refuted(given, m) and not refuted([1 - x for x in given], 1 - m)]
        found = Interval.of([float(x) for x in given])
        assert kept[0] - Fraction(1, 200) <= found.lower <= kept[0]
        assert kept[-1] <= found.upper <= kept[-1] + Fraction(1, 200)


@pytest.mark.parametrize("count", [1, 8, 60])
def test_values_that_are_all_one_have_the_bound_of_the_closed_form(count: int) -> None:
    """With y = 1 / m - 1, the capital is the polynomial sum_k 2^-(k+1) (1 + 2^-k y)^n."""
    terms = [0.5 ** (k + 1) * np.polynomial.Polynomial([1, 0.5**k]) ** count for k in range(16)]
    roots = (sum(terms[1:], terms[0]) - 2 / ALPHA).roots()
    (y,) = [root.real for root in roots if abs(root.imag) < 1e-9 and root.real > 0]
    ones, zeros = Interval.of(np.ones(count)), Interval.of(np.zeros(count))
    assert ones.lower == pytest.approx(1 / (1 + y), rel=1e-6) and ones.upper == 1
    assert zeros.upper == pytest.approx(1 - ones.lower) and zeros.lower == 0
    assert ones.lower >= (ALPHA / 4) ** (1 / count)  # the half of the capital that bets everything


def hoeffding(values: np.ndarray) -> float:
    """Width of the predictable plug-in Hoeffding confidence sequence of the paper."""
    t = np.arange(1, len(values) + 1)
    stakes = np.minimum(1, np.sqrt(8 * math.log(2 / ALPHA) / (t * np.log(t + 1))))
    return float(2 * (math.log(2 / ALPHA) + (stakes**2).sum() / 8) / stakes.sum())


@pytest.mark.parametrize("name", ["0.5", "0.9", "beta 9 1", "beta 40 60"])
def test_many_values_give_no_wider_interval_than_hoeffding(name: str) -> None:
    (values,), _ = streams(name, 1, 20_000)
    found = Interval.of(values)
    assert found.upper - found.lower <= hoeffding(values)
    if name != "0.5":  # whose variance is the largest possible
        assert found.upper - found.lower <= 0.7 * hoeffding(values)


def test_the_interval_contains_the_mean_of_the_values_and_shrinks_with_more_of_them() -> None:
    (values,), _ = streams("beta 9 1", 1, 1000)
    widths = []
    for count in (0, 10, 100, 1000):
        found = Interval.of(values[:count])
        assert not count or found.lower < values[:count].mean() < found.upper
        widths.append(found.upper - found.lower)
    assert widths[0] == 1 and widths == sorted(widths, reverse=True)
    assert Interval.of(values, 0.99).within(found) == Interval(found.lower, found.upper, 0.99)


def test_an_interval_is_symmetric_and_does_not_depend_on_the_order() -> None:
    (values,), _ = streams("beta 2 1", 1, 50)
    found, mirrored, reversed_ = Interval.of(values), Interval.of(1 - values), Interval.of(values[::-1])
    assert (mirrored.lower, mirrored.upper) == pytest.approx((1 - found.upper, 1 - found.lower))
    assert (reversed_.lower, reversed_.upper) == pytest.approx((found.lower, found.upper))


def test_the_guarantee_rounds_outwards() -> None:
    agreement = vars(Interval(0.52399, 0.87301))
    assert rounded(agreement) == ("52.3 %", "87.4 %")
    assert guarantee(agreement).startswith("With 95 % confidence, the top token agrees on at least 52.3 % of positions")


def test_a_verdict_needs_the_whole_interval_on_one_side() -> None:
    interval = Interval(0.6, 0.8)
    assert [interval.verdict(share) for share in (0.5, 0.6, 0.7, 0.8, 0.9)] == [
        *("holds", "holds", "undecided", "undecided", "does not hold")
    ]
