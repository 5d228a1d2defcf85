"""The layout of Llama, which needs no modelling file: an OLMo, whose LayerNorms have no parameters, becomes a Llama.

The module names of both are the same, so Llama's wiring names the writers. Without gain and bias in the last norm, its
output has a mean of zero, so that a recentred embedding may stay tied to the head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoForCausalLM

from lamella.errors import MethodError
from lamella.methods.pre_rmsnorm.report import MOST
from lamella.methods.pre_rmsnorm.rewrite import centre, parts_of
from lamella.stack import Model
from lamella.stack.architectures import ARCHITECTURES

EPS = 1e-5  # of OLMo's norms
SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_bias", "attention_dropout",
)  # fmt: skip
TOKENS = (2, 24)  # rows and length of the check


@torch.no_grad()
def to_llama(model: Model, seed: int = 0) -> LlamaForCausalLM:
    """Return an OLMo as a Llama of transformers, which computes the same up to rounding.

    Args:
        model: an OLMo of the first generation without clipped queries, keys and values; it is not changed.
        seed: random seed of the tokens on which both are compared.

    Raises:
        MethodError: for another model, or when the result differs.
    """
    whole: Any = model.model
    if not isinstance(whole, OlmoForCausalLM) or whole.config.clip_qkv is not None:
        raise MethodError(
            f"{model.name} has no Llama layout: only an OLMo without clip_qkv has LayerNorms without parameters, "
            "rotary positions and a gated MLP as Llama has; use pre-rmsnorm, which writes a modelling file"
        )
    config = LlamaConfig(**{name: getattr(whole.config, name) for name in SETTINGS}, rms_norm_eps=EPS)
    llama: Any = LlamaForCausalLM(config)
    llama = llama.to(whole.device, whole.dtype).eval()
    state = {name: each.clone() for name, each in whole.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for path, part in parts_of(llama, "model.layers", ARCHITECTURES["llama"].wiring):
        if part.writes != ("hidden",):
            continue
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in state:  # norms have no parameters, so they are not
                axis = 1 if part.reads is None else 0
                state[name] = centre(state[name].double(), axis).to(state[name].dtype)
    llama.load_state_dict(state, strict=False)  # without the norms' weights, which are 1
    ids = torch.randint(config.vocab_size, TOKENS, generator=torch.Generator().manual_seed(seed)).to(whole.device)
    expected, found = (each(ids).logits.double() for each in (whole, llama))
    distance, size = float((found - expected).abs().max()), float(expected.abs().max())
    dtype = str(whole.dtype).removeprefix("torch.").replace("float64", "float32")  # both compute norms in float32
    if not distance <= MOST[dtype] * size:
        raise MethodError(f"{model.name}: the Llama differs by {distance:.2g} where logits reach {size:.2g}")
    return llama
