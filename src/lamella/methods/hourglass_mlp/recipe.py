"""Healing after the rewrite (Liao et al., arXiv 2602.06471, after arXiv 2510.01796).

The whole model, sub-blocks and all, learns what the original would have said.
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
    """Train a model with sub-blocks towards the output of the original; all but the vocabulary trains.

    Args:
        stack: the original; it is not changed.
        plan: one that puts sub-blocks into it.
        train: text; its labels play no part.
        config: the training in numbers.
        temperature: of both distributions.
        work: where an interrupted run goes on from.

    Returns:
        The model with its trained weights, and the plan with the trained sub-blocks.
    """
    return distil(
        stack, plan, train, config=config, temperature=temperature, vocabulary=False, intermediate=False,
        out=work.directory(),
    )  # fmt: skip
