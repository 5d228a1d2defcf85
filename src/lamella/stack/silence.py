"""The parameters of a layer that make a sublayer the identity when zero, found by trial if no entry has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamella.stack.sharing import share
from lamella.stack.stack import Stack
from lamella.stack.sublayers import join

TOKENS = 4


@torch.no_grad()
def silencers(stack: Stack, layer: int, sublayer: str) -> frozenset[str]:
    """Return the names of a minimal set of a layer's parameters that make a sublayer the identity when zero.

    The modules of the sublayer are zeroed from the last one that runs backwards, until nothing is added to the residual
    stream any more; those that need not be zero are then restored.

    Args:
        stack: the stack.
        layer: index of the layer.
        sublayer: name of the sublayer.

    Returns:
        The names; empty if no parameters do this, as in a layer that normalises the sum.
    """
    ids = 3 + torch.arange(TOKENS, device=stack.device)[None]
    context = stack.context(ids)
    run, call = stack.architecture[sublayer].run, context.calls[layer]
    ran: list[str] = []
    original: Any = stack.layers[layer]
    hooks = [
        module.register_forward_hook(lambda _, __, ___, path=path: ran.append(path))
        for path, module in original.named_modules()
        if path and next(module.parameters(recurse=False), None) is not None
    ]
    run(original, context.h, call)
    for hook in hooks:
        hook.remove()
    order = list(dict.fromkeys(reversed(ran)))

    def silent(paths: Sequence[str]) -> bool:
        return torch.equal(join(run(_zeroed(original, paths), context.h, call)), context.h)

    chosen = next((order[:count] for count in range(1, len(order) + 1) if silent(order[:count])), None)
    if chosen is None:
        return frozenset()
    for path in tuple(chosen):
        fewer = [each for each in chosen if each != path]
        chosen = fewer if silent(fewer) else chosen
    return frozenset(f"{path}.{name}" for path in chosen for name, _ in _own(original.get_submodule(path)))


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters(recurse=False))


def _zeroed(layer: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Return a copy of a layer in which these modules have zero parameters."""
    zeroed: nn.Module = share(layer)
    for path in paths:
        module = zeroed.get_submodule(path)
        for name, parameter in _own(module):
            setattr(module, name, nn.Parameter(torch.zeros_like(parameter), requires_grad=False))
    return zeroed
