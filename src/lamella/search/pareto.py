"""Pareto fronts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name")


def pareto(points: Mapping[Name, tuple[float, float]]) -> list[Name]:
    """Return the points that no other point dominates in both costs, in their given order.

    >>> pareto({"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (2.0, 3.0)})
    ['a', 'b']
    """

    def is_dominated(one: tuple[float, float]) -> bool:
        return any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points.values())

    return [name for name, point in points.items() if not is_dominated(point)]
