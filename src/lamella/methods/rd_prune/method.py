"""RD-Prune: choose how many weights to prune in each layer so that the output of the whole network changes least.

Xu et al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks", arXiv 2308.10438.

    curves       delta[i, q]: the distortion of the logits when layer i alone loses its int(q n_i / Q) smallest weights
    additivity   E |f - f~|^2 is about the sum of delta[i, q_i], since errors of different layers are uncorrelated
    allocation   min over q of sum delta[i, q_i]   so that   sum n_i (1 - q_i / Q) <= (1 - s) N       a knapsack

Within a layer the ranking is plain magnitude. The curves cost layers x Q passes, once; with them any budget is solved
exactly within seconds. An optimum of a prediction also exploits its errors, so the true joint distortion is always
measured as well.

The functions work on any torch module; the registered method makes plans for decoders.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le, Lt
from torch import nn

from lamella.data import Samples, Text
from lamella.errors import BudgetError, MethodError
from lamella.files import Work
from lamella.methods.rd_prune import layerwise
from lamella.methods.rd_prune.curves import (
    Curves,
    Reduce,
    magnitude_order,
    masked_distortion,
    prunable,
    rate_distortion,
)
from lamella.methods.rd_prune.knapsack import allocate
from lamella.methods.rd_prune.masked import MaskHook
from lamella.methods.rd_prune.probes import probe_of
from lamella.plan import Masks, ModelReference, Plan, PlanSeries, Point, mask_edit, masks_of
from lamella.registry import command, method
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import Healed, Task, TrainConfig, fit, own, response_loss, with_weights_of

Rule = Literal["uniform", "uniform+", "erk", "global", "lamp"]
Unit = Literal["weights", "flops"]
RULES = ("uniform", "uniform+", "erk", "global", "lamp")
TRAINING = TrainConfig(steps=200, lr=3e-4, schedule="constant")
STEPS = (0.25, 0.5, 0.75, 1.0)  # plans of a series, as fractions of the sparsity


@dataclass(frozen=True)
class Amounts:
    """The number of weights that each layer loses.

    Attributes:
        pruned: number of weights to remove, by the name of the matrix.
        sizes: number of weights of each matrix.
        predicted: sum of the curves at these amounts; None for a rule without curves.
    """

    pruned: dict[str, int]
    sizes: dict[str, int]
    predicted: float | None = None

    @property
    def sparsity(self) -> float:
        """The achieved fraction of removed weights, which may differ from the target."""
        return sum(self.pruned.values()) / sum(self.sizes.values())

    @property
    def fractions(self) -> np.ndarray:
        """The fraction phi of removed weights of each layer [layers]."""
        return np.array([self.pruned[name] / self.sizes[name] for name in self.sizes])


def allocate_by_curves(
    curves: Curves,
    sparsity: float,
    *,
    reduce: Reduce = "worst",
    cost: Unit = "weights",
    max_amount: float | Mapping[str, float] = 1.0,
) -> Amounts:
    """Return the amounts with the least distortion, as predicted by the sum of the curves.

    No layer is pruned less than it already is: weights that are zero stay removed, so the masks of several rounds are
    nested.

    Args:
        curves: measured by :func:`lamella.methods.rd_prune.rate_distortion`.
        sparsity: fraction to remove, from 0 to below 1, of the weights or of the multiply-adds.
        reduce: distortion as the ``mean`` over inputs or of the ``worst`` input, as in all of the authors' commands.
        cost: unit of the budget: ``weights`` or ``flops``.
        max_amount: largest fraction of a layer to remove, for all layers or by name; below 1 no layer is emptied.

    Raises:
        MethodError: for a value out of range, or an unknown name.
        BudgetError: when ``max_amount`` leaves more than the sparsity allows.
    """
    check_sparsity(sparsity)
    grid, names = curves.grid, list(curves.layers)
    most = dict.fromkeys(names, max_amount) if isinstance(max_amount, float | int) else dict(max_amount)
    unknown = sorted(set(most) - set(names))
    if unknown:
        raise MethodError(f"max_amount names '{unknown[0]}', which has no curve; a name is like '{names[0]}'")
    if any(not 0 <= amount <= 1 for amount in most.values()):
        raise MethodError(f"max_amount {max_amount}: give the largest fraction of a layer to remove, from 0 to 1")
    zeros = np.array([curve.zeros for curve in curves.layers.values()])
    lowest = (curves.pruned <= zeros[:, None]).sum(1) - 1
    highest = np.maximum(lowest, [int(most.get(name, 1.0) * grid + 1e-9) for name in names])
    worth = _worth(curves, cost)
    kept = np.ceil((curves.sizes[:, None] - curves.pruned) * worth[:, None] - 1e-9).astype(np.int64)
    losses = curves.distortion(reduce)
    budget = int((1 - sparsity) * float(kept[:, 0].sum()) + 1e-6)
    try:
        found = allocate(list(losses), list(kept), budget, lowest=lowest.tolist(), highest=highest.tolist())
    except BudgetError:
        least = sum(int(options[a : b + 1].min()) for options, a, b in zip(kept, lowest, highest, strict=True))
        most_removed = 1 - least / kept[:, 0].sum()
        raise BudgetError(
            f"a sparsity of {sparsity:g} cannot be reached: max_amount allows at most {most_removed:.4g}; "
            "lower the sparsity, or raise max_amount"
        ) from None
    pruned = {name: int(curves.pruned[i, q]) for i, (name, q) in enumerate(zip(names, found.choice, strict=True))}
    _warn_of_saturation(curves, found.choice, found.distortion, getattr(curves.silent, reduce), sparsity)
    return Amounts(pruned, dict(zip(names, curves.sizes.tolist(), strict=True)), found.distortion)


def _worth(curves: Curves, cost: Unit) -> np.ndarray:
    """Return the cost of a weight of each layer [layers]."""
    if cost == "weights":
        return np.ones(len(curves.layers))
    for name, curve in curves.layers.items():
        if not curve.uses:
            raise MethodError(
                f"the multiply-adds of '{name}' could not be counted, since no module ran it: use cost weights"
            )
    return np.array([curve.uses for curve in curves.layers.values()])


def _warn_of_saturation(
    curves: Curves, choice: Sequence[int], predicted: float, silent: float, sparsity: float
) -> None:
    """Warn of an allocation in the flat part of the curves, where the output no longer depends on the input."""
    emptied = [
        name
        for (name, curve), q in zip(curves.layers.items(), choice, strict=True)
        if q == curves.grid and curve.severs and curve.zeros < curve.size
    ]
    if emptied:
        warnings.warn(
            f"at a sparsity of {sparsity:g}, {emptied[0]} is emptied and no residual path bypasses it: the output no "
            "longer depends on the input: set max_amount to 0.96, or prune in rounds",
            stacklevel=3,
        )
    elif predicted > silent:
        warnings.warn(
            f"at a sparsity of {sparsity:g} the predicted distortion ({predicted:.3g}) exceeds that of an output of "
            f"zeros ({silent:.3g}), so it is meaningless: prune less, or in rounds with training in between",
            stacklevel=3,
        )


@torch.no_grad()
def allocate_by_rule(model: nn.Module | Stack, sparsity: float, rule: Rule) -> Amounts:
    """Return the amounts of a rule that needs no data, as a baseline; see :mod:`lamella.methods.rd_prune.layerwise`.

    Args:
        model: any torch module, or a stack.
        sparsity: fraction of all weights to remove.
        rule: the rule.

    Raises:
        MethodError: for a sparsity out of range.
    """
    check_sparsity(sparsity)
    module = model.model if isinstance(model, Stack) else model
    found = prunable(model)
    weights = {name: matrix.of(module).detach() for name, matrix in found.items()}
    sizes = [matrix.size for matrix in found.values()]
    if rule == "uniform":
        counts = layerwise.uniform(sizes, sparsity)
    elif rule == "uniform+":
        convolutions = [index for index, weight in enumerate(weights.values()) if weight.ndim > 3]
        counts = layerwise.uniform_plus(sizes, sparsity, convolutions[0] if convolutions else None)
    elif rule == "erk":
        counts = layerwise.erk([tuple(weight.shape) for weight in weights.values()], sparsity)
    else:
        arrays = [weight.float().cpu().numpy() for weight in weights.values()]
        counts = (layerwise.lamp if rule == "lamp" else layerwise.global_magnitude)(arrays, sparsity)
    return Amounts(dict(zip(found, counts.tolist(), strict=True)), dict(zip(found, sizes, strict=True)))


@torch.no_grad()
def masks_for(model: nn.Module | Stack, amounts: Amounts) -> Masks:
    """Return the masks of the weights to keep: all but the smallest of each layer. Unpruned layers have no mask.

    Args:
        model: a torch module, or a stack.
        amounts: number of weights to remove from each matrix.
    """
    module = model.model if isinstance(model, Stack) else model
    masks = {}
    for name, matrix in prunable(model).items():
        if amounts.pruned[name]:
            weight = matrix.of(module)
            keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
            keep[magnitude_order(weight)[: amounts.pruned[name]]] = False
            masks[name] = keep.view(weight.shape).cpu()
    return masks


@command("rd-prune", "tune")
def tune(
    stack: Stack,
    plan: Plan,
    train: Samples,
    *,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Healed:
    """Train the remaining weights with masked weights fixed at zero; AdamW at a constant rate, as the authors on CIFAR.

    Args:
        stack: the model; it is not changed.
        plan: a plan of this method.
        train: training samples; their labels carry the loss.
        config: training settings.
        work: folder from which an interrupted run resumes.
    """
    out = work.directory()
    view = apply(stack, plan)
    own(view)
    log = fit(
        view,
        train,
        Task(response_loss),
        config,
        out=out,
        hooks=[MaskHook(view, masks_of(plan))],
        settings={"plan": plan.digest},
    )
    return Healed(stack=with_weights_of(stack, view), plan=plan, log=log)


@method("rd-prune", paper="2308.10438", purpose="prune", dense=True)
def rd_prune(
    stack: Stack,
    calibration: Text,
    *,
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.3,
    allocation: Literal["rd", "uniform", "uniform+", "erk", "global", "lamp"] = "rd",
    reduce: Literal["mean", "worst"] = "worst",
    cost: Literal["weights", "flops"] = "weights",
    max_amount: Annotated[float, Ge(0), Le(1)] = 1.0,
    grid: Annotated[int, Ge(1)] = 10,
    curves: Path | None = None,
    work: Work = Work(),
) -> PlanSeries:
    """Zero the smallest weights of each layer, with per-layer sparsity chosen from measured rate-distortion curves.

    Masked weights are ordinary zeros: dense kernels compute with them, so nothing gets faster by itself.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], alone or with an attention mask; 128 tokens are enough
            for 30 %.
        sparsity: fraction of all matrices' weights to remove, or of their multiply-adds.
        allocation: ``rd``, or a baseline rule that measures nothing: ``uniform``, ``uniform+``, ``erk``, ``global``
            magnitude, ``lamp``.
        reduce: distortion as the ``mean`` over sequences or of the ``worst`` one.
        cost: unit of the budget: ``weights`` or ``flops``; they differ for experts, of which a token uses only some.
        max_amount: largest fraction of a layer to remove.
        grid: Q, the number of steps of a curve; the authors' 100 take ten times as long, and a decoder has hundreds of
            matrices.
        curves: a file for the curves, which serve any sparsity. An interrupted measurement resumes from it, and a
            complete one is read.
        work: folder for the masks.

    Returns:
        The series of plans, starting with the whole model, at a quarter, half, three quarters and all of the sparsity;
        each with the achieved sparsity, the predicted distortion and the measured one.

    Raises:
        MethodError: for incompatible options, a model with nothing to prune, or another model's curves.
        BudgetError: when ``max_amount`` prevents the sparsity.
    """
    if allocation != "rd" and (cost, max_amount, curves) != ("weights", 1.0, None):
        raise MethodError(f"allocation {allocation} is a rule on weights alone: omit cost, max_amount and curves")
    folder = work.directory()
    measured = rate_distortion(stack, calibration, grid=grid, path=curves) if allocation == "rd" else None
    probe, found = probe_of(stack, calibration), prunable(stack)
    points = [Point(scores={"sparsity": 0.0, "distortion": 0.0})]
    for target in dict.fromkeys(step * sparsity for step in STEPS):
        if measured is not None:
            amounts = allocate_by_curves(measured, target, reduce=reduce, cost=cost, max_amount=max_amount)
        else:
            amounts = allocate_by_rule(stack, target, allocation)  # type: ignore[arg-type]
        masks = masks_for(stack, amounts)
        if not masks:
            continue
        joint = masked_distortion(probe, found, masks)
        scores = {"sparsity": amounts.sparsity, "distortion": getattr(joint, reduce)}
        if amounts.predicted is not None:
            scores["predicted distortion"] = amounts.predicted
        points.append(Point(weights=[mask_edit(stack, masks, folder, "rd-prune")], scores=scores))
    return PlanSeries(model=ModelReference.of(stack), points=points)


def check_sparsity(sparsity: float) -> None:
    """Raise a :class:`MethodError` unless the sparsity is from 0 to below 1."""
    if not 0 <= sparsity < 1:
        raise MethodError(f"sparsity {sparsity}: give the share of weights to remove, from 0 to below 1")
