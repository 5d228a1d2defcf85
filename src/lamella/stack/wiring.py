"""The axes that the modules of a layer read and write, and their sizes: the data that surgery on weights needs.

    hidden --q_proj--> queries        hidden --gate_proj, up_proj--> channels --down_proj--> hidden
    hidden --k_proj, v_proj--> keys   queries --o_proj--> hidden

    channels --fc2--> branch --layer_scale--> hidden        if a vector scales what is added to the residual stream

A part that reads the residual stream reads it after the norm that precedes it in the list. If it reads the states of an
encoder, their axis is ``encoded``; what a vector scales before it is added is on the axis ``branch``; and what becomes
the residual stream only after a norm or another non-linear function is on the axis ``embedded``.

This module imports nothing else: native exports include its source verbatim.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A module, or a parameter by itself, whose tensors have known axes.

    Attributes:
        path: its path inside the layer or inside the model.
        reads: axis of its input, or None for an embedding, a constant or a norm on the residual stream, which are never
            removed.
        writes: axes of its output, in order; empty for the head, whose output is the vocabulary.
    """

    path: str
    reads: str | None
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Wiring:
    """The axes of the modules of one architecture.

    Attributes:
        sublayers: parts of every layer, by the sublayer that they belong to; those that read nothing are norms on the
            residual stream.
        outside: parts outside the layers: embeddings, final norm, head.
        attention: module of a layer that holds its heads; empty if heads and channels cannot be cut.
        grouped: whether there may be fewer key-value heads than query heads.
        centred: whether norms subtract the mean, so that removing a silent channel cannot be compensated.
        shared_eps: whether the config's epsilon also applies to norms that are not on the residual stream.
        divides: whether the config requires the hidden size to be a multiple of the query heads, though it has a head
            size.
        bent: whether the input of the first layer is computed by a non-linear function that is not a module.
    """

    sublayers: Mapping[str, tuple[Part, ...]]
    outside: tuple[Part, ...]
    attention: str = ""
    grouped: bool = True
    centred: bool = False
    shared_eps: bool = False
    divides: bool = False
    bent: bool = False

    @property
    def layer(self) -> tuple[Part, ...]:
        """The parts of a layer, in order."""
        return tuple(part for parts in self.sublayers.values() for part in parts)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a layer on the residual stream, in the order of its sublayers."""
        return tuple(part.path for part in self.layer if part.reads is None)


@dataclass(frozen=True)
class Sizes:
    """The widths of a model whose layers are all alike.

    Attributes:
        hidden: hidden size.
        channels: MLP intermediate size.
        heads: number of query heads.
        kv_heads: number of key-value heads.
        head_dim: size of a head.
    """

    hidden: int
    channels: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def axes(self) -> dict[str, int]:
        """The length of every axis."""
        heads = {"queries": self.heads * self.head_dim, "keys": self.kv_heads * self.head_dim}
        return {"hidden": self.hidden, "channels": self.channels, **heads}
