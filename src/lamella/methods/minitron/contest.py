"""Minitron's contest: of several shapes, which is worth training on (arXiv 2407.14679, section 2.3).

Each candidate is distilled from the original briefly first, see :mod:`lamella.train.distil`: what a cut costs before
training says little across axes (practice 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lamella.plan import Plan
from lamella.stack import Stack
from lamella.train import Sample, TrainConfig, distil
from lamella.train.distil import TRAINING


def contest(
    stack: Stack,
    plans: Sequence[Plan],
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    *,
    config: TrainConfig = TRAINING,
    intermediate: bool | None = None,
    out: Path,
) -> list[dict[int, float]]:
    """Train every candidate briefly and alike, and compare them on held-out text (section 2.3).

    Args:
        stack: the original.
        plans: the candidates.
        samples, held_out: text to train on and to compare on.
        config: of each training; ``eval_every`` are the steps between two comparisons.
        intermediate: see :func:`lamella.train.distil`.
        out: a folder; each candidate's run goes into one of its own.

    Returns:
        For each candidate, the held-out divergence from the original in nats, by the number of steps.
    """
    curves = []
    for plan in plans:
        healed = distil(
            stack, plan, samples, config=config, intermediate=intermediate, held_out=held_out, out=out / plan.digest
        )
        curves.append({point.step: point.parts.get("kl", point.loss) for point in healed.log.held_out})
    return curves
