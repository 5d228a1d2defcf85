"""Rotation of the residual stream, which only RMSNorm allows; orthogonal slicing and quantisation start with it.

    |Q x| = |x|  so  RMSNorm(Q x) = Q RMSNorm(x)  where the norm has no gain:   W_out <- Q W_out,   W_in <- W_in Q^T

A LayerNorm subtracts the mean, C Q x, which is not Q C x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.methods.pre_rmsnorm.rewrite import (
    RMSNorm,
    find_branches,
    parameter_like,
    put,
    read_axis,
    written_axis,
)
from lamella.plan.rewriting import wirings_of
from lamella.stack import Model, share


@dataclass(frozen=True)
class RotationHook:
    """Hook that rotates the output of a module, or the input of a layer.

    Attributes:
        rotation: Q [d, d], orthogonal.
    """

    rotation: Tensor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor | None = None) -> Any:
        """Rotate a module's output, or a layer's input."""
        if out is None:
            return (self.of(args[0]), *args[1:])
        return self.of(out)

    def of(self, x: Tensor) -> Tensor:
        """Rotate x [..., d]."""
        return x @ self.rotation.to(x.device, x.dtype).T


@torch.no_grad()
def rotate(model: Model, rotation: Tensor, norm: type[nn.Module] = RMSNorm) -> Any:
    """Return a copy of a model with a rotated residual stream Q x; it is rotated back before a norm without readers.

    Args:
        model: a model with RMSNorm whose affine is folded; it is not changed.
        rotation: Q [d, d], orthogonal.
        norm: class of its norms; with ``nn.LayerNorm`` the result shows that LayerNorms do not allow it.

    Returns:
        A transformers model.

    Raises:
        MethodError: for norms that still have a gain or a bias, since these belong to single features.
    """
    view = share(model.model)
    for branch in find_branches(view, wirings_of(model.architectures), norm):
        for writer in branch.writers:
            for name, parameter in writer.parameters.items():
                axis = written_axis(writer.module, parameter)
                rotated = torch.tensordot(parameter.double(), rotation.double(), dims=([axis], [1])).movedim(-1, axis)
                put(view, f"{writer.path}.{name}" if name else writer.path, rotated, like=parameter)
        for entrance in branch.entrances:
            entrance.module.register_forward_hook(RotationHook(rotation))
        if branch.first is not None:
            branch.first.module.register_forward_pre_hook(RotationHook(rotation))
        for component in branch.norms:
            if not component.readers:  # its output is the model's output
                component.module.register_forward_pre_hook(RotationHook(rotation.T))
                continue
            if list(component.module.parameters()):
                raise MethodError(
                    f"{component.path} has a gain or a bias, which a rotation would mix: fold the affine first"
                )
            for reader in component.readers:
                axis, weight = read_axis(reader.module), reader.module.weight
                rotated = torch.tensordot(weight.double(), rotation.double(), dims=([axis], [1])).movedim(-1, axis)
                reader.module.weight = parameter_like(rotated, weight)
    return view
