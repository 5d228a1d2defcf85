"""Distillation to a smaller student: its shape, its loss, and the command (stage 5).

    L = (1 - a) CE(student, labels) + (a T^2 / B^2) KL( softmax(z_t / T) || softmax(z_s / T) )      T = 20, a = 0.7

CE and KL are means over labelled positions; the authors' implementation includes padding. B, the batch size, is part of
the weight of KL as published (0.27 with B = 32); ``divergence`` sets another weight.

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
from lamella.methods.cstrl.judge import COLLAPSE_RATIO, Judge
from lamella.methods.cstrl.recipe import TRAINING, PairEncoder, SummaryTraining, TextLengths, trainee, with_steps
from lamella.methods.cstrl.summaries import Summaries, SummarySplits
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
SMALLEST = 32  # the last row of the table
EIGHT = 8  # head sizes are multiples of it if they depend on the hidden size


def student_config(model: Model, parts: int) -> Any:
    """Return the config of a student with about 1 / ``parts`` of the parameters, for encoder and decoder alike.

    Args:
        model: the teacher; its config is not changed.
        parts: from 2 to 32: 8, 16 or 32 give the paper's students of T5-small; other values are interpolated.
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
    """Return the sizes of a student's stack, by the names of its architecture's sizes."""
    architecture, whole = stack.architecture, stack.architecture.sizes_of(stack.config)
    group = whole.heads // whole.kv_heads
    heads = max(group, round(whole.heads * heads_left) // group * group)
    width = whole.hidden / math.sqrt(parts)
    # T5 sets the head size explicitly; elsewhere heads may have to fill the width, and RoPE needs even sizes.
    hidden = int(width) if architecture.name == "t5" else EIGHT * heads * max(1, round(width / (EIGHT * heads)))
    sizes = {"hidden": hidden, "channels": max(1, whole.channels // parts), "heads": heads, "kv_heads": heads // group}
    return {name: size for name, size in sizes.items() if name in architecture.sizes}


def new_student(model: Model, parts: int, seed: int) -> Model:
    """Create a student with random weights.

    Args:
        model: the teacher.
        parts: see :func:`student_config`.
        seed: random seed.
    """
    config = copy.deepcopy(student_config(model, parts))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: Any = type(model.model)(config).to(model.device).eval()
    network.generation_config = copy.deepcopy(model.model.generation_config)
    return open_model(network, name=f"{model.name}, 1/{parts}")


def student_loss(
    model: Any, batch: Batch, *, teacher: Any, temperature: float, alpha: float, divergence: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (1 - a) CE + ``divergence`` T^2 KL, both in nats per position, with its parts ``ce`` and ``kl`` (T^2 KL).

    Args:
        model: the student.
        batch: a batch of :func:`lamella.train.collate`.
        teacher: a model with the same vocabulary; it gets no gradient.
        temperature: T.
        alpha: a.
        divergence: weight of T^2 KL: a / B^2 as published.
    """
    ce, kl = cross_entropy_and_distance(model, batch, teacher, partial(forward_kl, temperature=temperature))
    return (1 - alpha) * ce + divergence * kl, {"ce": ce, "kl": kl}


@command(
    "cstrl",
    "distil",
    brief={"student": None, "parts": 8, "batch": 4, "summary_length": 16, "test_samples": 2},
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
    lengths: TextLengths = TextLengths(),  # noqa: B008, frozen
    course: SummaryTraining = SummaryTraining(),  # noqa: B008, frozen
    config: TrainConfig = DISTILLING,
    work: Work = Work(),
) -> Trained:
    """Distil a summarisation model to a student of an eighth of its size or less.

    Example: lamella run cstrl distil summarising --pairs reports.jsonl --parts 16 -o student

    Args:
        model: the teacher; it is not changed.
        pairs: sources with their summaries. Without a test set, a tenth becomes one; a tenth of the rest is held out.
        student: initial student with the same vocabulary, such as the teacher with fewer layers; if None, a new one
            with random weights.
        test: test pairs.
        parts: a new student has about 1 / ``parts`` of the teacher's parameters: 8, 16 or 32 in the paper.
        temperature: T, of both distributions.
        alpha: a; the labels have the weight 1 - a in the loss.
        divergence: weight of T^2 KL; if None, a / B^2 as published.
        lengths: maximum lengths of texts.
        course: training on summaries, and evaluation.
        config: training configuration.
        work: folder from which an interrupted run resumes, bit-exact.

    Returns:
        The student, with scores of the teacher and of a constant answer for comparison.

    Raises:
        MethodError: for a student with another vocabulary.
        TrainingError: if training cannot start, or the loss is not finite.
    """
    splits, encoder = SummarySplits.of(pairs, test, config.seed), PairEncoder(model, pairs.tokenizer)
    initial = new_student(model, parts, config.seed) if student is None else student
    check_same_vocabulary(model, initial)
    samples, watched = (
        encoder.samples(part, course.prefix, lengths.source_length, lengths.summary_length)
        for part in (splits.train, splits.held_out)
    )
    view, teacher_model = trainee(initial), share(model.model).eval()
    weight = alpha / config.batch**2 if divergence is None else divergence
    loss = partial(student_loss, teacher=teacher_model, temperature=temperature, alpha=alpha, divergence=weight)
    log = fit(
        view,
        samples,
        Task(loss, frozen=(teacher_model,)),
        with_steps(config, len(samples), course.epochs),
        out=work.directory() / "student",
        trainable=lambda name: True,
        held_out=watched,
        settings={"temperature": temperature, "alpha": alpha, "divergence": weight, "teacher": model.files_digest},
    )
    trained = open_model(view.eval(), name=initial.name)
    judge = Judge(encoder, splits.test[: course.test_samples], course.prefix, lengths)
    scores = {
        "teacher": judge.of(model),
        "student": judge.of(trained),
        "constant answer": judge.constant(splits.train),
    }
    sizes = {"teacher": _size(model), "student": _size(trained)}
    return Trained(
        stack=trained,
        plan=Plan(model=ModelReference.of(trained)),
        log=log,
        findings={"parameters": sizes, "divergence": weight, "scores": scores},
        notes=_notes(scores, splits),
    )


def check_same_vocabulary(teacher: Model, student: Model) -> None:
    """Check that a student has the vocabulary and architecture type of its teacher.

    Args:
        teacher: the teacher.
        student: the student.

    Raises:
        MethodError: if the vocabulary sizes or the numbers of stacks differ.
    """
    sizes = [len(last_stack(each.model).unembedding.weight) for each in (teacher, student)]
    if sizes[0] != sizes[1] or len(teacher.stacks) != len(student.stacks):
        raise MethodError(
            f"{student.name} has {sizes[1]} tokens and {len(student.stacks)} stacks, its teacher {sizes[0]} and "
            f"{len(teacher.stacks)}: give a student of the same type and vocabulary"
        )


def _size(model: Model) -> int:
    return sum(each.numel() for each in model.model.parameters())


def _notes(scores: dict[str, dict[str, Any]], splits: SummarySplits) -> list[str]:
    ours, theirs = (scores[name]["distinct"] for name in ("student", "teacher"))
    notes = []
    if ours < COLLAPSE_RATIO * theirs:
        notes.append(f"The student has collapsed: {ours} distinct summaries, while its teacher generates {theirs}.")
    if scores["student"]["rouge1"] <= scores["constant answer"]["rouge1"]:
        notes.append("The student is not better than a constant answer: train longer, or make it larger.")
    if splits.test_from_pairs:
        notes.append(f"No test set was given, so {len(splits.test)} of the pairs were used as one.")
    return notes
