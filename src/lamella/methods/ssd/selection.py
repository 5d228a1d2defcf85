"""Selection by two importances, and dampening: the paper's formulas for single tensors and for whole models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.measure import Data, Fisher, check_disjoint, fisher
from lamella.measure.labelled import Order, count
from lamella.methods.ssd.damped import Dampening, ParameterDampening
from lamella.methods.ssd.percentile import percentile
from lamella.plan import Factors
from lamella.plan.selection import Skip, select_parameters
from lamella.stack import Stack, weights

Variant = Literal["ssd", "assd", "lfssd"]
Reference = Literal["full", "retain"]
ALPHA = 10.0  # the authors' value for a ResNet18, in all tasks
KINDS = {"ssd": "fisher", "assd": "fisher", "lfssd": "label-free"}


# The paper's two formulas, on single tensors


def select_weights(forget: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """Return S, the weights that are more than alpha times as important for the forget set, bool in the tensors' shape.

    Args:
        forget: the importances for the forget set.
        reference: the importances for all data.
        alpha: the threshold.
    """
    return forget > alpha * reference


def dampening(forget: Tensor, reference: Tensor, alpha: float, lam: float = 1.0) -> Factors:
    """Return beta for the weights of S: at most 1, and 0 for weights that only the forget set uses.

    Args:
        forget: the importances for the forget set.
        reference: the importances for all data.
        alpha: the threshold.
        lam: lambda, the dampening constant.
    """
    where = select_weights(forget, reference, alpha)
    return Factors(where, (lam * reference[where].double() / forget[where].double()).clamp(max=1.0).float())


def adaptive_alpha(ratios: Callable[[], Iterator[Tensor]], forget: int, full: int) -> float:
    """Return the alpha of ASSD: 1 % of the data to forget selects 0.69 % of the weights, 10 % selects 2.4 %.

    Args:
        ratios: returns an iterator over F_f / F_D, in which NaN and infinite ratios are ignored.
        forget: the size of D_f.
        full: the size of D.

    Raises:
        MethodError: if no ratio is finite.
    """
    try:
        return percentile(lambda: (r[torch.isfinite(r)] for r in ratios()), 100 - math.log(1 + 100 * forget / full))
    except ValueError:
        raise MethodError("no weight that may change has a gradient on both sets: select other layers") from None


# A whole model


@torch.no_grad()
def dampen(
    model: nn.Module | Stack,
    forget: Fisher,
    reference: Fisher,
    *,
    variant: Variant = "ssd",
    alpha: float | None = None,
    lam: float = 1.0,
    reference_of: Reference = "full",
    layers: Sequence[str] = (),
    skip: Sequence[Skip] = (),
) -> Dampening:
    """Select and dampen weights by two importances; the model is not changed.

    Args:
        model: any torch module, or a stack.
        forget: F_f, of the forget set; see :func:`lamella.measure.fisher`.
        reference: F_D, by the same estimator.
        variant: ``assd`` determines alpha itself; ``lfssd`` needs importances of the kind ``label-free``.
        alpha: the threshold; 10 if None.
        lam: lambda, the dampening constant.
        reference_of: the data that F_D was measured on: the ``full`` training data, including the forget set, or the
            ``retain`` set, as in the code of ASSD.
        layers: what may change: sites of a stack (``layers.3``, ``layers.5.mlp``, ``head``), or names of modules and
            parameters with wildcards (``*.down_proj.*``); everything if empty.
        skip: exclude ``norm`` parameters, whose gain of 0 silences a channel, or ``bias``.

    Raises:
        MethodError: for importances of different estimators or models, options out of range, or if nothing is
            selected; the message contains the highest alpha.
    """
    module = model.model if isinstance(model, Stack) else model
    check_options(variant, alpha, lam, reference_of)
    forget.check_comparable(reference)
    if forget.estimator.kind != KINDS[variant]:
        raise MethodError(f"{variant} needs importances of the kind {KINDS[variant]}, not {forget.estimator.kind}")
    every = weights(module)
    changeable = {name: every[name].of(module).detach() for name in select_parameters(model, layers, skip)}
    for name, theta in changeable.items():
        for importance in (forget, reference):
            _check_shape(name, theta, importance)
    full = reference.samples + (forget.samples if reference_of == "retain" else 0)

    def ratios() -> Iterator[Tensor]:
        return (forget.tensors[name].cpu() / reference.tensors[name].cpu() for name in changeable)

    if variant == "assd":
        alpha = adaptive_alpha(ratios, forget.samples, full)
    alpha = ALPHA if alpha is None else float(alpha)
    bound = full / forget.samples if reference_of == "full" and forget.estimator.batch == 1 else None
    if bound is not None:
        check_bound(alpha, forget.samples, full)
    factors, parameters = {}, []
    for name, theta in changeable.items():
        found = dampening(forget.tensors[name].cpu(), reference.tensors[name].cpu(), alpha, lam)
        size = theta.cpu().float().abs()
        removed = float((size[found.where].double() * (1 - found.values.double())).sum())
        parameters.append(
            ParameterDampening(name, theta.numel(), int(found.where.sum()), float(size.double().sum()), removed)
        )
        if parameters[-1].selected:
            factors[name] = found
    if not factors:
        highest = max((float(r[~r.isnan()].max()) for r in ratios() if (~r.isnan()).any()), default=0.0)
        raise MethodError(f"alpha {alpha:g} selects nothing: the highest ratio is {highest:.4g}; give a smaller alpha")
    untouched = [name for name, _ in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return Dampening(factors, alpha, bound, parameters, untouched)


def check_bound(alpha: float, forget: int, full: int) -> None:
    """Check that an alpha can select anything, for batches of one and a forget set within the full one.

    Args:
        alpha: the threshold.
        forget: the size of the forget set.
        full: the size of the full set.

    Raises:
        MethodError: if it cannot, since no ratio exceeds |D| / |D_f|.
    """
    if alpha >= full / forget:
        raise MethodError(
            f"alpha {alpha:g} can select nothing: {forget} of {full} samples are to be forgotten, so no weight is more "
            f"than {full / forget:.4g} times as important for them as for all: give ssd a smaller alpha, or more data"
        )


def _check_counts(alpha: float, forget: Data, retain: Data | None, saved: Fisher | None) -> None:
    """Check by the numbers of samples, as far as they are known, that something can be selected."""
    forgotten = count(forget)
    full = saved.samples if saved is not None else None
    if retain is not None and forgotten is not None and (rest := count(retain)) is not None:
        full = forgotten + rest
    if forgotten and full:
        check_bound(alpha, forgotten, full)


def check_options(
    variant: str = "ssd", alpha: float | None = None, lam: float = 1.0, reference_of: str = "full"
) -> None:
    """Raise a :class:`MethodError` for an option out of range; see :func:`dampen`."""
    if variant not in KINDS:
        raise MethodError(f"variant '{variant}': choose one of {', '.join(KINDS)}")
    if variant == "assd" and alpha is not None:
        raise MethodError("assd determines alpha itself: omit alpha, or use ssd")
    if alpha is not None and not alpha > 0:
        raise MethodError(f"alpha {alpha}: give a value above 0")
    if not 0 <= lam < math.inf:
        raise MethodError(f"lam {lam}: give a value of at least 0")
    if reference_of not in ("full", "retain"):
        raise MethodError(f"reference_of '{reference_of}': choose full or retain")


def _check_shape(name: str, weight: Tensor, importance: Fisher) -> None:
    if name not in importance.tensors:
        raise MethodError(f"the importances lack '{name}': measure them on this model, with all its parameters")
    if importance.tensors[name].shape != weight.shape:
        shape = list(importance.tensors[name].shape)
        raise MethodError(f"the importances of '{name}' are {shape}, but it is {list(weight.shape)}: another model's")


def importances(
    model: nn.Module | Stack,
    samples: Data,
    *,
    retain: Data | None = None,
    importance: Fisher | Path | str | None = None,
    reference_of: Reference = "full",
    variant: Variant = "ssd",
    batch: int = 1,
    order: Order = "given",
    seed: int = 0,
    names: Sequence[str] | None = None,
    alpha: float | None = None,
) -> tuple[Fisher, Fisher]:
    """Measure F_f and F_D on the forget set and the retained data, or load F_D from a file; see :func:`ssd`.

    Args:
        model: any torch module, or a stack.
        samples: the forget set.
        retain: the rest of the training data.
        importance: a saved F_D.
        reference_of: the data of F_D.
        variant: the variant of the method.
        batch: samples whose mean gradient is squared.
        order: order of samples for larger batches.
        seed: random seed of a shuffled order.
        names: the parameters to measure; all if None.
        alpha: the threshold of the following selection, to fail early if the numbers of samples show that it selects
            nothing.
    """
    module = model.model if isinstance(model, Stack) else model
    check_options(variant, reference_of=reference_of)
    if (retain is None) == (importance is None):
        raise MethodError("give either retain, the rest of the training data, or importance, a saved measurement on it")
    if retain is not None:
        check_disjoint(samples, retain)
    settings: Any = {"kind": KINDS[variant], "batch": batch, "order": order, "seed": seed, "names": names}
    saved = importance if isinstance(importance, Fisher | None) else Fisher.read(importance)
    if alpha is not None and variant != "assd" and reference_of == "full" and batch == 1:
        _check_counts(alpha, samples, retain, saved)
    forget = fisher(module, samples, **settings)
    if saved is not None:
        forget.check_comparable(saved)
        return forget, saved
    rest = fisher(module, retain, **settings)  # type: ignore[arg-type]
    return forget, rest.joined(forget) if reference_of == "full" else rest
