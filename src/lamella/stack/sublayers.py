"""The sublayers of a layer, for every architecture of the table.

A *sublayer* is the attention or the MLP part of a layer together with its norm(s) and its residual addition. For each
there is a function such as ``llama_attn(layer, h, call)``; those of a layer, one after the other, are equal to the
layer's own ``forward`` to the bit. ``h`` is the residual stream [batch, time, hidden]; ``call`` holds the keyword
arguments that the model passes to the layer beside the stream.

Inside a *parallel* layer the stream is a :class:`Parallel`, since its MLP reads what the attention read.

This module stands alone (torch and transformers only): native exports carry it with them, word for word.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache


class Parallel(NamedTuple):
    """The stream inside a parallel layer: the layer's input, and what attention adds to it."""

    h: Tensor
    attn: Tensor


def join(h: Tensor | Parallel) -> Tensor:
    """The stream after a layer whose MLP did not run."""
    return h.attn + h.h if isinstance(h, Parallel) else h


@dataclass(frozen=True)
class Returned:
    """What a layer returns that hands on a tuple: the stream, and nothing in the place of ``others`` more."""

    others: int

    def __call__(self, h: Tensor, call: dict[str, Any]) -> tuple[Any, ...]:
        return (h, *[None] * self.others)


@dataclass(frozen=True)
class ByKind:
    """A sublayer of layers of several classes: the function of each, by the class's name.

    Attributes:
        name: of the sublayer.
        functions: ``function(layer, h, call)``.
    """

    name: str
    functions: Mapping[str, Callable[..., Any]]

    def __call__(self, layer: nn.Module, h: Any, call: dict[str, Any]) -> Any:
        return self.functions[type(layer).__name__](layer, h, call)


def without(call: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in names}


# Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, OLMoE: serial, pre-norm.
def llama_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **call)
    return h + out


def llama_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return h + layer.mlp(layer.post_attention_layernorm(h))


# Gemma 3: sandwich norms, before and after each sublayer.
def gemma3_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.self_attn(hidden_states=layer.input_layernorm(h), **call)
    return h + layer.post_attention_layernorm(out)


def gemma3_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out = layer.mlp(layer.pre_feedforward_layernorm(h))
    return h + layer.post_feedforward_layernorm(out)


# GPT-2: dropout lives inside the two modules.
def gpt2_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.attn(layer.ln_1(h), **without(call, "encoder_hidden_states", "encoder_attention_mask"))
    return out + h


def gpt2_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return h + layer.mlp(layer.ln_2(h))


# GPT-NeoX: parallel or serial residual, by its config.
def gpt_neox_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor | Parallel:
    out, _ = layer.attention(layer.input_layernorm(h), **call)
    out = layer.post_attention_dropout(out)
    return Parallel(h, out) if layer.use_parallel_residual else out + h


def gpt_neox_mlp(layer: Any, h: Tensor | Parallel, call: dict[str, Any]) -> Tensor:
    read = h.h if isinstance(h, Parallel) else h
    out = layer.post_mlp_dropout(layer.mlp(layer.post_attention_layernorm(read)))
    return out + h.attn + h.h if isinstance(h, Parallel) else out + h


# OPT: no MLP module, norms before or after by its config.
def opt_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    read = layer.self_attn_layer_norm(h) if layer.do_layer_norm_before else h
    out, _ = layer.self_attn(hidden_states=read, **without(call, "use_cache"))
    h = h + nn.functional.dropout(out, p=layer.dropout, training=layer.training)
    return h if layer.do_layer_norm_before else layer.self_attn_layer_norm(h)


def opt_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    rows = h.reshape(-1, h.size(-1))  # as the layer does: some kernels differ in the last bit between 2 and 3 axes
    read = layer.final_layer_norm(rows) if layer.do_layer_norm_before else rows
    out = layer.fc2(layer.activation_fn(layer.fc1(read)))
    h = (rows + nn.functional.dropout(out, p=layer.dropout, training=layer.training)).view(h.shape)
    return h if layer.do_layer_norm_before else layer.final_layer_norm(h)


# LLaDA: the maps of both sublayers lie in the layer itself; bidirectional.
def llada_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return h + layer.attend(layer.attn_norm(h), **call)


def llada_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return h + layer.feed_forward(layer.ff_norm(h))


# ViT: bidirectional, no cache.
def vit_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.attention(layer.layernorm_before(h), **call)
    return layer.dropout(out) + h


def vit_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return layer.dropout(layer.mlp(layer.layernorm_after(h))) + h


class Placeholder(CacheLayerMixin):
    """The cache slot of an attention that does not run: it stores no keys, only how many tokens have passed.

    Models read the past length from the slots, so one whose attention is gone must still count, or positions and
    masks of a continuation are wrong.

    Args:
        window: the sliding window, in tokens, of the slot it stands for; None for full attention.
        length: tokens that have passed already.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, window: int | None = None, length: int = 0) -> None:
        super().__init__()
        self.window = window
        self.length = length
        self.is_sliding = window is not None

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self.length if self.window is None else min(self.length, self.window - 1)
        return kept + query_length, self.length - kept

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)

    def reset(self) -> None:
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise RuntimeError(
            "this cache was filled by a plan that does not run this attention; start from an empty cache"
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "this cache was filled by a plan that does not run this attention; start from an empty cache"
        )

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...


def counts_tokens(cache: Any, slot: int) -> bool:
    """Whether a slot is one of a static cache from which models read how many tokens have passed.

    It is the first one of its kind, sliding or not. Its other slots may stay empty where an attention is skipped.
    """
    return isinstance(cache, StaticCache) and slot == cache.is_sliding.index(cache.is_sliding[slot])


def own_keys(cache: Any) -> Any:
    """The part of a cache that holds the keys of a stack's own attentions, beside those of an encoder."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def hold(cache: Any, slot: int, tokens: int) -> None:
    """Count ``tokens`` in a slot whose attention is skipped, putting a :class:`Placeholder` there first.

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
    if not isinstance(layer, CacheLayerMixin):  # of a linear attention or a convolution, which keep no keys
        if hasattr(layer, "has_previous_state"):  # by which models ask whether this is a continuation
            layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
        return
    if not isinstance(layer, Placeholder):
        if layer.get_seq_length() > 0:
            raise RuntimeError("this cache was filled without this plan; start from an empty cache")
        layer = cache.layers[slot] = Placeholder(getattr(layer, "sliding_window", None))
    layer.advance(tokens)


@dataclass(frozen=True)
class PartialLayer:
    """The forward of a layer of which some sublayers, or all, do not run.

    Attributes:
        sublayers: by name and in their order, the function of each, or None for one that does not run.
        slot: the cache slot of the layer.
        cache: the keyword under which the layer receives the cache.
        complete_call: adds what is missing to the keyword arguments that a layer receives; None if nothing is.
        result: turns hidden states into what a layer returns, for layers that return more than hidden states.
    """

    sublayers: Mapping[str, Callable[..., Any] | None]
    slot: int
    cache: str
    complete_call: Callable[..., dict[str, Any]] | None = None
    result: Callable[..., Any] | None = None

    def __call__(self, layer: nn.Module, h: Tensor, call: dict[str, Any]) -> Any:
        call = call if self.complete_call is None else self.complete_call(layer, h, call)
        cache = call.get(self.cache)
        if self.sublayers["attn"] is None and cache is not None:
            hold(cache, self.slot, tokens=h.shape[1])
        stream: Tensor | Parallel = h
        for run in self.sublayers.values():
            if run is not None:
                stream = run(layer, stream, call)
        return join(stream) if self.result is None else self.result(join(stream), call)
