"""Distillation to a smaller student: its shape, its loss, and the command (stage 5).

    L = (1 - a) CE(student, labels) + (a T^2 / B^2) KL( softmax(z_t / T) || softmax(z_s / T) )      T = 20, a = 0.7

CE and KL are means over the positions that carry a label; the authors' own count padding, too. Their B, the batch, is
kept in the weight of KL as it is published, which depends on it (0.27 with B = 32); ``divergence`` sets another.

    parts    layers    width        channels    heads        of T5-small: 6 + 6, 512, 2048, 8
    1/8      2/3       1/sqrt 8     1/8         3/4          4 + 4, 181, 256, 6
    1/16     1/2       1/4          1/16        1/2          3 + 3, 128, 128, 4
    1/32     1/3       1/sqrt 32    1/32        1/4          2 + 2,  90,  64, 2
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.cstrl.judge import COLLAPSED, Judge
from lamella.methods.cstrl.recipe import TRAINING, Course, Lengths, Reading, lasting, trainee
from lamella.methods.cstrl.summaries import Splits, Summaries
from lamella.plan import ModelReference, Plan
from lamella.plan.config import reindex
from lamella.registry import command
from lamella.results import Trained
from lamella.signature import Split
from lamella.stack import Model, Stack, last_stack, open_model, share
from lamella.train import (
    Task,
    TrainConfig,
    fit,
    forward_kl,
)
from lamella.train.losses import cross_entropy_and_distance
from lamella.train.task import Batch

DISTILLING = replace(TRAINING, lr=3e-3, batch=32)
SMALLEST = 32  # of the parts that the table goes on to
EIGHT = 8  # a head's size is a multiple of it, where the width decides it


def shrunk(model: Model, parts: int) -> Any:
    """The config of a student of about so many parts fewer weights, encoder and decoder alike; the model's stays.

    Args:
        parts: from 2 to 32: 8, 16 or 32 give the paper's students of T5-small; others lie between.
    """
    octaves = math.log2(parts)
    config = model.model.config
    for stack in model.stacks.values():
        count = max(1, round(len(stack) * min(1.0, (7 - octaves) / 6)))
        kept = np.linspace(0, len(stack) - 1, count).round().astype(int).tolist()
        config = reindex(config, kept, stack.architecture)  # a copy
    for stack in model.stacks.values():
        for size, value in _sizes(stack, parts, min(1.0, (6 - octaves) / 4)).items():
            setattr(config, stack.architecture.sizes[size], value)
    return config


def _sizes(stack: Stack, parts: int, heads_left: float) -> dict[str, int]:
    """The widths of a student's stack, by the names of its architecture's sizes."""
    architecture, whole = stack.architecture, stack.architecture.sizes_of(stack.config)
    group = whole.heads // whole.kv_heads
    heads = max(group, round(whole.heads * heads_left) // group * group)
    width = whole.hidden / math.sqrt(parts)
    # T5 says a head's size beside the width; elsewhere heads may have to fill it, and rotations come in pairs.
    hidden = int(width) if architecture.name == "t5" else EIGHT * heads * max(1, round(width / (EIGHT * heads)))
    sizes = {"hidden": hidden, "channels": max(1, whole.channels // parts), "heads": heads, "kv_heads": heads // group}
    return {name: size for name, size in sizes.items() if name in architecture.sizes}


def fresh(model: Model, parts: int, seed: int) -> Model:
    """A student with random weights."""
    config = copy.deepcopy(shrunk(model, parts))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Any = type(model.model)(config).to(model.device).eval()
    made.generation_config = copy.deepcopy(model.model.generation_config)
    return open_model(made, name=f"{model.name}, 1/{parts}")


def student_loss(
    model: Any, batch: Batch, *, teacher: Any, temperature: float, alpha: float, divergence: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(1 - a) CE + ``divergence`` T^2 KL, both in nats per position, with its parts ``ce`` and ``kl`` (of T^2 KL).

    Args:
        model: the student.
        batch: what :func:`lamella.train.collate` returns.
        teacher: of the same vocabulary; it gets no gradient.
        temperature: T.
        alpha: a.
        divergence: the weight of T^2 KL: a / B^2 as published.
    """
    ce, kl = cross_entropy_and_distance(model, batch, teacher, partial(forward_kl, temperature=temperature))
    return (1 - alpha) * ce + divergence * kl, {"ce": ce, "kl": kl}


@command(
    "cstrl",
    "distil",
    brief={"student": None, "parts": 8, "batch": 4, "summary_length": 16, "judged": 2},
)
def distil(
    model: Model,
    pairs: Summaries,
    student: Model | None = None,
    test: Annotated[Summaries | None, Split("test")] = None,
    *,
    parts: Annotated[int, Ge(2), Le(SMALLEST)] = 8,
    temperature: Annotated[float, Gt(0)] = 20.0,
    alpha: Annotated[float, Ge(0), Le(1)] = 0.7,
    divergence: Annotated[float, Ge(0)] | None = None,
    lengths: Lengths = Lengths(),  # noqa: B008, frozen
    course: Course = Course(),  # noqa: B008, frozen
    config: TrainConfig = DISTILLING,
    work: Work = Work(),
) -> Trained:
    """Distil a model that summarises to a student of an eighth of its size or less.

    Example: lamella run cstrl distil summarising --pairs reports.jsonl --parts 16 -o student

    Args:
        model: the teacher; it is not changed.
        pairs: sources with their summaries. Without a test, a tenth becomes one; a tenth of the rest is watched.
        student: a model of the same vocabulary to begin with, such as the teacher with layers cut out; a fresh one when
            left out.
        test: pairs to judge by.
        parts: a fresh student has about one in so many of the teacher's weights: 8, 16 or 32 in the paper.
        temperature: T, of both distributions.
        alpha: a, how much of the loss is not the labels'.
        divergence: the weight of T^2 KL; a / B^2 when left out, as published.
        lengths: what is read and written.
        course: how summaries are learnt, and judged.
        config: of the training.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The student, beside its teacher and one constant answer.

    Raises:
        MethodError: for a student of another vocabulary.
        TrainingError: when training cannot start or stay finite.
    """
    splits, reading = Splits.of(pairs, test, config.seed), Reading(model, pairs.tokenizer)
    begun = fresh(model, parts, config.seed) if student is None else student
    check_same_words(model, begun)
    samples, watched = (
        reading.samples(part, course.prefix, lengths.source_length, lengths.summary_length)
        for part in (splits.train, splits.held_out)
    )
    view, master = trainee(begun), share(model.model).eval()
    weight = alpha / config.batch**2 if divergence is None else divergence
    loss = partial(student_loss, teacher=master, temperature=temperature, alpha=alpha, divergence=weight)
    log = fit(
        view,
        samples,
        Task(loss, frozen=(master,)),
        lasting(config, len(samples), course.epochs),
        out=work.directory() / "student",
        trainable=lambda name: True,
        held_out=watched,
        settings={"temperature": temperature, "alpha": alpha, "divergence": weight, "teacher": model.files_digest},
    )
    trained = open_model(view.eval(), name=begun.name)
    judge = Judge(reading, splits.test[: course.judged], course.prefix, lengths)
    scores = {
        "teacher": judge.of(model),
        "student": judge.of(trained),
        "one constant answer": judge.constant(splits.train),
    }
    sizes = {"teacher": _size(model), "student": _size(trained)}
    return Trained(
        stack=trained,
        plan=Plan(model=ModelReference.of(trained)),
        log=log,
        findings={"parameters": sizes, "divergence": weight, "scores": scores},
        notes=_notes(scores, splits),
    )


def check_same_words(teacher: Model, student: Model) -> None:
    """Check that a student has the vocabulary of its teacher.

    Raises:
        MethodError: when it has another number of tokens, or is of another kind.
    """
    sizes = [len(last_stack(each.model).unembedding.weight) for each in (teacher, student)]
    if sizes[0] != sizes[1] or len(teacher.stacks) != len(student.stacks):
        raise MethodError(
            f"{student.name} has {sizes[1]} tokens and {len(student.stacks)} stacks, its teacher {sizes[0]} and "
            f"{len(teacher.stacks)}: give a student of the same kind and vocabulary"
        )


def _size(model: Model) -> int:
    return sum(each.numel() for each in model.model.parameters())


def _notes(scores: dict[str, dict[str, Any]], splits: Splits) -> list[str]:
    ours, theirs = (scores[name]["distinct"] for name in ("student", "teacher"))
    notes = []
    if ours < COLLAPSED * theirs:
        notes.append(f"The student has collapsed: {ours} different summaries, where its teacher writes {theirs}.")
    if scores["student"]["rouge1"] <= scores["one constant answer"]["rouge1"]:
        notes.append("The student is no better than one constant answer: train longer, or make it larger.")
    if splits.set_aside:
        notes.append(f"No test was given, so {len(splits.test)} of the pairs were set aside as one.")
    return notes
