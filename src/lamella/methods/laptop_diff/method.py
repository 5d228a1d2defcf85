"""LAPTOP-Diff: layer pruning and normalized distillation for diffusion models (Zhang et al., arXiv 2404.11098).

A network that predicts noise is made smaller by whole blocks: residual blocks, attentions, layers of transformers::

    measure    v_i = E || eps({l_i}) - eps_ori ||^2      one pass without each block      (scores.py)
    choose     min sum_{i in R} v_i  s.t.  sum p_i >= P   a covering 0-1 knapsack          (knapsack.py)
    prune      the blocks are gone, all but their shortcuts                               (cut.py)
    heal       L_task + lambda_out L_out + lambda_feat sum_i L_feat_i / E || f_T^i ||^2    (recipe.py)

One measurement serves every size, since what a set costs is about the sum of what its blocks cost. The paper's body and
code are not public: how a block that changes shapes is bypassed (it keeps its 1 x 1 shortcut), the constant of the
normalization (1) and the training defaults (those of BK-SDM, on which it builds) are this implementation's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from lamella.data import CaptionedImages
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.laptop_diff import scores
from lamella.methods.laptop_diff.cut import Form, formed, natural_form
from lamella.methods.laptop_diff.denoiser import Denoiser
from lamella.methods.laptop_diff.judge import Judging, judged
from lamella.methods.laptop_diff.knapsack import Choice, covering, greedy
from lamella.methods.laptop_diff.recipe import TRAINING, Weights, distil
from lamella.methods.laptop_diff.result import Pruned
from lamella.methods.laptop_diff.tuples import Tuples
from lamella.plan import ModelReference, Plan
from lamella.registry import command, method
from lamella.runtime import apply
from lamella.train import TrainConfig, own

Criterion = Literal["output", "task", "magnitude", "taylor"]


@dataclass(frozen=True)
class Measuring:
    """How blocks are measured.

    Attributes:
        criterion: the change of the ``output``, as in the paper; of the ``task``'s loss; or two that measure little:
            ``magnitude`` of weights, and ``taylor``, its loss to first order.
        sets: random sets of blocks on which it is measured whether scores add up; 0: it is not.
        batch: tuples at once.
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
    measuring: Measuring = Measuring(),
    judging: Judging = Judging(),  # noqa: B008, frozen
    form: Form | None = None,
    work: Work = Work(),
    seed: int = 0,
) -> Pruned:
    """Leave out the blocks of a diffusion model that matter least for their size.

    Args:
        model: a pipeline whose network predicts noise; it is not changed.
        images: to measure on; one in five of them is kept to judge.
        remove: share of the network's parameters that shall go; the paper's half.
        solver: the best set, or the cheapest blocks for each parameter first.
        measuring: how blocks are measured.
        judging: on how much they are measured, and what is left is judged.
        form: of the pipeline that is written: ``plain`` where its config can say what is gone, else ``native``, which
            brings its class; or ``portable``, of the old size. The first that can be when left out.
        work: where an interrupted run goes on from.
        seed: of times, noise, random sets and pictures.

    Returns:
        The pruned pipeline with its plan, not healed yet.

    Raises:
        MethodError: for a share that the blocks do not have.
        NumericsError: for a block without which the network says what is no number.
    """
    blocks = model.blocks
    sites, savings = blocks.sites, blocks.savings()
    target = wanted(model, remove)
    tuples = Tuples.of(model, images, judging.tuples, seed)
    found = scores.measured(model, tuples, bins=judging.bins, batch=measuring.batch, work=work)
    values = chosen_by(model, tuples, found, measuring)
    sizes = [savings[site] for site in sites]
    best, near = (solve([values[site] for site in sites], sizes, target) for solve in (covering, greedy))
    choice: Choice = best if solver == "exact" else near
    plan = Plan(model=ModelReference.of(blocks), drop=[sites[each] for each in choice.chosen])
    network = apply(blocks, plan).eval()
    measured, _ = scores.joint(model, tuples, plan.drop, measuring.batch)
    findings: dict[str, Any] = {
        "blocks": [
            {
                "site": site,
                "parameters": savings[site],
                "score": values[site],
                "output": found.output[site],
                "by_time": found.by_time[site],
                "task": found.task[site],
                "gone": site in plan.drop,
            }
            for site in sites
        ],
        "parameters": {"before": count(model.network), "after": count(network), "target": target},
        "predicted": sum(found.output[site] for site in plan.drop),
        "measured": measured,
        "cost": {"exact": best.cost, "greedy": near.cost, "bound": best.bound},
        **judged(model, {"pruned": network}, images.part("test"), judging, measuring.batch, seed),
    }
    if measuring.sets:
        sets = scores.random_sets(sites, measuring.sets, seed)
        findings["additivity"] = scores.additivity(model, tuples, found.output, sets, measuring.batch)
    return written(model, plan, network, form, findings=findings)


def written(model: Denoiser, plan: Plan, network: Any, form: Form | None, **told: Any) -> Pruned:
    """The result in a form, or in the first that can be."""
    form = form or natural_form(model.blocks, plan.drop)
    left = model.with_network(formed(model.blocks, network, plan.drop, form), f"{model.name}, pruned")
    return Pruned(denoiser=left, plan=plan, form=form, **told)


def wanted(model: Denoiser, remove: float) -> int:
    """P, the parameters that shall go.

    Raises:
        MethodError: for a share that the blocks do not have; it says which one is the nearest.
    """
    every, within = count(model.network), sum(model.blocks.savings().values())
    target = -int(-remove * every // 1)  # up, so that the share is reached
    if target > within:
        most = within / every
        raise MethodError(f"remove {remove:g}: give at most the {most:.4f} that blocks have")
    return target


def chosen_by(model: Denoiser, tuples: Tuples, found: scores.Scores, measuring: Measuring) -> dict[str, float]:
    """What dropping each block costs, by the criterion that was chosen."""
    if measuring.criterion == "magnitude":
        return scores.magnitudes(model)
    if measuring.criterion == "taylor":
        return scores.taylor(model, tuples, measuring.batch)
    return dict(found.output if measuring.criterion == "output" else found.task)


def count(network: Any) -> int:
    """Its parameters."""
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
    weights: Weights = Weights(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    judging: Judging = Judging(),  # noqa: B008, frozen
    form: Form | None = None,
    work: Work = Work(),
) -> Pruned:
    """Let a pruned diffusion model learn from the whole one.

    Args:
        model: the whole one, which teaches; it is not changed.
        plan: what laptop-diff has written: its plan.json.
        images: to train on; one in five of them is kept to judge.
        weights: what the parts of the loss weigh.
        config: of the training; the rate, decay and batch of BK-SDM and 50,000 steps when left out.
        judging: on how much it is judged.
        form: see laptop-diff.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The healed pipeline with its plan.

    Raises:
        PlanError: for a plan for another model.
        TrainingError: when training cannot start, go on or stay finite.
    """
    pruned = apply(model.blocks, plan).eval()
    network = apply(model.blocks, plan).eval()
    own(network, lambda name: True)
    log, begins = distil(model, network, images, weights=weights, config=config, out=work.directory("run"), work=work)
    network.eval()
    findings: dict[str, Any] = {
        "blocks": [
            {"site": site, "parameters": size, "gone": site in plan.drop}
            for site, size in model.blocks.savings().items()
        ],
        "parameters": {"before": count(model.network), "after": count(network)},
        "begins": begins,
        "loss": [point.loss for point in log.train],
        **judged(model, {"pruned": pruned, "healed": network}, images.part("test"), judging, config.batch, config.seed),
    }
    healed = plan.model_copy(update={"provenance": {"healed": plan.digest}})
    return written(model, healed, network, form, log=log, findings=findings)
