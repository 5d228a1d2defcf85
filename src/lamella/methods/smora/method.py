"""SMoRA: one adapter for many tasks, in which every rank is an expert.

Zhao et al., "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
arXiv 2501.15103.

In a LoRA, the tasks of a mixture compete for the same few directions; a mixture of whole LoRAs separates them and
shares nothing. But a mixture of E LoRAs is one LoRA with gates over blocks of its ranks::

    sum_e g_e(x) B_e A_e x  =  B diag(G(x)) A x        A the A_e by rows, B the B_e by columns, G each g_e, r_e times

and with blocks of one rank it both separates and shares. Each linear layer gets R rank-one experts and its own router;
each token runs the k experts with the highest scores (modules.py). The load is balanced without a loss (balancing.py).
Task labels are not used, neither in training nor afterwards. Since the selection depends on the token, it cannot be
merged into the weights: the result is an adapter in a plan.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from lamella import processes
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.smora.balancing import LoadBalance
from lamella.methods.smora.examples import TaskExamples, with_prompts
from lamella.methods.smora.modules import RankExperts, check
from lamella.methods.smora.usage import Usage
from lamella.plan import ModelReference, Plan, attach, keep_adapters
from lamella.plan.adapters import sizes_of
from lamella.plan.fingerprint import revision
from lamella.registry import method
from lamella.results import Adapted
from lamella.runtime import apply
from lamella.stack import Stack, positions_at, sites_of
from lamella.train import Task, TrainConfig, fit, linear_at

TRAINING = TrainConfig(lr=1e-4, batch=8, accumulate=16, warmup=0.1)  # as in the authors' files, with a cosine schedule
MAX_EXAMPLES = 64  # per task, for the loss before and after and for the routing statistics
USAGE = "usage.json"


@dataclass(frozen=True)
class ExpertSettings:
    """The experts of each linear layer.

    Attributes:
        r: number of rank-one experts per linear layer.
        k: number of experts per token.
        p: number of experts that are selected together; 1 is SMoRA, more is a mixture of LoRAs of rank p.
        alpha: the output is scaled by alpha / k.
        dropout: dropout on the inputs of router and experts.
        bias_in_gate: include the balance in the gates, as the authors' code does, and not only in the selection.
    """

    r: Annotated[int, Ge(1)] = 64
    k: Annotated[int, Ge(1)] = 8
    p: Annotated[int, Ge(1)] = 1
    alpha: Annotated[float, Gt(0)] = 16.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    bias_in_gate: bool = True


@method("smora", paper="2501.15103", purpose="adapt", brief={"r": 4, "k": 2, "batch": 2, "accumulate": 1})
def smora(
    stack: Stack,
    train: TaskExamples,
    plan: Plan | None = None,
    *,
    experts: ExpertSettings = ExpertSettings(),
    balance: Annotated[float, Ge(0), Lt(1)] = 1e-5,
    loss_on: Literal["all", "response"] = "all",
    targets: tuple[str, ...] = (),
    sites: tuple[str, ...] = (),
    epochs: Annotated[int, Ge(1)] = 3,
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.01,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Adapted:
    """Train one adapter on many tasks, whose rank-one experts are routed per token and linear layer.

    Args:
        stack: a decoder; it is not changed.
        train: examples of all tasks.
        plan: the plan under which the model runs in training; the whole model if omitted.
        experts: number and selection of the experts of each linear layer.
        balance: u, the step by which the balance changes the scores after each pass; 0 disables it.
        loss_on: ``all`` for loss on all tokens including prompts, as in the paper; or only on the ``response``.
        targets: the last parts of the names of linear layers, such as ``q_proj``; all of a layer if omitted.
        sites: the sites to adapt, such as ``layers.3`` or ``layers.3.mlp``; all if omitted.
        epochs: number of epochs, unless ``steps`` is given.
        held_out: fraction of each task's examples that is held out for the loss.
        config: settings of the training; its seed is also that of the experts' initialisation.
        work: the directory from which an interrupted run resumes, bit-exact.

    Returns:
        The adapter in a plan, with the losses and the routing of each task.

    Raises:
        MethodError: for an invalid combination of ranks, ranks above the size of a layer, or a plan that moves layers.
        PlanError: for a site that the model does not have, or a plan with adapters.
        TrainingError: if training cannot start or diverges.
    """
    check(experts.r, experts.k, experts.p)
    plan = plan or Plan(model=ModelReference.of(stack), provenance={"method": "smora"})
    where = active_sites(stack, plan, sites)
    training, evaluation = train.split(held_out, config.seed)
    with_loss = with_prompts if loss_on == "all" else dict
    samples = [with_loss(each) for each in training]
    epoch_steps = config.with_steps(len(samples), processes.count()).steps or 1
    config = replace(config, steps=config.steps or epochs * epoch_steps)

    # Attach experts to the linear layers that run under the plan.
    view, folder = apply(stack, plan), work.directory()
    names = linear_at(view, targets or None, where)
    _check_sizes(view, names, experts.r)
    modules: dict[str, Any] = attach(view, names, partial(RankExperts, **asdict(experts)), seed=config.seed)

    # Train, with a balance update after each pass.
    routing_samples = {task: selected[:MAX_EXAMPLES] for task, selected in train.by_task().items()}
    loss_samples = {task: evaluation[task][:MAX_EXAMPLES] or selected for task, selected in routing_samples.items()}
    before = Usage.of(view, modules, loss_samples).losses
    load_balance = LoadBalance(modules, balance)
    log = fit(
        view,
        samples,
        Task(load_balance.loss, passes=load_balance.passes),
        config,
        out=folder / "run",
        trainable=trains,
        held_out={task: [with_loss(each) for each in selected] for task, selected in evaluation.items()},
        hooks=[load_balance],
        settings={"plan": plan.digest, "balance": balance, **asdict(experts)},
    )

    # Measure losses and routing.
    usage, after = Usage.of(view, modules, routing_samples), Usage.of(view, modules, loss_samples).losses
    tasks = {
        task: {"examples": len(selected), "before": before[task], "after": after[task]}
        for task, selected in loss_samples.items()
    }
    params, base = asdict(experts), revision(stack.model)
    adapter_plan = keep_adapters(plan, modules, folder, name="smora", params=params, sites=where, base=base)
    return Adapted(
        stack=stack,
        plan=adapter_plan,
        log=log,
        findings={**params, **sizes(modules), "balanced": balance, "tasks": tasks, **routing(usage)},
        files={USAGE: json.dumps({"layers": usage.layers, "counts": _as_lists(usage)}) + "\n"},
        notes=notes(usage, modules, experts),
    )


def trains(name: str) -> bool:
    """Return whether a parameter of a view belongs to the experts: the ``trainable`` of :func:`lamella.train.fit`."""
    return ".lora_" in name


def active_sites(stack: Stack, plan: Plan, sites: tuple[str, ...] = ()) -> list[str]:
    """Return the requested sites that run under a plan.

    Args:
        stack: the model.
        plan: the plan.
        sites: the requested sites; all if empty.
    """
    requested = {each for site in sites for each in positions_at(site, stack.positions)} or set(stack.positions)
    runs = plan.running("experts")
    if not requested & runs:
        raise MethodError(f"nothing at {', '.join(sites)} runs under the plan: give other sites")
    return sites_of(requested & runs, stack.positions)


def sizes(modules: dict[str, RankExperts]) -> dict[str, Any]:
    """Return the number of parameters, and of those that a token uses; the router is as large as A."""
    routers = sum(each.lora_router.numel() for each in modules.values())
    pairs = sum(each.lora_A.numel() + each.lora_B.numel() for each in modules.values())
    active = sum(each.k * (each.lora_A.shape[1] + len(each.lora_B)) for each in modules.values())
    return {"layers": len(modules), "parameters": {"experts": pairs, "routers": routers, "active": active}}


def routing(usage: Usage) -> dict[str, Any]:
    """Return the load of each linear layer, and the usage by task in the layer that separates the tasks most."""
    sharpest = usage.sharpest()
    shares = dict(zip(usage.counts, usage.shares()[:, sharpest].tolist(), strict=True))
    return {
        "load": {
            name: {"cv": spread, "dead": dead} for name, (spread, dead) in zip(usage.layers, usage.load(), strict=True)
        },
        "similarity": usage.similarity().tolist(),
        "sharpest": {"layer": usage.layers[sharpest], "shares": shares},
    }


def notes(usage: Usage, modules: dict[str, RankExperts], experts: ExpertSettings) -> list[str]:
    """Return the notes of the report.

    Args:
        usage: the statistics of the routing.
        modules: the experts by the names of their linear layers.
        experts: the settings.
    """
    found = sizes(modules)["parameters"]
    lines = [
        f"A token uses {found['active']} of the {found['experts']} parameters of the experts, and all "
        f"{found['routers']} of the routers; the dense kernel multiplies all of them.",
        f"The scale is alpha / k = {experts.alpha / experts.k:g}; for a LoRA of rank {experts.r} it would be "
        f"{experts.alpha / experts.r:g}.",
    ]
    dead = sum(count for _, count in usage.load())
    if dead:
        lines.append(f"{dead} of {experts.r * len(modules)} ranks were not selected by any token of the statistics.")
    return lines


def _as_lists(usage: Usage) -> dict[str, list[list[int]]]:
    return {task: counts.int().tolist() for task, counts in usage.counts.items()}


def _check_sizes(view: Any, names: tuple[str, ...], r: int) -> None:
    for name in names:
        inputs, outputs = sizes_of(view.get_submodule(name))
        if r > min(inputs, outputs):
            raise MethodError(
                f"r {r} exceeds the size of {name}, which is {inputs} to {outputs}: give at most "
                f"{min(inputs, outputs)}, or select other linear layers with targets"
            )
