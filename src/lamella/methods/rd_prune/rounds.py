"""Iterative pruning: prune a little, train, and measure again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.methods.rd_prune.curves import Distortion, Reduce, joint_distortion, rate_distortion
from lamella.methods.rd_prune.method import Amounts, Unit, allocate_by_curves, check_sparsity, masks_for
from lamella.methods.rd_prune.probes import Inputs
from lamella.plan import Masks, apply_masks
from lamella.progress import track
from lamella.stack import Stack


@dataclass(frozen=True)
class PruningRound:
    """One round of pruning and training.

    Attributes:
        target: target sparsity.
        amounts: number of weights that each layer lost, with the predicted distortion.
        joint: the measured distortion, against the model before this round.
        masks: the weights that are kept.
    """

    target: float
    amounts: Amounts
    joint: Distortion
    masks: Masks


def prune_in_rounds(
    model: nn.Module | Stack,
    inputs: Inputs,
    heal: Callable[[nn.Module, Masks], None],
    *,
    sparsity: float,
    rounds: int = 20,
    grid: int = 100,
    reduce: Reduce = "worst",
    cost: Unit = "weights",
    max_amount: float | Mapping[str, float] = 1.0,
    output: Callable[[Any], Tensor] | None = None,
) -> tuple[nn.Module, list[PruningRound]]:
    """Prune a little, train, measure again: s_t = 1 - (1 - p)^t, with p such that the last round reaches the sparsity.

    In every round the curves are measured on the current weights, and no removed weight is restored.

    Args:
        model: any torch module, or a stack; it is not changed.
        inputs: see :func:`lamella.methods.rd_prune.rate_distortion`.
        heal: trains a model in place with these masks fixed; see :func:`lamella.methods.rd_prune.masked.MaskHook`.
        sparsity: fraction to remove in the end, see :func:`allocate_by_curves`.
        rounds: number of rounds; the paper's 20 prune 20 % of the remaining weights each, down to 1.2 %.
        grid: see :func:`lamella.methods.rd_prune.rate_distortion`.
        reduce: see :func:`allocate_by_curves`.
        cost: see :func:`allocate_by_curves`.
        max_amount: see :func:`allocate_by_curves`.
        output: see :func:`lamella.methods.rd_prune.rate_distortion`.

    Returns:
        The pruned and trained model, and the results of each round.
    """
    check_sparsity(sparsity)
    if rounds < 1:
        raise MethodError(f"rounds {rounds}: give at least 1")
    current = copy.deepcopy(model.model if isinstance(model, Stack) else model)
    p = 1 - (1 - sparsity) ** (1 / rounds)
    history = []
    for t in track(range(1, rounds + 1), "rounds of pruning and training"):
        target = 1 - (1 - p) ** t
        measurable = Stack(current) if isinstance(model, Stack) else current
        curves = rate_distortion(measurable, inputs, grid=grid, output=output)
        amounts = allocate_by_curves(curves, target, reduce=reduce, cost=cost, max_amount=max_amount)
        masks = masks_for(current, amounts)
        history.append(PruningRound(target, amounts, joint_distortion(measurable, masks, inputs, output), masks))
        current = apply_masks(current, masks)
        with torch.enable_grad():
            heal(current, masks)
    return current, history
