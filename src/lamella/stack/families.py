"""The family table: where each architecture keeps its parts, as data.

To add an architecture, add one :class:`Family` here and, if none of :mod:`lamella.stack.halves` fits, its two halves.
The conformance tests then check it on the real transformers class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lamella.errors import ArchitectureError
from lamella.stack import halves
from lamella.stack.halves import Parallel

Half = Callable[[nn.Module, Any, dict[str, Any]], Tensor | Parallel]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: the ``model_type`` of its config.
        stack: what the stack is called in sites and paths (``text`` or ``vision``).
        base: dotted path to the module that embeds, runs the layers and applies the final norm.
        layers: name of the layer list inside ``base``.
        embedding, norm: dotted paths inside ``base``.
        head: dotted path to the output projection.
        attn, mlp: the two halves.
        attn_modules, mlp_modules: the children of a layer that serve that half alone.
        attn_out, mlp_out: the linear maps that write the half's result to the stream (zeroing them silences the half).
        cache: the keyword under which a layer receives the key-value cache.
        causal: True for decoders.
    """

    name: str
    attn: Half
    mlp: Half
    attn_modules: tuple[str, ...]
    mlp_modules: tuple[str, ...]
    attn_out: str
    mlp_out: str
    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    stack: str = "text"
    cache: str = "cache"
    causal: bool = True

    @property
    def prefix(self) -> str:
        """What the parameter names of the layers begin with, such as ``model.layers.``."""
        return f"{self.base}.{self.layers}."

    def silent_when_zeroed(self, config: Any) -> bool:
        """Whether a half with a zeroed output projection is the identity (not so with norms after the addition)."""
        return getattr(config, "do_layer_norm_before", True)


_LLAMA = Family(
    name="llama",
    attn=halves.llama_attn,
    mlp=halves.llama_mlp,
    attn_modules=("self_attn", "input_layernorm"),
    mlp_modules=("mlp", "post_attention_layernorm"),
    attn_out="self_attn.o_proj",
    mlp_out="mlp.down_proj",
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _LLAMA,
        replace(_LLAMA, name="mistral"),
        replace(_LLAMA, name="qwen2"),
        replace(_LLAMA, name="qwen3"),
        replace(_LLAMA, name="qwen3_moe", mlp_out="mlp.experts.down_proj"),
        replace(_LLAMA, name="olmoe", mlp_out="mlp.experts.down_proj"),
        Family(
            name="gemma3_text",
            attn=halves.gemma3_attn,
            mlp=halves.gemma3_mlp,
            attn_modules=("self_attn", "input_layernorm", "post_attention_layernorm"),
            mlp_modules=("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            attn_out="self_attn.o_proj",
            mlp_out="mlp.down_proj",
        ),
        Family(
            name="gpt2",
            attn=halves.gpt2_attn,
            mlp=halves.gpt2_mlp,
            attn_modules=("attn", "ln_1"),
            mlp_modules=("mlp", "ln_2"),
            attn_out="attn.c_proj",
            mlp_out="mlp.c_proj",
            base="transformer",
            layers="h",
            embedding="wte",
            norm="ln_f",
        ),
        Family(
            name="gpt_neox",
            attn=halves.gpt_neox_attn,
            mlp=halves.gpt_neox_mlp,
            attn_modules=("attention", "input_layernorm"),
            mlp_modules=("mlp", "post_attention_layernorm"),
            attn_out="attention.dense",
            mlp_out="mlp.dense_4h_to_h",
            base="gpt_neox",
            embedding="embed_in",
            norm="final_layer_norm",
            cache="layer_past",
        ),
        Family(
            name="opt",
            attn=halves.opt_attn,
            mlp=halves.opt_mlp,
            attn_modules=("self_attn", "self_attn_layer_norm"),
            mlp_modules=("fc1", "fc2", "final_layer_norm"),
            attn_out="self_attn.out_proj",
            mlp_out="fc2",
            base="model.decoder",
            norm="final_layer_norm",
        ),
        Family(
            name="vit",
            attn=halves.vit_attn,
            mlp=halves.vit_mlp,
            attn_modules=("attention", "layernorm_before"),
            mlp_modules=("mlp", "layernorm_after"),
            attn_out="attention.o_proj",
            mlp_out="mlp.fc2",
            base="vit",
            embedding="embeddings",
            norm="layernorm",
            head="classifier",
            stack="vision",
            causal=False,
        ),
    )
}


def register_family(family: Family) -> None:
    """Add an architecture to the table at run time, for packages outside Lamella."""
    FAMILIES[family.name] = family


def find_family(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        ArchitectureError: when the table has no such ``model_type``; the message shows how to add it.
    """
    model_type = str(getattr(config, "model_type", None)).removeprefix("lamella_")  # as native exports are called
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ArchitectureError(
        f"unknown architecture '{model_type}': known are {', '.join(sorted(FAMILIES))}; to add it, call "
        f"lamella.stack.register_family(Family(name='{model_type}', attn=..., mlp=..., ...)) "
        "(see the documentation page 'Families')"
    )
