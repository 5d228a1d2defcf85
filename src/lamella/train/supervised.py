"""Learning what to give for what comes in: numbers or classes, for vectors, images, or the streams inside a model.

    rows = [{"x": image, "y": target}, ...]
    fit(network, rows, supervised(), TrainConfig(steps=500, lr=1e-3), out="run")

    rows = [{"x": image, "y": torch.tensor(3)}, ...]
    fit(network, rows, supervised(class_cross_entropy), TrainConfig(steps=500, lr=1e-3), out="run")

A row is whatever the network reads at once as one element of a batch: a flat image [features], an image [channels,
height, width], a token [hidden], or a whole sequence [time, hidden] where the network mixes tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamella.train.task import Batch, Loss, Task


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """The mean squared error of ``model(x)`` from ``y``, over rows and numbers."""
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def class_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of ``model(x)``, logits [rows, classes], with the classes ``y`` [rows], in nats."""
    return nn.functional.cross_entropy(model(batch["x"]).float(), batch["y"])


def supervised(loss: Loss = squared_error) -> Task:
    """The task of giving ``y`` for ``x``.

    Args:
        loss: from the model and a batch of ``x`` and ``y`` [rows, ...] to the mean loss over rows.
    """
    return Task(loss, collate=stacked, weight=count_rows)


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> Batch:
    """Rows of one shape as a batch: ``x`` and ``y`` [rows, ...], and what else a loss of one's own reads."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def count_rows(batch: Any) -> int:
    """What a batch weighs: its rows, which are all of one size."""
    return len(batch["x"])
