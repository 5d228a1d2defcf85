"""Remove one run of consecutive layers, the one across which the residual stream turns least. A baseline.

Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887.
"""

from __future__ import annotations

from typing import Literal

from lamella.data import ImageText, Text
from lamella.measure import angular_distance
from lamella.plan import ModelReference, PlanSeries, Point
from lamella.registry import method
from lamella.search import window
from lamella.stack import Stack


@method("window", paper="2403.17887", purpose="prune", baseline=True)
def angular_window(
    stack: Stack, calibration: Text | ImageText, *, positions: Literal["last", "all"] = "last"
) -> PlanSeries:
    """Remove the run of n consecutive layers with the smallest angle between its input and its output, for every n.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], alone or with an attention mask; or images with text.
        positions: measure at the ``last`` token of each sequence, as the paper does, or at ``all`` tokens.

    Returns:
        A series with one plan per n; a longer run need not contain a shorter one.
    """
    angles = angular_distance(stack, calibration, positions).values
    points = [Point(scores={"angle": 0.0})]
    for size in range(1, len(stack)):
        start = window(len(stack), size, angles[:, size].__getitem__)
        drop = [f"layers.{layer}" for layer in range(start, start + size)]
        points.append(Point(drop=drop, scores={"angle": float(angles[start, size])}))
    return PlanSeries(model=ModelReference.of(stack), points=points)
