"""Minitron's comparison of candidate shapes by brief training (arXiv 2407.14679, section 2.3).

Each candidate is first distilled briefly from the original, see :mod:`lamella.train.distil`: the loss right after
pruning does not predict the loss after training when candidates differ in several axes (practice 9).
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
    """Train every candidate briefly with the same settings, and compare them on held-out text (section 2.3).

    Args:
        stack: the original model, which is the teacher.
        plans: the candidates.
        samples: text to train on.
        held_out: text to compare on.
        config: training settings of every candidate; ``eval_every`` is the number of steps between two comparisons.
        intermediate: whether hidden states are distilled too, see :func:`lamella.train.distil`.
        out: a folder; the run of each candidate is written to a subfolder.

    Returns:
        For each candidate, the held-out KL divergence from the original in nats, by the number of training steps.
    """
    curves = []
    for plan in plans:
        healed = distil(
            stack, plan, samples, config=config, intermediate=intermediate, held_out=held_out, out=out / plan.digest
        )
        curves.append({point.step: point.parts.get("kl", point.loss) for point in healed.log.held_out})
    return curves
