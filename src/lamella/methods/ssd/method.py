"""SSD: forget some training data by dampening the weights that are important for it and for little else.

Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
AAAI 2024, arXiv 2308.07707.

    F_D, F_f      importance of every weight to all training data D, and to the forget set D_f within it
    selection     S = { i : F_f[i] > alpha F_D[i] }
    dampening     theta_i <- beta_i theta_i  for i in S,      beta_i = min( lambda F_D[i] / F_f[i], 1 )

There is no optimiser and no gradient step, and only the forget set is needed if F_D was saved. Variants by the same
group:

    assd    alpha is a percentile of all ratios F_f / F_D, p = 100 - ln(1 + 100 |D_f| / |D|)      arXiv 2402.10098
    lfssd   importances are mean |d |f(x)|^2 / d theta|, so no labels are needed                  arXiv 2402.19308

With gradients of single samples F_D >= |D_f| / |D| F_f, so no ratio exceeds |D| / |D_f|, and an alpha of at least that
selects nothing: the published alpha = 10 has no effect for one of ten classes. This is an error instead of a silent
no-op.

The formulas (selection.py) and the evaluation (judge.py) work for any torch module; the method creates a plan for a
stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt
from torch import nn

from lamella.data import Records, SampledRecords
from lamella.errors import LamellaError, MethodError
from lamella.files import Work
from lamella.measure import Data, Fisher, check_disjoint
from lamella.measure.labelled import Order
from lamella.methods.ssd.damped import Dampening
from lamella.methods.ssd.judge import RetentionGuard, check_scikit_learn, evaluate_models
from lamella.methods.ssd.selection import ALPHA, Reference, Variant, check_options, dampen, importances
from lamella.plan import ModelReference, Plan, apply_factors, scale_edit
from lamella.plan.selection import Skip, select_parameters
from lamella.registry import method
from lamella.results import Edit
from lamella.runtime import apply
from lamella.signature import Named, Split
from lamella.stack import Stack


@dataclass(frozen=True)
class DampeningSettings:
    """The selection of weights and the strength of the dampening.

    Attributes:
        variant: ``ssd``; ``assd``, which determines alpha itself; ``lfssd``, which uses no labels.
        alpha: how many times more important a weight must be for the forget set than for all data; the authors' 10 if
            omitted.
        lam: lambda; below 1 it dampens more.
        reference_of: the data that F_D is measured on: ``full`` (retained and forgotten records) or, as in ASSD's code,
            ``retain``; for a file, the data that it was measured on.
        layers: only change these: layers.3, layers.5.mlp, head; or names of parameters with wildcards, *down_proj*.
        skip: parameters to leave unchanged: norm, bias.

    Raises:
        MethodError: for an alpha together with assd, which determines its own.
    """

    variant: Variant = "ssd"
    alpha: Annotated[float, Gt(0)] | None = None
    lam: Annotated[float, Named("lambda"), Ge(0)] = 1.0
    reference_of: Annotated[Reference, Named("reference")] = "full"
    layers: tuple[str, ...] = ()
    skip: tuple[Skip, ...] = ()

    def __post_init__(self) -> None:
        check_options(self.variant, self.alpha, self.lam, self.reference_of)


@method(
    "ssd",
    paper="2308.07707",
    purpose="repair",
    on="any",
    verb="forget",
    brief={"alpha": 1.2, "max_drop": 99.0, "retain": "pydoc"},
)
def ssd(
    stack: Stack,
    forget: Records,
    retain: SampledRecords | None = None,
    test: Annotated[SampledRecords | None, Split("test")] = None,
    retrained: Stack | None = None,
    *,
    importance: Path | None = None,
    save_importance: Path | None = None,
    settings: DampeningSettings = DampeningSettings(),
    batch: Annotated[int, Ge(1)] = 1,
    order: Order = "given",
    max_drop: Annotated[float, Ge(0)] = 0.05,
    work: Work = Work(),
    seed: int = 0,
) -> Edit:
    """Make a model forget some of its training records without retraining, by selective synaptic dampening.

    Weights that are far more important for the records than for all training data are scaled down once; nothing is
    trained. The importance of a weight is its mean squared gradient, measured in one pass over the retained data, which
    can be saved with --save-importance, and one over the records. With n of N records to forget, an alpha of at least
    N/n selects nothing, and is an error. If performance on the retained data drops too much, no model is written.

    The output folder contains an ordinary checkpoint with plan.json, evidence.json (forget, retain and test figures,
    membership inference, ZRF) and report.html, which shows the dampening by layer. The original model is never changed.

    Example: lamella forget tuned --forget gone.jsonl --retain rest.jsonl --retain pydoc --test stdlib -o forgot
    lamella forget tuned --forget more.txt --importance fisher.safetensors --variant assd -o forgot

    Args:
        stack: the opened model; it is not changed.
        forget: the records to forget; for a classifier, in Python, (inputs, labels).
        retain: the rest of the training data, or similar data. It determines F_D together with the forget set, and
            guards the edit. At most ``sequences`` records of a plain text are sampled; all records of a .jsonl file are
            used.
        test: data that the model never saw, for membership inference.
        retrained: a model that was trained without these records, for comparison.
        importance: the file of a saved F_D, which replaces the measurement on the retained data.
        save_importance: save F_D to this file, for further requests.
        settings: the selection of weights and the strength of the dampening.
        batch: samples whose mean gradient is squared; 1 is the Fisher information. The authors use 64, which works with
            batches of a single class only.
        order: order of samples for larger batches: ``given``, ``by class`` or ``shuffled``.
        max_drop: maximum relative increase of perplexity on the retained data; above it no model is written. For a
            classifier, the maximum loss of accuracy.
        work: the directory for the factors.
        seed: random seed for sampling texts and for the random weights of ZRF.

    Returns:
        A plan that scales weights, with the number and strength by site.

    Raises:
        MethodError: for an alpha together with assd, which determines its own, or if nothing can be selected.
        CalibrationError: for an empty set, labels out of range, or samples that are in both sets.
        NumericsError: for gradients that vanish or are not finite.
        LamellaError: if the guard rolls back.
    """
    variant, reference_of = settings.variant, settings.reference_of
    if retain is None and importance is None:
        raise MethodError("give --retain, the rest of the training data, or --importance, a saved measurement on it")
    if test is not None and retain is not None:
        check_scikit_learn()
    names = select_parameters(stack, settings.layers, settings.skip)
    if retain is not None:
        check_disjoint(forget, retain)
    found = importances(
        stack,
        forget,
        retain=retain if importance is None else None,
        importance=importance,
        reference_of=reference_of,
        variant=variant,
        batch=batch,
        order=order,
        seed=seed,
        names=names if save_importance is None else None,
        alpha=_alpha(vars(settings)),
    )
    if save_importance is not None:  # saved first, so that the edit can be repeated with other settings
        found[1].save(save_importance)
    done = dampen(stack, *found, **vars(settings))
    plan = plan_of(stack, done, found, work.directory())
    view = apply(stack, plan)
    guard = None if retain is None else RetentionGuard.of(stack.model, view, retain, max_drop)
    if guard is not None and not guard.passed:
        raise LamellaError(
            f"rolled back, no model is written: {guard}; raise alpha, select layers, or allow more with --max-drop"
        )
    models = {"before": stack.model, "after": view} | ({} if retrained is None else {"retrained": retrained.model})
    figures, notes = evaluate_models(models, forget, retain, test, seed)
    provenance = plan.provenance
    findings = {
        **{name: provenance[name] for name in ("alpha", "bound", "total", "sites")},
        "estimator": provenance["reference"]["estimator"],
        "samples": {"forget": found[0].samples, "reference": found[1].samples},
        "seconds": {"forget": found[0].seconds, "reference": found[1].seconds},
        "guard": None if guard is None else vars(guard) | {"lost": guard.lost},
        **figures,
    }
    notes = [*_notes(provenance, guard), *_sampling_notes(retain), *notes]
    return Edit(stack=stack, plan=plan, findings=findings, notes=notes)


def make_plan(
    stack: Stack,
    samples: Data,
    *,
    retain: Data | None = None,
    importance: Fisher | Path | None = None,
    batch: int = 1,
    work: Work = Work(),
    **options: Any,
) -> Plan:
    """Create the plan only, without guard and evaluation.

    Args:
        stack: the model.
        samples: the forget set.
        retain: the rest of the training data.
        importance: a saved F_D.
        batch: samples whose mean gradient is squared.
        work: the directory for the factors.
        options: the options of :func:`dampen`.
    """
    measurement: dict[str, Any] = {name: options[name] for name in ("variant", "reference_of") if name in options}
    measurement["names"] = select_parameters(stack, options.get("layers", ()), options.get("skip", ()))
    measurement |= {"retain": retain, "importance": importance, "batch": batch, "alpha": _alpha(options)}
    found = importances(stack, samples, **measurement)
    return plan_of(stack, dampen(stack, *found, **options), found, work.directory())


def _alpha(options: Mapping[str, Any]) -> float:
    alpha = options.get("alpha")
    return ALPHA if alpha is None else float(alpha)


def plan_of(stack: Stack, done: Dampening, found: tuple[Fisher, Fisher], folder: Path) -> Plan:
    """Create the plan of a dampening, with its factors in a folder.

    Args:
        stack: the model.
        done: the dampening.
        found: F_f and F_D.
        folder: the folder for the factors.
    """
    forget, reference = found
    return Plan(
        model=ModelReference.of(stack),
        weights=[scale_edit(stack, done.factors, folder, "ssd")],
        provenance={
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


def _notes(provenance: dict[str, Any], guard: RetentionGuard | None) -> list[str]:
    notes = []
    if provenance["stale"]:
        notes.append(
            "F_D was measured on other weights and is stale after an edit: measure it again from time to time."
        )
    if guard is None:
        notes.append("No retained data was given, so the edit was not guarded.")
    if provenance["untouched"]:
        notes.append(
            f"{len(provenance['untouched'])} buffers with running statistics are no parameters and remain unchanged."
        )
    return notes


def _sampling_notes(retain: SampledRecords | None) -> list[str]:
    """Return notes on retained texts that are sampled."""
    sources = [] if retain is None else [each for each in retain.sources if "of" in each]
    return [
        f"{each['records']} of the {each['of']} records of {each['data']} were sampled: give more with --sequences, or "
        "all of them as .jsonl."
        for each in sources
    ]


@dataclass(frozen=True)
class ForgetResult:
    """A model after dampening.

    Attributes:
        model: a copy that shares every unselected weight; the original if the guard rolled back.
        dampening: the dampening, even if it was rolled back.
        guard: the comparison on retained data; None without a guard.
    """

    model: Any
    dampening: Dampening
    guard: RetentionGuard | None = None


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
) -> ForgetResult:
    """Forget some training data, for any torch model.

    Args:
        model: the model; it is not changed.
        samples: the forget set; see :mod:`lamella.measure.labelled`.
        retain: the rest of the training data.
        importance: a saved F_D, or its file.
        batch: samples whose mean gradient is squared.
        order: order of samples for larger batches.
        seed: random seed of a shuffled order.
        guard: retained data, preferably not used in training.
        max_drop: the maximum loss of accuracy (for a decoder, the maximum relative increase of perplexity) on the
            guard's data; above it, the original is returned.
        options: of :func:`dampen`: variant, alpha, lam, reference_of, layers, skip.
    """
    measurement: dict[str, Any] = {name: options[name] for name in ("variant", "reference_of") if name in options}
    measurement["names"] = select_parameters(model, options.get("layers", ()), options.get("skip", ()))
    measurement |= {"retain": retain, "importance": importance, "batch": batch, "order": order, "seed": seed}
    found = importances(model, samples, alpha=_alpha(options), **measurement)
    done = dampen(model, *found, **options)
    changed = apply_factors(model, done.factors)
    if guard is None:
        return ForgetResult(changed, done)
    verdict = RetentionGuard.of(model, changed, guard, max_drop)
    return ForgetResult(changed if verdict.passed else model, done, verdict)
