"""The segmentation loss, in which tokens near a click weigh more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lamella.methods.agile3d.clicks import Clicks

Dice = Literal["token", "class"]

NEAR, FAR = 2.0, 0.8  # weight of a token at a click, and beyond its reach: b and a of the paper
DICE = 2.0  # weight of the Dice term


def click_weights(coords: Tensor, clicks: Clicks, reach: float) -> Tensor:
    """Return the weight of each token in the loss [N]: from 2 at any click down to 0.8 at a distance of ``reach``.

    Args:
        coords: positions of the tokens [N, D].
        clicks: the clicks.
        reach: distance at which the weight has fallen to 0.8, in the units of the coordinates.
    """
    clicked = coords[[click.token for click in clicks]]
    r = torch.cdist(coords, clicked, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values
    return FAR + (NEAR - FAR) * (1 - r.clamp(max=reach) / reach)


def dice_loss(logits: Tensor, truth: Tensor, over: Dice = "token") -> Tensor:
    """Compute 1 - 2 |P T| / (|P| + |T|) of probabilities P and one-hot labels T, summed over classes or over tokens.

    A textbook Dice loss sums over tokens, which gives one value per ``class`` [M + 1]. The authors' code sums over
    classes, which gives one value per ``token`` [N], equal to 1 - the probability of the true class; the paper's
    results use that.

    Args:
        logits: logits [N, M + 1].
        truth: labels [N].
        over: ``token`` for one value per token, ``class`` for one per class.
    """
    P = logits.softmax(dim=1)
    T = one_hot(truth, logits.shape[1]).to(P.dtype)
    axis = 1 if over == "token" else 0
    return 1 - 2 * (P * T).sum(axis) / (P.sum(axis) + T.sum(axis))


def click_loss(
    layers: Sequence[Tensor], truth: Tensor, weights: Tensor, dice: Dice = "token"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum weighted cross-entropy and Dice over the layers; also returns the two terms separately.

    Args:
        layers: logits after each layer [N, M + 1].
        truth: labels [N].
        weights: weights of the tokens [N]; the ``class`` Dice loss does not use them.
        dice: kind of Dice loss, see :func:`dice_loss`.
    """
    entropy, overlap = truth.new_zeros((), dtype=weights.dtype), truth.new_zeros((), dtype=weights.dtype)
    for logits in layers:
        entropy = entropy + (weights * cross_entropy(logits, truth, reduction="none")).mean()
        missed = dice_loss(logits, truth, dice)
        overlap = overlap + (weights * missed if dice == "token" else missed).mean()
    return entropy + DICE * overlap, {"cross-entropy": entropy, "dice": overlap}
