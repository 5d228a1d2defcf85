"""Evaluation of interactive segmentation: IoU against clicks, by a simulated user who clicks where it is most wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.methods.agile3d.clicks import BACKGROUND, Clicks, apply_clicks, simulate_clicks, task_labels
from lamella.methods.agile3d.decoder import EncodedScene
from lamella.methods.agile3d.modules import ClickSegmenter
from lamella.methods.agile3d.scene import Tokens

Predict = Callable[[Clicks], Tensor]  # from clicks to the label of every token [N]

BUDGET = 20  # clicks per object, on average


class CurvePoint(NamedTuple):
    """One point of an evaluation curve.

    Attributes:
        clicks: clicks per object.
        iou: mean IoU of the objects, over points.
    """

    clicks: float
    iou: float


Curve = list[CurvePoint]


def mean_iou(labels: Tensor, truth: Tensor, objects: int) -> float:
    """Return the mean intersection over union of objects 1..M.

    Args:
        labels: predicted labels of points [P].
        truth: true labels of points [P].
        objects: M, the number of objects.

    Raises:
        CalibrationError: if an object has no point.
    """
    found = []
    for k in range(1, objects + 1):
        ours, theirs = labels == k, truth == k
        if not theirs.any():
            raise CalibrationError(f"object {k} of {objects} has no point: choose objects that the scene has")
        found.append(float((ours & theirs).sum() / (ours | theirs).sum()))
    return fmean(found)


def visible(tokens: Tokens) -> list[int]:
    """Return the objects of a scene that have a token; an object can be hidden by others in its cells.

    Args:
        tokens: tokens of the scene.

    Raises:
        CalibrationError: if there is none.
    """
    found = [each for each in tokens.objects.unique().tolist() if each > BACKGROUND]
    if not found:
        raise CalibrationError(f"{tokens.scene.name} shows no object: give scenes whose objects are known")
    return found


def play(predict: Predict, tokens: Tokens, chosen: Sequence[int], budget: int = BUDGET, seed: int = 0) -> Curve:
    """Simulate a session: a click on each object, then one at a time where the prediction is most deeply wrong.

    Args:
        predict: function from clicks to token labels; with no clicks, everything is background without calling it.
        tokens: tokens of a scene with ground truth.
        chosen: objects to segment, each with a token; all others are background.
        budget: clicks per object, on average.
        seed: random seed of the order of the first clicks.

    Returns:
        The curve: a point for no clicks, one for a click on each object, and one for every further click. Once nothing
        is wrong no click is added, and the last IoU is repeated.

    Raises:
        CalibrationError: if an object has no token.
    """
    hidden = set(chosen) - set(visible(tokens))
    if hidden or not chosen:
        raise CalibrationError(f"{tokens.scene.name} shows no object {min(hidden, default='at all')}: choose others")
    assert tokens.scene.objects is not None
    objects, generator = len(chosen), np.random.default_rng(seed)
    truth = task_labels(tokens.objects, chosen)  # [N]
    of_points = task_labels(torch.from_numpy(tokens.scene.objects).to(truth.device), chosen)  # [P]
    clicks: Clicks = ()
    curve: Curve = []
    for made in (0, *range(objects, budget * objects + 1)):
        labels = apply_clicks(predict(clicks), clicks) if clicks else torch.zeros_like(truth)
        curve.append(CurvePoint(made / objects, mean_iou(labels[tokens.of_point], of_points, objects)))
        clicks += simulate_clicks(truth, labels, tokens.coords, objects if made == 0 else 1, generator)
    return curve


def iou_at(curves: Sequence[Curve], clicks: int) -> float:
    """Return IoU@k: the mean IoU over samples at exactly k clicks per object.

    Args:
        curves: evaluation curves.
        clicks: k.
    """
    return fmean(next(each.iou for each in curve if each.clicks == clicks) for curve in curves)


def clicks_to(curves: Sequence[Curve], quality: float, budget: int = BUDGET) -> float:
    """Return NoC@q: the mean number of clicks per object until the IoU reaches q, or the budget if it never does.

    Args:
        curves: evaluation curves.
        quality: q, an IoU in 0..1.
        budget: clicks per object that count if the IoU is never reached.
    """
    return fmean(next((each.clicks for each in curve if each.iou >= quality), float(budget)) for curve in curves)


def answers(model: ClickSegmenter, scene: EncodedScene, layers: int | None = None) -> Predict:
    """Return the prediction function of a model for an encoded scene.

    Args:
        model: the model.
        scene: the encoded scene.
        layers: number of decoder layers to run; all if None.
    """
    return lambda clicks: model.labels(scene, clicks, layers)


def nearest_click(tokens: Tokens) -> Predict:
    """Return the untrained baseline, which gives every token the label of the nearest click.

    Args:
        tokens: tokens of the scene.
    """

    def predict(clicks: Clicks) -> Tensor:
        where = tokens.coords[[click.token for click in clicks]]
        label = torch.tensor([click.label for click in clicks], device=where.device)
        return label[torch.cdist(tokens.coords, where).argmin(dim=1)]

    return predict
