"""SSD: forget some training data by dampening the weights that matter to them and to little else.

Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
AAAI 2024, arXiv 2308.07707.

    F_D, F_f      importance of every weight to all training data D, and to the forget set D_f within it
    selection     S = { i : F_f[i] > alpha F_D[i] }
    dampening     theta_i <- beta_i theta_i  for i in S,      beta_i = min( lambda F_D[i] / F_f[i], 1 )

No optimiser, no gradient step, no data beside the forget set where F_D was kept. By the same group, in the same frame:

    assd    alpha is a percentile of all ratios F_f / F_D, p = 100 - ln(1 + 100 |D_f| / |D|)      arXiv 2402.10098
    lfssd   importances are mean |d |f(x)|^2 / d theta|, so no labels are needed                  arXiv 2402.19308

With gradients of single samples F_D >= |D_f| / |D| F_f, so no ratio exceeds |D| / |D_f|, and an alpha from there on
selects nothing: the published alpha = 10 does nothing to one of ten classes. That is refused, not done in silence.

Everything here works on any torch module; the registered method makes a plan for a stack.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.measure import Data, Fisher, check_disjoint, fisher
from lamella.measure.labelled import Order
from lamella.methods.ssd.judge import Guard
from lamella.methods.ssd.percentile import percentile
from lamella.methods.ssd.summary import Damped, Dampening
from lamella.plan import Factors, ModelReference, Plan, apply_factors, scale_edit
from lamella.plan.places import Skip, chosen_parameters
from lamella.registry import method
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
    chosen = {name: every[name].of(module).detach() for name in chosen_parameters(model, layers, skip)}
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
        raise MethodError(f"alpha={alpha:g} selects nothing: the highest ratio is {highest:.4g}; give a smaller alpha")
    untouched = [name for name, _ in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return Dampening(factors, alpha, bound, told, untouched)


def check_bound(alpha: float, forget: int, full: int) -> None:
    """Check that an alpha can select anything; of importances with batches of one, on a forget set within the full one.

    Raises:
        MethodError: when it cannot, since no ratio exceeds |D| / |D_f|.
    """
    if alpha >= full / forget:
        raise MethodError(
            f"alpha={alpha:g} can select nothing: {forget} of {full} samples are to be forgotten, so no weight matters "
            f"to them more than {full / forget:.4g} times as much as to all: give ssd a smaller alpha"
        )


def check_options(
    variant: str = "ssd", alpha: float | None = None, lam: float = 1.0, reference_of: str = "full"
) -> None:
    """Raise a :class:`MethodError` for an option out of range; see :func:`dampen`."""
    if variant not in KINDS:
        raise MethodError(f"variant='{variant}': choose one of {', '.join(KINDS)}")
    if variant == "assd" and alpha is not None:
        raise MethodError("assd finds alpha itself: leave alpha out, or use ssd")
    if alpha is not None and not alpha > 0:
        raise MethodError(f"alpha={alpha}: give a number above 0")
    if not 0 <= lam < math.inf:
        raise MethodError(f"lam={lam}: give a number from 0 on")
    if reference_of not in ("full", "retain"):
        raise MethodError(f"reference_of='{reference_of}': choose full or retain")


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
) -> tuple[Fisher, Fisher]:
    """F_f and F_D: measured on the forget set and the retained data, or F_D from a file; see :func:`ssd`."""
    module = model.model if isinstance(model, Stack) else model
    check_options(variant, reference_of=reference_of)
    if (retain is None) == (importance is None):
        raise MethodError("give either retain, the rest of the training data, or importance, what was measured on it")
    if retain is not None:
        check_disjoint(samples, retain)
    settings: Any = {"kind": KINDS[variant], "batch": batch, "order": order, "seed": seed, "names": names}
    forget = fisher(module, samples, **settings)
    if retain is not None:
        rest = fisher(module, retain, **settings)
        return forget, rest.joined(forget) if reference_of == "full" else rest
    kept = importance if isinstance(importance, Fisher) else Fisher.read(importance or "")
    forget.check_comparable(kept)
    return forget, kept


@dataclass(frozen=True)
class Forgotten:
    """A model after dampening.

    Attributes:
        model: a copy that shares every weight that was not selected; the original where the guard rolled back.
        dampening: what was, or would have been, done.
        guard: what was lost on retained data; None without a guard.
    """

    model: Any
    dampening: Dampening
    guard: Guard | None = None


def forget(
    model: nn.Module,
    samples: Data,
    *,
    retain: Data | None = None,
    importance: Fisher | Path | str | None = None,
    guard: Data | None = None,
    max_drop: float = 0.02,
    batch: int = 1,
    order: Order = "given",
    seed: int = 0,
    **options: Any,
) -> Forgotten:
    """Forget some training data, with any torch model.

    Args:
        model: it is not changed.
        samples: the forget set; see :mod:`lamella.measure.labelled`.
        retain, importance, batch, order, seed: see :func:`ssd`.
        guard: retained data, better such as were not trained on.
        max_drop: the most accuracy that may be lost on them (of a decoder, the most by which perplexity may rise, as a
            share); if more is lost, the original comes back.
        options: of :func:`dampen`: variant, alpha, lam, reference_of, layers, skip.
    """
    measured: dict[str, Any] = {name: options[name] for name in ("variant", "reference_of") if name in options}
    measured["names"] = chosen_parameters(model, options.get("layers", ()), options.get("skip", ()))
    measured |= {"retain": retain, "importance": importance, "batch": batch, "order": order, "seed": seed}
    found = importances(model, samples, **measured)
    done = dampen(model, *found, **options)
    changed = apply_factors(model, done.factors)
    if guard is None:
        return Forgotten(changed, done)
    verdict = Guard.of(model, changed, guard, max_drop)
    return Forgotten(changed if verdict.kept else model, done, verdict)


@method("ssd", paper="2308.07707", purpose="repair", on="any", verb="forget", brief={"alpha": 1.2})
def ssd(
    stack: Stack,
    samples: Data,
    *,
    retain: Data | None = None,
    importance: Fisher | Path | None = None,
    reference_of: Literal["full", "retain"] = "full",
    variant: Literal["ssd", "assd", "lfssd"] = "ssd",
    alpha: float | None = None,
    lam: float = 1.0,
    layers: Sequence[str] = (),
    skip: Sequence[Literal["norm", "bias"]] = (),
    batch: int = 1,
    order: Literal["given", "by class", "shuffled"] = "given",
    seed: int = 0,
    out: Path | None = None,
) -> Plan:
    """Forget some training data by dampening the weights that matter to them most.

    Args:
        stack: the opened model; it is not changed.
        samples: the forget set: token samples for a decoder, (inputs, labels) for a classifier.
        retain: the rest of the training data, or a part of it that stands for the rest.
        importance: instead of ``retain``: F_D, or its file.
        reference_of: whether F_D is that of the ``full`` training data or, as in ASSD's code, of the ``retain`` set;
            of a file, what it was measured on.
        variant: ``ssd``; ``assd``, which finds alpha itself; ``lfssd``, which needs no labels.
        alpha: how many times as much a weight must matter to the forget set; the authors' 10 when left out.
        lam: lambda; below 1 it dampens more.
        layers: sites, or names of parameters with wildcards, that may change; all when left out.
        skip: leave out ``norm`` parameters or ``bias``.
        batch: samples whose mean gradient is squared; the authors take 64, which works with batches of one class alone.
        order: how samples come into larger batches.
        seed: of the order ``shuffled``.
        out: a folder for the factors; a temporary one when left out.

    Returns:
        A plan that scales weights; its provenance says how many and how much, site by site.

    Raises:
        MethodError: for options out of range, or when nothing can be selected.
        CalibrationError: for an empty set, labels out of range, or samples that are in both sets.
        NumericsError: for gradients that vanish or are not finite.
    """
    measured: dict[str, Any] = {"retain": retain, "importance": importance, "variant": variant, "batch": batch}
    measured |= {"reference_of": reference_of, "order": order, "seed": seed}
    found = importances(stack, samples, names=chosen_parameters(stack, layers, skip), **measured)
    settings = {"variant": variant, "lam": lam, "reference_of": reference_of, "layers": layers, "skip": skip}
    done = dampen(stack, *found, alpha=alpha, **settings)  # type: ignore[arg-type]
    return plan_of(stack, done, found, settings, out)


def plan_of(
    stack: Stack, done: Dampening, found: tuple[Fisher, Fisher], settings: dict[str, Any], out: Path | None = None
) -> Plan:
    """The plan that carries a dampening out."""
    folder = Path(tempfile.mkdtemp(prefix="lamella-ssd-")) if out is None else Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MethodError(
            f"{folder}: factors cannot be written there ({error.strerror}): give another folder"
        ) from None
    forget, reference = found
    return Plan(
        model=ModelReference.of(stack),
        weights=[scale_edit(stack, done.factors, folder, "ssd")],
        provenance={
            "method": "ssd",
            "options": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
            "alpha": done.alpha,
            "bound": done.bound,
            "forget": forget.provenance,
            "reference": reference.provenance,
            "stale": reference.weights != forget.weights,
            "total": done.total.as_dict(),
            "sites": [each.as_dict() for each in done.by_layer(stack)],
            "untouched": done.untouched,
        },
    )
