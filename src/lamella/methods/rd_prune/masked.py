"""Training with fixed masks: weights that were set to zero stay zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamella.stack import matrices
from lamella.train import Hook, TrainingRun


class MaskHook(Hook):
    """Set masked weights back to zero after each optimizer step.

    Gradients, momentum and weight decay all change a masked weight; reset after every step, it is zero in every forward
    pass. Pass the hook to :func:`lamella.train.fit`; in a loop of your own, call :meth:`apply` after each
    ``optimizer.step()``.

    Args:
        model: the model to train; its masked weights are set to zero at once.
        masks: the weights to keep of each matrix, bool in its shape, by the parameter's name.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        found = matrices(model)
        self.masked = [(found[name].of(model), ~keep.to(found[name].of(model).device)) for name, keep in masks.items()]
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set the masked weights to zero."""
        for weight, removed in self.masked:
            weight.masked_fill_(removed, 0)

    def after_step(self, run: TrainingRun) -> None:
        """Set the masked weights to zero after a step."""
        self.apply()
