"""Minitron's comparison of candidate shapes by brief training (arXiv 2407.14679, section 2.3).

Each candidate is first distilled briefly from the original, see :mod:`lamella.train.distil`: the loss right after
pruning does not predict the loss after training when candidates differ in several axes (practice 9).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Gt

from lamella.data import Text
from lamella.data.samples import blocks
from lamella.errors import CalibrationError
from lamella.files import Work
from lamella.measure import Tokens, describe
from lamella.measure.hidden_states import sequences
from lamella.plan import Plan
from lamella.search import Memo
from lamella.stack import Stack
from lamella.train import Sample, TrainConfig, distil
from lamella.train.distil import TRAINING

COMPARED = 0.25  # fraction of the sequences on which candidates are compared, without training on them


@dataclass(frozen=True)
class Contest:
    """The brief training of several shapes of the required size, of which the best is kept (section 2.3).

    Attributes:
        candidates: number of shapes; with 1, the most even shape is kept without training. The paper compares 15 to 18.
        trial_steps: training steps of each shape; the paper has 400 steps of far larger batches.
        trial_lr: peak learning rate of the training.
    """

    candidates: Annotated[int, Ge(1)] = 4
    trial_steps: Annotated[int, Ge(1)] = 25
    trial_lr: Annotated[float, Gt(0)] = 3e-4

    def divergences(self, stack: Stack, plans: Sequence[Plan], calibration: Tokens, work: Work) -> list[float]:
        """Return the KL divergence of each plan from the original after brief training, in nats.

        Args:
            stack: the original model.
            plans: the candidates.
            calibration: text; sequences of it train, others compare.
            work: folder from which an interrupted contest resumes.
        """
        config = replace(TRAINING, steps=self.trial_steps, lr=self.trial_lr, eval_every=self.trial_steps)
        config = replace(config, save_every=self.trial_steps)
        train, held_out = _parts(calibration, self.trial_steps * config.batch)
        header = {"model": plans[0].model.model_dump(), "calibration": describe(calibration), "config": repr(config)}
        memo = Memo(work.journal("contest"), header)
        for plan in plans:
            if plan.digest not in memo:
                with tempfile.TemporaryDirectory() as out:
                    curve = contest(stack, [plan], train, held_out, config=config, out=Path(out))[0]
                memo[plan.digest] = curve[self.trial_steps]
        return [memo[plan.digest] for plan in plans]


def _parts(calibration: Tokens, count: int) -> tuple[list[Sample], list[Sample]]:
    """Return samples to train on and others to compare on; a single sample is used for both.

    Args:
        calibration: token ids; from a text, more sequences are cut if it is long enough.
        count: number of sequences to cut.
    """
    if isinstance(calibration, Text):
        with suppress(CalibrationError):  # the text is too short for more
            calibration = calibration.cut(count, calibration.tokens.shape[1])
    rows = []
    for inputs in sequences(calibration):
        ids = inputs["input_ids"]
        rows.append(ids[inputs.get("attention_mask", torch.ones_like(ids)).bool()])
    samples = [blocks(row[None], loss_on="all")[0] for row in rows if len(row) > 1]
    split = max(1, round(COMPARED * len(samples)))
    return samples[split:] or samples, samples[:split]


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
