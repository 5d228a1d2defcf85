"""Load balancing without an auxiliary loss: after each training pass, b moves by u towards the less used experts.

    b_i <- b_i + u sign(mean(c) - c_i)        c_i: tokens of the batch that selected rank i, without padding

A training pass is a forward pass with its backward pass. b is updated after both: recomputation under gradient
checkpointing sees the same b as the first pass, and its counts replace those of the first pass. Evaluation changes
nothing.
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
from lamella.plan.adapters import ATTRIBUTE
from lamella.train import Hook, response_loss
from lamella.train.task import Backward, Batch, LossAndParts, single_pass

VECTORS = "balance.safetensors"


class LoadBalance(Hook):
    """Updates the balance vectors of a view's experts, and saves them in checkpoints.

    Args:
        experts: the experts by the names of their linear layers, all with the same number of ranks.
        u: the step size; 0 keeps them constant.
    """

    splits = True  # b and the counts are whole in every process

    def __init__(self, experts: Mapping[str, RankExperts], u: float) -> None:
        self.experts, self.u = experts, u

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the cross-entropy of the labels; padding is excluded from the counts.

        Args:
            model: the view with the experts.
            batch: token ids, labels and ``attention_mask`` `[batch, time]`.
        """
        token_mask = batch["attention_mask"].bool()
        # A sharded run trains a copy of the view, with the same vectors b.
        self.experts = {name: model.get_submodule(f"{name}.{ATTRIBUTE}") for name in self.experts}
        for each in self.experts.values():
            each.token_mask = token_mask
        return response_loss(model, batch)

    def passes(self, forward: Callable[[Batch], LossAndParts], batch: Batch, backward: Backward) -> LossAndParts:
        """Run a forward and a backward pass and update the balance: the ``passes`` of a task.

        Args:
            forward: the forward pass.
            batch: the batch.
            backward: the backward pass.
        """
        result = single_pass(forward, batch, backward)
        self.update()
        return result

    def update(self) -> None:
        """Update every b with the counts since the last update, summed over all processes."""
        used = [each for each in self.experts.values() if each.counts is not None]
        if not used:
            return
        counts = torch.stack([each.counts for each in used])  # type: ignore[misc]
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        for each, count in zip(used, counts, strict=True):
            each.balance(count, self.u)
            each.counts = None

    def save(self, folder: Path) -> None:
        """Save the balance vectors in a checkpoint folder."""
        save_file({name: each.lora_biases for name, each in self.experts.items()}, folder / VECTORS)

    def load(self, folder: Path) -> None:
        """Load the balance vectors from a checkpoint folder."""
        for name, vector in load_file(folder / VECTORS).items():
            self.experts[name].lora_biases.copy_(vector)
