"""gamma-MoD: fine-tune a vision-language model so that most image tokens skip most of its layers.

Luo et al., "gamma-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models", arXiv 2410.13859.

    1  ARank       of each layer, the rank of its attention: low if tokens attend to the same few positions
    2  convert     the layers with the lowest ARank; one router R [2, d] for all of them and for both modalities
    3  train       the whole model: the best tokens are processed, including all tokens after the image
    4  thresholds  p > threshold decides in serving, where later tokens are not available

The mixture-of-depths layers are in :mod:`lamella.methods.gamma_mod.policy`.
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
    RoutingTrace,
    calibrate,
    convert,
    observe,
    plan_of,
    policy_image,
    quantile,
)
from lamella.methods.gamma_mod.recipe import (
    train as train_view,
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
PROTECTED = (0, 1, 2, -1)  # as in the released configuration
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
    """Measure the rank of each layer's attention, and select the layers to convert.

    Args:
        stack: the model.
        calibration: prompts; for text without images, whole rows.
        fraction: fraction of all layers to convert.
        protect: layers that are never converted; -1 is the last one.
        rank: ``exact``, or ``effective``, which also distinguishes layers of nearly full rank.
        probes: maximum number of samples to measure.

    Returns:
        The ranks as a fraction of the maximum, by layer and by sample; the rank correlation of layers between two
        halves of the samples; the layers; and the conditions under which ranks are comparable.

    Raises:
        MethodError: for a protected layer that the model does not have.
    """
    listed(stack, protect)
    ranks, record = measured_ranks(stack, calibration, rank, probes)
    layers = lowest(ranks.mean(0), fraction, protect)
    return Study(findings={"arank": record, "layers": layers})


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
    """Convert layers to mixture-of-depths layers that some tokens skip, and train the model with its router.

    Args:
        stack: the model; it is not changed.
        train: prompts with their answers, images first; the task loss covers the answers.
        select: which layers to convert: ``lowest`` ARank (the method), ``highest`` (control), or one of the authors'
            presets; ``arank_mod``, the released one, converts all but the first three and the last.
        fraction: fraction of all layers to convert by rank.
        protect: layers that are not converted by rank; -1 is the last one.
        layers: convert these layers instead.
        rank: ``exact``, or ``effective``, which also distinguishes layers of nearly full rank.
        probes: maximum number of samples on which ARank is measured and thresholds are calibrated.
        routing: routing of tokens.
        config: training configuration; by default the authors' learning rate and batch size, and one epoch. Its seed is
            also that of the router.
        work: folder from which an interrupted run resumes.

    Returns:
        The trained model and its plan, with the fraction of each kind of token that each converted layer processes in
        serving.

    Raises:
        MethodError: for layers that the model does not have, or if none is converted.
        TrainingError: if training cannot start, or the loss is not finite.
    """
    findings: dict[str, Any] = {}
    if layers is None and select in ("lowest", "highest"):
        listed(stack, protect)
        ranks, findings["arank"] = measured_ranks(stack, train, rank, probes)
        chosen = chosen_layers(stack, ranks.mean(0), select, fraction, protect)
    else:
        chosen = mode_layers(select, len(stack)) if layers is None else listed(stack, layers)
    out = work.directory()
    view = convert(stack, chosen, routing, config.seed)
    log = train_view(view, train, routing, config, out / "run")
    view.eval()

    few = first(train, probes)
    limits: dict[str, Any] = {"prefill": PREFILL, "decode": DECODE}
    if routing.served == "calibrated":
        limits = calibrate(observe(view, few))
    trained = with_weights_of(stack, view)
    params = view.lamella_plan.policies[stack.stack].params | limits
    plan = keep_policy(plan_of(trained, params), view.lamella_policy, out)
    seen = observe(apply(trained, plan), few)
    plan = keep_policy(plan_of(trained, params, seen.work(chosen, stack)), view.lamella_policy, out)
    measured = {name: each for name, each in findings.get("arank", {}).items() if name != "by_sample"}
    plan = plan.model_copy(update={"provenance": {"method": "gamma-mod", "arank": measured}})
    findings |= {
        "layers": chosen,
        "of": len(stack),
        "kept": seen.kept(),
        "thresholds": limits,
        "shown": first_row(seen),
    }
    return Healed(stack=trained, plan=plan, log=log, findings=findings)


@command("gamma-mod", "thresholds")
@torch.no_grad()
def thresholds(stack: Stack, plan: Plan, calibration: Samples | ImageText) -> PlanSeries:
    """Create plans for one router that keep nine tenths of the prompt in each converted layer, eight tenths, and so on.

    Args:
        stack: the trained model.
        plan: its plan.
        calibration: prompts with their answers, on which thresholds are calibrated.

    Returns:
        The plan series, starting with the whole model, each plan with the fraction of tokens that the converted layers
        process in serving, and the loss of the answers. Fractions differ from the targets, since tokens skipped by one
        layer change the inputs of the next ones. Generated tokens keep the threshold of the plan.

    Raises:
        MethodError: for a plan of another method.
    """
    reference = plan.policies.get(stack.stack)
    if reference is None or reference.name != "gamma-mod":
        raise MethodError("gamma-mod thresholds needs a plan made by gamma-mod: give its plan.json")
    view = apply(stack, plan)
    policy: MixtureOfDepths = view.lamella_policy
    layers, served = list(policy.index_of), observe(view, calibration)
    p = served.p[served.prompt]
    points = [Point()]

    def serving(keep: float) -> tuple[list[float], RoutingTrace, float]:
        prefill = [quantile(p[:, index], keep) for index in range(len(layers))]
        policy.thresholds[0] = torch.tensor(prefill, dtype=torch.float64)
        seen = observe(view, calibration)
        return prefill, seen, float(seen.ran.double().mean())

    for prefill, seen, share in rising(map(serving, KEEPS), lambda each: 1 - each[2]):
        params = reference.params | {"prefill": prefill}
        changed = reference.model_copy(update={"params": params, "work": seen.work(layers, stack)})
        scores = {"kept tokens": share, "loss (nats)": seen.loss}
        points.append(Point(policies={stack.stack: changed}, scores=scores))
    return PlanSeries(model=ModelReference.of(stack), points=points, provenance={"method": "gamma-mod"})


def first(samples: Samples | ImageText, count: int) -> Any:
    """Return the first `count` samples, of the same type.

    Args:
        samples: the samples.
        count: how many.
    """
    if isinstance(samples, ImageText):
        return ImageText(samples[:count], samples.processing)
    return samples[:count]


def measured_ranks(
    stack: Stack, samples: Samples | ImageText, rank: Rank, probes: int
) -> tuple[Tensor, dict[str, Any]]:
    """Measure ARank of every layer on some samples [samples, layers], also as findings.

    Args:
        stack: the model.
        samples: the samples.
        rank: kind of rank.
        probes: maximum number of samples.
    """
    rows = prompts(stack, first(samples, probes))
    ranks = attention_ranks(stack, rows, rank).cpu()
    halves = [ranks[half::2].mean(0).tolist() for half in (0, 1)] if len(rows) > 1 else []
    lengths = [row["input_ids"].shape[1] for row in rows]
    record = {
        "by_layer": ranks.mean(0).tolist(),
        "by_sample": ranks.tolist(),
        "agreement": spearman(*halves) if halves else None,
        "rank": rank,
        "lengths": [min(lengths), max(lengths)],
        "images": policy_image(stack.model) >= 0 and isinstance(samples, ImageText),
        "dtype": str(next(stack.model.parameters()).dtype).removeprefix("torch."),
    }
    return ranks, record


def prompts(stack: Stack, samples: Any) -> list[dict[str, Tensor]]:
    """Return the model's inputs of each single prompt; for text, whose prompts differ in length, of the whole row.

    Args:
        stack: the model.
        samples: the samples.
    """
    if isinstance(samples, ImageText):
        inputs = [samples.prompts([row]) for row in samples]
    else:
        inputs = [{"input_ids": row["input_ids"][None]} for row in samples]
    return [{name: each.to(stack.device) for name, each in read_inputs(stack.model, row).items()} for row in inputs]


def chosen_layers(stack: Stack, ranks: Tensor, select: str, fraction: float, protect: Sequence[int]) -> list[int]:
    """Return the layers to convert by rank.

    Args:
        stack: the model.
        ranks: rank of each layer [layers].
        select: ``lowest`` or ``highest``.
        fraction: fraction of all layers.
        protect: layers that are not converted.

    Raises:
        MethodError: if there is none.
    """
    layers = lowest(ranks if select == "lowest" else -ranks, fraction, protect)
    if not layers:
        raise MethodError(f"gamma-mod: all {len(stack)} layers are protected, or fraction {fraction:g} is too small")
    return layers


def listed(stack: Stack, layers: Sequence[int]) -> list[int]:
    """Return sorted layer indices; negative ones count from the end.

    Args:
        stack: the model.
        layers: layer indices.

    Raises:
        MethodError: for a layer that the model does not have.
    """
    wrong = next((each for each in layers if not -len(stack) <= each < len(stack)), None)
    if wrong is not None:
        raise MethodError(f"gamma-mod: there is no layer {wrong}; {stack.name} has {len(stack)}")
    return sorted({each % len(stack) for each in layers})


def first_row(seen: RoutingTrace) -> dict[str, Any]:
    """Return, for the first row, the kind of each token and the layers that processed it."""
    here = seen.row == 0
    kinds = ["image" if image else "prompt" if prompt else "answer"
             for image, prompt in zip(seen.image[here].tolist(), seen.prompt[here].tolist(), strict=True)]  # fmt: skip
    return {"kinds": kinds, "ran": seen.ran[here].T.int().tolist()}
