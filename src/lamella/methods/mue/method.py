"""MuE: early exits in vision-language encoder-decoders, by modality in the encoder and by token in the decoder.

Tang et al., "You Need Multiple ExitSettings: Dynamic Early ExitSettings for Accelerating Unified Vision Language
Model", CVPR 2023, arXiv 2211.11152.

    image tokens ->  layers 1 2 3 . . .  ─┐ saturated after 3
                                          ├─> memory ─> decoder, for each token: 1 2 | 1 2 3 4 | 1 2 ...
    text tokens  ->  layers 1 2 3 4 5 .  ─┘ saturated after 5

    1  decompose   the encoder processes image and text separately, with one set of weights
    2  train       the whole model, with the loss of every decoder layer
    3  exit        where a layer hardly changes the hidden states: cosine above a threshold, one for each of three exits

The policies are in :mod:`lamella.methods.mue.policy`, the loss in :mod:`lamella.methods.mue.recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le

from lamella.data import ImageText
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.mue.policy import Reduce
from lamella.methods.mue.recipe import SLUG, TRAINING, ExitSettings, exit_plan, exit_view, pair_of
from lamella.methods.mue.recipe import train as fitted
from lamella.methods.mue.reduction import (
    ExitCosts,
    Exits,
    by_flops,
    by_layers,
    executed,
    histograms,
    measure_exits,
    quantile_thresholds,
)
from lamella.methods.mue.search import QUANTILES, ExitTrial, pareto_trials, search_thresholds, with_all_exits
from lamella.plan import ModelReference, Plan, PlanSeries, Point
from lamella.registry import command, method
from lamella.results import Study, Trained
from lamella.runtime import apply
from lamella.search import rising
from lamella.stack import Model
from lamella.train import Healed, TrainConfig, with_weights_of

SHOWN = (0.25, 0.5, 0.75, 0.9)


@method("mue", paper="2211.11152", purpose="skip", on="cross", brief={"rows": 6})
def mue(
    model: Model,
    train: ImageText,
    *,
    quantile: Annotated[float, Ge(0), Le(1)] = 0.5,
    exits: ExitSettings = ExitSettings(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Fine-tune a vision-language encoder-decoder for early exits, and set the thresholds of three exits.

    Args:
        model: an encoder-decoder with image inputs; it is not changed.
        train: prompts with their answers, which carry the loss; the last fifth is held out for the thresholds.
        quantile: quantile of the saturation S on held-out samples that becomes the threshold; a higher one exits later.
            `mue thresholds` searches for thresholds.
        exits: settings of the training loss and of the exits.
        config: training settings; learning rate, batch size and weight decay are those of the authors' code, for one
            epoch instead of 5.
        work: folder from which an interrupted run resumes.

    Returns:
        The trained model and its plan, with the thresholds, the exits of held-out samples, their reduction by layers
        and by FLOPs, and the mean saturation of each layer.

    Raises:
        MethodError: for a model that is no encoder-decoder or has no image inputs, and for a single sample.
        TrainingError: when training cannot start or stay finite.
    """
    if len(train) < 2:
        raise MethodError("mue: a single sample cannot both train and set thresholds: give at least 2")
    _, decoder = pair_of(model)
    kept = len(train) - max(1, len(train) // 5)
    rows, held_out = (ImageText(part, train.processing) for part in (train[:kept], train[kept:]))
    view, log = fitted(model, rows, exits, config, work.directory() / "run")
    full = measure_exits(view, held_out)
    tau = with_all_exits(quantile_thresholds(full, quantile, exits.min_layer))
    trained = with_weights_of(decoder, view)
    measured = measure_exits(exit_view(trained, exits, tau), held_out)
    plan = exit_plan(trained, exits.params(tau), executed(measured, model.stacks))
    plan = plan.model_copy(update={"provenance": {"method": SLUG}})
    findings = {
        "thresholds": tau,
        "exact match without exits": exact_match(full),
        **saturation_findings(full),
        **exit_findings(measured, model),
    }
    return Healed(stack=trained, plan=plan, log=log, findings=findings)


@command("mue", "saturation", on="cross", brief={"rows": 6})
@torch.no_grad()
def saturation(
    model: Model, calibration: ImageText, *, reduce: Reduce = "flat", min_layer: Annotated[int, Ge(1)] = 1
) -> Study:
    """Measure the cosine between the hidden states before and after each layer, by modality and in the decoder.

    Args:
        model: an encoder-decoder with image inputs, fine-tuned or not; its modalities are processed separately.
        calibration: prompts with their answers.
        reduce: saturation of a modality: ``flat`` for the cosine over all its tokens at once, or the ``mean`` or the
            ``min`` of the cosines of its tokens.
        min_layer: first layer after which a sample may exit.

    Returns:
        The mean saturation S of each layer, and the thresholds at some quantile_thresholds.

    Raises:
        MethodError: for a model that is no encoder-decoder or has no image inputs.
    """
    found = measure_exits(exit_view(model, ExitSettings(reduce=reduce, min_layer=min_layer), {}), calibration)
    by_quantile = {f"{q:g}": quantile_thresholds(found, q, min_layer) for q in SHOWN}
    return Study(
        findings={
            "exact match without exits": exact_match(found),
            "by quantile": by_quantile,
            **saturation_findings(found),
        }
    )


@command("mue", "thresholds", on="cross", brief={"rows": 6})
@torch.no_grad()
def thresholds(model: Model, plan: Plan, calibration: ImageText) -> PlanSeries:
    """Search for thresholds, for each exit alone and then jointly, and keep the Pareto-optimal ones.

    Args:
        model: the trained model.
        plan: its plan.
        calibration: prompts with their answers, on which thresholds are tried.

    Returns:
        The series: the whole model without decomposition first, then plans from late exits to early ones, each with the
        fraction of samples that it answers exactly and the expected time reduction.

    Raises:
        MethodError: for a plan of another method.
    """
    params = {stack: reference.params for stack, reference in plan.policies.items() if reference.name == SLUG}
    if set(params) != {"encoder", "decoder"}:
        raise MethodError("mue thresholds needs a plan of mue: give its plan.json")
    pair_of(model)
    plan.check_fits(model)
    tried = search_thresholds(partial(attempt, model, params, calibration), QUANTILES, params["decoder"]["min_layer"])
    points = [Point()]
    made = (
        (one, exit_plan(model, with_thresholds(params, one.tau), executed(one.exits, model.stacks)))
        for one in pareto_trials(tried)
    )
    for one, smaller in rising(made, lambda each: each[1].removed):
        scores = {"exact match": one.correct, "reduction by layers": one.reduction,
                  "by FLOPs": by_flops(one.exits, ExitCosts.of(*pair_of(model))),
                  **with_all_exits(one.tau)}  # fmt: skip
        points.append(Point(policies=smaller.policies, scores=scores))
    return PlanSeries(model=ModelReference.of(model), points=points, provenance={"method": SLUG})


def attempt(
    model: Model, params: Mapping[str, dict[str, Any]], samples: ImageText, tau: Mapping[str, float]
) -> ExitTrial:
    """Measure the exits at some thresholds; exits that are not named are off.

    Args:
        model: the trained model.
        params: settings of both policies, by stack.
        samples: prompts with their answers.
        tau: thresholds by exit.
    """
    taken = measure_exits(apply(model, exit_plan(model, with_thresholds(params, tau))), samples)
    return ExitTrial(dict(tau), exact_match(taken), by_layers(taken, depths(model)), taken)


def with_thresholds(params: Mapping[str, dict[str, Any]], tau: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return the settings of both policies with these thresholds.

    Args:
        params: settings of the policies of ``encoder`` and ``decoder``.
        tau: threshold on the cosine by exit (``image``, ``text``, ``decoder``); an exit that is not named is off.
    """
    every = with_all_exits(tau)
    encoder = params["encoder"] | {name: every[name] for name in ("image", "text")}
    return {"encoder": encoder, "decoder": params["decoder"] | {"threshold": every["decoder"]}}


def depths(model: Model) -> tuple[int, int]:
    """Return N_e and N_d, the numbers of encoder and decoder layers."""
    encoder, decoder = pair_of(model)
    return len(encoder), len(decoder)


def exact_match(exits: Exits) -> float:
    """Return the fraction of samples that are answered exactly."""
    return float(exits.correct.double().mean())


def exit_findings(exits: Exits, model: Model) -> dict[str, Any]:
    """Return the exits, the exact matches and the reduction as findings.

    Args:
        exits: the recorded exits.
        model: an encoder-decoder model.
    """
    taken = histograms(exits, depths(model))
    saved = {"by layers": by_layers(exits, depths(model)), "by FLOPs": by_flops(exits, ExitCosts.of(*pair_of(model)))}
    return {"exits": taken, "exact match": exact_match(exits), "reduction": saved}


def saturation_findings(exits: Exits) -> dict[str, Any]:
    """Return the mean of S by layer, from samples that run all layers."""
    means = {name: cosines.double().nanmean(0).tolist() for name, cosines in exits.cosines.items()}
    return {"saturation": {name: values for name, values in means.items() if values[0] == values[0]}}
