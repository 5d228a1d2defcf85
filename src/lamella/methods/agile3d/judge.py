"""How good an interactive segmentation is: IoU against clicks, by a user who always clicks where it is most wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.methods.agile3d.clicks import BACKGROUND, Clicks, overwritten, relabelled, simulated
from lamella.methods.agile3d.decoder import Encoded
from lamella.methods.agile3d.modules import ClickSegmenter
from lamella.methods.agile3d.scene import Tokens

Predict = Callable[[Clicks], Tensor]  # from clicks to the label of every token [N]

BUDGET = 20  # clicks for each object, on average


class Round(NamedTuple):
    """One point of a curve: clicks for each object, and the mean IoU of the objects, over points."""

    clicks: float
    iou: float


Curve = list[Round]


def mean_iou(labels: Tensor, truth: Tensor, objects: int) -> float:
    """The mean over objects 1..M of intersection over union, of labels of points [P].

    Raises:
        CalibrationError: when an object has no point.
    """
    found = []
    for k in range(1, objects + 1):
        ours, theirs = labels == k, truth == k
        if not theirs.any():
            raise CalibrationError(f"object {k} of {objects} has no point: choose objects that the scene has")
        found.append(float((ours & theirs).sum() / (ours | theirs).sum()))
    return fmean(found)


def visible(tokens: Tokens) -> list[int]:
    """The objects of a scene that have a token: one may have vanished behind others in its cells.

    Raises:
        CalibrationError: when there is none.
    """
    found = [each for each in tokens.objects.unique().tolist() if each > BACKGROUND]
    if not found:
        raise CalibrationError(f"{tokens.scene.name} shows no object: give scenes whose objects are known")
    return found


def play(predict: Predict, tokens: Tokens, chosen: Sequence[int], budget: int = BUDGET, seed: int = 0) -> Curve:
    """One user's work on one scene: first a click on each object, then one at a time where it is most deeply wrong.

    Args:
        predict: from clicks to labels; for none it is not asked, all is background.
        tokens: of the scene, with true objects.
        chosen: objects to segment, each with a token; all others are background.
        budget: clicks for each object, on average.
        seed: of the order of the first clicks.

    Returns:
        A round for no click, for one on each object, and for every further click. Once nothing is wrong there is
        nothing to click, and the last round stands for the rest.

    Raises:
        CalibrationError: when an object has no token.
    """
    hidden = set(chosen) - set(visible(tokens))
    if hidden or not chosen:
        raise CalibrationError(f"{tokens.scene.name} shows no object {min(hidden, default='at all')}: choose others")
    assert tokens.scene.objects is not None
    objects, drawn = len(chosen), np.random.default_rng(seed)
    truth = relabelled(tokens.objects, chosen)  # [N]
    of_points = relabelled(torch.from_numpy(tokens.scene.objects).to(truth.device), chosen)  # [P]
    clicks: Clicks = ()
    curve: Curve = []
    for made in (0, *range(objects, budget * objects + 1)):
        labels = overwritten(predict(clicks), clicks) if clicks else torch.zeros_like(truth)
        curve.append(Round(made / objects, mean_iou(labels[tokens.of_point], of_points, objects)))
        clicks += simulated(truth, labels, tokens.coords, objects if made == 0 else 1, drawn)
    return curve


def iou_at(curves: Sequence[Curve], clicks: int) -> float:
    """IoU@k: the mean over samples of their IoU at exactly k clicks for each object."""
    return fmean(next(each.iou for each in curve if each.clicks == clicks) for curve in curves)


def clicks_to(curves: Sequence[Curve], quality: float, budget: int = BUDGET) -> float:
    """NoC@q: the mean over samples of the clicks for each object until the IoU is q; the budget where it never is."""
    return fmean(next((each.clicks for each in curve if each.iou >= quality), float(budget)) for curve in curves)


def answers(model: ClickSegmenter, scene: Encoded, layers: int | None = None) -> Predict:
    """What a model predicts for an encoded scene."""
    return lambda clicks: model.labels(scene, clicks, layers)


def nearest_click(tokens: Tokens) -> Predict:
    """The floor without training: every token has the label of the nearest click."""

    def predict(clicks: Clicks) -> Tensor:
        where = tokens.coords[[click.token for click in clicks]]
        label = torch.tensor([click.label for click in clicks], device=where.device)
        return label[torch.cdist(tokens.coords, where).argmin(dim=1)]

    return predict
