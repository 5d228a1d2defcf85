"""Nano models: the real transformers classes with 4 layers and random weights, one for each feature of the table.

No parameters are trivial: biases and norms are random too, so a sublayer that omits one changes the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from lamella.errors import ArchitectureError
from lamella.stack import own_class

_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_TEXT = {**_SIZES, "vocab_size": 128, "max_position_embeddings": 256}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_TEXT, **_TOKENS, "intermediate_size": 64, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_NEOX = {**_TEXT, **_TOKENS, "intermediate_size": 64}
_OPT = {**_TEXT, **_TOKENS, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}

NANO: dict[str, tuple[str, dict[str, Any]]] = {  # name: (model class, differences from the config's defaults)
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", {**_LLAMA, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8, "attention_bias": True}),
    "smollm3": ("SmolLM3ForCausalLM", _LLAMA),
    "seed_oss": ("SeedOssForCausalLM", {**_LLAMA, "head_dim": 8, "attention_bias": True, "attention_out_bias": True}),
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
        {**_SIZES, "intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 10},
    ),
}


_LLADA = {"d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 64, "vocab_size": 128}
NANO_DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {  # the same for Lamella's own classes: masked diffusion
    "llada": (
        "llada",
        {**_LLADA, **_TOKENS, "max_sequence_length": 256, "mask_token_id": 127, "include_qkv_bias": True},
    ),
    "dream": ("Dream", {**_LLAMA, "mask_token_id": 127}),
}
_VISION = {**_SIZES, "model_type": "clip_vision_model", "intermediate_size": 64, "image_size": 16, "patch_size": 4}
_PATCHES = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MARKS = {"image_token_id": 127, "video_token_id": 126, "vision_start_token_id": 125, "vision_end_token_id": 124}
_T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 4,  # transformers 5.24 generates with a cache only if the decoder is not deeper than the encoder
    "num_decoder_layers": 3,
}
_LAYERS = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_BART = {**_LAYERS, **_TOKENS, "vocab_size": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_SEQ2SEQ = {**_BART, "max_position_embeddings": 64, "decoder_start_token_id": 2}
_PATCHED = {"image_size": 16, "patch_size": 4, "image_token_id": 127}
_DAVIT = {
    "depths": [1, 1],
    "patch_size": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [3, 1],
    "patch_prenorm": [False, True],
    "embed_dim": [16, 32],
    "num_heads": [2, 4],
    "num_groups": [2, 4],
    "window_size": 4,
    "projection_dim": 32,
    "max_position_embeddings": 8,
}
_RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
_SOUND = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}

NANO_ASSEMBLIES: dict[str, tuple[str, dict[str, Any]]] = {  # the same for models with several stacks
    "llava": (
        "LlavaForConditionalGeneration",
        {"vision_config": _VISION, "text_config": {**_LLAMA, "model_type": "llama"}, "image_token_id": 127},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": {**_PATCHES, "spatial_merge_size": 2, "temporal_patch_size": 1},
            "text_config": {**_LLAMA, "rope_parameters": _MROPE},
            **_MARKS,
        },
    ),
    "t5": ("T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", _SEQ2SEQ),
    "whisper": ("WhisperForConditionalGeneration", {**_BART, **_SOUND, "decoder_start_token_id": 1}),
    "florence2": (
        "Florence2ForConditionalGeneration",
        {"vision_config": _DAVIT, "text_config": {**_SEQ2SEQ, "model_type": "bart"}, "image_token_id": 127},
    ),
    "patch_bart": ("patch_seq2seq", {**_PATCHED, "text_config": {**_SEQ2SEQ, "model_type": "bart"}}),
    "patch_mbart": ("patch_seq2seq", {**_PATCHED, "text_config": {**_SEQ2SEQ, "model_type": "mbart"}}),
    "patch_t5": (
        "patch_seq2seq",
        {
            **_PATCHED,
            "text_config": {**_T5, **_TOKENS, "model_type": "t5", "decoder_start_token_id": 0},
            "tie_word_embeddings": False,
        },
    ),
    "ofa": (
        "ofa_seq2seq",
        {
            **_SEQ2SEQ,
            "vision_config": _RESNET,
            "image_size": 16,
            "image_token_index": 127,
            "token_bucket_size": 8,
            "image_bucket_size": 4,
        },
    ),
}


IMAGE_POSITIONS = {"florence2": 5, "patch_bart": 16, "patch_mbart": 16, "patch_t5": 16, "ofa": 4}  # positions per image


def nano(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a nano model in eval mode, fp32; the same seed gives the same weights.

    Args:
        model_type: a key of :data:`NANO`, :data:`NANO_DIFFUSION` or :data:`NANO_ASSEMBLIES`.
        seed: seed of the weights.
        **overrides: config fields that differ from the table, such as ``num_hidden_layers=6``.

    Raises:
        ArchitectureError: if the table has no such model, or its config no such field.
    """
    known = NANO | NANO_DIFFUSION | NANO_ASSEMBLIES
    if model_type not in known:
        raise ArchitectureError(f"no nano model '{model_type}'; there are: {', '.join(known)}")
    kind, settings = known[model_type]
    model_class = own_class(kind) or getattr(transformers, kind)
    config = model_class.config_class(**settings)
    for field, value in overrides.items():
        if not hasattr(config, field):
            raise ArchitectureError(f"the config of {model_class.__name__} has no field '{field}'")
        settings = {**settings, field: value}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**settings)).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Overwrite all parameters with random values, in place.

    Args:
        model: the model.
        seed: random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:  # biases around 0, norm weights around their own identity (1, for Gemma 0)
            parameter.add_(noise)
        else:  # 0.2 * sqrt(32) is about 1, so hidden states keep their scale
            parameter.copy_(noise)


def nano_inputs(model_type: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return inputs of a nano model: two rows, the first one padded if the model supports it.

    Args:
        model_type: as for :func:`nano`.
        seed: of tokens, pixels and audio.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, 120, (2, length), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if model_type == "vit":
        return {"pixel_values": noise(2, 3, 16, 16)}
    if model_type == "whisper":
        return {"input_features": noise(2, 8, 32), "decoder_input_ids": ids(7)}
    if model_type == "llava":  # an image of 16 patches after two tokens
        tokens = ids(24)
        tokens[:, 2:18] = 127
        return {"input_ids": tokens, "pixel_values": noise(2, 3, 16, 16)}
    if model_type == "qwen2_vl":  # an image of 4 x 4 patches, of which 2 x 2 are merged into one position
        tokens = ids(14)
        tokens[:, 2], tokens[:, 3:7], tokens[:, 7] = 125, 127, 124
        image = {"pixel_values": noise(32, 48), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        return {"input_ids": tokens, "mm_token_type_ids": (tokens == 127).int(), **image}
    if model_type in IMAGE_POSITIONS:  # an image after one token, then text; encoders pad on the right
        count = IMAGE_POSITIONS[model_type]
        tokens, mask = ids(count + 7), torch.ones(2, count + 7, dtype=torch.long)
        tokens[:, 1 : count + 1], mask[0, count + 4 :] = 127, 0
        images = {"pixel_values": noise(2, 3, 16, 16), "decoder_input_ids": ids(7)}
        return {"input_ids": tokens, "attention_mask": mask, **images}
    tokens, mask = ids(9), torch.ones(2, 9, dtype=torch.long)
    if model_type in ("t5", "bart", "mbart"):
        mask[0, 6:] = 0  # encoders pad on the right
        return {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": ids(7)}
    mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}
