"""From norms to batch norms and away: put in place, counted by optimizer steps, counted anew, and folded into readers.

convert    Norm                  -> PRepBN, a module in its place
step       gamma = max(0, (T - t) / T)                     t counts optimizer steps, whatever accumulates in one
refresh    mu, sigma^2           -> those of training data in evaluation: dropout has changed them in training
merge      W (A x + B) + b       =  (W diag(A)) x + (b + W B); behind a linear map  diag(A) (W x + b) + B
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lamella.errors import MethodError
from lamella.methods.slab.modules import Init, PRepBN, Real, begun
from lamella.methods.slab.sites import Site
from lamella.train import Hook, TrainingRun


def convert(
    model: nn.Module, sites: Sequence[Site], *, steps: int, warm: int = 0, first: float = 1.0, init: Init = "norm"
) -> Real:
    """Put a PRepBN in the place of each norm, in place; a model that may be changed.

    Args:
        sites: which norms.
        steps, warm, first: of gamma.
        init: see :func:`lamella.methods.slab.modules.begun`.

    Returns:
        Where to say which tokens of a batch are real.
    """
    real = Real()
    for site in sites:
        norm = model.get_submodule(site.path)
        model.set_submodule(site.path, PRepBN(norm, begun(norm, init, real), steps, warm, first))
    return real


def places(model: nn.Module) -> list[PRepBN]:
    """All norms that are on their way."""
    return [each for each in model.modules() if isinstance(each, PRepBN)]


class Transition(Hook):
    """Counts optimizer steps for every norm; a run that goes on after a kill goes on with gamma, too."""

    def begin(self, run: TrainingRun) -> None:
        self._tell(run)

    def after_step(self, run: TrainingRun) -> None:
        self._tell(run)

    @staticmethod
    def _tell(run: TrainingRun) -> None:
        for each in places(run.model):
            each.step.fill_(run.step)


@torch.no_grad()
def refresh(model: nn.Module, batches: Iterable[Any], call: Callable[[Any], Any]) -> None:
    """Measure mean and variance of every batch norm anew, over all of the batches; nothing else changes.

    Args:
        model: in evaluation mode, which it is left in.
        batches: of training data.
        call: runs the model on one.
    """
    norms = [each.rep.bn for each in places(model)]
    kept = [each.momentum for each in norms]
    for each in norms:
        each.reset_running_stats()
        each.momentum = None  # the mean of what all batches have
        each.train()
    for batch in batches:
        call(batch)
    for each, momentum in zip(norms, kept, strict=True):
        each.momentum = momentum
        each.eval()


@torch.no_grad()
def merge(model: nn.Module, sites: Sequence[Site]) -> None:
    """Fold every batch norm into what reads it, or into what it reads, in place: no norm is left there.

    Raises:
        MethodError: for a norm whose transition is not over, a batch norm without statistics, or a linear map that
            something else reads or is.
    """
    held: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        held[id(parameter)] = held.get(id(parameter), 0) + 1
    for site in sites:
        place = model.get_submodule(site.path)
        if not isinstance(place, PRepBN):
            raise MethodError(f"{site.path} is a {type(place).__name__}, and no norm that was converted")
        if place.gamma > 0:
            raise MethodError(
                f"{site.path} is at step {int(place.step)}, and its norm still weighs {place.gamma:.2f}: train to the "
                f"end of the transition, step {place.warm + place.steps}"
            )
        bn = place.rep.bn
        if bn.num_batches_tracked is not None and int(bn.num_batches_tracked) == 0:
            raise MethodError(f"{site.path} has no statistics yet: train, or refresh them")
        a, b = place.rep.closed()
        for path in (site.writer,) if site.writer else site.readers:
            linear = model.get_submodule(path)
            if held[id(linear.weight)] > 1:
                raise MethodError(f"{path} has a weight that is tied, which would be scaled twice: untie it first")
            (fold_behind if site.writer else fold_before)(linear, a, b)
        model.set_submodule(site.path, nn.Identity())


def fold_before(linear: Any, a: Tensor, b: Tensor) -> None:
    """Let a linear map read x where it has read a x + b: W <- W diag(a), c <- c + W b."""
    weight = linear.weight.double()
    axis = 0 if isinstance(linear, Conv1D) else 1
    added = torch.tensordot(weight, b, dims=([axis], [0]))
    scaled = weight * (a[:, None] if axis == 0 else a)
    _set(linear, scaled, added if linear.bias is None else linear.bias.double() + added)


def fold_behind(linear: Any, a: Tensor, b: Tensor) -> None:
    """Let a linear map or a convolution give a y + b where it has given y: W <- diag(a) W, c <- a c + b."""
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
    """The RMS of every token at each norm [tokens].

    Args:
        run: runs the model on calibration tokens.
    """
    seen: dict[str, list[Tensor]] = {site.path: [] for site in sites}

    def note(path: str, module: nn.Module, given: Any) -> None:
        seen[path].append(given[0].float().square().mean(-1).sqrt().flatten())

    hooks = [model.get_submodule(s.path).register_forward_pre_hook(partial(note, s.path)) for s in sites]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(each) for path, each in seen.items()}


def constancy(rms: Mapping[str, Tensor]) -> dict[str, float]:
    """How much the RMS of tokens differs at each norm: its coefficient of variation, small where a norm folds cheaply.

    Args:
        rms: of :func:`sizes`.
    """
    return {path: float(each.std() / each.mean()) for path, each in rms.items()}
