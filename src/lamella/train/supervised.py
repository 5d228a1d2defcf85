"""Supervised learning: regression or classification, for vectors, images, or the hidden states of a model.

    rows = [{"x": image, "y": target}, ...]
    fit(network, rows, supervised(), TrainConfig(steps=500, lr=1e-3), out="run")

    rows = [{"x": image, "y": torch.tensor(3)}, ...]
    fit(network, rows, supervised(class_cross_entropy), TrainConfig(steps=500, lr=1e-3), out="run")

A row is one element of the network's input batch: a flat image [features], an image [channels, height, width], a token
[hidden], or a whole sequence [time, hidden] if the network mixes tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamella.train.task import Batch, Loss, Task


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error of the model, over rows and elements.

    Args:
        model: maps ``x`` to a tensor in the shape of ``y``.
        batch: inputs ``x`` and targets ``y``, each [rows, ...].
    """
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def class_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a classifier, in nats.

    Args:
        model: maps ``x`` to logits [rows, classes].
        batch: inputs ``x`` [rows, ...] and the indices of the true classes ``y`` [rows].
    """
    return nn.functional.cross_entropy(model(batch["x"]).float(), batch["y"])


def supervised(loss: Loss = squared_error) -> Task:
    """Return the task of predicting ``y`` from ``x``.

    Args:
        loss: from the model and a batch of ``x`` and ``y`` [rows, ...] to the mean loss over rows.
    """
    return Task(loss, collate=stacked, weight=count_rows)


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> Batch:
    """Stack rows of one shape to a batch: ``x`` and ``y`` [rows, ...], and further inputs of a custom loss."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def count_rows(batch: Any) -> int:
    """Return the weight of a batch: its number of rows, which are all of one size."""
    return len(batch["x"])
