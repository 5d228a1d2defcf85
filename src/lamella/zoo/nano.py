"""Nano models: the real transformers classes with 4 layers and random weights, one for every trait of the table.

Nothing in them is degenerate: biases and norms are random too, so a sublayer that forgets one gives other logits.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from lamella.errors import ArchitectureError

_STREAM = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_TEXT = {**_STREAM, "vocab_size": 128, "max_position_embeddings": 256}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_TEXT, **_TOKENS, "intermediate_size": 64, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_NEOX = {**_TEXT, **_TOKENS, "intermediate_size": 64}
_OPT = {**_TEXT, **_TOKENS, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}

NANO: dict[str, tuple[str, dict[str, Any]]] = {  # name: (model class, what differs from the config's defaults)
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", {**_LLAMA, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8, "attention_bias": True}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            **_LLAMA,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 128, **_TOKENS},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": True}),
    "gpt_neox_serial": ("GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}),
    "opt": ("OPTForCausalLM", {**_OPT, "do_layer_norm_before": True}),
    "opt_post_norm": ("OPTForCausalLM", {**_OPT, "do_layer_norm_before": False}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_LLAMA, **_EXPERTS, "head_dim": 8, "moe_intermediate_size": 32}),
    "olmoe": ("OlmoeForCausalLM", {**_LLAMA, **_EXPERTS}),
    "vit": (
        "ViTForImageClassification",
        {**_STREAM, "intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 10},
    ),
}


def nano(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A nano model in eval mode, fp32; the same seed gives the same weights.

    Args:
        model_type: a key of :data:`NANO`.
        seed: seed of the weights.
        **overrides: config fields that differ from the table, such as ``num_hidden_layers=6``.

    Raises:
        ArchitectureError: when the table has no such model, or its config no such field.
    """
    if model_type not in NANO:
        raise ArchitectureError(f"no nano model '{model_type}'; there are: {', '.join(NANO)}")
    class_name, settings = NANO[model_type]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**settings)
    for field, value in overrides.items():
        if not hasattr(config, field):
            raise ArchitectureError(f"the config of {class_name} has no field '{field}'")
        settings = {**settings, field: value}
    model = model_class(model_class.config_class(**settings)).eval()
    _randomise(model, seed)
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:  # biases around 0, norm weights around their own identity (1, for Gemma 0)
            parameter.add_(noise)
        else:  # 0.2 * sqrt(32) is about 1, so the stream keeps its scale
            parameter.copy_(noise)
