"""Training with masks held: weights that were set to zero stay zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lamella.stack import matrices


def holding(model: nn.Module, masks: Mapping[str, Tensor]) -> Callable[[], None]:
    """What sets masked weights back to zero after each optimizer step.

    Gradients, momentum and weight decay all move a masked weight; put back after every step, it is zero in every
    forward pass. Give it to :func:`lamella.train.fit` as ``after_step``; in a loop of your own, call it after each
    ``optimizer.step()``.

    Args:
        model: what trains.
        masks: what is kept of each matrix, bool in its shape, by the parameter's name.
    """
    found = matrices(model)
    held = [(found[name].of(model), ~keep.to(found[name].of(model).device)) for name, keep in masks.items()]

    @torch.no_grad()
    def hold() -> None:
        for weight, gone in held:
            weight.masked_fill_(gone, 0)

    hold()
    return hold
