"""Numbers as people read them."""

import math

import pytest

from lamella.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (18.213, "18.2"),
        (1.3166, "1.32"),
        (0.35512, "0.355"),
        (0.0004, "0.00040"),
        (1234.5, "1,234"),
        (2_500_000.0, "2.5e+06"),
        (-0.5, "−0.500"),  # noqa: RUF001
        (None, "–"),  # noqa: RUF001
        (math.nan, "–"),  # noqa: RUF001
        (math.inf, "–"),  # noqa: RUF001
    ],
)
def test_a_number_has_three_digits(value: float | None, text: str) -> None:
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [(18.21, 0.91, "18.2 ± 0.9"), (0.355, 0.0178, "0.355 ± 0.018"), (18.21, None, "18.2"), (18.21, math.nan, "18.2")],
)
def test_an_error_is_as_precise_as_its_mean(mean: float, error: float | None, text: str) -> None:
    assert numbers.estimate({"mean": mean, "error": error}) == text


def test_units() -> None:
    assert numbers.count(134_515_008) == "134.5 M"
    assert numbers.size(538_060_032) == "538.1 MB"
    assert numbers.size(0) == "0 B"
    assert numbers.duration(0.0123) == "12.3 ms"
    assert numbers.duration(1.106) == "1.11 s"
    assert numbers.duration(1200) == "20 min"
    assert numbers.change(100, 81.6) == "−18.4 %"  # noqa: RUF001
    assert numbers.change(100, 100) == "same"
    assert numbers.change(0, 1) == "–"  # noqa: RUF001
