"""The trainable form: recentring is part of every forward pass, so training is equivalent to that of the Pre-LN model.

    forward    W_eff = C W,  b_eff = C b        gradients are multiplied by C, which is symmetric

The parameters are those of the Pre-LN model, and the function is the same. Losses and parameters are therefore the same
with any optimizer, up to rounding. A model that is recentred once and then trained as an RMSNorm model loses the zero
mean with the first step. Dropout on the outputs of branches breaks the equality in training, since a zero-mean vector
with dropped entries has a mean.
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
    replacement,
    written_axis,
)
from lamella.plan.rewriting import wirings_of
from lamella.stack import Model


class Recentring(nn.Module):
    """Parametrisation C W, over the output axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        """Return the recentred weight."""
        return centre(weight, self.axis)


def trainable(model: Model) -> Any:
    """Return a copy of a Pre-LN model with RMSNorm that has the Pre-LN model's own parameters, also during training.

    The outputs of tables and of scaling vectors are recentred by hooks, the weights of all other writers by
    parametrisation.

    Args:
        model: the model; it is not changed, and shares nothing with the copy.

    Returns:
        A transformers model; :func:`pre_ln_state` returns its parameters under the names of the Pre-LN model.

    Raises:
        MethodError: for a model that cannot be rewritten, or a BEiT with scaling vectors.
    """
    copied = copy.deepcopy(model.model)
    try:
        branches = find_branches(copied, wirings_of(model.architectures))
    except ValueError as error:
        raise MethodError(f"{model.name}: {error}") from None
    for branch in branches:
        for writer in branch.writers:
            if writer.scaled is not None and isinstance(writer.scaled.module, nn.Parameter):
                raise MethodError(f"{model.name}: {writer.scaled.path} scales a branch without a module of its own")
            if isinstance(writer.module, nn.Embedding) or writer.scaled is not None:
                (writer.scaled or writer).module.register_forward_hook(Recentre())
                continue
            for name, parameter in writer.parameters.items():
                parent, _, own = f"{writer.path}.{name}".rstrip(".").rpartition(".")
                axis = Recentring(written_axis(writer.module, parameter))
                parametrize.register_parametrization(copied.get_submodule(parent), own, axis)
        for entrance in branch.entrances:
            entrance.module.register_forward_hook(Recentre())
        if branch.first is not None:
            branch.first.module.register_forward_pre_hook(Recentre())
        for norm in branch.norms:
            copied.set_submodule(norm.path, replacement(norm, Form()))
    return copied


def pre_ln_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a trainable form under the names of the Pre-LN model."""
    return {
        name.replace("parametrizations.", "").removesuffix(".original"): each
        for name, each in model.state_dict().items()
    }
