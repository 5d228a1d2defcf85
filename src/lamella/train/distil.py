"""Distillation: a smaller model learns what a larger one would have said (Minitron, arXiv 2407.14679, section 3).

    L = (1 / S) sum_s KL( p_T(. | s) || p_S(. | s) ) + alpha L_is        alpha = L_logits / L_is, without gradient

L_is compares normed states inside the two models, the smaller one's through one shared projection; it is left out
unless much of the depth is gone. Labels play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lamella.data.samples import Sample
from lamella.errors import TrainingError
from lamella.plan import ModelReference, Plan, materialise
from lamella.stack import Stack, share
from lamella.train.config import TrainConfig
from lamella.train.fit import fit
from lamella.train.healing import Healed
from lamella.train.losses import PROJECTION, distillation_loss, projection
from lamella.train.parameters import own
from lamella.train.task import Task

TRAINING = TrainConfig(steps=400, lr=1e-4, warmup=0.1)
SHALLOW = 0.75  # of the layers: with fewer left, intermediate states are distilled too (the paper: "reduced a lot")


def distil(
    stack: Stack,
    plan: Plan,
    samples: Sequence[Sample],
    *,
    config: TrainConfig = TRAINING,
    teacher: Stack | None = None,
    intermediate: bool | None = None,
    temperature: float = 1.0,
    held_out: Sequence[Sample] = (),
    out: Path,
) -> Healed:
    """Train the model under a plan towards the original's output distribution; all its parameters train.

    Args:
        stack: the original; it is not changed.
        plan: a plan of whole layers and widths for it.
        samples: text; the positions that carry labels are compared, whatever the labels are.
        config: of the training; 400 steps are what the paper gives each candidate shape, and 1e-4, here down to 0, is
            the rate of the authors' guideline (there to 1e-5).
        teacher: the model to learn from, where it is not the original; its layers are matched evenly.
        intermediate: compare states inside the models and the embedding's output too; by default when fewer than
            three quarters of the layers are left.
        temperature: of both distributions.
        held_out: text whose divergence is measured on the way.
        out: a folder for checkpoints; an interrupted run goes on from there.

    Returns:
        The smaller model, which is an ordinary one, with a plan that runs all of it.

    Raises:
        TrainingError: for a teacher of another vocabulary.
    """
    student, kept = materialise(stack, plan).model, [run.layer for run in plan.runs("prefill")]
    other = teacher is not None
    teacher = teacher or stack
    check_vocabulary(stack, teacher)
    if intermediate is None:
        intermediate = len(kept) < SHALLOW * len(teacher)
    matched = np.linspace(0, len(teacher) - 1, len(kept)).round().astype(int).tolist() if other else kept
    pairs = tuple(enumerate(matched)) if intermediate else ()
    master = share(teacher.model).eval()
    own(student)
    if pairs:
        projection(student, master, config.seed)
    log = fit(
        student,
        samples,
        Task(partial(distillation_loss, teacher=master, pairs=pairs, temperature=temperature), beside=(master,)),
        config,
        out=out,
        trainable=lambda name: True,
        held_out=held_out,
        settings={"plan": plan.digest, "pairs": [list(pair) for pair in pairs], "temperature": temperature}
        | ({"teacher": teacher.name} if other else {}),
    )
    if hasattr(student, PROJECTION):
        delattr(student, PROJECTION)  # only training needs it
    smaller = Stack(student, name=f"{stack.name}, distilled")
    healed = Plan(model=ModelReference.of(smaller), provenance=plan.provenance | {"healed": plan.digest})
    return Healed(smaller, healed, log)


def check_vocabulary(stack: Stack, teacher: Stack) -> None:
    """Raise a :class:`TrainingError` for a teacher whose output is over other tokens."""
    ours, theirs = (each.unembedding.weight.shape[0] for each in (stack, teacher))
    if ours != theirs:
        raise TrainingError(
            f"the teacher {teacher.name} has {theirs} tokens and {stack.name} {ours}: distil from a model with the "
            "same vocabulary"
        )
