"""The frontier search: of all pairs of two thresholds that skip enough, find the one of least cost.

The skipped fraction g and its cost f both grow with each threshold. So for each text threshold the best image threshold
is the smallest that skips enough, and it falls as the text threshold rises: a walk along the edge. The points of the
edge are compared for every text threshold, also where the image threshold stays the same: there the lower text
threshold should cost less, but a measured f is monotone only nearly.

    images ^  o  .  .  .  .     * o   evaluated
           |  *  o  o  .  .       o   the edge, at and above which enough is skipped
           |  .  *  *  o  o
           |  .  .  .  *  *
           +-----------------> text
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lamella.errors import MethodError


@dataclass(frozen=True)
class FrontierResult:
    """The result of a frontier search.

    Attributes:
        text: index of the text threshold in its grid.
        image: index of the image threshold in its grid.
        skipped: g at this pair, the fraction of skipped pairs of a token and an expert.
        cost: f at this pair.
        evaluations: number of pairs of thresholds that were evaluated.
        violations: number of evaluated pairs at which f or g is lower than at a pair of lower thresholds; the search
            assumes 0.
    """

    text: int
    image: int
    skipped: float
    cost: float
    evaluations: int
    violations: int


@dataclass
class ThresholdPairs:
    """Evaluate pairs of thresholds, each only once.

    Attributes:
        evaluate: from the indices of both thresholds to g and f.
        known: the results so far.
    """

    evaluate: Callable[[int, int], tuple[float, float]]
    known: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    def __call__(self, text: int, image: int) -> tuple[float, float]:
        """Return g and f of a pair of thresholds, given their indices."""
        if (text, image) not in self.known:
            self.known[text, image] = self.evaluate(text, image)
        return self.known[text, image]

    def violations(self) -> int:
        """Count the pairs that skip less, or cost less, than another pair neither of whose thresholds is higher."""
        noise = 1e-9
        points = sorted(self.known)
        return sum(
            any(i <= at[0] and j <= at[1] and min(self.known[at][n] - self.known[i, j][n] for n in (0, 1)) < -noise
                for i, j in points if (i, j) != at)
            for at in points
        )  # fmt: skip


def frontier(
    text: int, image: int, evaluate: Callable[[int, int], tuple[float, float]], share: float
) -> FrontierResult:
    """Find the pair of thresholds of least cost among those that skip enough.

    Args:
        text: number of text thresholds in the grid, from low to high.
        image: number of image thresholds in the grid, from low to high.
        evaluate: from the indices of both thresholds to the skipped fraction g and the cost f; it is called at most
            2 * text + image times, once for each pair.
        share: rho, the least fraction to skip.

    Raises:
        MethodError: when the highest thresholds skip less.
    """
    at = ThresholdPairs(evaluate)
    most, _ = at(text - 1, image - 1)
    if most < share:
        raise MethodError(f"modes: the highest thresholds skip {most:.1%} and not {share:.1%}: lower skip")
    edge, j = [], image - 1
    for i in range(text):
        while j >= 0 and at(i, j)[0] >= share:
            j -= 1
        if j + 1 < image and at(i, j + 1)[0] >= share:  # not where g falls although a threshold grows
            edge.append((i, j + 1))
    best = min(edge, key=lambda point: at(*point)[1])
    skipped, cost = at(*best)
    return FrontierResult(*best, skipped, cost, len(at.known), at.violations())


def parity_grid(points: int, highest: float) -> list[float]:
    """Return the paper's thresholds: 2 / (1 + exp(-10 (x - 1))) for x evenly spaced from 0 to ``highest``.

    Args:
        points: number of thresholds, at least 2.
        highest: the last x; 0.71 for text and 0.6 for images in the paper.

    >>> [round(each, 6) for each in parity_grid(3, 0.71)]
    [9.1e-05, 0.00316, 0.104365]
    """
    xs = [highest * index / (points - 1) for index in range(points)]
    return [2 / (1 + math.exp(-10 * (x - 1))) for x in xs]


def quantile_grid(points: int, scores: Tensor) -> list[float]:
    """Return thresholds at evenly spaced quantiles of the scores: the first skips nothing, the last everything.

    Without scores there is a single threshold, since all would have the same effect.

    Args:
        points: number of thresholds, at least 2.
        scores: importance scores of the experts of all tokens, of any shape.

    >>> import torch
    >>> quantile_grid(3, torch.tensor([0.4, 0.1, 0.2, 0.3]))
    [0.0, 0.3, 0.8]
    """
    ordered = scores.flatten().double().sort().values
    if len(ordered) == 0:
        return [0.0]
    indices = [len(ordered) * step // (points - 1) for step in range(1, points - 1)]
    return [0.0, *(float(ordered[index]) for index in indices), 2 * float(ordered[-1])]
