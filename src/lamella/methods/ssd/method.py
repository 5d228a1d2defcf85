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

The formulas (selection.py) and the judges (judge.py) work on any torch module; the method makes a plan for a stack.
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
from lamella.methods.ssd.judge import Guard, check_scikit_learn, judged
from lamella.methods.ssd.selection import ALPHA, Reference, Variant, check_options, dampen, importances
from lamella.plan import ModelReference, Plan, apply_factors, scale_edit
from lamella.plan.selection import Skip, select_parameters
from lamella.registry import method
from lamella.results import Edit
from lamella.runtime import apply
from lamella.signature import Named, Split
from lamella.stack import Stack


@dataclass(frozen=True)
class Settings:
    """What is selected, and how far it is dampened.

    Attributes:
        variant: ``ssd``; ``assd``, which finds alpha itself; ``lfssd``, which uses no labels.
        alpha: how many times as much a weight must matter to the records as to all data; the authors' 10 when left out.
        lam: lambda; below 1 it dampens more.
        reference_of: what F_D is measured on: ``full`` (retained and forgotten records) or, as in ASSD's code,
            ``retain``; of a file, what it was measured on.
        layers: change these alone: layers.3, layers.5.mlp, head; or names of parameters with wildcards, *down_proj*.
        skip: leave these as they are: norm, bias.

    Raises:
        MethodError: for an alpha beside assd, which finds its own.
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
    settings: Settings = Settings(),
    batch: Annotated[int, Ge(1)] = 1,
    order: Order = "given",
    max_drop: Annotated[float, Ge(0)] = 0.05,
    work: Work = Work(),
    seed: int = 0,
) -> Edit:
    """Make a model forget some of its training records, without retraining: selective synaptic dampening.

    Weights that matter far more to the records than to all training data are scaled down, once; nothing is trained.
    How much a weight matters is its mean squared gradient, measured in one pass over the retained data, which can be
    kept with --save-importance, and one over the records. With n records of N to forget, an alpha from N/n on selects
    nothing, and is refused. If what should be kept suffers, no model is written.

    The folder gets an ordinary checkpoint with plan.json, evidence.json (forget, retain and test figures, membership
    inference, ZRF) and report.html, which shows layer by layer what was dampened. The model itself is never changed.

    Example: lamella forget tuned --forget gone.jsonl --retain rest.jsonl --retain pydoc --test stdlib -o forgot
    lamella forget tuned --forget more.txt --importance fisher.safetensors --variant assd -o forgot

    Args:
        stack: the opened model; it is not changed.
        forget: what to forget; for a classifier, in Python, (inputs, labels).
        retain: the rest of the training data, or what stands for it. It makes F_D together with the forget set, and
            guards the edit. Of a plain text at most ``sequences`` records are drawn; of .jsonl every one is taken.
        test: data that the model never saw, for membership inference.
        retrained: a model that was trained without these records, to stand beside.
        importance: the file of a stored F_D, which takes the place of the retained data in measuring.
        save_importance: keep F_D in this file, for further requests.
        settings: what is selected, and how far it is dampened.
        batch: samples whose mean gradient is squared; 1 is the Fisher information. The authors take 64, which works
            with batches of one class alone.
        order: how samples come into larger batches: ``given``, ``by class`` or ``shuffled``.
        max_drop: how much perplexity on the retained data may rise, as a share; above it no model is written. Of a
            classifier, the most accuracy that may be lost.
        work: for the factors.
        seed: chooses sequences of texts, and is that of the random weights for ZRF.

    Returns:
        A plan that scales weights; it says how many and how much, site by site.

    Raises:
        MethodError: for an alpha beside assd, which finds its own, or when nothing can be selected.
        CalibrationError: for an empty set, labels out of range, or samples that are in both sets.
        NumericsError: for gradients that vanish or are not finite.
        LamellaError: when the guard rolls back.
    """
    variant, reference_of = settings.variant, settings.reference_of
    if retain is None and importance is None:
        raise MethodError("give --retain, the rest of the training data, or --importance, what was measured on it")
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
    if save_importance is not None:  # whatever comes of the edit, it can be tried again with other settings
        found[1].save(save_importance)
    done = dampen(stack, *found, **vars(settings))
    plan = plan_of(stack, done, found, work.directory())
    view = apply(stack, plan)
    guard = None if retain is None else Guard.of(stack.model, view, retain, max_drop)
    if guard is not None and not guard.kept:
        raise LamellaError(
            f"rolled back, no model is written: {guard}; raise alpha, name layers, or allow more with --max-drop"
        )
    models = {"before": stack.model, "after": view} | ({} if retrained is None else {"retrained": retrained.model})
    figures, notes = judged(models, forget, retain, test, seed)
    told = plan.provenance
    findings = {
        **{name: told[name] for name in ("alpha", "bound", "total", "sites")},
        "estimator": told["reference"]["estimator"],
        "samples": {"forget": found[0].samples, "reference": found[1].samples},
        "seconds": {"forget": found[0].seconds, "reference": found[1].seconds},
        "guard": None if guard is None else vars(guard) | {"lost": guard.lost},
        **figures,
    }
    notes = [*_notes(told, guard), *_drawn(retain), *notes]
    return Edit(stack=stack, plan=plan, findings=findings, notes=notes)


def scaled(
    stack: Stack,
    samples: Data,
    *,
    retain: Data | None = None,
    importance: Fisher | Path | None = None,
    batch: int = 1,
    work: Work = Work(),
    **options: Any,
) -> Plan:
    """The plan alone, which nothing guards and nothing judges; options are those of :func:`dampen`."""
    measured: dict[str, Any] = {name: options[name] for name in ("variant", "reference_of") if name in options}
    measured["names"] = select_parameters(stack, options.get("layers", ()), options.get("skip", ()))
    measured |= {"retain": retain, "importance": importance, "batch": batch, "alpha": _alpha(options)}
    found = importances(stack, samples, **measured)
    return plan_of(stack, dampen(stack, *found, **options), found, work.directory())


def _alpha(options: Mapping[str, Any]) -> float:
    alpha = options.get("alpha")
    return ALPHA if alpha is None else float(alpha)


def plan_of(stack: Stack, done: Dampening, found: tuple[Fisher, Fisher], folder: Path) -> Plan:
    """The plan that carries a dampening out, with its factors in a folder."""
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


def _notes(told: dict[str, Any], guard: Guard | None) -> list[str]:
    notes = []
    if told["stale"]:
        notes.append("F_D was measured on other weights: after an edit it is stale, so measure it again now and then.")
    if guard is None:
        notes.append("No retained data were given, so nothing guarded what should be kept.")
    if told["untouched"]:
        notes.append(
            f"{len(told['untouched'])} buffers with running statistics are no parameters and stay as they are."
        )
    return notes


def _drawn(retain: SampledRecords | None) -> list[str]:
    """Which retained texts are sampled."""
    sources = [] if retain is None else [each for each in retain.sources if "of" in each]
    return [
        f"{each['records']} of the {each['of']} records of {each['data']} were drawn: give more with --sequences, or "
        "all of them as .jsonl."
        for each in sources
    ]


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
    measured["names"] = select_parameters(model, options.get("layers", ()), options.get("skip", ()))
    measured |= {"retain": retain, "importance": importance, "batch": batch, "order": order, "seed": seed}
    found = importances(model, samples, alpha=_alpha(options), **measured)
    done = dampen(model, *found, **options)
    changed = apply_factors(model, done.factors)
    if guard is None:
        return Forgotten(changed, done)
    verdict = Guard.of(model, changed, guard, max_drop)
    return Forgotten(changed if verdict.kept else model, done, verdict)
