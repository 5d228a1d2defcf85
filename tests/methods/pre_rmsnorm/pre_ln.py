"""Nano models of every Pre-LN type that is known, in float64, with random affines."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from lamella.methods.pre_rmsnorm.checking import output
from lamella.methods.pre_rmsnorm.rewrite import Form
from lamella.plan import RewriteReference
from lamella.plan.rewriting import with_rewrite
from lamella.stack import Model, open_model
from lamella.zoo.nano import nano, nano_inputs, randomise

_TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPTJ = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4, **_TOKENS}
_DECODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **_TOKENS}
_PHI = {**_DECODER, "intermediate_size": 64, "max_position_embeddings": 64}
DECODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gptj": (transformers.GPTJForCausalLM, transformers.GPTJConfig, _GPTJ),
    "phi": (transformers.PhiForCausalLM, transformers.PhiConfig, _PHI),
    "phi_qk": (transformers.PhiForCausalLM, transformers.PhiConfig, {**_PHI, "qk_layernorm": True}),
    "falcon": (transformers.FalconForCausalLM, transformers.FalconConfig, _DECODER),
    "falcon_two_norms": (
        transformers.FalconForCausalLM,
        transformers.FalconConfig,
        {**_DECODER, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon_one_norm": (
        transformers.FalconForCausalLM,
        transformers.FalconConfig,
        {**_DECODER, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon_serial": (
        transformers.FalconForCausalLM,
        transformers.FalconConfig,
        {**_DECODER, "parallel_attn": False, "multi_query": False, "bias": True, "tie_word_embeddings": False},
    ),
}
TEXT = ("gpt2", "opt", "gpt_neox", "gpt_neox_serial", "bloom", *DECODERS)
IMAGES = ("vit", "clip", "dinov2", "dinov2_with_registers", "deit", "beit", "beit_class_token")
FAMILIES = (*TEXT, *IMAGES, "whisper")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig, {"intermediate_size": 64}),
    "beit": (
        transformers.BeitForImageClassification,
        transformers.BeitConfig,
        {"intermediate_size": 64, "use_relative_position_bias": True, "use_mask_token": True},
    ),
    "beit_class_token": (
        transformers.BeitForImageClassification,
        transformers.BeitConfig,
        {
            "intermediate_size": 64,
            "use_mean_pooling": False,
            "use_absolute_position_embeddings": True,
            "use_shared_relative_position_bias": True,
            "layer_scale_init_value": 0.0,
        },
    ),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, {"intermediate_size": 64}),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, {"mlp_ratio": 2}),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
}


def built(name: str, offset: float = 0.0, **settings: Any) -> Model:
    """A nano model in float64.

    Args:
        offset: added to every number of the token embedding (of images, the positions'), which makes errors with ties
            loud.
        settings: fields of its config that differ.
    """
    if name == "bloom":
        sizes = {"vocab_size": 128, "hidden_size": 32, "n_layer": 3, "n_head": 4}
        model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes | settings))
        randomise(model, 0)
    elif name in DECODERS:
        kind, config, sizes = DECODERS[name]
        model = kind(config(**sizes | settings))
        randomise(model, 0)
    elif name in TOWERS:
        kind, config, sizes = TOWERS[name]
        model = kind(config(**SIZES | sizes | {"image_size": 16, "patch_size": 4} | settings))
        randomise(model, 0)
    else:
        model = nano(name, **settings)
    model = model.double().eval()
    with torch.no_grad():
        table_of(model, name).add_(offset)
    return open_model(model, name=name)


def table_of(model: Any, name: str) -> torch.Tensor:
    """A table that writes the beginning of the stream."""
    if name == "clip":
        return model.embeddings.position_embedding.weight
    if name in IMAGES:
        whole = next((getattr(model, each) for each in ("vit", "deit", "beit") if hasattr(model, each)), model)
        positions = whole.embeddings.position_embeddings
        return whole.embeddings.cls_token if positions is None else positions
    return model.get_input_embeddings().weight


def inputs(name: str) -> dict[str, torch.Tensor]:
    given = nano_inputs("vit" if name in IMAGES else "gpt2" if name in ("bloom", *DECODERS) else name)
    if name in ("bloom", *DECODERS):  # at padding BLOOM's attention is no number
        del given["attention_mask"]
    return {key: each.double() if each.is_floating_point() else each for key, each in given.items()}


def written(model: Model, form: Form) -> Any:
    """The transformers model that a form makes of it."""
    return with_rewrite(model, RewriteReference(name="pre-rmsnorm", params=vars(form))).model


def error(model: Any, other: Any, given: dict[str, torch.Tensor]) -> float:
    """The largest difference of what two transformers models give in the end."""
    with torch.no_grad():
        return float((output(model, given) - output(other, given)).abs().max())
