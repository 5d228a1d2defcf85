"""The attention probabilities of a sublayer, which fused kernels do not return, and the norm before it."""

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
    """Run an attention sublayer and return its probabilities as well.

    Args:
        sublayer: the attention.
        layer: the layer it belongs to; it is not changed.
        h: residual stream before the sublayer [batch, time, hidden].
        call: the keyword arguments that the model passes to the layer.
        causal: whether tokens attend to earlier tokens only, if the call has no mask.

    Returns:
        The residual stream after the sublayer, and the attention probabilities [batch, heads, time, stored].

    Raises:
        ArchitectureError: if no module of the sublayer returns its weights.
    """
    weights: list[Tensor] = []

    def note(module: Any, states: Tensor, given: dict[str, Any]) -> Any:
        out = type(module).forward(module, states, **given)
        weights.extend(each for each in out[1:] if isinstance(each, Tensor) and each.ndim == 4)
        return out

    def attend(states: Tensor, **given: Any) -> Tensor:  # for a layer that contains the attention itself
        states, found = eager.attend_with_probabilities(states, **given)
        weights.append(found)
        return states

    eager: Any = copy.copy(layer)
    eager._modules = dict(layer._modules)
    if hasattr(layer, "attend_with_probabilities"):
        eager.config = _eager(eager.config)
        eager.__dict__["attend"] = attend
    for name in sublayer.modules:
        module: Any = layer.get_submodule(name)
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module = copy.copy(module)
            module.config = _eager(module.config)
            replace_forward(module, note)
            eager._modules[name] = module
    out = sublayer.run(eager, h, call | {"attention_mask": _additive(call.get("attention_mask"), h, causal)})
    if len(weights) != 1:
        raise ArchitectureError(f"the attention of a {type(layer).__name__} does not return its weights")
    return out, weights[0]


def _eager(config: Any) -> Any:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    return config


def _additive(mask: Tensor | None, h: Tensor | Parallel, causal: bool) -> Tensor | None:
    """Return a mask in the form of eager attention, which adds it to the scores [batch or 1, 1, time, stored]."""
    hidden = h.h if isinstance(h, Parallel) else h
    least = max(torch.finfo(hidden.dtype).min, torch.finfo(torch.float32).min)  # the eager softmax is in float32
    if mask is None:
        time = hidden.shape[1]
        if not causal or time == 1:
            return None
        return hidden.new_full((time, time), least).triu(1)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return hidden.new_zeros(mask.shape).masked_fill(~mask, least)


@torch.no_grad()
def norm_before(stack: Stack, index: int, sublayer: str = "attn") -> str:
    """Return the module of a layer that normalises the input of a sublayer, found by running the sublayer.

    Args:
        stack: the stack.
        index: index of the layer.
        sublayer: name of the sublayer.

    Raises:
        ArchitectureError: if the sublayer reads the residual stream directly, as in post-norm layers.
    """
    context, layer = stack.context(torch.full((1, 2), 3, device=stack.device)), stack.layers[index]
    hidden = stack.run(context.h, index, (index, sublayer), context)
    h = hidden.h if isinstance(hidden, Parallel) else hidden
    norms: list[str] = []

    def note(name: str) -> Any:
        def ends(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if args and args[0] is h and isinstance(out, Tensor) and out.shape == h.shape:
                norms.append(name)

        return ends

    hooks = [module.register_forward_hook(note(name)) for name, module in layer.named_children()]
    try:
        stack.architecture[sublayer].run(layer, hidden, context.calls[index])
    finally:
        for hook in hooks:
            hook.remove()
    if not norms:
        raise ArchitectureError(
            f"the {sublayer} of layers.{index} of {stack.name} reads the residual stream without a norm"
        )
    return norms[0]
