"""Minitron's retraining: distillation from the original alone, without labels (arXiv 2407.14679, section 3)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt

from lamella.data import Samples
from lamella.files import Work
from lamella.plan import Plan
from lamella.registry import command
from lamella.stack import Stack
from lamella.train import Healed, TrainConfig
from lamella.train import distil as distilled
from lamella.train.distil import TRAINING


@command("minitron", "distil")
def distil(
    stack: Stack,
    plan: Plan,
    train: Samples,
    *,
    config: TrainConfig = TRAINING,
    intermediate: bool | None = None,
    temperature: Annotated[float, Gt(0)] = 1.0,
    work: Work = Work(),
) -> Healed:
    """Train the smaller model to match the output distribution of the original; all its parameters are trained.

    Args:
        stack: the original model; it is not changed.
        plan: a plan of whole layers and widths for it.
        train: text; labels are ignored.
        config: training settings.
        intermediate: compare hidden states inside the models too; if omitted, only where many layers were removed.
        temperature: softmax temperature of both distributions.
        work: folder from which an interrupted run resumes.

    Returns:
        The smaller model, which is an ordinary one, with a plan that runs all of it.
    """
    out = work.directory()
    return distilled(stack, plan, train, config=config, intermediate=intermediate, temperature=temperature, out=out)
