"""Shapes under a budget: all that are close, the closest first, and the nearest named where none is."""

from __future__ import annotations

from itertools import product

import pytest

from lamella.errors import BudgetError
from lamella.methods.minitron import enumerate_shapes

GRID = {"layers": [2, 3, 4], "width": [8, 12, 16], "heads": [1, 2]}


def size(shape) -> int:
    return shape["layers"] * shape["width"] * (10 + shape["heads"])


def test_every_shape_within_the_tolerance_is_found_and_no_other() -> None:
    found = enumerate_shapes(GRID, size, budget=500, tolerance=0.1)
    every = [dict(zip(GRID, sizes, strict=True)) for sizes in product(*GRID.values())]
    expected = [shape for shape in every if abs(size(shape) - 500) <= 50]
    assert 1 < len(expected) < len(every)
    assert sorted(map(str, expected)) == sorted(str(each.shape) for each in found)
    distances = [abs(each.cost - 500) for each in found]
    assert distances == sorted(distances) and all(each.cost == size(each.shape) for each in found)


def test_shapes_that_are_not_allowed_are_left_out() -> None:
    found = enumerate_shapes(GRID, size, 450, 0.1, allowed=lambda shape: shape["heads"] == 2)
    assert found and {each.shape["heads"] for each in found} == {2}


def test_the_nearest_shapes_are_named_where_none_is_close() -> None:
    with pytest.raises(BudgetError) as error:
        enumerate_shapes({"a": [2, 3]}, lambda shape: shape["a"] * 100, budget=240, tolerance=0.05)
    assert "a=2 (200) and a=3 (300)" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(BudgetError, match=r"the nearest are a=3 \(300\):"):
        enumerate_shapes({"a": [2, 3]}, lambda shape: shape["a"] * 100, budget=1000)
