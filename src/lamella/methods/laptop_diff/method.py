"""LAPTOP-Diff: layer pruning and normalized distillation for diffusion models (Zhang et al., arXiv 2404.11098).

A noise prediction network is pruned by whole blocks: residual blocks, attentions, transformer layers::

    measure    v_i = E || eps({l_i}) - eps_ori ||^2      one evaluation without each block  (scores.py)
    choose     min sum_{i in R} v_i  s.t.  sum p_i >= P   a covering 0-1 knapsack            (knapsack.py)
    prune      remove the blocks, except their shortcuts                                    (cut.py)
    heal       L_task + lambda_out L_out + lambda_feat sum_i L_feat_i / E || f_T^i ||^2      (recipe.py)

One measurement serves every target size, because the cost of a set is approximately the sum of the costs of its blocks.
The paper's body and code are not public: the bypass of a block that changes shapes (its 1 x 1 shortcut is kept), the
constant of the normalization (1) and the training defaults (those of BK-SDM, on which it builds) are this
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from lamella.data import CaptionedImages
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.laptop_diff import scores
from lamella.methods.laptop_diff.cut import Form, convert, natural_form
from lamella.methods.laptop_diff.denoiser import Denoiser
from lamella.methods.laptop_diff.judge import EvaluationSettings, evaluate_networks
from lamella.methods.laptop_diff.knapsack import Choice, covering, greedy
from lamella.methods.laptop_diff.recipe import TRAINING, LossWeights, distil
from lamella.methods.laptop_diff.result import PrunedDenoiser
from lamella.methods.laptop_diff.tuples import Tuples
from lamella.plan import ModelReference, Plan
from lamella.registry import command, method
from lamella.runtime import apply
from lamella.train import TrainConfig, own

Criterion = Literal["output", "task", "magnitude", "taylor"]


@dataclass(frozen=True)
class ScoringSettings:
    """Settings for measuring the scores of blocks.

    Attributes:
        criterion: how a block is scored: ``output``, the change of the network's output without it, as in the paper;
            ``task``, the change of the task loss without it; or a cheap baseline: ``magnitude``, the magnitude of its
            weights, or ``taylor``, a first-order estimate of the change of the task loss.
        sets: number of random sets of blocks for testing whether scores are additive; 0 skips the test.
        batch: batch size.
    """

    criterion: Criterion = "output"
    sets: Annotated[int, Ge(0)] = 12
    batch: Annotated[int, Ge(1)] = 32


@method(
    "laptop-diff",
    paper="2404.11098",
    purpose="prune",
    on="any",
    brief={"remove": 0.3, "tuples": 8, "sets": 3, "batch": 4, "draws": 2},
)
def laptop_diff(
    model: Denoiser,
    images: CaptionedImages,
    *,
    remove: Annotated[float, Gt(0), Lt(1)] = 0.5,
    solver: Literal["exact", "greedy"] = "exact",
    scoring: ScoringSettings = ScoringSettings(),
    evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008, frozen
    form: Form | None = None,
    work: Work = Work(),
    seed: int = 0,
) -> PrunedDenoiser:
    """Drop the blocks of a diffusion model that matter least for their size.

    Args:
        model: a pipeline whose network predicts noise; it is not changed.
        images: images to measure on; one in five is held out for evaluation.
        remove: fraction of the network's parameters to remove; the paper's half.
        solver: ``exact`` for the optimal set, or ``greedy`` for the cheapest blocks per parameter.
        scoring: settings of the measurement.
        evaluation: settings of the measurement's samples and of the evaluation.
        form: form of the saved pipeline: ``plain`` if its config can express the dropped blocks; ``native``, which
            includes its class; or ``portable``, with the original size. Defaults to the first that is possible.
        work: folder from which an interrupted run resumes.
        seed: random seed of timesteps, noise, random sets and generated images.

    Returns:
        The pruned pipeline with its plan, not yet healed.

    Raises:
        MethodError: for a fraction above that of the blocks.
        NumericsError: for a block without which the network's output is not finite.
    """
    blocks = model.blocks
    sites, savings = blocks.sites, blocks.savings()
    target = target_parameters(model, remove)
    tuples = Tuples.of(model, images, evaluation.tuples, seed)
    found = scores.measure_blocks(model, tuples, bins=evaluation.bins, batch=scoring.batch, work=work)
    values = costs_by_criterion(model, tuples, found, scoring)
    sizes = [savings[site] for site in sites]
    best, near = (solve([values[site] for site in sites], sizes, target) for solve in (covering, greedy))
    choice: Choice = best if solver == "exact" else near
    plan = Plan(model=ModelReference.of(blocks), drop=[sites[each] for each in choice.chosen])
    network = apply(blocks, plan).eval()
    measured, _ = scores.joint(model, tuples, plan.drop, scoring.batch)
    findings: dict[str, Any] = {
        "blocks": [
            {
                "site": site,
                "parameters": savings[site],
                "score": values[site],
                "output": found.output[site],
                "by_time": found.by_time[site],
                "task": found.task[site],
                "dropped": site in plan.drop,
            }
            for site in sites
        ],
        "parameters": {"before": count(model.network), "after": count(network), "target": target},
        "predicted": sum(found.output[site] for site in plan.drop),
        "measured": measured,
        "cost": {"exact": best.cost, "greedy": near.cost, "bound": best.bound},
        **evaluate_networks(model, {"pruned": network}, images.part("test"), evaluation, scoring.batch, seed),
    }
    if scoring.sets:
        sets = scores.random_sets(sites, scoring.sets, seed)
        findings["additivity"] = scores.additivity(model, tuples, found.output, sets, scoring.batch)
    return build_result(model, plan, network, form, findings=findings)


def build_result(model: Denoiser, plan: Plan, network: Any, form: Form | None, **fields: Any) -> PrunedDenoiser:
    """Build the result in the given form, or in the first possible one.

    Args:
        model: the original.
        plan: plan with the dropped blocks.
        network: the pruned network.
        form: the form, or None.
        fields: further fields of the result.
    """
    form = form or natural_form(model.blocks, plan.drop)
    left = model.with_network(convert(model.blocks, network, plan.drop, form), f"{model.name}, pruned")
    return PrunedDenoiser(denoiser=left, plan=plan, form=form, **fields)


def target_parameters(model: Denoiser, remove: float) -> int:
    """P, the number of parameters to remove.

    Args:
        model: the model.
        remove: fraction to remove.

    Raises:
        MethodError: for a fraction above that of the blocks, with the largest possible one.
    """
    every, within = count(model.network), sum(model.blocks.savings().values())
    target = -int(-remove * every // 1)  # rounded up, so that the fraction is reached
    if target > within:
        most = within / every
        raise MethodError(f"remove {remove:g}: blocks hold {most:.4f} of the parameters: give at most that")
    return target


def costs_by_criterion(
    model: Denoiser, tuples: Tuples, found: scores.BlockScores, scoring: ScoringSettings
) -> dict[str, float]:
    """Cost of dropping each block, by the chosen criterion.

    Args:
        model: the model.
        tuples: measurement samples.
        found: measured scores.
        scoring: settings.
    """
    if scoring.criterion == "magnitude":
        return scores.magnitudes(model)
    if scoring.criterion == "taylor":
        return scores.taylor(model, tuples, scoring.batch)
    return dict(found.output if scoring.criterion == "output" else found.task)


def count(network: Any) -> int:
    """Number of parameters of a network."""
    return sum(each.numel() for each in network.parameters())


@command(
    "laptop-diff",
    "heal",
    on="any",
    brief={"steps": 3, "batch": 4, "accumulate": 1, "save_every": 2, "tuples": 8, "draws": 2},
)
def heal(
    model: Denoiser,
    plan: Plan,
    images: CaptionedImages,
    *,
    weights: LossWeights = LossWeights(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008, frozen
    form: Form | None = None,
    work: Work = Work(),
) -> PrunedDenoiser:
    """Heal a pruned diffusion model by distillation from the original.

    Args:
        model: the original, used as the teacher; it is not changed.
        plan: the plan.json written by laptop-diff.
        images: training images; one in five is held out for evaluation.
        weights: weights of the parts of the loss.
        config: training settings; defaults to BK-SDM's learning rate, weight decay and batch size, and 50,000 steps.
        evaluation: settings of the evaluation.
        form: see laptop-diff.
        work: folder from which an interrupted run resumes, with bitwise identical results.

    Returns:
        The healed pipeline with its plan.

    Raises:
        PlanError: for a plan for another model.
        TrainingError: when training cannot start, resume or does not stay finite.
    """
    pruned = apply(model.blocks, plan).eval()
    network = apply(model.blocks, plan).eval()
    own(network, lambda name: True)
    log, initial = distil(model, network, images, weights=weights, config=config, out=work.directory("run"), work=work)
    network.eval()
    findings: dict[str, Any] = {
        "blocks": [
            {"site": site, "parameters": size, "dropped": site in plan.drop}
            for site, size in model.blocks.savings().items()
        ],
        "parameters": {"before": count(model.network), "after": count(network)},
        "initial": initial,
        "loss": [point.loss for point in log.train],
        **evaluate_networks(
            model, {"pruned": pruned, "healed": network}, images.part("test"), evaluation, config.batch, config.seed
        ),
    }
    healed = plan.model_copy(update={"provenance": {"healed": plan.digest}})
    return build_result(model, healed, network, form, log=log, findings=findings)
