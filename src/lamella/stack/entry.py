"""What an entry of the architecture table says: where an architecture keeps its parts, and what they do, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from lamella.errors import ArchitectureError
from lamella.stack.sublayers import Parallel
from lamella.stack.wiring import Sizes, Wiring

Objective = Literal["next token", "masked tokens", "classes", "features"]

SIZES = {  # what configs call the sizes, if nothing else is said
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
        modules: the children of a layer that serve it alone.
        out: the linear map that writes its result to the stream, or the vector that scales it (zeroing it silences the
            sublayer); empty where the sublayer is derived, and the map found when it is wanted.
    """

    name: str
    run: Callable[[nn.Module, Any, dict[str, Any]], Tensor | Parallel]
    modules: tuple[str, ...]
    out: str = ""


@dataclass(frozen=True)
class DerivedCode:
    """Functions as text, with the module whose names they use: derived sublayers, which a native export carries.

    Attributes:
        text: their definitions.
        module: where the names in them come from.
        names: which of its names they use.
    """

    text: str
    module: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of an MLP.

    Attributes:
        router: the module of a layer that chooses among them.
        experts: the module that holds them all.
        count, used: what the config calls how many there are, and how many a token uses; the numbers themselves where
            they are derived.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    count: str | int = "num_experts"
    used: str | int = "num_experts_per_tok"

    def counts(self, config: Any) -> tuple[int, int]:
        """How many there are, and how many a token uses."""
        count, used = (each if isinstance(each, int) else getattr(config, each) for each in (self.count, self.used))
        return count, used


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: the ``model_type`` of its config.
        sublayers: of a layer, in their order.
        stack: what the stack is called in sites and paths: ``text``, ``vision``, ``encoder`` or ``decoder``.
        base: dotted path to the module that embeds, runs the layers and applies the final norm.
        layers: dotted path to the layer list inside ``base``.
        embedding, norm: dotted paths inside ``base``; no norm where what the layers give is final.
        head: dotted path to what reads the final states, such as the output projection; none where nothing does.
        readout: what the model predicts, ``readout(model, normed, head)``, where it is not the head alone.
        cache: the keyword under which a layer receives the key-value cache.
        causal: True for decoders.
        objective: what the model is trained to predict, from which loss, fidelity, sampler and speed test follow. Where
            it is ``masked tokens``, the config names the ``mask_token_id``.
        shifted: whether the logits at a position are those of the next one's token.
        modality: what its positions are: ``text``, ``image`` or ``audio``.
        images: what the config calls the token that stands for an image's positions, if there is one.
        mask: the input that says which positions are no padding; none where all are.
        config: the part of the model's config that is this stack's; empty for the whole.
        front: dotted path to the module that makes, of the model's inputs, what the layers read; ``base`` if left out.
        complete_call: adds what is missing to the keyword arguments that a layer receives; None if nothing is.
        result: turns hidden states into what a layer returns, for layers that return more than hidden states.
        irremovable: function of the config and the number of layers that returns the layers that a plain
            checkpoint cannot do without, with the reason; None if there are none.
        auto: the class of transformers that opens a checkpoint.
        sizes: what its config calls the sizes, by the names of :data:`SIZES`.
        experts: where its experts are, if it has any; of one that is derived, see :attr:`Stack.experts`.
        wired: what its modules read and write; None where no surgery knows it.
        sources: of one that is derived, the functions of its sublayers; empty for an entry of the table.
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
        """What its sublayers are called, in their order."""
        return tuple(each.name for each in self.sublayers)

    def __getitem__(self, sublayer: str) -> Sublayer:
        return next(each for each in self.sublayers if each.name == sublayer)

    @property
    def prefix(self) -> str:
        """What the parameter names of the layers begin with, such as ``model.layers.``."""
        return f"{self.base}.{self.layers}.".removeprefix(".")

    @property
    def cuttable(self) -> bool:
        """Whether its widths can be cut."""
        return self.wired is not None and bool(self.wired.attention)

    @property
    def wiring(self) -> Wiring:
        """What its modules read and write.

        Raises:
            ArchitectureError: where widths cannot be cut.
        """
        if self.wired is None or not self.cuttable:
            raise ArchitectureError(
                f"{self.name} models cannot be cut in width: their entry does not say how their heads lie"
            )
        return self.wired

    def silent_when_zeroed(self, config: Any) -> bool:
        """Whether a sublayer with a zeroed output map is the identity (not so with norms after the addition)."""
        return getattr(config, "do_layer_norm_before", True)

    def centred_before(self, config: Any) -> bool:
        """Whether its sublayers are known to read the stream through norms that subtract the mean, and only so."""
        return self.wired is not None and self.wired.centred and self.silent_when_zeroed(config)

    def sizes_of(self, config: Any) -> Sizes:
        """The widths that a config says."""

        def said(size: str) -> int | None:
            return getattr(config, self.sizes.get(size, size), None)

        hidden, heads = said("hidden"), said("heads")
        assert hidden is not None and heads is not None
        channels = said("channels") or 4 * hidden  # as GPT-2 reads its n_inner
        return Sizes(hidden, channels, heads, said("kv_heads") or heads, said("head_dim") or hidden // heads)

    def fits(self, hidden: int, heads: int, head_dim: int) -> bool:
        """Whether the config can say so many query heads of that size beside a stream of that width."""
        if "head_dim" not in self.sizes:
            return heads * head_dim == hidden
        return not self.wiring.divides or hidden % heads == 0


@dataclass(frozen=True)
class Slot:
    """A stack whose architecture a part of the model's config names.

    Attributes:
        config: that part.
        changes: how its entry differs inside this model.
        inside: dotted path to the module that holds that stack as a whole model, where there is one.
        stack: which one, of a part that has several.
    """

    config: str
    changes: Mapping[str, Any]
    inside: str = ""
    stack: str = ""


@dataclass(frozen=True)
class Assembly:
    """An architecture of several stacks.

    Attributes:
        name: the ``model_type`` of its config.
        stacks: their entries, or where to find them, in the order in which they run.
        auto: the class of transformers that opens a checkpoint.
    """

    name: str
    stacks: tuple[Architecture | Slot, ...]
    auto: str
