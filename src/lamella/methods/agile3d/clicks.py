"""Clicks, and the simulated user who always clicks where the prediction is most deeply wrong."""

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
    """One click; its index in a sequence of clicks is its time.

    Attributes:
        label: label of the object, from 1; 0 is the background.
        token: index of the clicked token.
    """

    label: int
    token: int


Clicks = tuple[Click, ...]


def apply_clicks(labels: Tensor, clicks: Clicks) -> Tensor:
    """Return the labels of tokens [N], with clicked tokens set to their click's label; the latest click wins.

    Args:
        labels: predicted labels [N].
        clicks: the clicks, in order.
    """
    labels = labels.clone()
    for click in clicks:
        labels[click.token] = click.label
    return labels


def task_labels(objects: Tensor, chosen: Sequence[int]) -> Tensor:
    """Map ground-truth objects to the labels of a task: chosen objects become 1..M in order, all others background.

    Args:
        objects: ground-truth objects [...].
        chosen: the objects to segment.
    """
    labels = objects.new_zeros(objects.shape)
    for label, each in enumerate(chosen, start=1):
        labels[objects == each] = label
    return labels


class Region(NamedTuple):
    """Tokens with the same true label and the same wrong prediction.

    Attributes:
        label: their true label.
        depth: distance of the deepest token to the nearest token outside the region.
        token: index of the deepest token.
    """

    label: int
    depth: float
    token: int


def regions(truth: Tensor, predicted: Tensor, coords: Tensor) -> list[Region]:
    """Group wrong tokens by true and predicted label: one region for each pair, whether connected or not.

    Args:
        truth: true labels [N].
        predicted: predicted labels [N].
        coords: positions of the tokens [N, D].

    Returns:
        The regions, ordered by true and then predicted label. A region that contains all tokens has infinite depth.
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


def simulate_clicks(
    truth: Tensor, predicted: Tensor, coords: Tensor, most: int, generator: np.random.Generator
) -> Clicks:
    """Simulate one click in each of the deepest wrong regions, in random order.

    Returns no click if all labels are right. With an all-background prediction, M objects give M clicks, one on each.

    Args:
        truth: true labels [N].
        predicted: predicted labels [N].
        coords: positions of the tokens [N, D].
        most: maximum number of clicks.
        generator: random generator.
    """
    deepest = sorted(regions(truth, predicted, coords), key=lambda region: -region.depth)[:most]
    return tuple(Click(deepest[index].label, deepest[index].token) for index in generator.permutation(len(deepest)))
