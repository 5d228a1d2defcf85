"""The architecture table: one entry for each architecture that is not derived, and the functions that look entries up.

To add an architecture, add one :class:`Architecture` here and, if none of :mod:`lamella.stack.sublayers` fits, the
functions of its sublayers. A model of several stacks is an :class:`Assembly` of such entries. The conformance tests
then check it on the real transformers class. Architectures without an entry are derived
(:mod:`lamella.stack.derivation`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMaskedLM

from lamella.errors import ArchitectureError
from lamella.stack import sublayers as functions
from lamella.stack import towers
from lamella.stack.derivation import derive
from lamella.stack.diffusion_config import DreamConfig, LLaDAConfig, LlavaDiffusionConfig
from lamella.stack.entry import SIZES, Architecture, Assembly, Experts, Slot, Sublayer
from lamella.stack.ofa_config import OFAConfig
from lamella.stack.patch_config import PatchSeq2SeqConfig
from lamella.stack.wiring import Part, Wiring

_LLAMA = Architecture(
    name="llama",
    sublayers=(
        Sublayer("attn", functions.llama_attn, ("self_attn", "input_layernorm"), "self_attn.o_proj"),
        Sublayer("mlp", functions.llama_mlp, ("mlp", "post_attention_layernorm"), "mlp.down_proj"),
    ),
    wired=Wiring(
        sublayers={
            "attn": (
                Part("input_layernorm", None, ("hidden",)),
                Part("self_attn.q_proj", "hidden", ("queries",)),
                Part("self_attn.k_proj", "hidden", ("keys",)),
                Part("self_attn.v_proj", "hidden", ("keys",)),
                Part("self_attn.o_proj", "queries", ("hidden",)),
            ),
            "mlp": (
                Part("post_attention_layernorm", None, ("hidden",)),
                Part("mlp.gate_proj", "hidden", ("channels",)),
                Part("mlp.up_proj", "hidden", ("channels",)),
                Part("mlp.down_proj", "channels", ("hidden",)),
            ),
        },
        outside=(
            Part("model.embed_tokens", None, ("hidden",)),
            Part("model.norm", None, ("hidden",)),
            Part("lm_head", "hidden", ()),
        ),
        attention="self_attn",
    ),
)

_EXPERTS = replace(
    _LLAMA,
    sublayers=(_LLAMA["attn"], replace(_LLAMA["mlp"], out="mlp.experts.down_proj")),
    experts=Experts(),
    wired=None,
)


def _attends(attention: str, states: str = "hidden") -> tuple[Part, ...]:
    """Return the parts of a BART attention and its norm; its keys and values may read an encoder's states."""
    return (
        Part(f"{attention}_layer_norm", None, ("hidden",)),
        Part(f"{attention}.q_proj", "hidden", ("queries",)),
        Part(f"{attention}.k_proj", states, ("keys",)),
        Part(f"{attention}.v_proj", states, ("keys",)),
        Part(f"{attention}.out_proj", "queries", ("hidden",)),
    )


_FEEDS = (
    Part("final_layer_norm", None, ("hidden",)),
    Part("fc1", "hidden", ("channels",)),
    Part("fc2", "channels", ("hidden",)),
)

_SCALED = Wiring(  # does not cover the largest DINOv2, which has another MLP
    sublayers={
        "attn": (
            Part("norm1", None, ("hidden",)),
            Part("attention.q_proj", "hidden", ("queries",)),
            Part("attention.k_proj", "hidden", ("keys",)),
            Part("attention.v_proj", "hidden", ("keys",)),
            Part("attention.o_proj", "queries", ("branch",)),
            Part("layer_scale1", "branch", ("hidden",)),
        ),
        "mlp": (
            Part("norm2", None, ("hidden",)),
            Part("mlp.fc1", "hidden", ("channels",)),
            Part("mlp.fc2", "channels", ("branch",)),
            Part("layer_scale2", "branch", ("hidden",)),
        ),
    },
    outside=(
        Part("embeddings.cls_token", None, ("hidden",)),
        Part("embeddings.mask_token", "mask", ("hidden",)),
        Part("embeddings.position_embeddings", None, ("hidden",)),
        Part("embeddings.patch_embeddings.projection", "patches", ("hidden",)),
        Part("layernorm", None, ("hidden",)),
    ),
    centred=True,
)
_DINO = Architecture(
    name="dinov2",
    sublayers=(
        Sublayer("attn", towers.dino_attn, ("attention", "norm1", "layer_scale1"), "layer_scale1.lambda1"),
        Sublayer("mlp", towers.dino_mlp, ("mlp", "norm2", "layer_scale2"), "layer_scale2.lambda1"),
    ),
    base="",
    layers="encoder.layer",
    embedding="embeddings",
    norm="layernorm",
    head="",
    stack="vision",
    causal=False,
    objective="features",
    shifted=False,
    modality="image",
    mask="",
    auto="AutoModel",
    wired=_SCALED,
)
_REGISTERS = replace(
    _DINO,
    name="dinov2_with_registers",
    wired=replace(_SCALED, outside=(*_SCALED.outside, Part("embeddings.register_tokens", None, ("hidden",)))),
)

_MASKED: dict[str, Any] = {"causal": False, "objective": "masked tokens", "auto": "AutoModelForMaskedLM"}

_TABLE = (
    replace(_LLAMA, wired=replace(_LLAMA.wiring, divides=True)),
    replace(_LLAMA, name="mistral"),
    replace(_LLAMA, name="qwen2"),
    replace(_LLAMA, name="qwen3", wired=replace(_LLAMA.wiring, shared_eps=True)),  # norms of queries and keys
    *(replace(_LLAMA, name=name) for name in ("smollm3", "seed_oss", "ministral", "ministral3", "internlm3")),
    replace(_LLAMA, name="cwm", wired=replace(_LLAMA.wiring, divides=True)),
    replace(_EXPERTS, name="qwen3_moe"),
    replace(_EXPERTS, name="olmoe"),
    Architecture(
        name="gemma3_text",
        sublayers=(
            Sublayer(
                "attn",
                functions.gemma3_attn,
                ("self_attn", "input_layernorm", "post_attention_layernorm"),
                "self_attn.o_proj",
            ),
            Sublayer(
                "mlp",
                functions.gemma3_mlp,
                ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
                "mlp.down_proj",
            ),
        ),
    ),
    Architecture(
        name="gpt2",
        sublayers=(
            Sublayer("attn", functions.gpt2_attn, ("attn", "ln_1"), "attn.c_proj"),
            Sublayer("mlp", functions.gpt2_mlp, ("mlp", "ln_2"), "mlp.c_proj"),
        ),
        base="transformer",
        layers="h",
        embedding="wte",
        norm="ln_f",
        sizes={"layers": "n_layer", "hidden": "n_embd", "channels": "n_inner", "heads": "n_head"},
        wired=Wiring(
            sublayers={
                "attn": (
                    Part("ln_1", None, ("hidden",)),
                    Part("attn.c_attn", "hidden", ("queries", "keys", "keys")),
                    Part("attn.c_proj", "queries", ("hidden",)),
                ),
                "mlp": (
                    Part("ln_2", None, ("hidden",)),
                    Part("mlp.c_fc", "hidden", ("channels",)),
                    Part("mlp.c_proj", "channels", ("hidden",)),
                ),
            },
            outside=(
                Part("transformer.wte", None, ("hidden",)),
                Part("transformer.wpe", None, ("hidden",)),
                Part("transformer.ln_f", None, ("hidden",)),
                Part("lm_head", "hidden", ()),
            ),
            attention="attn",
            grouped=False,
            centred=True,
        ),
    ),
    Architecture(
        name="gpt_neox",
        sublayers=(
            Sublayer("attn", functions.gpt_neox_attn, ("attention", "input_layernorm"), "attention.dense"),
            Sublayer("mlp", functions.gpt_neox_mlp, ("mlp", "post_attention_layernorm"), "mlp.dense_4h_to_h"),
        ),
        base="gpt_neox",
        embedding="embed_in",
        norm="final_layer_norm",
        cache="layer_past",
        wired=Wiring(
            sublayers={
                "attn": (
                    Part("input_layernorm", None, ("hidden",)),
                    Part("attention.query_key_value", "hidden", ("heads",)),
                    Part("attention.dense", "queries", ("hidden",)),
                ),
                "mlp": (
                    Part("post_attention_layernorm", None, ("hidden",)),
                    Part("mlp.dense_h_to_4h", "hidden", ("channels",)),
                    Part("mlp.dense_4h_to_h", "channels", ("hidden",)),
                ),
            },
            outside=(
                Part("gpt_neox.embed_in", None, ("hidden",)),
                Part("gpt_neox.final_layer_norm", None, ("hidden",)),
                Part("lm_head", "hidden", ()),
            ),
            centred=True,
        ),
    ),
    Architecture(
        name="opt",
        sublayers=(
            Sublayer("attn", functions.opt_attn, ("self_attn", "self_attn_layer_norm"), "self_attn.out_proj"),
            Sublayer("mlp", functions.opt_mlp, ("fc1", "fc2", "final_layer_norm"), "fc2"),
        ),
        base="model.decoder",
        norm="final_layer_norm",
        sizes=SIZES | {"channels": "ffn_dim"},
        wired=Wiring(
            sublayers={"attn": _attends("self_attn"), "mlp": _FEEDS},
            outside=(
                Part("model.decoder.embed_tokens", None, ("hidden",)),
                Part("model.decoder.embed_positions", None, ("hidden",)),
                Part("model.decoder.final_layer_norm", None, ("hidden",)),
                Part("lm_head", "hidden", ()),
            ),
            centred=True,
        ),
    ),
    Architecture(
        name="llada",
        sublayers=(
            Sublayer("attn", functions.llada_attn, ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out"), "attn_out"),
            Sublayer("mlp", functions.llada_mlp, ("ff_norm", "ff_proj", "up_proj", "ff_out"), "ff_out"),
        ),
        base="model.transformer",
        layers="blocks",
        embedding="wte",
        norm="ln_f",
        head="model.transformer.ff_out",
        shifted=False,
        sizes={
            "layers": "n_layers",
            "hidden": "d_model",
            "channels": "mlp_hidden_size",
            "heads": "n_heads",
            "kv_heads": "n_kv_heads",
        },
        **_MASKED,
    ),
    replace(_LLAMA, name="Dream", **_MASKED),
    Architecture(
        name="vit",
        sublayers=(
            Sublayer("attn", functions.vit_attn, ("attention", "layernorm_before"), "attention.o_proj"),
            Sublayer("mlp", functions.vit_mlp, ("mlp", "layernorm_after"), "mlp.fc2"),
        ),
        base="vit",
        embedding="embeddings",
        norm="layernorm",
        head="classifier",
        readout=towers.class_token,
        stack="vision",
        causal=False,
        objective="classes",
        shifted=False,
        modality="image",
        mask="",
        auto="AutoModelForImageClassification",
        wired=Wiring(
            sublayers={
                "attn": (
                    Part("layernorm_before", None, ("hidden",)),
                    Part("attention.q_proj", "hidden", ("queries",)),
                    Part("attention.k_proj", "hidden", ("keys",)),
                    Part("attention.v_proj", "hidden", ("keys",)),
                    Part("attention.o_proj", "queries", ("hidden",)),
                ),
                "mlp": (
                    Part("layernorm_after", None, ("hidden",)),
                    Part("mlp.fc1", "hidden", ("channels",)),
                    Part("mlp.fc2", "channels", ("hidden",)),
                ),
            },
            outside=(
                Part("vit.embeddings.cls_token", None, ("hidden",)),
                Part("vit.embeddings.position_embeddings", None, ("hidden",)),
                Part("vit.embeddings.patch_embeddings.projection", "patches", ("hidden",)),
                Part("vit.layernorm", None, ("hidden",)),
                Part("classifier", "hidden", ()),
            ),
            centred=True,
        ),
    ),
    replace(_LLAMA, name="qwen2_vl_text", wired=None),
    Architecture(
        name="clip_vision_model",
        sublayers=(
            Sublayer("attn", towers.clip_attn, ("self_attn", "layer_norm1"), "self_attn.out_proj"),
            Sublayer("mlp", towers.clip_mlp, ("mlp", "layer_norm2"), "mlp.fc2"),
        ),
        base="",
        layers="encoder.layers",
        embedding="embeddings",
        norm="",
        head="",
        stack="vision",
        causal=False,
        objective="features",
        shifted=False,
        modality="image",
        mask="",
        auto="AutoModel",
        wired=Wiring(
            sublayers={
                "attn": (
                    Part("layer_norm1", None, ("hidden",)),
                    Part("self_attn.q_proj", "hidden", ("queries",)),
                    Part("self_attn.k_proj", "hidden", ("keys",)),
                    Part("self_attn.v_proj", "hidden", ("keys",)),
                    Part("self_attn.out_proj", "queries", ("hidden",)),
                ),
                "mlp": (
                    Part("layer_norm2", None, ("hidden",)),
                    Part("mlp.fc1", "hidden", ("channels",)),
                    Part("mlp.fc2", "channels", ("hidden",)),
                ),
            },
            outside=(
                Part("embeddings.class_embedding", None, ("embedded",)),
                Part("embeddings.patch_embedding", "patches", ("embedded",)),
                Part("embeddings.position_embedding", None, ("embedded",)),
                Part("pre_layrnorm", "embedded", ("hidden",)),
                Part("post_layernorm", None, ("hidden",)),
            ),
            centred=True,
        ),
    ),
    _DINO,
    _REGISTERS,
)

_BLOOM = Wiring(
    sublayers={
        "attn": (
            Part("input_layernorm", None, ("hidden",)),
            Part("self_attention.query_key_value", "hidden", ("heads",)),
            Part("self_attention.dense", "queries", ("hidden",)),
        ),
        "mlp": (
            Part("post_attention_layernorm", None, ("hidden",)),
            Part("mlp.dense_h_to_4h", "hidden", ("channels",)),
            Part("mlp.dense_4h_to_h", "channels", ("hidden",)),
        ),
    },
    outside=(
        Part("transformer.word_embeddings", None, ("embedded",)),
        Part("transformer.word_embeddings_layernorm", "embedded", ("hidden",)),
        Part("transformer.ln_f", None, ("hidden",)),
        Part("lm_head", "hidden", ()),
    ),
    centred=True,
)


def _reads_once(norm: str, attention: tuple[str, ...], out: str, mlp: tuple[str, str]) -> dict[str, tuple[Part, ...]]:
    """Return the parts of a parallel layer whose attention and MLP read the same norm.

    Args:
        norm: path of the norm.
        attention: paths of the projections to queries, keys and values.
        out: path of the output projection of the attention.
        mlp: paths of the two projections of the MLP.
    """
    return {
        "attn": (
            Part(norm, None, ("hidden",)),
            *(Part(each, "hidden", ("heads",)) for each in attention),
            Part(out, "queries", ("hidden",)),
        ),
        "mlp": (Part(mlp[0], "hidden", ("channels",)), Part(mlp[1], "channels", ("hidden",))),
    }


_GPTJ = Wiring(
    sublayers=_reads_once(
        "ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.out_proj", ("mlp.fc_in", "mlp.fc_out")
    ),
    outside=(
        Part("transformer.wte", None, ("hidden",)),
        Part("transformer.ln_f", None, ("hidden",)),
        Part("lm_head", "hidden", ()),
    ),
    centred=True,
)
_PHI_PARTS = _reads_once(
    "input_layernorm",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.dense",
    ("mlp.fc1", "mlp.fc2"),
)
_PHI_NORMS = tuple(Part(f"self_attn.{each}_layernorm", "heads", ("heads",)) for each in "qk")  # optional
_PHI = Wiring(
    sublayers=_PHI_PARTS | {"attn": (*_PHI_PARTS["attn"], *_PHI_NORMS)},
    outside=(
        Part("model.embed_tokens", None, ("hidden",)),
        Part("model.final_layernorm", None, ("hidden",)),
        Part("lm_head", "hidden", ()),
    ),
    centred=True,
)


def _falcon(config: Any) -> Wiring:
    """Return the wiring of a Falcon: attention and MLP share a norm, have parallel norms, or follow each other."""
    fused, out = "self_attention.query_key_value", "self_attention.dense"
    two = config.parallel_attn and config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    first = "ln_attn" if two else "input_layernorm"
    sublayers = _reads_once(first, (fused,), out, ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))
    if two or not config.parallel_attn:
        second = Part("ln_mlp" if two else "post_attention_layernorm", None, ("hidden",))
        sublayers["mlp"] = (second, *sublayers["mlp"])
    outside = (
        Part("transformer.word_embeddings", None, ("hidden",)),
        Part("transformer.ln_f", None, ("hidden",)),
        Part("lm_head", "hidden", ()),
    )
    return Wiring(sublayers, outside, centred=True)


def _beit(config: Any) -> Wiring:
    """Return the wiring of a BEiT, which scales its updates by parameters and may normalise after the pooling."""
    vit = ARCHITECTURES["vit"].wired
    assert vit is not None

    def scaled(sublayer: str, vector: str) -> tuple[Part, ...]:
        *parts, last = vit.sublayers[sublayer]
        return *parts, replace(last, writes=("branch",)), Part(vector, "branch", ("hidden",))

    biases = Part("relative_position_bias", "positions", ("heads",))
    norm = "beit.pooler.layernorm" if config.use_mean_pooling else "beit.layernorm"
    return Wiring(
        sublayers={"attn": (*scaled("attn", "lambda_1"), biases), "mlp": scaled("mlp", "lambda_2")},
        outside=(
            Part("beit.embeddings.cls_token", None, ("hidden",)),
            Part("beit.embeddings.mask_token", "mask", ("hidden",)),
            Part("beit.embeddings.position_embeddings", "positions", ("hidden",)),  # optional
            Part("beit.embeddings.patch_embeddings.projection", "patches", ("hidden",)),
            Part("beit.shared_position_bias", "positions", ("heads",)),
            Part(norm, None, ("hidden",)),
            Part("classifier", "hidden", ()),
        ),
        centred=True,
    )


# Wirings by config, of types whose parts depend on it, and of derived types, since no forward shows which module reads
# after which norm.
_WIRED: dict[str, Callable[[Any], Wiring]] = {
    "bloom": lambda config: _BLOOM,
    "gptj": lambda config: _GPTJ,
    "phi": lambda config: _PHI,
    "falcon": _falcon,
    "beit": _beit,
}

_T5 = Architecture(
    name="t5",
    sublayers=(
        Sublayer("attn", towers.t5_attn, ("layer.0",), "layer.0.SelfAttention.o"),
        Sublayer("mlp", towers.t5_mlp, ("layer.1",), "layer.1.DenseReluDense.wo"),
    ),
    base="encoder",
    layers="block",
    norm="final_layer_norm",
    head="",
    stack="encoder",
    causal=False,
    objective="features",
    shifted=False,
    front="",
    complete_call=towers.t5_call,
    result=towers.t5_result,
    irremovable=towers.t5_irremovable,
    sizes={"layers": "num_layers", "hidden": "d_model", "channels": "d_ff", "heads": "num_heads", "head_dim": "d_kv"},
)

_BART = Architecture(
    name="bart",
    sublayers=(
        Sublayer("attn", towers.bart_attn, ("self_attn", "self_attn_layer_norm"), "self_attn.out_proj"),
        Sublayer("mlp", towers.bart_encoder_mlp, ("fc1", "fc2", "final_layer_norm"), "fc2"),
    ),
    base="model.encoder",
    norm="",
    head="",
    stack="encoder",
    causal=False,
    objective="features",
    shifted=False,
    front="model",
    sizes={
        "layers": "encoder_layers",
        "hidden": "d_model",
        "channels": "encoder_ffn_dim",
        "heads": "encoder_attention_heads",
    },
)

_DECODER: dict[str, Any] = {
    "stack": "decoder",
    "causal": True,
    "objective": "next token",
    "shifted": True,
    "mask": "decoder_attention_mask",
    "sizes": {
        "layers": "decoder_layers",
        "hidden": "d_model",
        "channels": "decoder_ffn_dim",
        "heads": "decoder_attention_heads",
    },
}
_CROSS = ("encoder_attn", "encoder_attn_layer_norm")

_WHISPER = replace(
    _BART,
    name="whisper",
    sublayers=(
        replace(_BART["attn"], run=towers.whisper_attn),
        replace(_BART["mlp"], run=towers.whisper_encoder_mlp),
    ),
    embedding="conv1",
    norm="layer_norm",
    modality="audio",
    mask="",
    wired=Wiring(
        sublayers={"attn": _attends("self_attn"), "mlp": _FEEDS},
        outside=(
            Part("model.encoder.conv1", "sound", ("embedded",)),
            Part("model.encoder.conv2", "embedded", ("embedded",)),
            Part("model.encoder.embed_positions", None, ("embedded",)),
            Part("model.encoder.layer_norm", None, ("hidden",)),
        ),
        centred=True,
        bent=True,
    ),
)

# MBART and similar models
_PRE_NORM = replace(_WHISPER, embedding="embed_tokens", modality="text", mask="attention_mask", wired=None)
_OFA = replace(
    _PRE_NORM,
    name="ofa_seq2seq",
    sublayers=(
        Sublayer(
            "attn",
            towers.ofa_attn,
            ("self_attn", "self_attn_layer_norm", "self_attn_mid_layer_norm"),
            "self_attn_mid_layer_norm",
        ),
        Sublayer("mlp", towers.ofa_mlp, ("fc1", "ffn_layer_norm", "fc2", "final_layer_norm"), "fc2"),
    ),
    front="model",
    images="image_token_index",
)

_ASSEMBLIES = (
    Assembly(
        name="t5",
        stacks=(
            _T5,
            replace(
                _T5,
                sublayers=(
                    _T5["attn"],
                    Sublayer("cross", towers.t5_cross, ("layer.1",), "layer.1.EncDecAttention.o"),
                    Sublayer("mlp", towers.t5_mlp, ("layer.2",), "layer.2.DenseReluDense.wo"),
                ),
                base="decoder",
                head="lm_head",
                readout=towers.t5_logits,
                **_DECODER | {"sizes": {**_T5.sizes, "layers": "num_decoder_layers"}},
            ),
        ),
        auto="AutoModelForSeq2SeqLM",
    ),
    Assembly(
        name="bart",
        stacks=(
            _BART,
            replace(
                _BART,
                sublayers=(
                    _BART["attn"],
                    Sublayer("cross", towers.bart_cross, _CROSS, "encoder_attn.out_proj"),
                    replace(_BART["mlp"], run=towers.bart_mlp),
                ),
                base="model.decoder",
                head="lm_head",
                readout=towers.bart_logits,
                **_DECODER,
            ),
        ),
        auto="AutoModelForSeq2SeqLM",
    ),
    Assembly(
        name="mbart",
        stacks=(
            replace(_PRE_NORM, name="mbart"),
            replace(
                _PRE_NORM,
                name="mbart",
                sublayers=(
                    _PRE_NORM["attn"],
                    Sublayer("cross", towers.whisper_cross, _CROSS, "encoder_attn.out_proj"),
                    replace(_PRE_NORM["mlp"], run=towers.whisper_mlp),
                ),
                base="model.decoder",
                head="lm_head",
                readout=towers.bart_logits,
                **_DECODER,
            ),
        ),
        auto="AutoModelForSeq2SeqLM",
    ),
    Assembly(
        name="whisper",
        stacks=(
            _WHISPER,
            replace(
                _WHISPER,
                sublayers=(
                    _WHISPER["attn"],
                    Sublayer("cross", towers.whisper_cross, _CROSS, "encoder_attn.out_proj"),
                    replace(_WHISPER["mlp"], run=towers.whisper_mlp),
                ),
                base="model.decoder",
                embedding="embed_tokens",
                head="proj_out",
                modality="text",
                wired=Wiring(
                    sublayers={
                        "attn": _attends("self_attn"),
                        "cross": _attends("encoder_attn", "encoded"),
                        "mlp": _FEEDS,
                    },
                    outside=(
                        Part("model.decoder.embed_tokens", None, ("hidden",)),
                        Part("model.decoder.embed_positions", None, ("hidden",)),
                        Part("model.decoder.layer_norm", None, ("hidden",)),
                        Part("proj_out", "hidden", ()),
                    ),
                    centred=True,
                ),
                **_DECODER,
            ),
        ),
        auto="AutoModelForSpeechSeq2Seq",
    ),
    Assembly(
        name="llava",
        stacks=(
            Slot(
                "vision_config",
                {
                    "base": "model.vision_tower",
                    "front": "model",
                    "head": "model.multi_modal_projector",
                    "readout": towers.llava_features,
                    "irremovable": towers.llava_irremovable,
                },
            ),
            Slot("text_config", {"base": "model.language_model", "front": "model", "images": "image_token_id"}),
        ),
        auto="AutoModelForImageTextToText",
    ),
    Assembly(
        name="qwen2_vl",
        stacks=(
            Architecture(
                name="qwen2_vl_vision",
                sublayers=(
                    Sublayer("attn", towers.qwen2_vl_vision_attn, ("attn", "norm1"), "attn.proj"),
                    Sublayer("mlp", towers.qwen2_vl_vision_mlp, ("mlp", "norm2"), "mlp.fc2"),
                ),
                base="model.visual",
                layers="blocks",
                embedding="patch_embed",
                norm="",
                head="model.visual.merger",
                stack="vision",
                causal=False,
                objective="features",
                shifted=False,
                modality="image",
                mask="",
                config="vision_config",
                front="model",
                sizes={"layers": "depth", "hidden": "embed_dim", "heads": "num_heads"},
            ),
            Slot("text_config", {"base": "model.language_model", "front": "model", "images": "image_token_id"}),
        ),
        auto="AutoModelForImageTextToText",
    ),
)

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _TABLE}
_VIT = ARCHITECTURES["vit"]
assert _VIT.wired is not None
ARCHITECTURES["deit"] = replace(
    _VIT,
    name="deit",
    base="deit",
    wired=replace(
        _VIT.wired,
        outside=(
            *(replace(part, path=part.path.replace("vit.", "deit.")) for part in _VIT.wired.outside),
            Part("deit.embeddings.distillation_token", None, ("hidden",)),
        ),
    ),
)
ARCHITECTURES["beit"] = replace(
    _VIT,
    name="beit",
    base="beit",
    sublayers=(replace(_VIT["attn"], run=towers.beit_attn), replace(_VIT["mlp"], run=towers.beit_mlp)),
    readout=towers.beit_logits,
    wired=None,
)
ARCHITECTURES["siglip_vision_model"] = replace(
    ARCHITECTURES["clip_vision_model"], name="siglip_vision_model", wired=None
)
ASSEMBLIES: dict[str, Assembly] = {assembly.name: assembly for assembly in _ASSEMBLIES}
for _name, _like in {
    "mt5": "t5",
    "marian": "bart",
    "blenderbot-small": "bart",
    "plbart": "bart",
    "pegasus": "mbart",
    "blenderbot": "mbart",
}.items():
    ASSEMBLIES[_name] = replace(ASSEMBLIES[_like], name=_name)
PROJECTED = "CLIPVisionModelWithProjection"  # contains the tower of a clip_vision_model, and projects its output
_DERIVED: dict[str, Architecture] = {}  # by the digest of a config
REFUSED = {  # types that resemble known ones, with the difference
    "diffusion_gemma": "it denoises tokens drawn at random instead of masks, reads its own last logits, and shares the "
    "weights of its decoder with an encoder: no layer of one can be removed without the other's",
}
ASSEMBLIES["llava_diffusion"] = Assembly(
    name="llava_diffusion",
    stacks=(
        ASSEMBLIES["llava"].stacks[0],
        Slot("text_config", {"front": "model", "images": "image_token_id"}, inside="model.language_model"),
    ),
    auto="AutoModelForImageTextToText",
)
ASSEMBLIES["florence2"] = Assembly(
    name="florence2",
    stacks=(
        Slot(
            "text_config",
            {"base": "model.language_model.encoder", "front": "model", "images": "image_token_id"},
            stack="encoder",
        ),
        Slot(
            "text_config",
            {"base": "model.language_model.decoder", "front": "model", "head": "lm_head", "readout": None},
            stack="decoder",
        ),
    ),
    auto="AutoModelForImageTextToText",
)
ASSEMBLIES["patch_seq2seq"] = replace(ASSEMBLIES["florence2"], name="patch_seq2seq")
ASSEMBLIES["ofa_seq2seq"] = Assembly(
    name="ofa_seq2seq",
    stacks=(
        _OFA,
        replace(
            _OFA,
            sublayers=(
                _OFA["attn"],
                Sublayer(
                    "cross",
                    towers.ofa_cross,
                    ("cross_attn", "cross_attn_layer_norm", "cross_attn_mid_layer_norm"),
                    "cross_attn_mid_layer_norm",
                ),
                _OFA["mlp"],
            ),
            base="model.decoder",
            head="lm_head",
            images="",
            **_DECODER,
        ),
    ),
    auto="AutoModelForImageTextToText",
)
_OWN_CONFIGS = (LLaDAConfig, DreamConfig, LlavaDiffusionConfig, PatchSeq2SeqConfig, OFAConfig)
OWN = {each.model_type: each for each in _OWN_CONFIGS}  # model types that transformers does not have
for _type, _config in OWN.items():
    AutoConfig.register(_type, _config, exist_ok=True)


def register_architecture(architecture: Architecture | Assembly) -> None:
    """Add an architecture to the table at run time, for packages outside Lamella."""
    if isinstance(architecture, Assembly):
        ASSEMBLIES[architecture.name] = architecture
    else:
        ARCHITECTURES[architecture.name] = architecture


def find_architectures(config: Any) -> dict[str, Architecture]:
    """Return the architecture of every stack of a model, by the stack's name, for its transformers config.

    Raises:
        ArchitectureError: for a model type that is unknown and cannot be derived; the message shows how to add it.
    """
    model_type = _model_type(config)
    if model_type in REFUSED:
        raise ArchitectureError(f"{model_type} models are not a stack of layers that can be cut: {REFUSED[model_type]}")
    if model_type in ARCHITECTURES:
        entry = ARCHITECTURES[model_type]
        by_config = _WIRED.get(model_type)
        found: tuple[Architecture, ...] = (entry if by_config is None else replace(entry, wired=by_config(config)),)
    elif model_type in ASSEMBLIES and not _decodes_alone(config):
        found = tuple(_resolve(each, config) for each in ASSEMBLIES[model_type].stacks)
    else:
        found = (_derived(config, model_type),)
    return {each.stack: each for each in found}


def architectures_of(model: Any) -> dict[str, Architecture]:
    """Return the architecture of every stack of a transformers model in memory, by the stack's name."""
    found = find_architectures(model.config)
    if type(model).__name__ == PROJECTED:
        return {stack: replace(each, base="vision_model", wired=None) for stack, each in found.items()}
    return found


def own_class(model_type: str) -> Any:
    """Return Lamella's own class for a model type that transformers lacks, and register it; None for other types."""
    if model_type not in OWN:
        return None
    from lamella.stack import diffusion, diffusion_vlm, ofa, patch_seq2seq  # imported here because it takes seconds

    auto, known = {
        "llada": (AutoModelForMaskedLM, diffusion.LLaDAForMaskedLM),
        "Dream": (AutoModelForMaskedLM, diffusion.DreamForMaskedLM),
        "llava_diffusion": (AutoModelForImageTextToText, diffusion_vlm.LlavaDiffusion),
        "patch_seq2seq": (AutoModelForImageTextToText, patch_seq2seq.PatchSeq2Seq),
        "ofa_seq2seq": (AutoModelForImageTextToText, ofa.OFAForConditionalGeneration),
    }[model_type]
    auto.register(OWN[model_type], known, exist_ok=True)
    return known


def check_own(model: Any) -> None:
    """Check that a model whose type Lamella defines is of Lamella's class.

    Raises:
        ArchitectureError: for a model of the code that comes with its checkpoint, whose modules have other names.
    """
    known = own_class(_model_type(model.config))
    if known is not None and not isinstance(model, known):
        raise ArchitectureError(
            f"a {type(model).__name__} in memory uses the code of its checkpoint: open the checkpoint's folder, "
            f"which Lamella opens as a {known.__name__}"
        )


def _derived(config: Any, model_type: str) -> Architecture:
    """Return the derived architecture of a type without an entry; the same object for equal configs."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str) if hasattr(config, "to_dict") else ""
    digest = hashlib.sha256(f"{type(config).__name__} {text}".encode()).hexdigest()
    if digest not in _DERIVED:
        try:
            wired = _WIRED[model_type](config) if model_type in _WIRED else None
            _DERIVED[digest] = replace(derive(config, model_type), wired=wired)
        except ArchitectureError as error:
            raise ArchitectureError(
                f"unknown architecture '{model_type}': it has no entry and cannot be derived ({error}); the "
                "documentation page 'Open your own architecture' shows how to add it "
                f"(lamella.stack.register_architecture(Architecture(name='{model_type}', sublayers=...)) in Python)"
            ) from None
    return _DERIVED[digest]


def find_architecture(config: Any) -> Architecture:
    """Return the architecture of a model with one stack.

    Raises:
        ArchitectureError: for an unknown architecture, and for a model with several stacks.
    """
    found = find_architectures(config)
    if len(found) > 1:
        raise ArchitectureError(f"a {_model_type(config)} has the stacks {' and '.join(found)}: choose one of them")
    return next(iter(found.values()))


def _decodes_alone(config: Any) -> bool:
    """Return whether a model is the decoder of one with several stacks, without its encoder."""
    return bool(getattr(config, "is_decoder", False))


def auto_class(config: Any) -> str:
    """Return the auto class of transformers that opens a model with this config."""
    own_class(_model_type(config))
    assembly = None if _decodes_alone(config) else ASSEMBLIES.get(_model_type(config))
    return find_architecture(config).auto if assembly is None else assembly.auto


def _model_type(config: Any) -> str:
    return str(getattr(config, "model_type", None)).removeprefix("lamella_")  # the prefix of native exports


def _resolve(entry: Architecture | Slot, config: Any) -> Architecture:
    """Return an entry of an assembly, adapted to a model with this config."""
    if isinstance(entry, Architecture):
        return entry
    inner = getattr(config, entry.config)
    part = find_architectures(inner)[entry.stack] if entry.stack else find_architecture(inner)
    if entry.inside:
        part = replace(part, base=f"{entry.inside}.{part.base}", head=f"{entry.inside}.{part.head}")
    return replace(part, config=entry.config, wired=None, **entry.changes)


def cuttable() -> list[str]:
    """Return the architectures that can be cut in width."""
    return [name for name, each in ARCHITECTURES.items() if each.cuttable]
