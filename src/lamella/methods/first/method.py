"""FiRST: trained routers read the prompt once and choose the layers that its answer runs.

Jain et al., "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction", arXiv 2410.12513.

    p_l[t] = sigmoid(w_l . rms(h_l[t]) + b_l)         one small router per layer
    s_l    = mean of p_l over the prompt's tokens      keep layer l for the whole answer iff s_l >= theta

The set of kept layers is fixed for an answer, so the KV caches of kept layers are complete and those of skipped layers
are freed. Routers are trained first, with the model frozen; then LoRA recovers quality with the routers frozen. The
paper's equations were not available: pooling, losses and defaults are a reconstruction from its abstract and public
reviews.

Soft gates g = s_l may all end near the threshold, where the model in training and the served one differ most. An option
closes this gap: straight-through gates g = [s_l >= theta] + s_l - stopgrad(s_l), while the temperature of the sigmoid
falls.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from lamella import processes
from lamella.data import Samples, Text
from lamella.files import Work
from lamella.measure import sequences
from lamella.methods.first.policy import Gates, PromptRouters, plan_of, scores
from lamella.plan import ModelReference, Plan, PlanSeries, Point, PolicyReference
from lamella.registry import command, method
from lamella.runtime import apply, keep_policy, with_policy
from lamella.search import threshold
from lamella.stack import Stack
from lamella.train import (
    Healed,
    Hook,
    Task,
    TrainConfig,
    TrainingRun,
    add_lora,
    blocks,
    fit,
    fit_policy,
    response_loss,
    with_weights_of,
)

ROUTING = TrainConfig(lr=1e-2, batch=2)
TRAINING = TrainConfig(steps=200, lr=2e-4)
MARGIN = 1e-3  # distance of a threshold from the lowest and the highest score
HELD = 64  # prompts on which healing preserves the mean number of kept layers


def train_routers(
    stack: Stack,
    samples: Any,
    *,
    config: TrainConfig = ROUTING,
    skip_weight: float = 0.1,
    reg_weight: float = 0.01,
    reg: Literal["binary", "l2"] = "binary",
    target_skip: float | None = None,
    gates: Gates = "soft",
    scope: Literal["prompt", "token"] = "prompt",
    out: Path,
    **settings: Any,
) -> PromptRouters:
    """Phase 1: train the routers alone, with the model frozen.

    Args:
        stack: the model; it is not changed.
        samples: prompts with their answers, as :func:`lamella.train.blocks` makes them.
        config: training configuration.
        skip_weight: alpha of the paper: weight of the loss term that favours skipping.
        reg_weight: lambda of the paper: weight of the regulariser.
        reg: ``binary`` is mean g (1 - g), which pushes gates to 0 or 1; ``l2`` penalises the routers' weights.
        target_skip: target fraction of skipped layers; if None, as many as possible are skipped.
        gates: gates of the forward pass in training; see :class:`PromptRouters`.
        scope: scope of soft gates; see :class:`PromptRouters`.
        out: folder for checkpoints, from which an interrupted run resumes.
        **settings: keyword arguments of :class:`PromptRouters`. A ``temperature`` below 1 is reached at the last step,
            from 1 at the first.

    Returns:
        The trained routers, with hard gates.
    """
    config = config.with_steps(len(samples), processes.count())
    routers = PromptRouters(stack, **settings)
    routers.gates, routers.scope = gates, scope
    view = with_policy(stack, plan_of(stack, routers), routers)

    def loss(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        answer_loss = response_loss(model, inputs)
        g = routers.last_gates[:, list(routers.free)]
        pressure = g.mean() if target_skip is None else (g.mean() - (1 - target_skip)).square()
        regular = (g * (1 - g)).mean() if reg == "binary" else routers.weight.square().sum(-1).mean()
        total = answer_loss + skip_weight * pressure + reg_weight * regular
        return total, {"ce": answer_loss.detach(), "kept": g.mean().detach(), "unsure": (g * (1 - g)).mean().detach()}

    weights = {"skip": skip_weight, "reg": [reg, reg_weight], "target": target_skip, "gates": [gates, scope]}
    hooks = [Annealing(routers, config.steps or 1)]
    fit_policy(view, samples, loss, config, out=out, settings=weights | settings, hooks=hooks)
    routers.gates = "hard"
    return routers


class Annealing(Hook):
    """Hook that lowers the temperature of routers geometrically, from 1 at the first step to their own at the last.

    Args:
        routers: the routers.
        steps: number of steps.
    """

    def __init__(self, routers: PromptRouters, steps: int) -> None:
        self.routers, self.steps, self.last = routers, steps, routers.temperature

    def before_step(self, run: TrainingRun) -> None:
        """Set the temperature of the step."""
        self.routers.temperature = self.last ** (run.step / max(self.steps - 1, 1))

    def end(self, run: TrainingRun) -> None:
        """Set the temperature with which the routers decide."""
        self.routers.temperature = self.last


@command("first", "tune")
def tune(
    stack: Stack,
    plan: Plan,
    train: Samples,
    *,
    config: TrainConfig = TRAINING,
    rank: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[int, Ge(1)] = 16,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.05,
    gates: Gates = "hard",
    work: Work = Work(),
) -> Healed:
    """Phase 2: recover quality with LoRA while the routers stay frozen.

    LoRA changes the hidden states that the routers read, and with them the scores. The returned plan therefore has a
    new threshold, at which as many layers as before are kept on average over the first 64 prompts; the threshold is
    unchanged if that number is.

    Args:
        stack: the model; it is not changed.
        plan: a plan of this method.
        train: prompts with their answers; the loss is computed on answer tokens only.
        config: training configuration.
        rank: rank of the adapters on the projections of attention and MLP, which are merged at the end.
        alpha: LoRA alpha of the adapters.
        dropout: dropout rate of the adapters.
        gates: ``hard`` as in serving, or ``soft``.
        work: folder from which an interrupted run resumes.

    Returns:
        The healed model, its plan and the training log.
    """
    out = work.directory()
    view = apply(stack, plan)
    routers: PromptRouters = view.lamella_policy
    routers.gates = gates
    lora = add_lora(view, rank, alpha, dropout, seed=config.seed)
    log = fit(
        view,
        train,
        Task(response_loss),
        config,
        out=out,
        trainable=lora.trains,
        settings={"plan": plan.digest, "gates": gates, "lora": [rank, alpha, dropout]},
    )
    lora.merge()
    lora.remove()
    healed = with_weights_of(stack, view)
    few = [train[index] for index in range(min(len(train), HELD))]
    prompts = [sample["input_ids"][: int(sample["prompt_lengths"])] for sample in few]
    before, after = (scores(each, routers, prompts) for each in (stack, healed))
    free = list(routers.free)
    skipped, now = (float((table[:, free] < routers.threshold).double().mean()) for table in (before, after))
    limit = routers.threshold if now == skipped else _threshold_for(skipped, after, routers)
    assert plan.policy is not None
    changed = {"params": plan.policy.params | {"threshold": limit}, "work": _work(after, routers, limit)}
    reference = plan.policy.model_copy(update=changed)
    return Healed(stack=healed, plan=plan.model_copy(update={"policies": {stack.stack: reference}}), log=log)


@method("first", paper="2410.12513", purpose="skip", brief={"steps": 8})
def first(
    stack: Stack,
    calibration: Text,
    *,
    steps: Annotated[int, Ge(1)] = 40,
    skip_weight: Annotated[float, Ge(0)] = 0.1,
    reg_weight: Annotated[float, Ge(0)] = 0.01,
    pool: Literal["mean", "last", "vote"] = "mean",
    prefill: Literal["full", "route"] = "full",
    gates: Literal["soft", "straight"] = "soft",
    temperature: Annotated[float, Gt(0), Le(1)] = 1.0,
    protect: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]] = (1, 1),
    batch_policy: Literal["rows", "union", "majority"] = "rows",
    lr: Annotated[float, Gt(0)] = 1e-2,
    seed: Annotated[int, Ge(0)] = 0,
    work: Work = Work(),
) -> PlanSeries:
    """Train one router per layer that reads the prompt and chooses the layers that its answer runs.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time]; the beginning of each sequence serves as prompt, the rest as
            answer.
        steps: optimizer steps of the routers' training; healing with LoRA is a separate command.
        skip_weight: alpha of the paper: weight of the loss term that favours skipping layers.
        reg_weight: lambda of the paper: weight of the term that pushes gates to 0 or 1.
        pool: how a router's probabilities are pooled over the prompt: their ``mean``, the ``last`` token's, or the
            fraction above 0.5 (``vote``).
        prefill: ``full`` runs every layer on the prompt and skips during generation; ``route`` skips on the prompt too.
        gates: in training, ``soft`` gates multiply the output of a layer by its score; ``straight``-through gates run
            or skip it, as in generation, with the gradient of the score.
        temperature: temperature of the routers' sigmoid at the end of training, which starts at 1; a lower one pushes
            the scores to 0 or 1.
        protect: how many layers at the start and at the end are always kept.
        batch_policy: in a batch, ``rows`` decides for each row, ``union`` keeps the layers that any row keeps, and
            ``majority`` those that at least half of the rows keep.
        lr: learning rate of the routers.
        seed: random seed of the sample order and of the split into prompt and answer.
        work: folder for the routers and for checkpoints, from which an interrupted run resumes.

    Returns:
        The plan series, starting with the unchanged model: one set of routers with a threshold that rises along the
        series, each plan with the mean number of layers that it keeps on calibration text.
    """
    tokens = torch.cat([row["input_ids"] for row in sequences(calibration)])
    folder = work.directory()
    samples = blocks(tokens.cpu(), (tokens.shape[1] // 4, tokens.shape[1] // 2), seed=seed)
    settings: dict[str, Any] = {
        "pool": pool,
        "prefill": prefill,
        "temperature": temperature,
        "protect": list(protect),
        "batch_policy": batch_policy,
    }
    routers = train_routers(
        stack,
        samples,
        config=replace(ROUTING, steps=steps, lr=lr, seed=seed),
        skip_weight=skip_weight,
        reg_weight=reg_weight,
        gates=gates,
        out=folder / "training",
        **settings,
    )
    prompts = [sample["input_ids"][: int(sample["prompt_lengths"])] for sample in samples]
    series = thresholds(stack, routers, prompts)
    kept = keep_policy(plan_of(stack, routers), routers, folder).policy
    for point in series.points[1:]:
        assert kept is not None and point.policy is not None
        params = settings | point.policy.params
        point.policies = {stack.stack: kept.model_copy(update={"params": params, "work": point.policy.work})}
    return series


def thresholds(stack: Stack, routers: PromptRouters, prompts: list[Tensor]) -> PlanSeries:
    """Build the plan series of one set of routers: a threshold for each mean number of layers to skip.

    Args:
        stack: the opened model.
        routers: the trained routers.
        prompts: token ids of each prompt [time]; their scores determine the thresholds.
    """
    table, free = scores(stack, routers, prompts), len(routers.free)
    limits = [_threshold_for(skipped / free, table, routers) for skipped in range(1, free + 1)]
    points = [Point()]
    for limit in dict.fromkeys(limits):
        policy = PolicyReference(name="first", params={"threshold": limit}, work=_work(table, routers, limit))
        kept = sum(attn for attn, _ in policy.work)
        points.append(Point(policies={stack.stack: policy}, scores={"kept layers": kept, "threshold": limit}))
    return PlanSeries(model=ModelReference.of(stack), points=points, provenance={"method": "first"})


def _threshold_for(share: float, table: Tensor, routers: PromptRouters) -> float:
    """Return a threshold below which this fraction of the scores lies."""
    free = table[:, list(routers.free)]
    return threshold(free.cpu(), round(share * free.numel()), MARGIN)


def _work(table: Tensor, routers: PromptRouters, limit: float) -> list[tuple[float, float]]:
    """Return the fraction of prompts for which each layer's attention and MLP run."""
    kept = table >= limit
    kept[:, [layer for layer in range(table.shape[1]) if layer not in routers.free]] = True
    return [(share, share) for share in kept.double().mean(0).tolist()]
