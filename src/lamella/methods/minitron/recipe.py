"""Minitron's retraining: distillation from the original alone, without labels (arXiv 2407.14679, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamella.plan import Plan
from lamella.registry import command
from lamella.stack import Stack
from lamella.train import Healed, Sample
from lamella.train import distil as train


@command("minitron", "distil")
def distil(
    stack: Stack,
    plan: Plan,
    samples: Sequence[Sample],
    *,
    out: Path,
    steps: int = 400,
    lr: float = 1e-4,
    batch: int = 4,
    seed: int = 0,
    **settings: Any,
) -> Healed:
    """Train the smaller model towards the output of the original; all its parameters train.

    Args:
        stack: the original; it is not changed.
        plan: a plan of whole layers and widths for it.
        samples: text; its labels play no part.
        out: a folder for checkpoints; an interrupted run goes on from there.
        steps: of the optimizer; 400 is what the paper gives each candidate shape.
        lr: the highest learning rate, cosine to 0; 1e-4 in the authors' guideline (there to 1e-5).
        batch, seed, settings: see :func:`lamella.train.distil`.

    Returns:
        The smaller model, which is an ordinary one, with a plan that runs all of it.
    """
    return train(stack, plan, samples, out=out, steps=steps, lr=lr, batch=batch, seed=seed, **settings)
