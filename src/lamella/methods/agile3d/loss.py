"""The loss of labels against the truth, in which tokens near a click count for more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lamella.methods.agile3d.clicks import Clicks

Dice = Literal["token", "class"]

NEAR, FAR = 2.0, 0.8  # weight of a token at a click, and of one beyond its reach: the paper's b and a
DICE = 2.0  # weight of the Dice term


def click_weights(coords: Tensor, clicks: Clicks, reach: float) -> Tensor:
    """How much each token counts [N]: from 2 at a click, of whatever label, down to 0.8 at a distance of ``reach``."""
    clicked = coords[[click.token for click in clicks]]
    r = torch.cdist(coords, clicked, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values
    return FAR + (NEAR - FAR) * (1 - r.clamp(max=reach) / reach)


def dice_loss(logits: Tensor, truth: Tensor, over: Dice = "token") -> Tensor:
    """1 - 2 |P T| / (|P| + |T|) of probabilities P and the truth T, summed over tokens, or over classes.

    A Dice loss is meant to sum over tokens, which gives one value for each ``class`` [M + 1]. The authors' code sums
    over classes, which gives one for each ``token`` [N] and comes to 1 - the probability of the true class; their
    results are those of that.
    """
    P = logits.softmax(dim=1)
    T = one_hot(truth, logits.shape[1]).to(P.dtype)
    axis = 1 if over == "token" else 0
    return 1 - 2 * (P * T).sum(axis) / (P.sum(axis) + T.sum(axis))


def click_loss(
    layers: Sequence[Tensor], truth: Tensor, weights: Tensor, dice: Dice = "token"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over layers of weighted cross-entropy and Dice, and these two apart.

    Args:
        layers: logits after each layer [N, M + 1].
        truth: labels [N].
        weights: of the tokens [N]; a Dice loss of classes has none.
        dice: over what it sums, see :func:`dice_loss`.
    """
    entropy, overlap = truth.new_zeros((), dtype=weights.dtype), truth.new_zeros((), dtype=weights.dtype)
    for logits in layers:
        entropy = entropy + (weights * cross_entropy(logits, truth, reduction="none")).mean()
        missed = dice_loss(logits, truth, dice)
        overlap = overlap + (weights * missed if dice == "token" else missed).mean()
    return entropy + DICE * overlap, {"cross-entropy": entropy, "dice": overlap}
