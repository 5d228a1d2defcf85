"""LoRA: small trained maps beside frozen ones. The baseline of every adapter.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; through peft.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Lt

from lamella.data import Passages
from lamella.files import Work
from lamella.plan import ModelReference, Plan
from lamella.registry import method
from lamella.results import Tuned
from lamella.runtime import apply
from lamella.stack import Stack, sites_of
from lamella.train import Task, TrainConfig, add_lora, fit, merge, response_loss

TRAINING = TrainConfig(lr=3e-4, schedule="linear")


@method("lora", paper="2106.09685", purpose="adapt", baseline=True, brief={"steps": 3, "r": 4})
def lora(
    stack: Stack,
    train: Passages,
    plan: Plan | None = None,
    *,
    r: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[int, Ge(1)] = 16,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    targets: tuple[str, ...] = (),
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Tuned:
    """Train a LoRA adapter on text, for the whole model or for what runs under a plan.

    Args:
        stack: a decoder; it is not changed.
        train: text, in blocks, every token of which carries loss.
        plan: what the model runs under while it trains; the whole model when left out.
        r: rank.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: on the adapter's input, while training.
        targets: the last parts of the names of linear maps, such as ``q_proj``; all of a layer when left out.
        config: of the training; its seed is that of the adapter's random half, too.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The adapter, and the model with it merged.

    Raises:
        MethodError: for a plan in which a layer runs twice.
        TrainingError: for targets that are missing, or when training cannot start or stay finite.
    """
    plan = plan or Plan(model=ModelReference.of(stack), provenance={"method": "lora"})
    running = sites_of(plan.running("adapter"), stack.positions)
    view = apply(stack, plan)
    beside = add_lora(view, r, alpha, dropout, targets or None, sites=running, seed=config.seed)
    log = fit(
        view,
        train,
        Task(response_loss),
        config,
        out=work.directory() / "run",
        trainable=beside.trains,
        settings={"plan": plan.digest, "lora": [beside.scale, list(beside.modules)], "base": beside.base},
    )
    adapter = beside.adapter()
    findings = {"r": r, "modules": len(adapter.modules), "parameters": adapter.parameters}
    return Tuned(stack=merge(stack, adapter), plan=plan, log=log, adapter=adapter, findings=findings)
