"""Select by two importances, and dampen: the paper's formulas, on single tensors and on whole models."""

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
from lamella.methods.ssd.damped import Damped, Dampening
from lamella.methods.ssd.percentile import percentile
from lamella.plan import Factors
from lamella.plan.selection import Skip, select_parameters
from lamella.stack import Stack, weights

Variant = Literal["ssd", "assd", "lfssd"]
Reference = Literal["full", "retain"]
ALPHA = 10.0  # of the authors for a ResNet18, in all tasks
KINDS = {"ssd": "fisher", "assd": "fisher", "lfssd": "label-free"}


# The paper's two formulas, on single tensors


def selected(forget: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """S, the weights that matter more than alpha times as much to the forget set, bool in the tensors' shape."""
    return forget > alpha * reference


def dampening(forget: Tensor, reference: Tensor, alpha: float, lam: float = 1.0) -> Factors:
    """beta for the weights of S: at most 1, and 0 where only the forget set knows a weight."""
    where = selected(forget, reference, alpha)
    return Factors(where, (lam * reference[where].double() / forget[where].double()).clamp(max=1.0).float())


def adaptive_alpha(ratios: Callable[[], Iterator[Tensor]], forget: int, full: int) -> float:
    """The alpha of ASSD: 1 % of the data to forget selects 0.69 % of the weights, 10 % selects 2.4 %.

    Args:
        ratios: makes the stream of F_f / F_D, in which NaN and infinite ratios do not count.
        forget, full: the sizes of D_f and D.

    Raises:
        MethodError: when no ratio is a number.
    """
    try:
        return percentile(lambda: (r[torch.isfinite(r)] for r in ratios()), 100 - math.log(1 + 100 * forget / full))
    except ValueError:
        raise MethodError("no weight that may change has a gradient on both sets: name other layers") from None


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
    """Select and dampen by two importances; the model is not changed.

    Args:
        model: any torch module, or a stack.
        forget: F_f, of the forget set; see :func:`lamella.measure.fisher`.
        reference: F_D, by the same estimator.
        variant: ``assd`` finds alpha itself; ``lfssd`` wants importances of the kind ``label-free``.
        alpha: 10 when left out.
        lam: lambda, the dampening constant.
        reference_of: what F_D was measured on: the ``full`` training data, forget set included, or the ``retain`` set,
            as in the code of ASSD.
        layers: what may change: sites of a stack (``layers.3``, ``layers.5.mlp``, ``head``), or names of modules and
            parameters with wildcards (``*.down_proj.*``); everything when left out.
        skip: leave out ``norm`` parameters, whose gain of 0 silences a channel, or ``bias``.

    Raises:
        MethodError: for importances of different estimators or models, options out of range, or when nothing is
            selected; the message says what the highest alpha is.
    """
    module = model.model if isinstance(model, Stack) else model
    check_options(variant, alpha, lam, reference_of)
    forget.check_comparable(reference)
    if forget.estimator.kind != KINDS[variant]:
        raise MethodError(f"{variant} needs importances of the kind {KINDS[variant]}, not {forget.estimator.kind}")
    every = weights(module)
    chosen = {name: every[name].of(module).detach() for name in select_parameters(model, layers, skip)}
    for name, theta in chosen.items():
        for importance in (forget, reference):
            _check_shape(name, theta, importance)
    full = reference.samples + (forget.samples if reference_of == "retain" else 0)

    def ratios() -> Iterator[Tensor]:
        return (forget.tensors[name].cpu() / reference.tensors[name].cpu() for name in chosen)

    if variant == "assd":
        alpha = adaptive_alpha(ratios, forget.samples, full)
    alpha = ALPHA if alpha is None else float(alpha)
    bound = full / forget.samples if reference_of == "full" and forget.estimator.batch == 1 else None
    if bound is not None:
        check_bound(alpha, forget.samples, full)
    factors, told = {}, []
    for name, theta in chosen.items():
        found = dampening(forget.tensors[name].cpu(), reference.tensors[name].cpu(), alpha, lam)
        size = theta.cpu().float().abs()
        removed = float((size[found.where].double() * (1 - found.values.double())).sum())
        told.append(Damped(name, theta.numel(), int(found.where.sum()), float(size.double().sum()), removed))
        if told[-1].selected:
            factors[name] = found
    if not factors:
        highest = max((float(r[~r.isnan()].max()) for r in ratios() if (~r.isnan()).any()), default=0.0)
        raise MethodError(f"alpha {alpha:g} selects nothing: the highest ratio is {highest:.4g}; give a smaller alpha")
    untouched = [name for name, _ in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return Dampening(factors, alpha, bound, told, untouched)


def check_bound(alpha: float, forget: int, full: int) -> None:
    """Check that an alpha can select anything; of importances with batches of one, on a forget set within the full one.

    Raises:
        MethodError: when it cannot, since no ratio exceeds |D| / |D_f|.
    """
    if alpha >= full / forget:
        raise MethodError(
            f"alpha {alpha:g} can select nothing: {forget} of {full} samples are to be forgotten, so no weight matters "
            f"to them more than {full / forget:.4g} times as much as to all: give ssd a smaller alpha, or more data"
        )


def _check_counts(alpha: float, forget: Data, retain: Data | None, kept: Fisher | None) -> None:
    """Check by the numbers of samples alone, as far as they are known, that something can be selected."""
    gone = count(forget)
    full = kept.samples if kept is not None else None
    if retain is not None and gone is not None and (rest := count(retain)) is not None:
        full = gone + rest
    if gone and full:
        check_bound(alpha, gone, full)


def check_options(
    variant: str = "ssd", alpha: float | None = None, lam: float = 1.0, reference_of: str = "full"
) -> None:
    """Raise a :class:`MethodError` for an option out of range; see :func:`dampen`."""
    if variant not in KINDS:
        raise MethodError(f"variant '{variant}': choose one of {', '.join(KINDS)}")
    if variant == "assd" and alpha is not None:
        raise MethodError("assd finds alpha itself: leave alpha out, or use ssd")
    if alpha is not None and not alpha > 0:
        raise MethodError(f"alpha {alpha}: give a number above 0")
    if not 0 <= lam < math.inf:
        raise MethodError(f"lam {lam}: give a number from 0 on")
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
    """F_f and F_D: measured on the forget set and the retained data, or F_D from a file; see :func:`ssd`.

    Args:
        alpha: of the selection that follows; nothing is measured when the numbers of samples alone show that it selects
            nothing.
    """
    module = model.model if isinstance(model, Stack) else model
    check_options(variant, reference_of=reference_of)
    if (retain is None) == (importance is None):
        raise MethodError("give either retain, the rest of the training data, or importance, what was measured on it")
    if retain is not None:
        check_disjoint(samples, retain)
    settings: Any = {"kind": KINDS[variant], "batch": batch, "order": order, "seed": seed, "names": names}
    kept = importance if isinstance(importance, Fisher | None) else Fisher.read(importance)
    if alpha is not None and variant != "assd" and reference_of == "full" and batch == 1:
        _check_counts(alpha, samples, retain, kept)
    forget = fisher(module, samples, **settings)
    if kept is not None:
        forget.check_comparable(kept)
        return forget, kept
    rest = fisher(module, retain, **settings)  # type: ignore[arg-type]
    return forget, rest.joined(forget) if reference_of == "full" else rest
