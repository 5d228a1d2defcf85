"""The balance of the load, without a loss of its own: after each pass that trains, b moves by u towards the idle.

    b_i <- b_i + u sign(mean(c) - c_i)        c_i: tokens of the batch that chose rank i, padding left out

A pass that trains is a forward pass with its backward pass. b moves when both are over: what gradient checkpointing
computes again sees the b of the first time, and its counts replace those that they repeat. Nothing moves in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamella.methods.smora.modules import RankExperts
from lamella.train import Hook, response_loss
from lamella.train.task import Backward, Batch, LossAndParts, single_pass

VECTORS = "balance.safetensors"


class Balance(Hook):
    """Moves the balance vectors of a view's experts, and keeps them in checkpoints.

    Args:
        experts: by the names of their maps, all with as many ranks.
        u: how far they move; 0 leaves them where they are.
    """

    def __init__(self, experts: Mapping[str, RankExperts], u: float) -> None:
        self.experts, self.u = experts, u

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The cross-entropy of the labels; padding will not count."""
        real = batch["attention_mask"].bool()
        for each in self.experts.values():
            each.real = real
        return response_loss(model, batch)

    def passes(self, forward: Callable[[Batch], LossAndParts], batch: Batch, backward: Backward) -> LossAndParts:
        """A forward and a backward pass, and then the balance: the ``passes`` of a task."""
        told = single_pass(forward, batch, backward)
        self.move()
        return told

    def move(self) -> None:
        """Move every b by what was counted since the last time, in all processes."""
        ran = [each for each in self.experts.values() if each.counts is not None]
        if not ran:
            return
        counts = torch.stack([each.counts for each in ran])  # type: ignore[misc]
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        for each, counted in zip(ran, counts, strict=True):
            each.balance(counted, self.u)
            each.counts = None

    def save(self, folder: Path) -> None:
        save_file({name: each.lora_biases for name, each in self.experts.items()}, folder / VECTORS)

    def load(self, folder: Path) -> None:
        for name, vector in load_file(folder / VECTORS).items():
            self.experts[name].lora_biases.copy_(vector)
