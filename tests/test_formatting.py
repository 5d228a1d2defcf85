"""Numbers as people read them."""

import math

import pytest

from lamella import formatting as numbers


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


def test_no_number_is_a_negative_zero() -> None:
    assert (numbers.number(-0.0), numbers.percent(-0.0001), numbers.points(-0.0001), numbers.signed(-0.001)) == (
        "0",
        "0.0 %",
        "0 points",
        "+0.00",
    )
    assert (numbers.percent(-0.25), numbers.signed(-0.25), numbers.signed(0.25)) == ("−25.0 %", "−0.25", "+0.25")  # noqa: RUF001
    assert (numbers.percent(0.256, 0), numbers.points(0.01), numbers.points(0.025)) == ("26 %", "1 point", "2.5 points")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 plans"), (1, "1 plan"), (2, "2 plans"), (1024, "1,024 plans"), (-2, "−2 plans")],  # noqa: RUF001
)
def test_things_are_counted_in_singular_and_plural(count: int, text: str) -> None:
    assert numbers.counted(count, "plan") == text
    assert numbers.counted(2, "batch", "batches") == "2 batches"


def test_things_are_listed_as_in_a_sentence() -> None:
    assert [numbers.listed(each) for each in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "nothing", "a", "a and b", "a, b and c"
    ]  # fmt: skip
    assert numbers.listed(range(10), most=3) == "0, 1, 2 and 7 more"
    assert [numbers.numbered("layer", each) for each in ([], [3], [3, 5])] == ["no layer", "layer 3", "layers 3 and 5"]
    assert (numbers.span("layer", 3, 4), numbers.span("layer", 3, 6)) == ("layer 3", "layers 3 to 5")
    assert (numbers.share(1, 4), numbers.share(1, 0)) == (0.25, 0.0)
