"""Learning a function from what goes in and what shall come out: vectors, images, or the streams inside a model.

    rows = [{"x": image, "y": target}, ...]
    fit(network, rows, regression(), TrainConfig(steps=500, lr=1e-3), out="run")

A row is whatever the network reads at once as one element of a batch: a flat image [features], a map [height, width,
channels], a token [hidden], or a whole sequence [time, hidden] where it mixes tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamella.train.task import Batch, Loss, Task

Row = Mapping[str, Tensor]


def stacked(rows: Sequence[Row]) -> Batch:
    """Rows of one shape as a batch: ``x`` and ``y`` [rows, ...]."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def count_rows(batch: Any) -> int:
    """What a batch weighs: its rows, which are all of one size."""
    return len(batch["x"])


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """The mean squared error of ``model(x)`` from ``y``, over rows and numbers."""
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def regression(loss: Loss = squared_error) -> Task:
    """The task of giving ``y`` for ``x``.

    Args:
        loss: from the model and a batch of ``x`` and ``y`` to the mean loss.
    """
    return Task(loss, collate=stacked, weight=count_rows)
