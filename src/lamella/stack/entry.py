"""The entries of the architecture table: the modules of an architecture and what they do, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from lamella.errors import ArchitectureError
from lamella.stack.sublayers import Parallel
from lamella.stack.wiring import Sizes, Wiring

Objective = Literal["next token", "masked tokens", "classes", "features"]

SIZES = {  # default names of the sizes in configs
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
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
        modules: children of a layer that only this sublayer uses.
        out: the linear layer that writes its result to the residual stream, or the vector that scales it (the sublayer
            is the identity if this is zero); empty for a derived sublayer, where it is found when needed.
    """

    name: str
    run: Callable[[nn.Module, Any, dict[str, Any]], Tensor | Parallel]
    modules: tuple[str, ...]
    out: str = ""


@dataclass(frozen=True)
class DerivedCode:
    """The source of derived sublayers, which native exports include.

    Attributes:
        text: definitions of the functions.
        module: module whose names they use.
        names: names of that module that they use.
    """

    text: str
    module: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of an MLP.

    Attributes:
        router: module of a layer that chooses the experts.
        experts: module that holds all experts.
        count: name of the config entry for the number of experts, or the number itself if it is derived.
        used: name of the config entry for the number of experts per token, or the number itself if it is derived.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    count: str | int = "num_experts"
    used: str | int = "num_experts_per_tok"

    def counts(self, config: Any) -> tuple[int, int]:
        """Return the number of experts, and the number of experts per token."""
        count, used = (each if isinstance(each, int) else getattr(config, each) for each in (self.count, self.used))
        return count, used


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: ``model_type`` of its config.
        sublayers: sublayers of a layer, in order.
        base: dotted path to the module that embeds, runs the layers and applies the final norm.
        layers: dotted path to the layer list inside ``base``.
        embedding: dotted path to the embedding inside ``base``.
        norm: dotted path to the final norm inside ``base``; empty if the last layer's output is final.
        head: dotted path to what reads the final states, such as the output projection; empty if nothing does.
        readout: computes the prediction, ``readout(model, normed, head)``, if it is more than applying the head.
        stack: name of the stack in sites and paths: ``text``, ``vision``, ``encoder`` or ``decoder``.
        cache: keyword under which a layer receives the key-value cache.
        causal: whether tokens attend to earlier tokens only; true for decoders.
        objective: what the model is trained to predict, which determines loss, fidelity, sampler and speed test. For
            ``masked tokens``, the config has a ``mask_token_id``.
        shifted: whether the logits at a position predict the next token.
        modality: the kind of its positions: ``text``, ``image`` or ``audio``.
        images: name of the config entry for the token at image positions, if there is one.
        mask: name of the input that marks padding; empty if there is no padding.
        config: name of the part of the model's config that belongs to this stack; empty for the whole config.
        front: dotted path to the module that computes the input of the layers from the model's inputs; ``base`` if
            None.
        complete_call: adds what is missing to the keyword arguments that a layer receives; None if nothing is.
        result: turns hidden states into what a layer returns, for layers that return more than hidden states.
        irremovable: function of the config and the number of layers that returns the layers that a plain checkpoint
            cannot do without, with the reason; None if there are none.
        auto: auto class of transformers that opens a checkpoint.
        sizes: names of the sizes in its config, by the keys of :data:`SIZES`.
        experts: its experts, if it has any; for a derived architecture, see :attr:`Stack.experts`.
        wired: the axes of its modules; None if it cannot be narrowed.
        sources: source of the sublayers of a derived architecture; empty for an entry of the table.
    """

    name: str
    sublayers: tuple[Sublayer, ...]
    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    readout: Callable[[Any, Tensor, Any], Tensor] | None = None
    stack: str = "text"
    cache: str = "cache"
    causal: bool = True
    objective: Objective = "next token"
    shifted: bool = True
    modality: str = "text"
    images: str = ""
    mask: str = "attention_mask"
    config: str = ""
    front: str | None = None
    complete_call: Callable[[nn.Module, Tensor, dict[str, Any]], dict[str, Any]] | None = None
    result: Callable[[Tensor, dict[str, Any]], Any] | None = None
    irremovable: Callable[[Any, int], Mapping[int, str]] | None = None
    auto: str = "AutoModelForCausalLM"
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)
    experts: Experts | None = None
    wired: Wiring | None = None
    sources: tuple[DerivedCode, ...] = ()

    @property
    def denoises(self) -> bool:
        """Whether the model predicts masked tokens."""
        return self.objective == "masked tokens"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its sublayers, in order."""
        return tuple(each.name for each in self.sublayers)

    def __getitem__(self, sublayer: str) -> Sublayer:
        return next(each for each in self.sublayers if each.name == sublayer)

    @property
    def prefix(self) -> str:
        """The prefix of the layers' parameter names, such as ``model.layers.``."""
        return f"{self.base}.{self.layers}.".removeprefix(".")

    @property
    def cuttable(self) -> bool:
        """Whether its widths can be cut."""
        return self.wired is not None and bool(self.wired.attention)

    @property
    def wiring(self) -> Wiring:
        """The axes of its modules.

        Raises:
            ArchitectureError: if widths cannot be cut.
        """
        if self.wired is None or not self.cuttable:
            raise ArchitectureError(
                f"{self.name} models cannot be cut in width: their entry has no wiring of the heads"
            )
        return self.wired

    def silent_when_zeroed(self, config: Any) -> bool:
        """Return whether a sublayer with a zeroed output projection is the identity.

        It is not if a norm follows the addition.
        """
        return getattr(config, "do_layer_norm_before", True)

    def centred_before(self, config: Any) -> bool:
        """Return whether its sublayers read the residual stream only through norms that subtract the mean."""
        return self.wired is not None and self.wired.centred and self.silent_when_zeroed(config)

    def sizes_of(self, config: Any) -> Sizes:
        """Return the widths in a config."""

        def entry(size: str) -> int | None:
            return getattr(config, self.sizes.get(size, size), None)

        hidden, heads = entry("hidden"), entry("heads")
        assert hidden is not None and heads is not None
        channels = entry("channels") or 4 * hidden  # like GPT-2 without n_inner
        return Sizes(hidden, channels, heads, entry("kv_heads") or heads, entry("head_dim") or hidden // heads)

    def fits(self, hidden: int, heads: int, head_dim: int) -> bool:
        """Return whether the config can express these sizes.

        Args:
            hidden: hidden size.
            heads: number of query heads.
            head_dim: size of a head.
        """
        if "head_dim" not in self.sizes:
            return heads * head_dim == hidden
        return not self.wiring.divides or hidden % heads == 0


@dataclass(frozen=True)
class Slot:
    """A stack whose architecture is given by a part of the model's config.

    Attributes:
        config: name of that part.
        changes: fields of its entry that differ inside this model.
        inside: dotted path to the module that holds that stack as a complete model, if there is one.
        stack: name of the stack, for a part that has several.
    """

    config: str
    changes: Mapping[str, Any]
    inside: str = ""
    stack: str = ""


@dataclass(frozen=True)
class Assembly:
    """An architecture of several stacks.

    Attributes:
        name: ``model_type`` of its config.
        stacks: their entries, or where to find them, in the order in which they run.
        auto: auto class of transformers that opens a checkpoint.
    """

    name: str
    stacks: tuple[Architecture | Slot, ...]
    auto: str
