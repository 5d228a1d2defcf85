"""MuE: leave a model of images and text early, in the encoder by modality, and in the decoder word by word.

Tang et al., "You Need Multiple Exiting: Dynamic Early Exiting for Accelerating Unified Vision Language Model", CVPR
2023, arXiv 2211.11152.

    image tokens ->  layers 1 2 3 . . .  ─┐ saturated behind 3
                                          ├─> memory ─> decoder, for each word:  1 2 | 1 2 3 4 | 1 2 ...
    words        ->  layers 1 2 3 4 5 .  ─┘ saturated behind 5

    1  decompose   the encoder runs on image and text apart, with one set of weights
    2  train       the whole model, with the loss of every layer of the decoder
    3  exit        where a layer changes the stream little: cosine above a threshold, one for each of the three exits

Streams and exits are in :mod:`lamella.methods.mue.policy`, the loss in :mod:`lamella.methods.mue.recipe`.
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
from lamella.methods.mue.recipe import SLUG, TRAINING, Exiting, exiting, pair_of, planned
from lamella.methods.mue.recipe import train as fitted
from lamella.methods.mue.reduction import Exits, by_flops, by_layers, executed, histograms, observed, quantiles
from lamella.methods.mue.reduction import Work as Costs
from lamella.methods.mue.search import QUANTILES, Tried, complete, front, searched
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
    exits: Exiting = Exiting(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Fine-tune a model so that its layers can be left early, and set thresholds for three exits.

    Args:
        model: an encoder-decoder that reads images; it is not changed.
        train: prompts with their answers, which carry the loss; the last fifth is kept for the thresholds.
        quantile: of S on samples, for the thresholds: a higher one exits later. `mue thresholds` searches for them.
        exits: how the model is trained, and how it is left.
        config: of the training: the authors' rate, batch and decay, and one pass over the samples; theirs are 5.
        work: where an interrupted run goes on from.

    Returns:
        The trained model and its plan, with thresholds, the exits that samples take, what that saves by layers and by
        FLOPs, and how much alike streams are from layer to layer.

    Raises:
        MethodError: for a model that is no encoder-decoder or reads no images, and for a single sample.
        TrainingError: when training cannot start or stay finite.
    """
    if len(train) < 2:
        raise MethodError("mue: one sample cannot both train and set thresholds: give more")
    _, decoder = pair_of(model)
    kept = len(train) - max(1, len(train) // 5)
    rows, held_out = (ImageText(part, train.processing) for part in (train[:kept], train[kept:]))
    view, log = fitted(model, rows, exits, config, work.directory() / "run")
    full = observed(view, held_out)
    tau = complete(quantiles(full, quantile, exits.min_layer))
    trained = with_weights_of(decoder, view)
    seen = observed(exiting(trained, exits, tau), held_out)
    plan = planned(trained, exits.params(tau), executed(seen, model.stacks))
    plan = plan.model_copy(update={"provenance": {"method": SLUG}})
    findings = {"thresholds": tau, "right without exits": right(full), **alike(full), **told(seen, model)}
    return Healed(stack=trained, plan=plan, log=log, findings=findings)


@command("mue", "saturation", on="cross", brief={"rows": 6})
@torch.no_grad()
def saturation(
    model: Model, calibration: ImageText, *, reduce: Reduce = "flat", min_layer: Annotated[int, Ge(1)] = 1
) -> Study:
    """Measure how much alike streams are before and after each layer, by modality and in the decoder.

    Args:
        model: an encoder-decoder that reads images, fine-tuned or not; its modalities run apart.
        calibration: prompts with their answers.
        reduce: what S of a stream is: of all of it at once, or the mean or the min of its tokens' cosines.
        min_layer: layers that are no exits.

    Returns:
        The mean of S by layer, and the thresholds that some quantiles make.

    Raises:
        MethodError: for a model that is no encoder-decoder or reads no images.
    """
    found = observed(exiting(model, Exiting(reduce=reduce, min_layer=min_layer), {}), calibration)
    by_quantile = {f"{q:g}": quantiles(found, q, min_layer) for q in SHOWN}
    return Study(findings={"right without exits": right(found), "by quantile": by_quantile, **alike(found)})


@command("mue", "thresholds", on="cross", brief={"rows": 6})
@torch.no_grad()
def thresholds(model: Model, plan: Plan, calibration: ImageText) -> PlanSeries:
    """Search for thresholds: each exit by itself, then together, and keep what nothing else beats.

    Args:
        model: the trained model.
        plan: its plan.
        calibration: prompts with their answers, on which thresholds are tried.

    Returns:
        The series, from the whole model on, whose modalities see each other; then from late exits to early ones, each
        with the share of samples that it answers word for word and the expected time reduction.

    Raises:
        MethodError: for a plan of another method.
    """
    params = {stack: reference.params for stack, reference in plan.policies.items() if reference.name == SLUG}
    if set(params) != {"encoder", "decoder"}:
        raise MethodError("mue thresholds needs a plan that mue has made: give its plan.json")
    pair_of(model)
    plan.check_fits(model)
    tried = searched(partial(attempt, model, params, calibration), QUANTILES, params["decoder"]["min_layer"])
    points = [Point()]
    made = (
        (one, planned(model, with_thresholds(params, one.tau), executed(one.exits, model.stacks)))
        for one in front(tried)
    )
    for one, smaller in rising(made, lambda each: each[1].removed):
        scores = {"right": one.right, "reduction by layers": one.reduction,
                  "by FLOPs": by_flops(one.exits, Costs.of(*pair_of(model))), **complete(one.tau)}  # fmt: skip
        points.append(Point(policies=smaller.policies, scores=scores))
    return PlanSeries(model=ModelReference.of(model), points=points, provenance={"method": SLUG})


def attempt(model: Model, params: Mapping[str, dict[str, Any]], samples: ImageText, tau: Mapping[str, float]) -> Tried:
    """What comes of thresholds, beside these settings of both policies; exits that are not named are off."""
    taken = observed(apply(model, planned(model, with_thresholds(params, tau))), samples)
    return Tried(dict(tau), right(taken), by_layers(taken, depths(model)), taken)


def with_thresholds(params: Mapping[str, dict[str, Any]], tau: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Settings of both policies with these thresholds."""
    every = complete(tau)
    encoder = params["encoder"] | {name: every[name] for name in ("image", "text")}
    return {"encoder": encoder, "decoder": params["decoder"] | {"threshold": every["decoder"]}}


def depths(model: Model) -> tuple[int, int]:
    """N_e and N_d."""
    encoder, decoder = pair_of(model)
    return len(encoder), len(decoder)


def right(exits: Exits) -> float:
    """The share of samples that are answered word for word."""
    return float(exits.right.double().mean())


def told(exits: Exits, model: Model) -> dict[str, Any]:
    """Exits as findings."""
    taken = histograms(exits, depths(model))
    saved = {"by layers": by_layers(exits, depths(model)), "by FLOPs": by_flops(exits, Costs.of(*pair_of(model)))}
    return {"exits": taken, "right": right(exits), "reduction": saved}


def alike(exits: Exits) -> dict[str, Any]:
    """The mean of S by layer, of samples that run everything."""
    means = {name: cosines.double().nanmean(0).tolist() for name, cosines in exits.cosines.items()}
    return {"saturation": {name: values for name, values in means.items() if values[0] == values[0]}}
