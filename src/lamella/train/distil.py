"""Distillation: a smaller model is trained to match a larger one's outputs (Minitron, arXiv 2407.14679, section 3).

    L = (1 / S) sum_s KL( p_T(. | s) || p_S(. | s) ) + alpha L_is        alpha = L_logits / L_is, without gradient

L_is compares normed intermediate states of the two models, the smaller one's through one shared projection; it is
omitted unless much of the depth is removed. Labels are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lamella.data import ImageText
from lamella.data.samples import Sample
from lamella.errors import TrainingError
from lamella.plan import ModelReference, Plan, can_stand_alone, materialise
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train.config import TrainConfig
from lamella.train.fit import fit
from lamella.train.healing import with_modules_of, with_weights_of
from lamella.train.lora import add_lora
from lamella.train.losses import PROJECTION, distillation_loss, projection
from lamella.train.pace import config_for_time
from lamella.train.parameters import Choice, choose, in_bfloat16, own
from lamella.train.task import Task, batching
from lamella.train.trained import Healed

TRAINING = TrainConfig(steps=400, lr=1e-4, warmup=0.1)
SHALLOW = 0.75  # of the layers: below it, intermediate states are distilled too (the paper: "reduced a lot")


def distil(
    stack: Stack,
    plan: Plan,
    samples: Sequence[Sample] | ImageText,
    *,
    config: TrainConfig = TRAINING,
    teacher: Stack | None = None,
    intermediate: bool | None = None,
    temperature: float = 1.0,
    vocabulary: bool = True,
    lora: int | None = None,
    minutes: float | None = None,
    held_out: Sequence[Sample] = (),
    out: Path,
) -> Healed:
    """Train the model under a plan to match the original's output distribution.

    Args:
        stack: the original; it is not changed.
        plan: a static plan for it.
        samples: text, or images with text; positions with labels are compared, whatever the labels are.
        config: of the training; the paper gives each candidate shape 400 steps, and 1e-4, here decayed to 0, is the
            rate of the authors' guideline (there to 1e-5).
        teacher: the teacher model, if it is not the original; its layers are matched evenly.
        intermediate: also compare intermediate states and the embedding's output; by default if fewer than three
            quarters of the layers remain.
        temperature: of both distributions.
        vocabulary: train embedding and output projection too. If they are frozen, a step is cheaper: logits are
            computed only once.
        lora: rank of adapters to train instead of all parameters; they are merged.
        minutes: training time, instead of the config's steps; see :func:`lamella.train.pace.config_for_time`.
        held_out: text on which the divergence is measured during training.
        out: a folder for checkpoints; an interrupted run resumes from there.

    Returns:
        The healed model. If the plan keeps whole layers, it is a smaller, ordinary one, with a plan that runs all of
        it; otherwise it keeps the plan.

    Raises:
        TrainingError: for a teacher with another vocabulary.
    """
    alone = can_stand_alone(stack, plan)
    student: Any = materialise(stack, plan).model if alone else apply(stack, plan)
    kept = [run.layer for run in plan.runs("prefill")]
    other = teacher is not None
    teacher = teacher or stack
    check_vocabulary(stack, teacher)
    if intermediate is None:
        intermediate = alone and len(kept) < SHALLOW * len(teacher)
    matched = np.linspace(0, len(teacher) - 1, len(kept)).round().astype(int).tolist() if other else kept
    pairs = tuple(enumerate(matched)) if intermediate else ()
    master = (in_bfloat16 if config.bf16 else share)(teacher.model).eval()
    adapters = add_lora(student, r=lora, alpha=lora, seed=config.seed) if lora else None
    trains = adapters.trains if adapters else _trained_names(student, vocabulary)
    own(student, trains)
    if pairs:
        projection(student, master, config.seed)
        chosen = trains
        trains = lambda name: name.startswith(PROJECTION) or chosen(name)  # noqa: E731
    trainee = in_bfloat16(student, choose(student, trains).values()) if config.bf16 else student
    loss = partial(distillation_loss, teacher=master, pairs=pairs, temperature=temperature)
    task = Task(loss, collate=batching(samples), frozen=(master,))
    if minutes is not None:
        config = config_for_time(trainee, samples, task, config, 60 * minutes, trainable=trains, out=out)
    log = fit(
        trainee,
        samples,
        task,
        config,
        out=out,
        trainable=trains,
        held_out=held_out,
        settings={"plan": plan.digest, "pairs": [list(pair) for pair in pairs], "temperature": temperature}
        | ({"teacher": teacher.name} if other else {})
        | ({"lora": lora} if lora else {}),
    )
    if adapters:
        adapters.merge()
        adapters.remove()
    if hasattr(student, PROJECTION):
        delattr(student, PROJECTION)  # only training needs it
    if not alone:
        healed = with_weights_of(stack, student)
        return Healed(stack=healed, plan=with_modules_of(plan, stack, student, out), log=log)
    smaller = Stack(student, name=f"{stack.name}, distilled")
    whole = Plan(model=ModelReference.of(smaller), provenance=plan.provenance | {"healed": plan.digest})
    return Healed(stack=smaller, plan=whole, log=log)


def _trained_names(student: Any, vocabulary: bool) -> Choice:
    """Return which parameters of a model train: all, or all but the embedding and the output projection."""
    if vocabulary:
        return lambda name: True
    fixed = {id(each) for module in Stack(student).vocabulary for each in module.parameters()}
    names = {name for name, each in student.named_parameters(remove_duplicate=False) if id(each) not in fixed}
    return names.__contains__


def check_vocabulary(stack: Stack, teacher: Stack) -> None:
    """Raise a :class:`TrainingError` for a teacher whose vocabulary has another size.

    Args:
        stack: the student.
        teacher: the teacher.
    """
    ours, theirs = (each.unembedding.weight.shape[0] for each in (stack, teacher))
    if ours != theirs:
        raise TrainingError(
            f"the teacher {teacher.name} has {theirs} tokens and {stack.name} {ours}: distil from a model with the "
            "same vocabulary"
        )
