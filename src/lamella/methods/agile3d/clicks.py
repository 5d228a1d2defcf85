"""Clicks, and the user who makes them: always where the prediction is most deeply wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor

BACKGROUND = 0
Labels = NDArray[np.int64]


class Click(NamedTuple):
    """One click; in a sequence of them, its place is its time.

    Attributes:
        label: of the object, from 1; 0 is the background.
        token: that was clicked.
    """

    label: int
    token: int


Clicks = tuple[Click, ...]


def overwritten(labels: Tensor, clicks: Clicks) -> Tensor:
    """The labels of tokens [N], with what the clicked ones were said to be; of two clicks on one, the later counts."""
    labels = labels.clone()
    for click in clicks:
        labels[click.token] = click.label
    return labels


def relabelled(objects: Tensor, chosen: Sequence[int]) -> Tensor:
    """True objects [...] as the labels of a task: the chosen ones are 1..M in their order, all else is background."""
    labels = objects.new_zeros(objects.shape)
    for label, each in enumerate(chosen, start=1):
        labels[objects == each] = label
    return labels


class Region(NamedTuple):
    """Tokens that are all taken for the same wrong thing.

    Attributes:
        label: what they are.
        depth: how far its deepest token is from the nearest one outside.
        token: the deepest.
    """

    label: int
    depth: float
    token: int


def regions(truth: Tensor, predicted: Tensor, coords: Tensor) -> list[Region]:
    """Wrong tokens grouped by what they are and what they are taken for: one region for each pair, connected or not.

    Args:
        truth, predicted: labels [N].
        coords: of the tokens [N, D].

    Returns:
        By the true, then the predicted label. Where everything is one region, there is no outside, and it is endlessly
        deep.
    """
    true, taken, where = truth.cpu().numpy(), predicted.cpu().numpy(), coords.cpu().numpy()
    found = []
    for label, wrong in np.unique(np.stack([true, taken], axis=1)[true != taken], axis=0).tolist():
        inside = (true == label) & (taken == wrong)
        within = np.flatnonzero(inside)
        if inside.all():
            found.append(Region(label, float("inf"), int(within[0])))
            continue
        depths, _ = KDTree(where[~inside]).query(where[within])
        deepest = int(depths.argmax())
        found.append(Region(label, float(depths[deepest]), int(within[deepest])))
    return found


def simulated(truth: Tensor, predicted: Tensor, coords: Tensor, most: int, drawn: np.random.Generator) -> Clicks:
    """One click in each of the deepest regions, at most so many, in random order; none where all is right.

    From a prediction that is all background, M objects give M clicks, one on each.
    """
    deepest = sorted(regions(truth, predicted, coords), key=lambda region: -region.depth)[:most]
    return tuple(Click(deepest[place].label, deepest[place].token) for place in drawn.permutation(len(deepest)))
