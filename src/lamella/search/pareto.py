"""What nothing beats in everything at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name")


def pareto(points: Mapping[Name, tuple[float, float]]) -> list[Name]:
    """Which points nothing beats in both costs at once, in the order that they are given in.

    >>> pareto({"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (2.0, 3.0)})
    ['a', 'b']
    """

    def beaten(one: tuple[float, float]) -> bool:
        return any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points.values())

    return [name for name, point in points.items() if not beaten(point)]
