"""The sublayers of a layer, for every architecture of the table.

A *sublayer* is the attention or the MLP part of a layer together with its norm(s) and its residual addition. Each one
has a function such as ``llama_attn(layer, h, call)``; those of a layer, applied in order, are bitwise equal to the
layer's own ``forward``. ``h`` is the residual stream [batch, time, hidden]; ``call`` holds the other keyword arguments
that the model passes to the layer.

Inside a *parallel* layer the hidden states are a :class:`Parallel`, since its MLP has the same input as its attention.

This module imports torch and transformers only: native exports include its source verbatim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache


class Parallel(NamedTuple):
    """The hidden states inside a parallel layer.

    Attributes:
        h: input of the layer [batch, time, hidden].
        attn: what its attention adds to the residual stream [batch, time, hidden].
    """

    h: Tensor
    attn: Tensor


def join(h: Tensor | Parallel) -> Tensor:
    """Return the residual stream after a layer whose MLP did not run."""
    return h.attn + h.h if isinstance(h, Parallel) else h


@dataclass(frozen=True)
class Returned:
    """Turns hidden states into the tuple that a layer returns.

    Attributes:
        others: number of other entries of the tuple, which are None.
    """

    others: int

    def __call__(self, h: Tensor, call: dict[str, Any]) -> tuple[Any, ...]:
        """Return the tuple."""
        return (h, *[None] * self.others)


@dataclass(frozen=True)
class ByKind:
    """A sublayer of layers of several classes, with one function per class.

    Attributes:
        name: name of the sublayer.
        functions: by class name, ``function(layer, h, call)``.
    """

    name: str
    functions: Mapping[str, Callable[..., Any]]

    def __call__(self, layer: nn.Module, h: Any, call: dict[str, Any]) -> Any:
        """Run the function of the layer's class."""
        return self.functions[type(layer).__name__](layer, h, call)


def without(call: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the keyword arguments without some of them."""
    return {name: value for name, value in call.items() if name not in names}


# Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, OLMoE: serial, pre-norm.
def llama_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a Llama layer."""
    out, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **call)
    return h + out


def llama_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a Llama layer."""
    return h + layer.mlp(layer.post_attention_layernorm(h))


# Gemma 3: sandwich norms, before and after each sublayer.
def gemma3_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a Gemma 3 layer."""
    out, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **call)
    return h + layer.post_attention_layernorm(out)


def gemma3_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a Gemma 3 layer."""
    out = layer.mlp(layer.pre_feedforward_layernorm(h))
    return h + layer.post_feedforward_layernorm(out)


# GPT-2: dropout is inside the two modules.
def gpt2_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a GPT-2 layer."""
    out, _ = layer.attn(layer.ln_1(h), **without(call, "encoder_hidden_states", "encoder_attention_mask"))
    return out + h


def gpt2_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a GPT-2 layer."""
    return h + layer.mlp(layer.ln_2(h))


# GPT-NeoX: parallel or serial residual, depending on its config.
def gpt_neox_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor | Parallel:
    """Run the attention sublayer of a GPT-NeoX layer."""
    out, _ = layer.attention(layer.input_layernorm(h), **call)
    out = layer.post_attention_dropout(out)
    return Parallel(h, out) if layer.use_parallel_residual else out + h


def gpt_neox_mlp(layer: Any, h: Tensor | Parallel, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a GPT-NeoX layer."""
    states = h.h if isinstance(h, Parallel) else h
    out = layer.post_mlp_dropout(layer.mlp(layer.post_attention_layernorm(states)))
    return out + h.attn + h.h if isinstance(h, Parallel) else out + h


# OPT: no MLP module; norms before or after the sublayers, depending on its config.
def opt_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of an OPT layer."""
    states = layer.self_attn_layer_norm(h) if layer.do_layer_norm_before else h
    out, _ = layer.self_attn(hidden_states=states, **without(call, "use_cache"))
    h = h + nn.functional.dropout(out, p=layer.dropout, training=layer.training)
    return h if layer.do_layer_norm_before else layer.self_attn_layer_norm(h)


def opt_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of an OPT layer."""
    rows = h.reshape(-1, h.size(-1))  # like the layer: some kernels differ in the last bit between 2 and 3 axes
    states = layer.final_layer_norm(rows) if layer.do_layer_norm_before else rows
    out = layer.fc2(layer.activation_fn(layer.fc1(states)))
    h = (rows + nn.functional.dropout(out, p=layer.dropout, training=layer.training)).view(h.shape)
    return h if layer.do_layer_norm_before else layer.final_layer_norm(h)


# LLaDA: the projections of both sublayers are in the layer itself; bidirectional.
def llada_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a LLaDA layer."""
    return h + layer.attend(layer.attn_norm(h), **call)


def llada_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a LLaDA layer."""
    return h + layer.feed_forward(layer.ff_norm(h))


# ViT: bidirectional, no cache.
def vit_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a ViT layer."""
    out, _ = layer.attention(layer.layernorm_before(h), **call)
    return layer.dropout(out) + h


def vit_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a ViT layer."""
    return layer.dropout(layer.mlp(layer.layernorm_after(h))) + h


class Placeholder(CacheLayerMixin):
    """The cache slot of an attention that does not run: it stores no keys, but counts the tokens that have passed.

    Models read the past length from the slots, so the slot of a removed attention must still count, or the positions
    and masks of a continuation are wrong.

    Args:
        window: sliding window of the slot that it replaces, in tokens; None for full attention.
        length: number of tokens that have passed already.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, window: int | None = None, length: int = 0) -> None:
        super().__init__()
        self.window = window
        self.length = length
        self.is_sliding = window is not None

    def advance(self, tokens: int) -> None:
        """Count further tokens."""
        self.length += tokens

    def get_seq_length(self) -> int:
        """Return the number of tokens that have passed."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of key columns and their offset for a mask of ``query_length`` tokens."""
        kept = self.length if self.window is None else min(self.length, self.window - 1)
        return kept + query_length, self.length - kept

    def get_max_length(self) -> int:
        """Return the sliding window, or -1 without one."""
        return -1 if self.window is None else self.window

    def crop(self, tokens_to_remove: int) -> None:
        """Count tokens back."""
        self.length -= abs(tokens_to_remove)

    def reset(self) -> None:
        """Start again at zero tokens."""
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise, because this slot takes no keys."""
        raise RuntimeError(
            "this cache was filled by a plan that does not run this attention; start from an empty cache"
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise, because this slot takes no keys."""
        raise RuntimeError(
            "this cache was filled by a plan that does not run this attention; start from an empty cache"
        )

    def offload(self) -> None:
        """Do nothing, because there are no keys."""
        ...

    def prefetch(self) -> None:
        """Do nothing, because there are no keys."""
        ...

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Do nothing, because there are no keys."""
        ...

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Do nothing, because there are no keys."""
        ...

    def batch_select_indices(self, indices: Tensor) -> None:
        """Do nothing, because there are no keys."""
        ...


def counts_tokens(cache: Any, slot: int) -> bool:
    """Return whether models read the number of past tokens from this slot of a static cache.

    It is the first slot of its kind, sliding or not. Other slots may stay empty if an attention is skipped.

    Args:
        cache: a key-value cache.
        slot: index of the slot.
    """
    return isinstance(cache, StaticCache) and slot == cache.is_sliding.index(cache.is_sliding[slot])


def own_keys(cache: Any) -> Any:
    """Return the part of a cache that holds a stack's own keys, without those of an encoder."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def hold(cache: Any, slot: int, tokens: int) -> None:
    """Count ``tokens`` in a slot whose attention is skipped, which first becomes a :class:`Placeholder`.

    Args:
        cache: a key-value cache.
        slot: index of the slot.
        tokens: number of tokens.

    Raises:
        TypeError: for a cache in which skipped attentions cannot be counted.
    """
    cache = own_keys(cache)
    if counts_tokens(cache, slot):
        raise TypeError(f"the removed attention of layer {slot} counts tokens in a static cache: use a dynamic one")
    if isinstance(cache, StaticCache):
        return
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else f"a {type(cache).__name__}"
        raise TypeError(f"a plan that removes attention runs with a dynamic cache, not with {kind}")
    while len(cache.layers) <= slot:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[slot]
    if not isinstance(layer, CacheLayerMixin):  # linear attentions and convolutions keep no keys
        if hasattr(layer, "has_previous_state"):  # models use this to detect a continuation
            layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
        return
    if not isinstance(layer, Placeholder):
        if layer.get_seq_length() > 0:
            raise RuntimeError("this cache was filled without this plan; start from an empty cache")
        layer = cache.layers[slot] = Placeholder(getattr(layer, "sliding_window", None))
    layer.advance(tokens)


@dataclass(frozen=True)
class PartialLayer:
    """The forward of a layer of which some or all sublayers do not run.

    Attributes:
        sublayers: by name and in order, the function of each sublayer, or None if it does not run.
        slot: cache slot of the layer.
        cache: keyword under which the layer receives the cache.
        complete_call: adds what is missing to the keyword arguments that a layer receives; None if nothing is.
        result: turns hidden states into what a layer returns, for layers that return more than hidden states.
    """

    sublayers: Mapping[str, Callable[..., Any] | None]
    slot: int
    cache: str
    complete_call: Callable[..., dict[str, Any]] | None = None
    result: Callable[..., Any] | None = None

    def __call__(self, layer: nn.Module, h: Tensor, call: dict[str, Any]) -> Any:
        """Run the remaining sublayers."""
        call = call if self.complete_call is None else self.complete_call(layer, h, call)
        cache = call.get(self.cache)
        if self.sublayers["attn"] is None and cache is not None:
            hold(cache, self.slot, tokens=h.shape[1])
        hidden: Tensor | Parallel = h
        for run in self.sublayers.values():
            if run is not None:
                hidden = run(layer, hidden, call)
        return join(hidden) if self.result is None else self.result(join(hidden), call)
