"""LoRA: small trained low-rank layers beside frozen ones. The baseline of all adapter methods.

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
    """Train a LoRA adapter on text, for the whole model or for the part that runs under a plan.

    Args:
        stack: a decoder; it is not changed.
        train: text in blocks, with loss on every token.
        plan: plan under which the model runs during training; defaults to the whole model.
        r: rank.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: dropout rate on the adapter's input in training.
        targets: last parts of the names of linear layers, such as ``q_proj``; defaults to all of a layer.
        config: training settings; the seed also initialises the adapter.
        work: folder from which an interrupted run resumes, with bitwise identical results.

    Returns:
        The adapter, and the merged model.

    Raises:
        MethodError: for a plan in which a layer runs twice.
        TrainingError: for missing targets, or when training cannot start or does not stay finite.
    """
    plan = plan or Plan(model=ModelReference.of(stack), provenance={"method": "lora"})
    running = sites_of(plan.running("adapter"), stack.positions)
    view = apply(stack, plan)
    adapters = add_lora(view, r, alpha, dropout, targets or None, sites=running, seed=config.seed)
    log = fit(
        view,
        train,
        Task(response_loss),
        config,
        out=work.directory() / "run",
        trainable=adapters.trains,
        settings={"plan": plan.digest, "lora": [adapters.scale, list(adapters.modules)], "base": adapters.base},
    )
    adapter = adapters.adapter()
    findings = {"r": r, "modules": len(adapter.modules), "parameters": adapter.parameters}
    return Tuned(stack=merge(stack, adapter), plan=plan, log=log, adapter=adapter, findings=findings)
