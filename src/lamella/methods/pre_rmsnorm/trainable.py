"""The trainable form: the recentring computed with every step, so training goes exactly as the Pre-LN model's does.

    forward    W_eff = C W,  b_eff = C b        gradients come back through C, which is symmetric

The parameters are those of the Pre-LN model, and so is the function of them. Losses and parameters therefore take the
same course with any optimizer, up to rounding. Recentred once, and trained on as an RMSNorm model, it leaves the
zero-mean streams with the first step. Dropout on what branches write breaks the equality while training: what it leaves
of a zero-mean vector has a mean.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lamella.errors import MethodError
from lamella.methods.pre_rmsnorm.rewrite import (
    Form,
    Recentre,
    centre,
    find_branches,
    replaced,
    written_axis,
)
from lamella.plan.rewriting import wirings_of
from lamella.stack import Model


class Recentred(nn.Module):
    """C W, over the axis of what is written."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        return centre(weight, self.axis)


def trainable(model: Model) -> Any:
    """A copy of a Pre-LN model with RMSNorm, whose parameters are the Pre-LN model's own and stay so in training.

    What tables give is recentred, and what a vector has scaled; all other writers are, whenever they are used.

    Args:
        model: it is not changed, and shares nothing with the copy.

    Returns:
        A transformers model; :func:`pre_ln_state` gives its parameters under the names that the Pre-LN model has.

    Raises:
        MethodError: for a model that cannot be rewritten.
    """
    copied = copy.deepcopy(model.model)
    try:
        branches = find_branches(copied, wirings_of(model.architectures))
    except ValueError as error:
        raise MethodError(f"{model.name}: {error}") from None
    for branch in branches:
        for writer in branch.writers:
            if isinstance(writer.module, nn.Embedding) or writer.scaled is not None:
                (writer.scaled or writer).module.register_forward_hook(Recentre())
                continue
            for name, parameter in writer.parameters.items():
                parent, _, own = f"{writer.path}.{name}".rstrip(".").rpartition(".")
                axis = Recentred(written_axis(writer.module, parameter))
                parametrize.register_parametrization(copied.get_submodule(parent), own, axis)
        for entrance in branch.entrances:
            entrance.module.register_forward_hook(Recentre())
        if branch.first is not None:
            branch.first.module.register_forward_pre_hook(Recentre())
        for norm in branch.norms:
            copied.set_submodule(norm.path, replaced(norm, Form()))
    return copied


def pre_ln_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a trainable form, by the names that the Pre-LN model has for them."""
    return {
        name.replace("parametrizations.", "").removesuffix(".original"): each
        for name, each in model.state_dict().items()
    }
