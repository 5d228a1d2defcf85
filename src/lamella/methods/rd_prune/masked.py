"""Training with masks held: weights that were set to zero stay zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamella.stack import matrices
from lamella.train import Hook, TrainingRun


class Holding(Hook):
    """Sets masked weights back to zero after each optimizer step.

    Gradients, momentum and weight decay all move a masked weight; put back after every step, it is zero in every
    forward pass. Give it to :func:`lamella.train.fit`; in a loop of your own, call :meth:`hold` after each
    ``optimizer.step()``.

    Args:
        model: what trains; its masked weights are set to zero at once.
        masks: what is kept of each matrix, bool in its shape, by the parameter's name.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        found = matrices(model)
        self.held = [(found[name].of(model), ~keep.to(found[name].of(model).device)) for name, keep in masks.items()]
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Set them to zero."""
        for weight, gone in self.held:
            weight.masked_fill_(gone, 0)

    def after_step(self, run: TrainingRun) -> None:
        self.hold()
