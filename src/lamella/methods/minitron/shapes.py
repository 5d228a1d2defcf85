"""Shapes under a budget: every combination of some sizes whose cost is close to the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lamella.errors import BudgetError


@dataclass(frozen=True)
class CostedShape:
    """A shape with its cost.

    Attributes:
        shape: size of each axis by name.
        cost: cost of the shape, such as its number of parameters.
    """

    shape: dict[str, int]
    cost: int

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.shape.items()) + f" ({self.cost})"


def enumerate_shapes(
    grid: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, int]], int],
    budget: float,
    tolerance: float = 0.05,
    allowed: Callable[[Mapping[str, int]], bool] = lambda shape: True,
) -> list[CostedShape]:
    """Return the shapes of a grid whose cost is within ``tolerance`` of the budget, the closest first.

    Args:
        grid: the sizes to try, by the name of each axis.
        cost: the cost of a shape, such as its number of parameters.
        budget: the cost to meet.
        tolerance: allowed difference from the budget as a fraction of it; 0.05 in Minitron (arXiv 2407.14679).
        allowed: whether a combination of sizes is valid.

    Raises:
        BudgetError: when no shape is that close; the message names the nearest ones.

    >>> found = enumerate_shapes({"a": [1, 2, 3], "b": [2, 4]}, lambda s: s["a"] * s["b"], budget=6, tolerance=0.4)
    >>> [str(candidate) for candidate in found]
    ['a=3 b=2 (6)', 'a=1 b=4 (4)', 'a=2 b=2 (4)', 'a=2 b=4 (8)']
    """
    shapes = [dict(zip(grid, sizes, strict=True)) for sizes in product(*grid.values())]
    candidates = [CostedShape(shape, cost(shape)) for shape in shapes if allowed(shape)]
    candidates.sort(key=lambda candidate: (abs(candidate.cost - budget), *candidate.shape.values()))
    fitting = [candidate for candidate in candidates if abs(candidate.cost - budget) <= tolerance * budget]
    if not fitting:
        below = [candidate for candidate in candidates if candidate.cost <= budget][:1]
        above = [candidate for candidate in candidates if candidate.cost > budget][:1]
        near = " and ".join(map(str, below + above)) or "none at all"
        raise BudgetError(
            f"no shape costs {budget:.0f} within {tolerance:.0%}; the nearest are {near}: change the budget, the "
            "tolerance or the grid"
        )
    return fitting
