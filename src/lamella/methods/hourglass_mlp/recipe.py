"""Healing after the rewrite (Liao et al., arXiv 2602.06471, after arXiv 2510.01796).

The whole model, including the sub-blocks, is distilled from the original.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt

from lamella.data import Samples
from lamella.files import Work
from lamella.plan import Plan
from lamella.registry import command
from lamella.stack import Stack
from lamella.train import Healed, TrainConfig, distil
from lamella.train.distil import TRAINING


@command("hourglass-mlp", "heal")
def heal(
    stack: Stack,
    plan: Plan,
    train: Samples,
    *,
    config: TrainConfig = TRAINING,
    temperature: Annotated[float, Gt(0)] = 1.0,
    work: Work = Work(),
) -> Healed:
    """Distil the original into a model with sub-blocks; all parameters but the vocabulary are trained.

    Args:
        stack: the original; it is not changed.
        plan: a plan with sub-blocks.
        train: text; its labels are not used.
        config: training settings.
        temperature: temperature of both distributions.
        work: folder from which an interrupted run resumes.

    Returns:
        The model with its trained weights, and the plan with the trained sub-blocks.
    """
    return distil(
        stack, plan, train, config=config, temperature=temperature, vocabulary=False, intermediate=False,
        out=work.directory(),
    )  # fmt: skip
