"""What only a model with RMSNorm allows: turning its stream, as orthogonal slicing and quantisation do first.

    |Q x| = |x|  so  RMSNorm(Q x) = Q RMSNorm(x)  where the norm has no gain:   W_out <- Q W_out,   W_in <- W_in Q^T

A LayerNorm takes the mean away, C Q x, which is not Q C x.
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
class Turn:
    """Turns what a module gives, or what a layer is given."""

    rotation: Tensor

    def __call__(self, module: nn.Module, given: tuple[Any, ...], out: Tensor | None = None) -> Any:
        if out is None:
            return (self.of(given[0]), *given[1:])
        return self.of(out)

    def of(self, x: Tensor) -> Tensor:
        return x @ self.rotation.to(x.device, x.dtype).T


@torch.no_grad()
def rotate(model: Model, rotation: Tensor, norm: type[nn.Module] = RMSNorm) -> Any:
    """A copy of a model whose stream is Q x in the place of x; before a norm that nothing reads it is turned back.

    Args:
        model: one with RMSNorm whose affine is folded; it is not changed.
        rotation: Q [d, d], orthogonal.
        norm: what its norms are; with ``nn.LayerNorm`` it shows that they must not be.

    Returns:
        A transformers model.

    Raises:
        MethodError: for norms that still have a gain or a bias, since those belong to features.
    """
    view = share(model.model)
    for branch in find_branches(view, wirings_of(model.architectures), norm):
        for writer in branch.writers:
            for name, parameter in writer.parameters.items():
                axis = written_axis(writer.module, parameter)
                turned = torch.tensordot(parameter.double(), rotation.double(), dims=([axis], [1])).movedim(-1, axis)
                put(view, f"{writer.path}.{name}" if name else writer.path, turned, like=parameter)
        for entrance in branch.entrances:
            entrance.module.register_forward_hook(Turn(rotation))
        if branch.first is not None:
            branch.first.module.register_forward_pre_hook(Turn(rotation))
        for place in branch.norms:
            if not place.readers:  # what it gives is the model's own output
                place.module.register_forward_pre_hook(Turn(rotation.T))
                continue
            if list(place.module.parameters()):
                raise MethodError(f"{place.path} has a gain or a bias, which belong to features: fold the affine first")
            for reader in place.readers:
                axis, weight = read_axis(reader.module), reader.module.weight
                turned = torch.tensordot(weight.double(), rotation.double(), dims=([axis], [1])).movedim(-1, axis)
                reader.module.weight = parameter_like(turned, weight)
    return view
