"""The sublayers of models with several stacks: encoders, decoders that read them, and vision towers.

As in :mod:`lamella.stack.sublayers`, those of a layer, one after the other, are equal to the layer's own ``forward`` to
the bit. A decoder that reads an encoder has a ``cross`` between ``attn`` and ``mlp``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from lamella.stack.sublayers import own_keys, without

ENCODED = ("encoder_hidden_states", "encoder_attention_mask", "encoder_decoder_position_bias")  # what cross alone reads


def _crossed(call: dict[str, Any]) -> dict[str, Any]:
    """What a cross-attention is called with: the encoder's states and mask, in place of the decoder's."""
    rest = without(call, *ENCODED, "attention_mask", "position_bias", "use_cache")
    return {
        "key_value_states": call["encoder_hidden_states"],
        "attention_mask": call.get("encoder_attention_mask"),
    } | rest


def _clamped(h: Tensor) -> Tensor:
    """Half-precision streams are kept finite, as some models do between layers."""
    if h.dtype != torch.float16:
        return h
    most = torch.finfo(h.dtype).max - 1000
    return torch.clamp(h, min=-most, max=most)


# CLIP's vision tower: pre-norm, bidirectional.
def clip_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.self_attn(hidden_states=layer.layer_norm1(h), **call)
    return h + out


def clip_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return h + layer.mlp(layer.layer_norm2(h))


# DINOv2: the same, and a vector scales what is added to the stream (LayerScale).
def dino_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.attention(layer.norm1(h), **call)
    return layer.drop_path(layer.layer_scale1(out)) + h


def dino_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(h)))) + h


# Qwen2-VL's vision tower: all patches of all images in one row [patches, hidden].
def qwen2_vl_vision_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return h + layer.attn(layer.norm1(h), **call)


def qwen2_vl_vision_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return h + layer.mlp(layer.norm2(h))


# BART: norms after the addition.
def bart_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.self_attn(h, **without(call, *ENCODED, "use_cache"))
    return layer.self_attn_layer_norm(h + dropout(out, p=layer.dropout, training=layer.training))


def bart_cross(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.encoder_attn(h, **_crossed(call))
    return layer.encoder_attn_layer_norm(h + dropout(out, p=layer.dropout, training=layer.training))


def bart_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return layer.final_layer_norm(h + _feed_forward(layer, h))


def bart_encoder_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    h = bart_mlp(layer, h, call)
    finite = h.dtype != torch.float16 or bool(torch.isfinite(h).all())
    return h if finite else _clamped(h)


# Whisper: the same with norms before.
def whisper_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.self_attn(layer.self_attn_layer_norm(h), **without(call, *ENCODED, "use_cache"))
    return h + dropout(out, p=layer.dropout, training=layer.training)


def whisper_cross(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    out, _ = layer.encoder_attn(layer.encoder_attn_layer_norm(h), **_crossed(call))
    return h + dropout(out, p=layer.dropout, training=layer.training)


def whisper_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return h + _feed_forward(layer, layer.final_layer_norm(h))


def whisper_encoder_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return _clamped(whisper_mlp(layer, h, call))


def _feed_forward(layer: Any, h: Tensor) -> Tensor:
    h = dropout(layer.activation_fn(layer.fc1(h)), p=layer.activation_dropout, training=layer.training)
    return dropout(layer.fc2(h), p=layer.dropout, training=layer.training)


# T5: norms inside the parts of a layer; layer 0 makes the position bias that all layers add to their scores.
def t5_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return _t5_clamped(layer.layer[0](h, **without(call, *ENCODED))[0])


def t5_cross(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    call = _crossed(call) | {"position_bias": call.get("encoder_decoder_position_bias")}
    return _t5_clamped(layer.layer[1](h, **call)[0])


def t5_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    return _t5_clamped(layer.layer[-1](h))


def _t5_clamped(h: Tensor) -> Tensor:
    if h.dtype != torch.float16:
        return h
    largest = torch.finfo(h.dtype).max
    most = torch.where(torch.isinf(h).any(), largest - 1000, largest)
    return torch.clamp(h, min=-most, max=most)


def t5_call(layer: Any, h: Tensor, call: dict[str, Any]) -> dict[str, Any]:
    """A layer's call with the position bias, which layer 0 makes whether or not its attention runs."""
    attention, cache = layer.layer[0].SelfAttention, call.get("cache")
    if call.get("position_bias") is not None or not attention.has_relative_attention_bias:
        return call
    past = 0 if cache is None else own_keys(cache).get_seq_length(attention.layer_idx)
    bias = attention.compute_bias(h.shape[1], past + h.shape[1], device=h.device, past_seen_tokens=past)
    return call | {"position_bias": bias}


def t5_result(h: Tensor, call: dict[str, Any]) -> tuple[Tensor, Any, Any]:
    """What a layer returns: the stream, and the two biases for the next one."""
    return h, call.get("position_bias"), call.get("encoder_decoder_position_bias")


# Layers that cannot leave a plain checkpoint, with the reason.
def t5_irremovable(config: Any, layers: int) -> dict[int, str]:
    return {0: "makes the position bias of all layers"}


def llava_irremovable(config: Any, layers: int) -> dict[int, str]:
    """Layers by which the config counts where the language model reads: those behind, or before, that place."""
    places = config.vision_feature_layer
    found: set[int] = set()
    for place in [places] if isinstance(places, int) else places:
        found |= set(range(place) if place >= 0 else range(layers + 1 + place, layers))
    return dict.fromkeys(sorted(found), "is counted by the config to find what the language model reads")


# Readouts: from the final, normed states to what the model predicts.
def class_token(model: Any, normed: Tensor, head: Any) -> Tensor:
    return head(normed[..., 0, :])


def t5_logits(model: Any, normed: Tensor, head: Any) -> Tensor:
    scales = getattr(model.config, "scale_decoder_outputs", False)  # as mT5 does not
    return head(normed * model.config.d_model**-0.5 if scales else normed)


def bart_logits(model: Any, normed: Tensor, head: Any) -> Tensor:
    return head(normed) + model.final_logits_bias


def llava_features(model: Any, normed: Tensor, head: Any) -> Tensor:
    """What LLaVA's projector makes of the stream before the layer that its config names, for the language model."""
    return head(normed[:, 1:] if model.config.vision_feature_select_strategy == "default" else normed)
