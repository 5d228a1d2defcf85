"""The sublayers of models with several stacks: encoders, decoders that read them, and vision towers.

As in :mod:`lamella.stack.sublayers`, those of a layer, applied in order, are bitwise equal to the layer's own
``forward``. A decoder that reads an encoder has a ``cross`` sublayer between ``attn`` and ``mlp``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from lamella.stack.sublayers import own_keys, without

ENCODED = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_decoder_position_bias",
)  # what only cross-attention reads


def _crossed(call: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a cross-attention: the encoder's states and mask instead of the decoder's."""
    rest = without(call, *ENCODED, "attention_mask", "position_bias", "use_cache")
    return {
        "key_value_states": call["encoder_hidden_states"],
        "attention_mask": call.get("encoder_attention_mask"),
    } | rest


def _clamped(h: Tensor) -> Tensor:
    """Clamp half-precision hidden states to finite values, as some models do between layers."""
    if h.dtype != torch.float16:
        return h
    limit = torch.finfo(h.dtype).max - 1000
    return torch.clamp(h, min=-limit, max=limit)


# CLIP's vision tower: pre-norm, bidirectional.
def clip_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a CLIP vision layer."""
    out, _ = layer.self_attn(hidden_states=layer.layer_norm1(h), **call)
    return h + out


def clip_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a CLIP vision layer."""
    return h + layer.mlp(layer.layer_norm2(h))


# BEiT: a ViT with relative positions, and vectors of the layer itself that scale what is added to the residual stream.
def beit_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a BEiT layer."""
    call, mask = dict(call), call.get("attention_mask")
    height, width = call.pop("resolution")
    interpolates = call.pop("interpolate_pos_encoding", False)
    if layer.relative_position_bias is not None:
        window = height // layer.patch_size, width // layer.patch_size
        bias = layer.relative_position_bias(window, interpolates, dim_size=h.shape[1])
        call["attention_mask"] = bias if mask is None else bias + mask
    out, _ = layer.attention(layer.layernorm_before(h), **call)
    return layer.drop_path(layer.lambda_1 * layer.dropout(out)) + h


def beit_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a BEiT layer."""
    return layer.drop_path(layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(h)))) + h


def beit_logits(model: Any, normed: Tensor, head: Any) -> Tensor:
    """Return the prediction from BEiT's pooled tokens."""
    return head(model.beit.pooler(normed))


# DINOv2: the same, with a vector that scales what is added to the residual stream (LayerScale).
def dino_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a DINOv2 layer."""
    out, _ = layer.attention(layer.norm1(h), **call)
    return layer.drop_path(layer.layer_scale1(out)) + h


def dino_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a DINOv2 layer."""
    return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(h)))) + h


# Qwen2-VL's vision tower: all patches of all images in one sequence [patches, hidden].
def qwen2_vl_vision_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a Qwen2-VL vision layer."""
    return h + layer.attn(layer.norm1(h), **call)


def qwen2_vl_vision_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a Qwen2-VL vision layer."""
    return h + layer.mlp(layer.norm2(h))


# BART: norms after the addition.
def bart_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a BART layer."""
    out, _ = layer.self_attn(h, **without(call, *ENCODED, "use_cache"))
    return layer.self_attn_layer_norm(h + dropout(out, p=layer.dropout, training=layer.training))


def bart_cross(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the cross-attention sublayer of a BART layer."""
    out, _ = layer.encoder_attn(h, **_crossed(call))
    return layer.encoder_attn_layer_norm(h + dropout(out, p=layer.dropout, training=layer.training))


def bart_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a BART layer."""
    return layer.final_layer_norm(h + _feed_forward(layer, h))


def bart_encoder_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a BART encoder layer."""
    h = bart_mlp(layer, h, call)
    finite = h.dtype != torch.float16 or bool(torch.isfinite(h).all())
    return h if finite else _clamped(h)


# Whisper: the same with norms before.
def whisper_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a Whisper layer."""
    out, _ = layer.self_attn(layer.self_attn_layer_norm(h), **without(call, *ENCODED, "use_cache"))
    return h + dropout(out, p=layer.dropout, training=layer.training)


def whisper_cross(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the cross-attention sublayer of a Whisper layer."""
    out, _ = layer.encoder_attn(layer.encoder_attn_layer_norm(h), **_crossed(call))
    return h + dropout(out, p=layer.dropout, training=layer.training)


def whisper_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a Whisper layer."""
    return h + _feed_forward(layer, layer.final_layer_norm(h))


def whisper_encoder_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a Whisper encoder layer."""
    return _clamped(whisper_mlp(layer, h, call))


def _feed_forward(layer: Any, h: Tensor) -> Tensor:
    """Return the output of the two linear layers of an MLP, with dropout."""
    h = dropout(layer.activation_fn(layer.fc1(h)), p=layer.activation_dropout, training=layer.training)
    return dropout(layer.fc2(h), p=layer.dropout, training=layer.training)


# OFA: norms before the sublayers and inside them, and biases of the scores.
def ofa_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of an OFA layer."""
    out, _ = layer.self_attn(layer.self_attn_layer_norm(h), **without(call, *ENCODED, "use_cache"))
    return h + dropout(layer.self_attn_mid_layer_norm(out), p=layer.dropout, training=layer.training)


def ofa_cross(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the cross-attention sublayer of an OFA layer."""
    call = _crossed(call) | {"position_bias": call["encoder_decoder_position_bias"]}
    out, _ = layer.cross_attn(layer.cross_attn_layer_norm(h), **call)
    return h + dropout(layer.cross_attn_mid_layer_norm(out), p=layer.dropout, training=layer.training)


def ofa_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of an OFA layer."""
    out = layer.activation_fn(layer.fc1(layer.final_layer_norm(h)))
    out = layer.ffn_layer_norm(dropout(out, p=layer.activation_dropout, training=layer.training))
    return h + dropout(layer.fc2(out), p=layer.dropout, training=layer.training)


# T5: norms inside the parts of a layer; layer 0 computes the position bias that all layers add to their scores.
def t5_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the attention sublayer of a T5 layer."""
    return _t5_clamped(layer.layer[0](h, **without(call, *ENCODED))[0])


def t5_cross(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the cross-attention sublayer of a T5 layer."""
    call = _crossed(call) | {"position_bias": call.get("encoder_decoder_position_bias")}
    return _t5_clamped(layer.layer[1](h, **call)[0])


def t5_mlp(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Run the MLP sublayer of a T5 layer."""
    return _t5_clamped(layer.layer[-1](h))


def _t5_clamped(h: Tensor) -> Tensor:
    """Clamp half-precision hidden states as T5 does."""
    if h.dtype != torch.float16:
        return h
    largest = torch.finfo(h.dtype).max
    limit = torch.where(torch.isinf(h).any(), largest - 1000, largest)
    return torch.clamp(h, min=-limit, max=limit)


def t5_call(layer: Any, h: Tensor, call: dict[str, Any]) -> dict[str, Any]:
    """Return a layer's keyword arguments with the position bias of layer 0, whether or not its attention runs."""
    attention, cache = layer.layer[0].SelfAttention, call.get("cache")
    if call.get("position_bias") is not None or not attention.has_relative_attention_bias:
        return call
    past = 0 if cache is None else own_keys(cache).get_seq_length(attention.layer_idx)
    bias = attention.compute_bias(h.shape[1], past + h.shape[1], device=h.device, past_seen_tokens=past)
    return call | {"position_bias": bias}


def t5_result(h: Tensor, call: dict[str, Any]) -> tuple[Tensor, Any, Any]:
    """Return what a T5 layer returns: the hidden states, and the two position biases for the next layer."""
    return h, call.get("position_bias"), call.get("encoder_decoder_position_bias")


# Layers that a plain checkpoint cannot do without, with the reason.
def t5_irremovable(config: Any, layers: int) -> dict[int, str]:
    """Return the layers that a plain T5 checkpoint cannot do without, with the reason."""
    return {0: "computes the position bias of all layers"}


def llava_irremovable(config: Any, layers: int) -> dict[int, str]:
    """Return the layers that the config counts to locate the states that the language model reads, with the reason."""
    selected = config.vision_feature_layer
    found: set[int] = set()
    for index in [selected] if isinstance(selected, int) else selected:
        found |= set(range(index) if index >= 0 else range(layers + 1 + index, layers))
    return dict.fromkeys(sorted(found), "is counted by the config to locate the states that the language model reads")


# Readouts: from the final, normalised states to the prediction.
def class_token(model: Any, normed: Tensor, head: Any) -> Tensor:
    """Return the prediction from the class token."""
    return head(normed[..., 0, :])


def t5_logits(model: Any, normed: Tensor, head: Any) -> Tensor:
    """Return the logits, for which T5 rescales the states if its embedding is tied."""
    scales = getattr(model.config, "scale_decoder_outputs", False)  # mT5 does not
    return head(normed * model.config.d_model**-0.5 if scales else normed)


def bart_logits(model: Any, normed: Tensor, head: Any) -> Tensor:
    """Return the logits with BART's bias."""
    return head(normed) + model.final_logits_bias


def llava_features(model: Any, normed: Tensor, head: Any) -> Tensor:
    """Return what LLaVA's projector computes for the language model from the states that its config selects."""
    return head(normed[:, 1:] if model.config.vision_feature_select_strategy == "default" else normed)
