"""SMoRA: one adapter for many tasks, whose every rank is an expert of its own.

Zhao et al., "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
arXiv 2501.15103.

A LoRA makes the tasks of a mixture fight over the same few directions; a mixture of whole LoRAs keeps them apart and
shares nothing. But a mixture of E LoRAs is one LoRA with gates over blocks of its ranks::

    sum_e g_e(x) B_e A_e x  =  B diag(G(x)) A x        A the A_e by rows, B the B_e by columns, G each g_e, r_e times

and with blocks of one rank it both parts and shares. Beside every linear map stand R rank-one experts and a router of
its own; each token runs the k with the best scores (modules.py). The load is balanced without a loss (balancing.py).
No label of a task is read, in training or after. Since what runs depends on the token, no weight can hold the result:
it is an adapter in a plan.
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
from lamella.methods.smora.balancing import Balance
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

TRAINING = TrainConfig(lr=1e-4, batch=8, accumulate=16, warmup=0.1)  # the authors' files; a cosine
LOOKED_AT = 64  # examples of each task at most, whose loss is told, or whose routing is counted
USAGE = "usage.json"


@dataclass(frozen=True)
class Experts:
    """The experts beside each linear map.

    Attributes:
        r: rank-one experts beside each map.
        k: how many of them a token runs.
        p: how many are chosen together; 1 is SMoRA, more is a mixture of LoRAs of rank p.
        alpha: the output is scaled by alpha / k.
        dropout: on what router and experts read, while training.
        bias_in_gate: let the balance count in the gates, as the authors' code does, and not in the choice alone.
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
    experts: Experts = Experts(),
    balance: Annotated[float, Ge(0), Lt(1)] = 1e-5,
    loss_on: Literal["all", "response"] = "all",
    targets: tuple[str, ...] = (),
    sites: tuple[str, ...] = (),
    epochs: Annotated[int, Ge(1)] = 3,
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.01,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Adapted:
    """Train one adapter on many tasks, whose rank-one experts are routed by token and by linear map.

    Args:
        stack: a decoder; it is not changed.
        train: examples of all tasks together.
        plan: what the model runs under while it trains; the whole model when left out.
        experts: how many there are beside each map, and how they are chosen.
        balance: u, how far the balance moves the scores after each pass; 0 leaves it out.
        loss_on: ``all`` tokens carry loss, prompts too, as in the paper; or the ``response`` alone.
        targets: the last parts of the names of linear maps, such as ``q_proj``; all of a layer when left out.
        sites: where, such as ``layers.3`` or ``layers.3.mlp``; everywhere when left out.
        epochs: passes over the data, where ``steps`` is left out.
        held_out: which share of each task's examples is not trained on, and shows the loss.
        config: of the training; its seed is that of the experts' start, too.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The adapter in a plan, with the losses and the routing of each task.

    Raises:
        MethodError: for ranks that cannot be chosen so or are above the size of a map, or a plan that moves layers.
        PlanError: for a site that the model does not have, or a plan with adapters.
        TrainingError: when training cannot start or stay finite.
    """
    check(experts.r, experts.k, experts.p)
    plan = plan or Plan(model=ModelReference.of(stack), provenance={"method": "smora"})
    where = running(stack, plan, sites)
    learnt, kept = train.split(held_out, config.seed)
    everywhere = with_prompts if loss_on == "all" else dict
    samples = [everywhere(each) for each in learnt]
    once = config.with_steps(len(samples), processes.count()).steps or 1
    config = replace(config, steps=config.steps or epochs * once)

    # Experts beside the linear maps that run under the plan.
    view, folder = apply(stack, plan), work.directory()
    names = linear_at(view, targets or None, where)
    _check_sizes(view, names, experts.r)
    made: dict[str, Any] = attach(view, names, partial(RankExperts, **asdict(experts)), seed=config.seed)

    # Training, and the balance after each pass.
    routed = {task: given[:LOOKED_AT] for task, given in train.by_task().items()}
    judged = {task: kept[task][:LOOKED_AT] or given for task, given in routed.items()}
    before = Usage.of(view, made, judged).losses
    even = Balance(made, balance)
    log = fit(
        view,
        samples,
        Task(even.loss, passes=even.passes),
        config,
        out=folder / "run",
        trainable=trains,
        held_out={task: [everywhere(each) for each in given] for task, given in kept.items()},
        hooks=[even],
        settings={"plan": plan.digest, "balance": balance, **asdict(experts)},
    )

    # What was learnt, and who runs what.
    usage, after = Usage.of(view, made, routed), Usage.of(view, made, judged).losses
    tasks = {
        task: {"examples": len(given), "before": before[task], "after": after[task]} for task, given in judged.items()
    }
    params, base = asdict(experts), revision(stack.model)
    adapted = keep_adapters(plan, made, folder, name="smora", params=params, sites=where, base=base)
    return Adapted(
        stack=stack,
        plan=adapted,
        log=log,
        findings={**params, **sizes(made), "balanced": balance, "tasks": tasks, **routing(usage)},
        files={USAGE: json.dumps({"maps": usage.maps, "counts": _lists(usage)}) + "\n"},
        notes=notes(usage, made, experts),
    )


def trains(name: str) -> bool:
    """Whether a parameter of a view belongs to the experts: the ``trainable`` of :func:`lamella.train.fit`."""
    return ".lora_" in name


def running(stack: Stack, plan: Plan, sites: tuple[str, ...] = ()) -> list[str]:
    """The sites that run under a plan, of those that are wanted."""
    wanted = {each for site in sites for each in positions_at(site, stack.positions)} or set(stack.positions)
    runs = plan.running("experts")
    if not wanted & runs:
        raise MethodError(f"nothing at {', '.join(sites)} runs under the plan: name other sites")
    return sites_of(wanted & runs, stack.positions)


def sizes(made: dict[str, RankExperts]) -> dict[str, Any]:
    """How many numbers there are, and how many of them a token multiplies; the router is as large as A."""
    routers = sum(each.lora_router.numel() for each in made.values())
    pairs = sum(each.lora_A.numel() + each.lora_B.numel() for each in made.values())
    active = sum(each.k * (each.lora_A.shape[1] + len(each.lora_B)) for each in made.values())
    return {"maps": len(made), "numbers": {"experts": pairs, "routers": routers, "active": active}}


def routing(usage: Usage) -> dict[str, Any]:
    """The load for the record, and the usage of all tasks in the map that parts them most."""
    shown = usage.sharpest()
    shares = dict(zip(usage.counts, usage.shares()[:, shown].tolist(), strict=True))
    return {
        "load": {
            name: {"cv": spread, "dead": dead} for name, (spread, dead) in zip(usage.maps, usage.load(), strict=True)
        },
        "similarity": usage.similarity().tolist(),
        "sharpest": {"map": usage.maps[shown], "shares": shares},
    }


def notes(usage: Usage, made: dict[str, RankExperts], experts: Experts) -> list[str]:
    """What a reader must know beside the tables."""
    found = sizes(made)["numbers"]
    said = [
        f"A token multiplies {found['active']} of the {found['experts']} numbers of the experts, and all "
        f"{found['routers']} of the routers; the dense kernel multiplies everything.",
        f"The scale is alpha / k = {experts.alpha / experts.k:g}; a LoRA of rank {experts.r} would have "
        f"{experts.alpha / experts.r:g}.",
    ]
    dead = sum(count for _, count in usage.load())
    if dead:
        said.append(f"{dead} of {experts.r * len(made)} ranks were chosen by no token that was looked at.")
    return said


def _lists(usage: Usage) -> dict[str, list[list[int]]]:
    return {task: counts.int().tolist() for task, counts in usage.counts.items()}


def _check_sizes(view: Any, names: tuple[str, ...], r: int) -> None:
    for name in names:
        inputs, outputs = sizes_of(view.get_submodule(name))
        if r > min(inputs, outputs):
            raise MethodError(
                f"r {r} is above the size of {name}, which is {inputs} to {outputs}: give at most "
                f"{min(inputs, outputs)}, or choose other maps by targets"
            )
