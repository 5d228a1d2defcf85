"""Losses: plain functions over chunks of positions.

A model's final states are small, its logits are not: [positions, vocabulary]. So losses first gather the states of the
positions that carry loss, and make logits a chunk at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lamella.runtime import phase_options
from lamella.stack import Stack
from lamella.train.data import NO_LOSS, Sample, collate

Batch = Mapping[str, Tensor]

CHUNK = 256  # positions whose logits are held at once


def response_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the labels, in nats per token.

    A view runs as it is served: each row's first ``prompt_lengths`` columns are prompt, the others generated.

    Args:
        model: a model or a view.
        batch: what :func:`lamella.train.collate` returns.
    """
    states, labels = scored_states(model, batch)
    logits = Stack(model).logits

    def chunk(states: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits(states), labels)

    return mean_over_positions(chunk, states, labels)


@torch.no_grad()
def mean_loss(model: Any, samples: Sequence[Sample], *, batch: int = 8) -> float:
    """The response loss over all labels of some samples, in nats per token; the model's mode stays as it is.

    Args:
        model: a model or a view.
        samples: such as :func:`lamella.train.blocks` makes.
        batch: samples in one forward pass.
    """
    device = next(model.parameters()).device
    total = labels = 0.0
    for start in range(0, len(samples), batch):
        each = {name: values.to(device) for name, values in collate(samples[start : start + batch]).items()}
        count = int((each["labels"] != NO_LOSS).sum())
        total += float(response_loss(model, each)) * count
        labels += count
    return total / labels


def distilled_loss(model: Any, batch: Batch, *, teacher: Any, weight: float = 0.05) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy plus ``weight`` times the squared error of the logits (LoRA-Drop's second objective).

    Args:
        model: the model or view that trains.
        batch: what :func:`lamella.train.collate` returns.
        teacher: the unmodified model; it gets no gradient.
        weight: of the squared error; 0.05 in the release of arXiv 2601.02569.

    Returns:
        The loss, and its two parts ``ce`` and ``mse``.
    """
    states, labels = scored_states(model, batch)
    with torch.no_grad():
        teacher_states, _ = scored_states(teacher, batch)
    logits, teacher_logits = Stack(model).logits, Stack(teacher).logits

    def chunk(states: Tensor, teacher_states: Tensor, labels: Tensor) -> Tensor:
        ours = logits(states)
        with torch.no_grad():
            theirs = teacher_logits(teacher_states)
        return torch.stack([cross_entropy(ours, labels), logit_mse(ours, theirs)])

    ce, mse = mean_over_positions(chunk, states, teacher_states, labels)
    return ce + weight * mse, {"ce": ce, "mse": mse}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over positions of -log p(label), in float32: logits [positions, vocabulary], labels [positions]."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def logit_mse(logits: Tensor, teacher: Tensor) -> Tensor:
    """The sum over positions of the squared error, mean over the vocabulary: both [positions, vocabulary]."""
    return (logits.float() - teacher.float()).square().mean(dim=-1).sum()


def scored_states(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The final states that predict a label [positions, hidden], and those labels [positions], rows joined."""
    options = phase_options(model, batch["prompt_lengths"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = Stack(model).hidden(inputs, **options)[:, :-1]  # the last one predicts nothing that we have
    labels = batch["labels"][:, 1:]
    carries = labels != NO_LOSS
    return states[carries], labels[carries]


def mean_over_positions(chunk: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The mean of ``chunk``'s sums over positions. Its logits are made again in the backward pass, never kept.

    Args:
        chunk: from a stretch of each of ``rows`` to a sum over its positions.
        rows: tensors with one entry for each position [positions, ...].
    """
    pieces = zip(*(each.split(CHUNK) for each in rows), strict=True)
    sums = [checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(sums).sum(dim=0) / len(rows[0])
