"""The architecture table: where each architecture keeps its parts, and what they do, as data.

To add an architecture, add one :class:`Architecture` here and, if none of :mod:`lamella.stack.sublayers` fits, the
functions of its sublayers. The conformance tests then check it on the real transformers class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lamella.errors import ArchitectureError
from lamella.stack import sublayers as functions
from lamella.stack.sublayers import Parallel
from lamella.stack.wiring import Part, Sizes, Wiring

SIZES = {  # what configs call the sizes, if nothing else is said
    "layers": "num_hidden_layers",
    "stream": "hidden_size",
    "channels": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


@dataclass(frozen=True)
class Sublayer:
    """A part of a layer with its norm(s) and its residual addition.

    Attributes:
        name: ``attn``, ``cross`` or ``mlp``.
        run: the function that computes it, ``run(layer, h, call)``.
        modules: the children of a layer that serve it alone.
        out: the linear map that writes its result to the stream (zeroing it silences the sublayer).
    """

    name: str
    run: Callable[[nn.Module, Any, dict[str, Any]], Tensor | Parallel]
    modules: tuple[str, ...]
    out: str


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of an MLP.

    Attributes:
        router: the module of a layer that chooses among them.
        experts: the module that holds them all.
        count, used: what the config calls how many there are, and how many a token uses.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    count: str = "num_experts"
    used: str = "num_experts_per_tok"


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: the ``model_type`` of its config.
        sublayers: of a layer, in their order.
        stack: what the stack is called in sites and paths (``text`` or ``vision``).
        base: dotted path to the module that embeds, runs the layers and applies the final norm.
        layers: name of the layer list inside ``base``.
        embedding, norm: dotted paths inside ``base``.
        head: dotted path to the output projection.
        cache: the keyword under which a layer receives the key-value cache.
        causal: True for decoders.
        sizes: what its config calls the sizes, by the names of :data:`SIZES`.
        experts: where its experts are, if it has any.
        wired: what its modules read and write; None where widths cannot be cut.
    """

    name: str
    sublayers: tuple[Sublayer, ...]
    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    stack: str = "text"
    cache: str = "cache"
    causal: bool = True
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)
    experts: Experts | None = None
    wired: Wiring | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What its sublayers are called, in their order."""
        return tuple(each.name for each in self.sublayers)

    def __getitem__(self, sublayer: str) -> Sublayer:
        return next(each for each in self.sublayers if each.name == sublayer)

    @property
    def prefix(self) -> str:
        """What the parameter names of the layers begin with, such as ``model.layers.``."""
        return f"{self.base}.{self.layers}."

    @property
    def wiring(self) -> Wiring:
        """What its modules read and write.

        Raises:
            ArchitectureError: where widths cannot be cut.
        """
        if self.wired is None:
            known = ", ".join(cuttable())
            raise ArchitectureError(f"{self.name} models cannot be cut in width; known are {known}")
        return self.wired

    def silent_when_zeroed(self, config: Any) -> bool:
        """Whether a sublayer with a zeroed output map is the identity (not so with norms after the addition)."""
        return getattr(config, "do_layer_norm_before", True)

    def sizes_of(self, config: Any) -> Sizes:
        """The widths that a config says."""

        def said(size: str) -> int | None:
            return getattr(config, self.sizes.get(size, size), None)

        stream, heads = said("stream"), said("heads")
        assert stream is not None and heads is not None
        channels = said("channels") or 4 * stream  # as GPT-2 reads its n_inner
        return Sizes(stream, channels, heads, said("kv_heads") or heads, said("head_dim") or stream // heads)

    def fits(self, stream: int, heads: int, head_dim: int) -> bool:
        """Whether the config can say so many query heads of that size beside a stream of that width."""
        if "head_dim" not in self.sizes:
            return heads * head_dim == stream
        return not self.wiring.divides or stream % heads == 0


_LLAMA = Architecture(
    name="llama",
    sublayers=(
        Sublayer("attn", functions.llama_attn, ("self_attn", "input_layernorm"), "self_attn.o_proj"),
        Sublayer("mlp", functions.llama_mlp, ("mlp", "post_attention_layernorm"), "mlp.down_proj"),
    ),
    wired=Wiring(
        sublayers={
            "attn": (
                Part("input_layernorm", None, ("stream",)),
                Part("self_attn.q_proj", "stream", ("queries",)),
                Part("self_attn.k_proj", "stream", ("keys",)),
                Part("self_attn.v_proj", "stream", ("keys",)),
                Part("self_attn.o_proj", "queries", ("stream",)),
            ),
            "mlp": (
                Part("post_attention_layernorm", None, ("stream",)),
                Part("mlp.gate_proj", "stream", ("channels",)),
                Part("mlp.up_proj", "stream", ("channels",)),
                Part("mlp.down_proj", "channels", ("stream",)),
            ),
        },
        outside=(
            Part("model.embed_tokens", None, ("stream",)),
            Part("model.norm", None, ("stream",)),
            Part("lm_head", "stream", ()),
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

_TABLE = (
    replace(_LLAMA, wired=replace(_LLAMA.wiring, divides=True)),
    replace(_LLAMA, name="mistral"),
    replace(_LLAMA, name="qwen2"),
    replace(_LLAMA, name="qwen3", wired=replace(_LLAMA.wiring, shared_eps=True)),  # norms of queries and keys
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
        sizes={"layers": "n_layer", "stream": "n_embd", "channels": "n_inner", "heads": "n_head"},
        wired=Wiring(
            sublayers={
                "attn": (
                    Part("ln_1", None, ("stream",)),
                    Part("attn.c_attn", "stream", ("queries", "keys", "keys")),
                    Part("attn.c_proj", "queries", ("stream",)),
                ),
                "mlp": (
                    Part("ln_2", None, ("stream",)),
                    Part("mlp.c_fc", "stream", ("channels",)),
                    Part("mlp.c_proj", "channels", ("stream",)),
                ),
            },
            outside=(
                Part("transformer.wte", None, ("stream",)),
                Part("transformer.wpe", None, ("stream",)),
                Part("transformer.ln_f", None, ("stream",)),
                Part("lm_head", "stream", ()),
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
    ),
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
        stack="vision",
        causal=False,
    ),
)

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _TABLE}


def register_architecture(architecture: Architecture) -> None:
    """Add an architecture to the table at run time, for packages outside Lamella."""
    ARCHITECTURES[architecture.name] = architecture


def find_architecture(config: Any) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        ArchitectureError: when the table has no such ``model_type``; the message shows how to add it.
    """
    model_type = str(getattr(config, "model_type", None)).removeprefix("lamella_")  # as native exports are called
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise ArchitectureError(
        f"unknown architecture '{model_type}': known are {', '.join(sorted(ARCHITECTURES))}; to add it, call "
        f"lamella.stack.register_architecture(Architecture(name='{model_type}', sublayers=...)) "
        "(see the documentation page 'Models')"
    )


def cuttable() -> list[str]:
    """The architectures that can be cut in width."""
    return [name for name, each in ARCHITECTURES.items() if each.wired is not None]
