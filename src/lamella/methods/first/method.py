"""FiRST: the prompt decides, once, which layers its answer will run.

Jain et al., "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction", arXiv 2410.12513.

    p_l[t] = sigmoid(w_l . rms(h_l[t]) + b_l)         one small router per layer
    s_l    = mean of p_l over the prompt's tokens      keep layer l for the whole answer iff s_l >= theta

The kept set is fixed for an answer, so kept layers' caches are whole and skipped layers' are freed. Routers are trained
first, with the model frozen; then LoRA recovers quality with the routers frozen. The paper's equations were not
available: pooling, losses and defaults are a reconstruction from its abstract and public reviews.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lamella.data import Samples, Text
from lamella.files import Work
from lamella.measure import sequences
from lamella.methods.first.policy import Gates, PromptRouters, plan_of, scores
from lamella.plan import ModelReference, Plan, PlanSeries, Point, PolicyReference
from lamella.registry import command, method
from lamella.runtime import apply, keep_policy, with_policy
from lamella.search import threshold
from lamella.stack import Stack
from lamella.train import Healed, Task, TrainConfig, add_lora, blocks, fit, fit_policy, response_loss, with_weights_of

ROUTING = TrainConfig(lr=1e-2, batch=2)
TRAINING = TrainConfig(steps=200, lr=2e-4)
MARGIN = 1e-3  # of a threshold to the lowest and the highest score
HELD = 64  # prompts on which healing holds the number of kept layers


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
    """Phase 1: train the routers alone, with the model frozen and gates soft.

    Args:
        stack: the model; it is not changed.
        samples: prompts with their answers, as :func:`lamella.train.blocks` makes them.
        config: of the training.
        skip_weight: alpha: the pressure to skip.
        reg_weight: lambda: of the regulariser.
        reg: ``binary``, mean g (1 - g), which pushes gates to 0 or 1; or ``l2`` of the routers' weights.
        target_skip: aim for this share of skipped layers instead of as many as possible.
        gates, scope: see :class:`PromptRouters`.
        out: a folder for checkpoints; an interrupted run goes on from there.
        settings: of the routers.
    """
    routers = PromptRouters(stack, **settings)
    routers.gates, routers.scope = gates, scope
    view = with_policy(stack, plan_of(stack, routers), routers)

    def loss(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        told = response_loss(model, inputs)
        g = routers.seen[:, list(routers.free)]
        pressure = g.mean() if target_skip is None else (g.mean() - (1 - target_skip)).square()
        regular = (g * (1 - g)).mean() if reg == "binary" else routers.weight.square().sum(-1).mean()
        total = told + skip_weight * pressure + reg_weight * regular
        return total, {"ce": told.detach(), "kept": g.mean().detach(), "unsure": (g * (1 - g)).mean().detach()}

    weights = {"skip": skip_weight, "reg": [reg, reg_weight], "target": target_skip, "gates": [gates, scope]}
    fit_policy(view, samples, loss, config, out=out, settings=weights | settings)
    routers.gates = "hard"
    return routers


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
    """Phase 2: LoRA recovers quality while the routers stay as they are.

    LoRA changes the streams that routers read, and with them their scores: the plan that comes back has the threshold
    at which as many layers as before are kept, on average over the first 64 prompts; its own where they still are.

    Args:
        stack: the model; it is not changed.
        plan: a plan of this method.
        train: prompts with their answers; answers alone carry loss.
        config: of the training.
        rank, alpha, dropout: of the adapters on the projections of attention and MLP, merged at the end.
        gates: ``hard`` as in serving, or ``soft``.
        work: where an interrupted run goes on from.
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
    limit = routers.threshold if now == skipped else _leaving_out(skipped, after, routers)
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
    protect: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]] = (1, 1),
    batch_policy: Literal["rows", "union", "majority"] = "rows",
    lr: Annotated[float, Gt(0)] = 1e-2,
    seed: Annotated[int, Ge(0)] = 0,
    work: Work = Work(),
) -> PlanSeries:
    """Train one router per layer on text, then let every prompt decide which layers its answer runs.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time]; the beginning of each is the prompt, the rest its answer.
        steps: optimizer steps of the routers; healing with LoRA comes after.
        skip_weight: alpha of the paper, the pressure to skip while routers train.
        reg_weight: lambda of the paper.
        pool: what a router says of a prompt: the ``mean`` over its tokens, that of the ``last`` one, or a ``vote``.
        prefill: ``full`` runs every layer on the prompt and skips while generating; ``route`` skips on the prompt too.
        protect: how many layers at the start and at the end are always kept.
        batch_policy: of a batch, ``rows`` decides for each row, ``union`` keeps what any row keeps, and ``majority``
            what half of them do.
        lr: learning rate of the routers.
        seed: of the order of samples and of where prompts end.
        work: for the routers and for checkpoints, from which an interrupted run goes on.

    Returns:
        The series of plans, from the whole model on: one set of routers, and a threshold that rises from point to
        point, each with the mean number of layers that it keeps on calibration text.
    """
    tokens = torch.cat([row["input_ids"] for row in sequences(calibration)])
    folder = work.directory()
    samples = blocks(tokens.cpu(), (tokens.shape[1] // 4, tokens.shape[1] // 2), seed=seed)
    settings: dict[str, Any] = {
        "pool": pool,
        "prefill": prefill,
        "protect": list(protect),
        "batch_policy": batch_policy,
    }
    routers = train_routers(
        stack,
        samples,
        config=replace(ROUTING, steps=steps, lr=lr, seed=seed),
        skip_weight=skip_weight,
        reg_weight=reg_weight,
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
    """The series of plans that one set of routers allows: a threshold for each mean number of layers to skip.

    Args:
        prompts: token ids of each [time]; the scores that the thresholds divide come from them.
    """
    table, free = scores(stack, routers, prompts), len(routers.free)
    limits = [_leaving_out(skipped / free, table, routers) for skipped in range(1, free + 1)]
    points = [Point()]
    for limit in dict.fromkeys(limits):
        policy = PolicyReference(name="first", params={"threshold": limit}, work=_work(table, routers, limit))
        kept = sum(attn for attn, _ in policy.work)
        points.append(Point(policies={stack.stack: policy}, scores={"kept layers": kept, "threshold": limit}))
    return PlanSeries(model=ModelReference.of(stack), points=points, provenance={"method": "first"})


def _leaving_out(share: float, table: Tensor, routers: PromptRouters) -> float:
    """A threshold under which this share of the scores lies."""
    free = table[:, list(routers.free)]
    return threshold(free.cpu(), round(share * free.numel()), MARGIN)


def _work(table: Tensor, routers: PromptRouters, limit: float) -> list[tuple[float, float]]:
    """How often each layer runs."""
    kept = table >= limit
    kept[:, [layer for layer in range(table.shape[1]) if layer not in routers.free]] = True
    return [(share, share) for share in kept.double().mean(0).tolist()]
