"""gamma-MoD: tune a model so that in most of its layers most image tokens pass by.

Luo et al., "gamma-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models", arXiv 2410.13859.

    1  ARank       of each layer, the rank of its attention: low where tokens attend to the same few places
    2  convert     the layers of the lowest; one router R [2, d] for all of them and for both modalities
    3  train       the whole model: the best tokens are processed, all behind the image among them
    4  thresholds  p > threshold decides in serving, where looking ahead is not possible

The layers themselves are in :mod:`lamella.methods.gamma_mod.policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lamella.data import ImageText, Samples
from lamella.errors import MethodError
from lamella.evaluate.scored import read_inputs
from lamella.files import Work
from lamella.measure import spearman
from lamella.methods.gamma_mod.arank import Rank, attention_ranks, lowest
from lamella.methods.gamma_mod.baselines import mode_layers
from lamella.methods.gamma_mod.policy import MixtureOfDepths
from lamella.methods.gamma_mod.recipe import (
    DECODE,
    PREFILL,
    TRAINING,
    Routing,
    Seen,
    calibrated,
    converted,
    observed,
    planned,
    policy_image,
    quantile,
)
from lamella.methods.gamma_mod.recipe import (
    train as fitted,
)
from lamella.plan import ModelReference, Plan, PlanSeries, Point
from lamella.registry import command, method
from lamella.results import Study, Trained
from lamella.runtime import apply, keep_policy
from lamella.search import rising
from lamella.stack import Stack
from lamella.train import Healed, TrainConfig, with_weights_of

Select = Literal[
    "lowest", "highest", "first_half", "second_half", "sparse", "dense", "first_last_dense", "first_five_dense",
    "last_two_thirds", "arank_mod",
]  # fmt: skip
PROTECTED = (0, 1, 2, -1)  # as the released configuration leaves them
KEEPS = tuple(round(0.1 * tenth, 1) for tenth in range(9, 0, -1))


@command("gamma-mod", "arank", brief={"protect": ()})
def arank(
    stack: Stack,
    calibration: Samples | ImageText,
    *,
    fraction: Annotated[float, Gt(0), Le(1)] = 0.9,
    protect: tuple[int, ...] = PROTECTED,
    rank: Rank = "exact",
    probes: Annotated[int, Ge(2)] = 50,
) -> Study:
    """Measure the rank of each layer's attention, and say which layers that would convert.

    Args:
        stack: the model.
        calibration: prompts; of text without images whole rows.
        fraction: of all layers, how many to convert.
        protect: layers that are never converted; -1 is the last.
        rank: ``exact``, or ``effective``, which tells layers apart also where all are of nearly full rank.
        probes: samples to measure, as long as there are so many.

    Returns:
        The ranks as a share of the highest possible, by layer and by sample; how far two halves of the samples agree on
        the order of layers; the layers; and what ranks may be compared with.

    Raises:
        MethodError: for a protected layer that the model does not have.
    """
    listed(stack, protect)
    ranks, told = measured_ranks(stack, calibration, rank, probes)
    layers = lowest(ranks.mean(0), fraction, protect)
    return Study(findings={"arank": told, "layers": layers})


@method(
    "gamma-mod",
    paper="2410.13859",
    purpose="skip",
    brief={"fraction": 0.5, "protect": (), "text_rows": "half"},
)
def gamma_mod(
    stack: Stack,
    train: Samples | ImageText,
    *,
    select: Select = "lowest",
    fraction: Annotated[float, Gt(0), Le(1)] = 0.9,
    protect: tuple[int, ...] = PROTECTED,
    layers: tuple[int, ...] | None = None,
    rank: Rank = "exact",
    probes: Annotated[int, Ge(2)] = 50,
    routing: Routing = Routing(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Convert layers into ones that some tokens pass by, and train the model with its router.

    Args:
        stack: the model; it is not changed.
        train: prompts with their answers, images first; answers carry the task's loss.
        select: the layers of ``lowest`` ARank; for comparison of the ``highest``, or one of the authors' modes:
            ``arank_mod``, the released one, is all but the first three and the last.
        fraction: of all layers, how many are converted by rank.
        protect: layers that are not converted by rank; -1 is the last.
        layers: convert these instead.
        rank: ``exact``, or ``effective``, which tells layers apart also where all are of nearly full rank.
        probes: samples on which ARank is measured, and on which thresholds are set.
        routing: how tokens are routed.
        config: of the training; the authors' rate and batch, and one pass over the samples. Its seed is the router's.
        work: where an interrupted run goes on from.

    Returns:
        The trained model and its plan, with what each converted layer keeps of each kind of token when it is served.

    Raises:
        MethodError: for layers that the model does not have, or when none is converted.
        TrainingError: when training cannot start or stay finite.
    """
    findings: dict[str, Any] = {}
    if layers is None and select in ("lowest", "highest"):
        listed(stack, protect)
        ranks, findings["arank"] = measured_ranks(stack, train, rank, probes)
        chosen = chosen_layers(stack, ranks.mean(0), select, fraction, protect)
    else:
        chosen = mode_layers(select, len(stack)) if layers is None else listed(stack, layers)
    out = work.directory()
    view = converted(stack, chosen, routing, config.seed)
    log = fitted(view, train, routing, config, out / "run")
    view.eval()

    few = first(train, probes)
    limits: dict[str, Any] = {"prefill": PREFILL, "decode": DECODE}
    if routing.served == "calibrated":
        limits = calibrated(observed(view, few))
    trained = with_weights_of(stack, view)
    params = view.lamella_plan.policies[stack.stack].params | limits
    plan = keep_policy(planned(trained, params), view.lamella_policy, out)
    seen = observed(apply(trained, plan), few)
    plan = keep_policy(planned(trained, params, seen.work(chosen, stack)), view.lamella_policy, out)
    measured = {name: each for name, each in findings.get("arank", {}).items() if name != "by_sample"}
    plan = plan.model_copy(update={"provenance": {"method": "gamma-mod", "arank": measured}})
    findings |= {"layers": chosen, "of": len(stack), "kept": seen.kept(), "thresholds": limits, "shown": shown(seen)}
    return Healed(stack=trained, plan=plan, log=log, findings=findings)


@command("gamma-mod", "thresholds")
@torch.no_grad()
def thresholds(stack: Stack, plan: Plan, calibration: Samples | ImageText) -> PlanSeries:
    """Make plans of one router that keep nine tenths of prompts in each converted layer, eight tenths, and so on.

    Args:
        stack: the trained model.
        plan: its plan.
        calibration: prompts with their answers, on which thresholds are set.

    Returns:
        The series, from the whole model on, each with the share of tokens that the converted layers process when it is
        served, and the loss of the answers. Shares differ from what was aimed at, since what one layer leaves out
        changes what the next ones read. Generated tokens keep the threshold of the plan.

    Raises:
        MethodError: for a plan of another method.
    """
    reference = plan.policies.get(stack.stack)
    if reference is None or reference.name != "gamma-mod":
        raise MethodError("gamma-mod thresholds needs a plan that gamma-mod has made: give its plan.json")
    view = apply(stack, plan)
    policy: MixtureOfDepths = view.lamella_policy
    layers, served = list(policy.place), observed(view, calibration)
    p = served.p[served.prompt]
    points = [Point()]

    def serving(keep: float) -> tuple[list[float], Seen, float]:
        prefill = [quantile(p[:, place], keep) for place in range(len(layers))]
        policy.thresholds[0] = torch.tensor(prefill, dtype=torch.float64)
        seen = observed(view, calibration)
        return prefill, seen, float(seen.ran.double().mean())

    for prefill, seen, share in rising(map(serving, KEEPS), lambda each: 1 - each[2]):
        params = reference.params | {"prefill": prefill}
        changed = reference.model_copy(update={"params": params, "work": seen.work(layers, stack)})
        scores = {"kept tokens": share, "loss (nats)": seen.loss}
        points.append(Point(policies={stack.stack: changed}, scores=scores))
    return PlanSeries(model=ModelReference.of(stack), points=points, provenance={"method": "gamma-mod"})


def first(samples: Samples | ImageText, count: int) -> Any:
    """The first so many samples, of the same kind."""
    if isinstance(samples, ImageText):
        return ImageText(samples[:count], samples.processing)
    return samples[:count]


def measured_ranks(
    stack: Stack, samples: Samples | ImageText, rank: Rank, probes: int
) -> tuple[Tensor, dict[str, Any]]:
    """ARank of every layer on some samples [samples, layers], and the same as findings."""
    rows = prompts(stack, first(samples, probes))
    ranks = attention_ranks(stack, rows, rank).cpu()
    halves = [ranks[half::2].mean(0).tolist() for half in (0, 1)] if len(rows) > 1 else []
    lengths = [row["input_ids"].shape[1] for row in rows]
    told = {
        "by_layer": ranks.mean(0).tolist(),
        "by_sample": ranks.tolist(),
        "agreement": spearman(*halves) if halves else None,
        "rank": rank,
        "lengths": [min(lengths), max(lengths)],
        "images": policy_image(stack.model) >= 0 and isinstance(samples, ImageText),
        "dtype": str(next(stack.model.parameters()).dtype).removeprefix("torch."),
    }
    return ranks, told


def prompts(stack: Stack, samples: Any) -> list[dict[str, Tensor]]:
    """What a model takes of each prompt by itself; of text, where prompts are of many lengths, the whole row."""
    if isinstance(samples, ImageText):
        given = [samples.prompts([row]) for row in samples]
    else:
        given = [{"input_ids": row["input_ids"][None]} for row in samples]
    return [{name: each.to(stack.device) for name, each in read_inputs(stack.model, row).items()} for row in given]


def chosen_layers(stack: Stack, ranks: Tensor, select: str, fraction: float, protect: Sequence[int]) -> list[int]:
    """The layers to convert by rank [layers]."""
    layers = lowest(ranks if select == "lowest" else -ranks, fraction, protect)
    if not layers:
        raise MethodError(f"gamma-mod: all {len(stack)} layers are protected, or fraction {fraction:g} is too little")
    return layers


def listed(stack: Stack, layers: Sequence[int]) -> list[int]:
    """Layers as they were given, counted from the first; negative ones are counted from the end."""
    wrong = next((each for each in layers if not -len(stack) <= each < len(stack)), None)
    if wrong is not None:
        raise MethodError(f"gamma-mod: there is no layer {wrong}; {stack.name} has {len(stack)}")
    return sorted({each % len(stack) for each in layers})


def shown(seen: Seen) -> dict[str, Any]:
    """Of the first row, what each token is and which layers have processed it."""
    here = seen.row == 0
    kinds = ["image" if image else "prompt" if prompt else "answer"
             for image, prompt in zip(seen.image[here].tolist(), seen.prompt[here].tolist(), strict=True)]  # fmt: skip
    return {"kinds": kinds, "ran": seen.ran[here].T.int().tolist()}
