"""RD-Prune: how much to prune in each layer, so that the output of the whole network moves least.

Xu et al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks", arXiv 2308.10438.

    curves       delta[i, q]: the distortion of the logits when layer i alone loses its int(q n_i / Q) smallest weights
    additivity   E |f - f~|^2 is about the sum of delta[i, q_i], since errors of different layers are uncorrelated
    allocation   min over q of sum delta[i, q_i]   so that   sum n_i (1 - q_i / Q) <= (1 - s) N       a knapsack

Within a layer the ranking is plain magnitude. The curves cost layers x Q passes, once; with them any budget is solved
in a moment, exactly. What minimises a prediction also exploits its errors, so the true joint distortion is always
measured beside it.

Everything here works on any torch module; the registered method makes plans for decoders.
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
    masked_distortion,
    prunable,
    rate_distortion,
    smallest,
)
from lamella.methods.rd_prune.knapsack import allocate
from lamella.methods.rd_prune.masked import Holding
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
STEPS = (0.25, 0.5, 0.75, 1.0)  # of the sparsity: the plans of a series


@dataclass(frozen=True)
class Amounts:
    """How many weights each layer loses.

    Attributes:
        pruned: weights to remove, by the name of the matrix.
        sizes: weights that there are.
        predicted: the sum of the curves there; None for a rule that has no curves.
    """

    pruned: dict[str, int]
    sizes: dict[str, int]
    predicted: float | None = None

    @property
    def sparsity(self) -> float:
        """The share of all these weights that is removed: what was achieved, not what was asked for."""
        return sum(self.pruned.values()) / sum(self.sizes.values())

    @property
    def shares(self) -> np.ndarray:
        """The amount phi of each layer [layers]."""
        return np.array([self.pruned[name] / self.sizes[name] for name in self.sizes])


def allocate_by_curves(
    curves: Curves,
    sparsity: float,
    *,
    reduce: Reduce = "worst",
    cost: Unit = "weights",
    max_amount: float | Mapping[str, float] = 1.0,
) -> Amounts:
    """The amounts that distort least, by the sum of the curves.

    No layer is pruned less than it is already: weights that are zero stay removed, so the masks of several rounds are
    nested.

    Args:
        curves: what :func:`lamella.methods.rd_prune.curves` measured.
        sparsity: the share to remove, from 0 to below 1, of the weights or of the multiply-adds.
        reduce: distortion as the ``mean`` over inputs or of the ``worst`` input, as in all of the authors' commands.
        cost: what the budget counts.
        max_amount: the most of a layer that may go, for all or by name; below 1 keeps layers from being emptied.

    Raises:
        MethodError: for a number out of range, or a name that is not there.
        BudgetError: when ``max_amount`` leaves more than the sparsity allows.
    """
    check_share(sparsity)
    grid, names = curves.grid, list(curves.layers)
    most = dict.fromkeys(names, max_amount) if isinstance(max_amount, float | int) else dict(max_amount)
    unknown = sorted(set(most) - set(names))
    if unknown:
        raise MethodError(f"max_amount names '{unknown[0]}', which has no curve; a name is like '{names[0]}'")
    if any(not 0 <= amount <= 1 for amount in most.values()):
        raise MethodError(f"max_amount {max_amount}: give the most of a layer that may go, from 0 to 1")
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
            f"a sparsity of {sparsity:g} cannot be reached: max_amount leaves at most {most_removed:.4g} to remove; "
            "ask for less, or raise it"
        ) from None
    pruned = {name: int(curves.pruned[i, q]) for i, (name, q) in enumerate(zip(names, found.choice, strict=True))}
    _warn_of_saturation(curves, found.choice, found.distortion, getattr(curves.silent, reduce), sparsity)
    return Amounts(pruned, dict(zip(names, curves.sizes.tolist(), strict=True)), found.distortion)


def _worth(curves: Curves, cost: Unit) -> np.ndarray:
    """What each weight of each layer costs [layers]."""
    if cost == "weights":
        return np.ones(len(curves.layers))
    for name, curve in curves.layers.items():
        if not curve.uses:
            raise MethodError(f"the multiply-adds of '{name}' were not seen, as no module ran it: use cost weights")
    return np.array([curve.uses for curve in curves.layers.values()])


def _warn_of_saturation(
    curves: Curves, choice: Sequence[int], predicted: float, silent: float, sparsity: float
) -> None:
    """Curves flatten where the output is constant already; an allocation that lands there is worth nothing."""
    emptied = [
        name
        for (name, curve), q in zip(curves.layers.items(), choice, strict=True)
        if q == curves.grid and curve.severs and curve.zeros < curve.size
    ]
    if emptied:
        warnings.warn(
            f"at a sparsity of {sparsity:g}, {emptied[0]} is emptied and no path leads around it, so the output no "
            "longer depends on the input: set max_amount to 0.96, or prune in rounds",
            stacklevel=3,
        )
    elif predicted > silent:
        warnings.warn(
            f"at a sparsity of {sparsity:g} the predicted distortion ({predicted:.3g}) exceeds that of an output of "
            f"zeros ({silent:.3g}), so it predicts nothing: prune less, or in rounds with training between",
            stacklevel=3,
        )


@torch.no_grad()
def allocate_by_rule(model: nn.Module | Stack, sparsity: float, rule: Rule) -> Amounts:
    """The amounts of a rule that needs no data, to compare with; see :mod:`lamella.methods.rd_prune.layerwise`.

    Raises:
        MethodError: for a sparsity out of range.
    """
    check_share(sparsity)
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
    """Which weights stay: in each layer all but the smallest, as many as the amounts say. Whole layers are left out."""
    module = model.model if isinstance(model, Stack) else model
    masks = {}
    for name, matrix in prunable(model).items():
        if amounts.pruned[name]:
            weight = matrix.of(module)
            keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
            keep[smallest(weight)[: amounts.pruned[name]]] = False
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
    """Train all that is left, with masked weights held at zero. AdamW at a constant rate, as the authors on CIFAR.

    Args:
        stack: the model; it is not changed.
        plan: a plan of this method.
        train: training samples; their labels carry loss.
        config: of the training.
        work: where an interrupted run goes on from.
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
        hooks=[Holding(view, masks_of(plan))],
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
    """Set the smallest weights to zero, in each layer as many as measured curves say the output can spare.

    Masked weights are ordinary zeros: dense kernels compute with them, so nothing gets faster by itself.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], alone or with an attention mask; 128 tokens are enough
            for 30 %.
        sparsity: the share of all matrices' weights to remove, or of their multiply-adds.
        allocation: ``rd``, or a rule to compare with that measures nothing: ``uniform``, ``uniform+``, ``erk``,
            ``global`` magnitude, ``lamp``.
        reduce: distortion as the ``mean`` over sequences or of the ``worst`` one.
        cost: what the budget counts; they differ for experts, which a token uses only some of.
        max_amount: the most of a layer that may go.
        grid: Q, the steps of a curve; the authors' 100 take ten times as long, and a decoder has hundreds of layers.
        curves: a file for the curves, which answer any sparsity. It lets an interrupted measurement go on, and is read
            when it is complete.
        work: for the masks.

    Returns:
        The series of plans, from the whole model on, at a quarter, half, three quarters and all of the sparsity; each
        with the sparsity that was achieved, the distortion that was predicted and the one that was measured.

    Raises:
        MethodError: for options that do not go together, a model with nothing to prune, or another model's curves.
        BudgetError: when ``max_amount`` keeps the sparsity from being reached.
    """
    if allocation != "rd" and (cost, max_amount, curves) != ("weights", 1.0, None):
        raise MethodError(f"allocation {allocation} is a rule on weights alone: leave out cost, max_amount and curves")
    folder = work.directory()
    measured = rate_distortion(stack, calibration, grid=grid, path=curves) if allocation == "rd" else None
    probe, found = probe_of(stack, calibration), prunable(stack)
    points = [Point(scores={"sparsity": 0.0, "distortion": 0.0})]
    for share in dict.fromkeys(step * sparsity for step in STEPS):
        if measured is not None:
            amounts = allocate_by_curves(measured, share, reduce=reduce, cost=cost, max_amount=max_amount)
        else:
            amounts = allocate_by_rule(stack, share, allocation)  # type: ignore[arg-type]
        masks = masks_for(stack, amounts)
        if not masks:
            continue
        joint = masked_distortion(probe, found, masks)
        scores = {"sparsity": amounts.sparsity, "distortion": getattr(joint, reduce)}
        if amounts.predicted is not None:
            scores["predicted distortion"] = amounts.predicted
        points.append(Point(weights=[mask_edit(stack, masks, folder, "rd-prune")], scores=scores))
    return PlanSeries(model=ModelReference.of(stack), points=points)


def check_share(sparsity: float) -> None:
    """Raise a :class:`MethodError` unless it is a share of the weights that can go."""
    if not 0 <= sparsity < 1:
        raise MethodError(f"sparsity {sparsity}: give the share of weights to remove, from 0 to below 1")
