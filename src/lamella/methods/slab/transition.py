"""The transition from norms to batch norms: conversion, counting of optimizer steps, statistics, and folding.

convert    Norm                  -> PRepBN, a module in its place
step       gamma = max(0, (T - t) / T)                     t counts optimizer steps, whatever the gradient accumulation
refresh    mu, sigma^2           -> those of training data in evaluation mode: dropout changes them in training
merge      W (A x + B) + b       =  (W diag(A)) x + (b + W B); after a linear layer  diag(A) (W x + b) + B
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from lamella.errors import MethodError
from lamella.methods.slab.modules import Init, PRepBN, TokenMask, initial_repbn
from lamella.methods.slab.sites import Site
from lamella.progress import tracker
from lamella.train import EarlyStopping, Hook, TrainingRun


def convert(
    model: nn.Module, sites: Sequence[Site], *, steps: int, warm: int = 0, first: float = 1.0, init: Init = "norm"
) -> TokenMask:
    """Replace each norm by a PRepBN, in place.

    Args:
        model: a model that may be changed.
        sites: the norms.
        steps: number of steps over which gamma falls.
        warm: number of steps before.
        first: initial gamma.
        init: see :func:`lamella.methods.slab.modules.initial_repbn`.

    Returns:
        The token mask shared by all norms, to set before each batch.
    """
    real = TokenMask()
    for site in sites:
        norm = model.get_submodule(site.path)
        model.set_submodule(site.path, PRepBN(norm, initial_repbn(norm, init, real), steps, warm, first))
    return real


def prepbn_modules(model: nn.Module) -> list[PRepBN]:
    """Return all norms in transition."""
    return [each for each in model.modules() if isinstance(each, PRepBN)]


class Transition(Hook):
    """Hook that counts optimizer steps for every norm; a resumed run resumes gamma as well."""

    def begin(self, run: TrainingRun) -> None:
        """Set the step of a new or resumed run."""
        self._set_step(run)

    def after_step(self, run: TrainingRun) -> None:
        """Set the step after an optimizer step."""
        self._set_step(run)

    @staticmethod
    def _set_step(run: TrainingRun) -> None:
        for each in prepbn_modules(run.model):
            each.step.fill_(run.step)


class BestCheckpoint(EarlyStopping):
    """Hook that keeps the state with the lowest held-out loss of RepBN alone; training does not stop early.

    The state before the first step is not kept, since its batch norms have no statistics.
    """

    def __init__(self) -> None:
        super().__init__(patience=1)

    def evaluated(self, run: TrainingRun) -> None:
        """Keep the tensors if the last held-out loss is the lowest after the first step."""
        losses = [point.loss for point in run.log.held_out if point.step]
        if losses and losses[-1] < min(losses[:-1], default=math.inf):
            self.best = {name: each.detach().clone() for name, each in self.tracked(run).items()}

    def done(self, run: TrainingRun) -> bool:
        """Return false."""
        return False


@torch.no_grad()
def refresh(
    model: nn.Module, passes: Sequence[Iterable[Any]], call: Callable[[Any], Any], score: Callable[[], float]
) -> list[float]:
    """Recompute mean and variance of every batch norm over several passes; nothing else changes.

    After each pass the statistics are means over the batches of all passes so far. Those with the lowest score are
    kept, which may be the statistics of training.

    Args:
        model: in evaluation mode, in which it stays.
        passes: for each pass the batches of training data, in another order.
        call: runs the model on a batch.
        score: evaluates the model on held-out data, lower is better.

    Returns:
        The scores, before the first pass and after each.
    """
    norms = [each.rep.bn for each in prepbn_modules(model)]
    momenta = [each.momentum for each in norms]
    scores, best = [_finite(score())], _statistics(norms)
    for each in norms:
        each.reset_running_stats()
        each.momentum = None  # cumulative mean over all batches
    with tracker("statistics", len(passes)) as count:
        for batches in passes:
            for each in norms:
                each.train()
            for batch in batches:
                call(batch)
            for each in norms:
                each.eval()
            scores.append(_finite(score()))
            if scores[-1] < min(scores[:-1]):
                best = _statistics(norms)
            count()
    for each, momentum, statistics in zip(norms, momenta, best, strict=True):
        each.momentum = momentum
        each.load_state_dict(statistics, strict=False)
    return scores


def _finite(score: float) -> float:
    return score if math.isfinite(score) else math.inf


def _statistics(norms: Sequence[nn.BatchNorm1d]) -> list[dict[str, Tensor]]:
    return [{name: buffer.clone() for name, buffer in each.named_buffers()} for each in norms]


def reshuffled(
    items: Sequence[Any], passes: int, size: int, collate: Callable[[Any], Any], seed: int
) -> list[Iterable[Any]]:
    """Return the batches of several passes over all items, each pass in another random order.

    Args:
        items: the items, decoded on access.
        passes: number of passes.
        size: items per batch; the last batch of a pass may have fewer.
        collate: makes a batch of items.
        seed: random seed of the orders.
    """
    drawn = torch.Generator().manual_seed(seed)
    data: Any = items
    loader: DataLoader[Any] = DataLoader(data, size, shuffle=True, collate_fn=collate, generator=drawn)
    return [loader] * passes


@torch.no_grad()
def merge(model: nn.Module, sites: Sequence[Site]) -> None:
    """Fold every batch norm into the layers after it, or before it, in place, and remove it.

    Args:
        model: a model whose norms were converted; changed in place.
        sites: the converted norms, with the linear layers before and after them.

    Raises:
        MethodError: for a norm whose transition is not over, a batch norm without statistics, or a linear layer with a
            tied weight.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {parameter for parameter, count in uses.items() if count > 1}
    for site in sites:
        module = model.get_submodule(site.path)
        if not isinstance(module, PRepBN):
            raise MethodError(f"{site.path} is a {type(module).__name__}, not a converted norm")
        if module.gamma > 0:
            raise MethodError(
                f"{site.path} is at step {int(module.step)}, where the norm still has the weight {module.gamma:.2f}: "
                "train to the "
                f"end of the transition, step {module.warm + module.steps}"
            )
        bn = module.rep.bn
        if bn.num_batches_tracked is not None and int(bn.num_batches_tracked) == 0:
            raise MethodError(f"{site.path} has no statistics yet: train, or refresh them")
        a, b = module.rep.closed()
        for path in (site.writer,) if site.writer else site.readers:
            linear = model.get_submodule(path)
            if id(linear.weight) in tied:
                raise MethodError(f"{path} has a tied weight, which would be scaled twice: untie it first")
            (fold_after if site.writer else fold_before)(linear, a, b)
        model.set_submodule(site.path, nn.Identity())


def fold_before(linear: Any, a: Tensor, b: Tensor) -> None:
    """Fold a x + b into the linear layer or convolution after it: W <- W diag(a), c <- c + W b.

    Args:
        linear: the linear layer, convolution, or Conv1D of transformers; changed in place.
        a: scale per input channel `[inputs]`.
        b: offset per input channel `[inputs]`.

    Raises:
        MethodError: for a convolution with padding, whose zeros are not shifted.
    """
    if isinstance(linear, _ConvNd) and (isinstance(linear.padding, str) or any(linear.padding)):
        raise MethodError("the convolution after the norm pads with zeros, so the shift of the norm cannot be folded")
    weight = linear.weight.double()
    output, axis = (1, 0) if isinstance(linear, Conv1D) else (0, 1)
    shape = [1] * weight.ndim
    shape[axis] = -1
    added = (weight * b.view(shape)).sum([each for each in range(weight.ndim) if each != output])
    _set(linear, weight * a.view(shape), added if linear.bias is None else linear.bias.double() + added)


def fold_after(linear: Any, a: Tensor, b: Tensor) -> None:
    """Fold a y + b into the linear layer or convolution before it: W <- diag(a) W, c <- a c + b.

    Args:
        linear: the linear layer, convolution, or Conv1D of transformers; changed in place.
        a: scale per output channel `[outputs]`.
        b: offset per output channel `[outputs]`.
    """
    axis = 1 if isinstance(linear, Conv1D) else 0
    shape = [1] * linear.weight.ndim
    shape[axis] = -1
    bias = torch.zeros_like(b) if linear.bias is None else linear.bias.double()
    _set(linear, linear.weight.double() * a.view(shape), a * bias + b)


def _set(linear: nn.Linear | _ConvNd, weight: Tensor, bias: Tensor) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        like = linear.weight
        setattr(linear, name, nn.Parameter(tensor.to(like.dtype), requires_grad=like.requires_grad))


def sizes(model: nn.Module, sites: Sequence[Site], run: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the RMS of every token at each norm [tokens].

    Args:
        model: the model.
        sites: the norms.
        run: runs the model on calibration tokens.
    """
    recorded: dict[str, list[Tensor]] = {site.path: [] for site in sites}

    def record(path: str, module: nn.Module, args: Any) -> None:
        recorded[path].append(args[0].float().square().mean(-1).sqrt().flatten())

    hooks = [model.get_submodule(s.path).register_forward_pre_hook(partial(record, s.path)) for s in sites]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(each) for path, each in recorded.items()}


def constancy(rms: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the coefficient of variation of the tokens' RMS at each norm; small where folding costs little.

    Args:
        rms: result of :func:`sizes`.
    """
    return {path: float(each.std() / each.mean()) for path, each in rms.items()}
