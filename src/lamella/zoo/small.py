"""Small models of any causal type of transformers: its real class with a few thousand random weights.

:mod:`lamella.zoo.nano` has models with hand-picked sizes. Here the sizes in a config's defaults are reduced by their
names, so a type needs its own entry only if its sizes must satisfy constraints that their names do not imply.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lamella.errors import ArchitectureError
from lamella.zoo.nano import randomise

LAYERS = 4
LARGEST = 10_000_000  # weights
SMALL: dict[str, Any] = {  # sizes by their names in configs
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "hidden_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "lru_width", "word_embedding_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_hidden_size", "dense_intermediate_size", "dim_ff"), 64),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels", "dim_head", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_expert_groups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "mlp_layer_start_index"), 1),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "index_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("index_n_heads", "num_codebooks"), 2),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "index_topk", "attention_window_size"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("hidden_size_per_layer_input", "altup_num_inputs"), 4),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_chunk"), 16),
    "query_pre_attn_scalar": 8,
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "block_types")

_HYBRID = ["linear_attention", "full_attention"] * 2
_HEAD = {"head_dim": 8}
_DECODER = {"is_decoder": True}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
AGREE: dict[str, dict[str, Any]] = {  # constraints that names in a config do not imply
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), _DECODER),
    **dict.fromkeys(("ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm"), _DECODER),
    **dict.fromkeys(("roformer", "xlm-roberta", "xlm-roberta-xl"), _DECODER),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEAD),
    "nemotron": {**_HEAD, "num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "bailing_hybrid": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    "roc_bert": {**_DECODER, "enable_shape": False, "enable_pronunciation": False, "pronunciation_vocab_size": 128,
                 "shape_vocab_size": 128, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "xmod": {**_DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": _DECODER,
    "dots3_note_text": {"num_key_value_heads": 4},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "inkling2_text": {"unpadded_vocab_size": 120, "swa_head_dim": 8, "swa_num_attention_heads": 4,
                      "swa_num_key_value_heads": 2, "n_layers_per_attn_res_block": 2, "rel_extent": 16},
    "inkling2_loop_text": {"unpadded_vocab_size": 120, "swa_head_dim": 8, "swa_num_attention_heads": 4,
                           "swa_num_key_value_heads": 2, "n_layers_per_attn_res_block": 2, "rel_extent": 16,
                           "loop_layer_index_start": 2, "loop_layer_index_end": 4, "loop_num_passes": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": _HYBRID},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    **{name: {"text_config": {"rope_parameters": _SECTIONS}}
       for name in ("qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl")},
}  # fmt: skip
LATENT = "kv_lora_rank"  # attentions with as many key-value heads as query heads


def causal_types() -> list[str]:
    """Return every model type for which transformers has a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_types() -> list[str]:
    """Return every model type for which transformers has a model that reads images and writes text."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def small_config(model_type: str) -> Any:
    """Return the config of a type with small sizes."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_settings(kind, AGREE.get(model_type, {})))


def _settings(kind: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Return the values that differ from the defaults of a config, including those of its sub-configs."""
    defaults = kind().to_dict()
    settings: dict[str, Any] = {name: SMALL[name] for name, value in defaults.items()
                                if name in SMALL and value is not None}  # fmt: skip
    settings |= {name: value for name, value in TOKENS.items() if name in defaults}
    if defaults.get(LATENT) is not None and defaults.get("num_key_value_heads") is not None:
        settings["num_key_value_heads"] = SMALL["num_attention_heads"]
    for name in PER_LAYER:
        if isinstance(defaults.get(name), list) and name in defaults:
            settings[name] = _sample(defaults[name])
    for name, part in (kind.sub_configs or {}).items():
        if isinstance(defaults.get(name), dict):
            part = CONFIG_MAPPING[defaults[name]["model_type"]] if part is transformers.AutoConfig else part
            settings[name] = _settings(part, own.get(name, {})) | {"model_type": part.model_type}
    return settings | {name: value for name, value in own.items() if not name.endswith("_config")}


def _sample(values: list[Any]) -> list[Any]:
    """Return as many entries as there are layers, with every kind among them, in order of first appearance."""
    kinds = list(dict.fromkeys(values))[:LAYERS]
    return (kinds * LAYERS)[:LAYERS]


def small(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Return a small model of a causal type in eval mode, fp32; the same seed gives the same weights.

    For a type with images whose causal class is that of its text model, only the text model.

    Args:
        model_type: the type in transformers, such as ``llama``.
        seed: random seed of the weights.

    Raises:
        ArchitectureError: if transformers has no causal language model of this type, or it cannot be reduced.
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ArchitectureError(f"transformers has no causal language model of the type '{model_type}'")
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config = small_config(model_type)
    return _made(
        model_class, config if isinstance(config, model_class.config_class) else config.get_text_config(), seed
    )


def small_with_images(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Return a small model of a type that takes images and text, as :func:`small` does for causal types.

    Args:
        model_type: the type in transformers, such as ``llava``.
        seed: random seed of the weights.

    Raises:
        ArchitectureError: if transformers has no such type, or it cannot be reduced.
    """
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ArchitectureError(f"transformers has no model of images and text of the type '{model_type}'")
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    return _made(model_class, small_config(model_type), seed)


def _made(model_class: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(each.numel() for each in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ArchitectureError(
            f"the config of {config.model_type} has sizes unknown to zoo/small.py: {size} parameters"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config).eval()
    randomise(model, seed)
    return model
