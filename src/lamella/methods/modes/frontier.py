"""The frontier search: of two thresholds, the pair that costs least and skips enough.

What is skipped, g, and what it costs, f, both grow with each threshold. So for each threshold of text the best one for
images is the smallest that is enough, and it falls while the other rises: a walk along the edge, of at most as many
steps as the grid has rows and columns.

    images ^  . . . . .        evaluated: the points of the walk
           |  *           .    enough is skipped at and above the edge
           |  * * *       .
           |      * * *   .
           +-----------------> text
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lamella.errors import MethodError


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        text, image: the places of the thresholds in their grids.
        skipped, cost: g and f there.
        evaluations: how many pairs were evaluated.
        falls: how often f or g fell where a threshold rose, in points that were evaluated; 0 as the search assumes.
    """

    text: int
    image: int
    skipped: float
    cost: float
    evaluations: int
    falls: int


@dataclass
class Evaluated:
    """The pairs that were evaluated, each once."""

    evaluate: Callable[[int, int], tuple[float, float]]
    known: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    def __call__(self, text: int, image: int) -> tuple[float, float]:
        if (text, image) not in self.known:
            self.known[text, image] = self.evaluate(text, image)
        return self.known[text, image]

    def falls(self) -> int:
        """How many of the pairs skip less, or cost less, than one whose thresholds are both no higher."""
        noise = 1e-9
        points = sorted(self.known)
        return sum(
            any(i <= at[0] and j <= at[1] and min(self.known[at][n] - self.known[i, j][n] for n in (0, 1)) < -noise
                for i, j in points if (i, j) != at)
            for at in points
        )  # fmt: skip


def frontier(text: int, image: int, evaluate: Callable[[int, int], tuple[float, float]], share: float) -> Found:
    """The pair of thresholds that costs least of those that skip enough.

    Args:
        text, image: how many thresholds each grid has, from low to high.
        evaluate: from their places to the share that is skipped, g, and the cost, f. At most text + image are asked.
        share: rho, the least to skip.

    Raises:
        MethodError: when the highest thresholds skip less.
    """
    at = Evaluated(evaluate)
    most, _ = at(text - 1, image - 1)
    if most < share:
        raise MethodError(f"modes: the highest thresholds skip {most:.1%} and not {share:.1%}: ask for less")
    edge, j = [], image - 1
    for i in range(text):
        before = j
        while j >= 0 and at(i, j)[0] >= share:
            j -= 1
        if j < before:  # else the point of the edge above costs no more, since its threshold of text is lower
            edge.append((i, j + 1))
    best = min(edge, key=lambda point: at(*point)[1])
    skipped, cost = at(*best)
    return Found(*best, skipped, cost, len(at.known), at.falls())


def parity_grid(points: int, highest: float) -> list[float]:
    """The paper's grid of thresholds: 2 / (1 + exp(-10 (x - 1))) for x evenly spaced from 0 to ``highest``.

    >>> [round(each, 6) for each in parity_grid(3, 0.71)]
    [9.1e-05, 0.00316, 0.104365]
    """
    places = [highest * place / (points - 1) for place in range(points)]
    return [2 / (1 + math.exp(-10 * (place - 1))) for place in places]


def quantile_grid(points: int, scores: Tensor) -> list[float]:
    """Thresholds that skip, one after the other, the same share more of these scores: from nothing to all.

    Of no scores there is one threshold, since all would do the same.

    >>> import torch
    >>> quantile_grid(3, torch.tensor([0.4, 0.1, 0.2, 0.3]))
    [0.0, 0.3, 0.8]
    """
    ordered = scores.flatten().double().sort().values
    if len(ordered) == 0:
        return [0.0]
    places = [len(ordered) * place // (points - 1) for place in range(1, points - 1)]
    return [0.0, *(float(ordered[place]) for place in places), 2 * float(ordered[-1])]
