"""Losses: the objective of IRepair, the score of its layers, and a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lamella.methods.irepair.slices import Roles
from lamella.stack import Stack
from lamella.train import dpo_loss, forward_kl, response_loss
from lamella.train.losses import mean_over_positions


def bad_loss(model: Any, batch: Roles) -> Tensor:
    """L_bad: minus the mean log probability of bad continuations (and of their prompts, where those carry loss).

    Args:
        model: the model.
        batch: a batch by role.
    """
    return response_loss(model, batch["bad"])


def repair_loss(
    model: Any, batch: Roles, *, reference: Any, beta: float, gamma: float
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """L = beta NLL(good) + gamma KL(reference || model), with its two parts.

    Args:
        model: the model.
        batch: a batch by role.
        reference: the original model.
        beta: weight of the loss on good text.
        gamma: weight of the KL.
    """
    parts = {"nll": response_loss(model, batch["good"])}
    loss = beta * parts["nll"]
    if gamma:
        parts["kl"] = utility_kl(model, batch["utility"], reference)
        loss = loss + gamma * parts["kl"]
    return loss, parts


def utility_kl(model: Any, batch: Mapping[str, Tensor], reference: Any) -> Tensor:
    """KL(reference || model) over the whole vocabulary, mean over all positions that are not padding, in nats.

    Args:
        model: the model.
        batch: utility text.
        reference: the original model.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    ours, original = Stack(model), Stack(reference)
    states = ours.hidden(inputs)[real]
    with torch.no_grad():
        original_states = original.hidden(inputs)[real]

    def chunk(states: Tensor, original_states: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = original.logits(original_states)
        return forward_kl(ours.logits(states), theirs)

    return mean_over_positions(chunk, states, original_states)


def preference_loss(model: Any, batch: Roles, *, reference: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """DPO with its usual temperature of 0.1, as a baseline.

    Args:
        model: the model.
        batch: a batch by role.
        reference: the original model.
    """
    return dpo_loss(model, batch["good"], batch["bad"], reference=reference)
