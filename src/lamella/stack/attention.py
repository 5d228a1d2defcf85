"""What an attention reads, and with what weights: fused kernels do not hand them out, and the eager one is slow."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import ArchitectureError
from lamella.stack.entry import Sublayer
from lamella.stack.sharing import replace_forward
from lamella.stack.stack import Stack
from lamella.stack.sublayers import Parallel


def attend_with_weights(
    sublayer: Sublayer, layer: nn.Module, h: Tensor | Parallel, call: dict[str, Any], causal: bool
) -> tuple[Tensor | Parallel, Tensor]:
    """An attention and its probabilities.

    Args:
        sublayer: the attention.
        layer: the layer it belongs to; it is not changed.
        h: the stream before it [batch, time, hidden].
        call: what the model passes to the layer.
        causal: whether tokens see those before them alone, where the call has no mask that says so.

    Returns:
        The stream after it, and how much each token attends to each one [batch, heads, time, stored].

    Raises:
        ArchitectureError: where no module of the sublayer hands its weights out.
    """
    weights: list[Tensor] = []

    def note(module: Any, states: Tensor, given: dict[str, Any]) -> Any:
        out = type(module).forward(module, states, **given)
        weights.extend(each for each in out[1:] if isinstance(each, Tensor) and each.ndim == 4)
        return out

    def attend(states: Tensor, **given: Any) -> Tensor:  # of a layer that is its own attention
        states, found = eager.weighed(states, **given)
        weights.append(found)
        return states

    eager: Any = copy.copy(layer)
    eager._modules = dict(layer._modules)
    if hasattr(layer, "weighed"):
        eager.config = _eager(eager.config)
        eager.__dict__["attend"] = attend
    for name in sublayer.modules:
        module: Any = layer.get_submodule(name)
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module = copy.copy(module)
            module.config = _eager(module.config)
            replace_forward(module, note)
            eager._modules[name] = module
    out = sublayer.run(eager, h, call | {"attention_mask": _added(call.get("attention_mask"), h, causal)})
    if len(weights) != 1:
        raise ArchitectureError(f"the attention of a {type(layer).__name__} hands no weights out")
    return out, weights[0]


def _eager(config: Any) -> Any:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    return config


def _added(mask: Tensor | None, h: Tensor | Parallel, causal: bool) -> Tensor | None:
    """A mask as the eager attention reads it: added to scores [batch or 1, 1, time, stored]."""
    stream = h.h if isinstance(h, Parallel) else h
    least = max(torch.finfo(stream.dtype).min, torch.finfo(torch.float32).min)  # the eager softmax is in float32
    if mask is None:
        time = stream.shape[1]
        if not causal or time == 1:
            return None
        return stream.new_full((time, time), least).triu(1)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return stream.new_zeros(mask.shape).masked_fill(~mask, least)


@torch.no_grad()
def norm_before(stack: Stack, index: int, sublayer: str = "attn") -> str:
    """The module of a layer that makes, of the stream, what a sublayer reads: found by running it.

    Raises:
        ArchitectureError: where it reads the stream as it is, as in post-norm layers.
    """
    context, layer = stack.context(torch.full((1, 2), 3, device=stack.device)), stack.layers[index]
    stream = stack.run(context.h, index, (index, sublayer), context)
    h = stream.h if isinstance(stream, Parallel) else stream
    read: list[str] = []

    def note(name: str) -> Any:
        def ends(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if args and args[0] is h and isinstance(out, Tensor) and out.shape == h.shape:
                read.append(name)

        return ends

    hooks = [module.register_forward_hook(note(name)) for name, module in layer.named_children()]
    try:
        stack.architecture[sublayer].run(layer, stream, context.calls[index])
    finally:
        for hook in hooks:
            hook.remove()
    if not read:
        raise ArchitectureError(f"the {sublayer} of layers.{index} of {stack.name} reads the stream without a norm")
    return read[0]
